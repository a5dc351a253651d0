"""Who a process is, read from the environment."""

from __future__ import annotations

import pytest

from ddpkit.errors import UserError
from ddpkit.world import World, thread_and_network_defaults

RANK_3 = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "h0",
    "MASTER_PORT": "1234",
}


def test_no_launcher_is_a_world_of_one() -> None:
    for env in ({}, {"LOCAL_RANK": "5", "MASTER_PORT": "x"}):
        assert World.from_env(env) == World(0, 1, 0, 1)


def test_the_standard_variables() -> None:
    world = World.from_env(RANK_3)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (3, 4, 1, 2)
    assert (world.nnodes, world.node_rank, world.is_main) == (2, 1, False)
    assert (world.master_addr, world.master_port, world.agent_store) == ("h0", 1234, False)


def test_hand_set_variables_need_no_local_ones() -> None:
    world = World.from_env({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"})
    assert (world.local_rank, world.local_world_size, world.nnodes) == (1, 2, 1)
    assert World.from_env({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1  # nobody to meet


def test_what_is_written_is_read_back() -> None:
    world = World(3, 4, 1, 2, "127.0.0.1", 5, agent_store=True, restart_count=2)
    again = World.from_env(world.to_env())
    assert again == World(3, 4, 1, 2, "127.0.0.1", 5, True, 2, source=again.source)
    assert World.from_env(World().to_env()).world_size == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": None}, r"sets RANK=3 but not WORLD_SIZE.*Unset RANK"),
        ({"RANK": None}, r"sets WORLD_SIZE=4 but not RANK"),
        ({"RANK": "x"}, r"RANK='x' in the environment is not a whole number"),
        ({"RANK": ""}, r"RANK=''"),
        ({"WORLD_SIZE": "4.0"}, r"WORLD_SIZE='4.0'"),
        ({"RANK": "-1"}, r"RANK='-1'"),
        ({"RANK": "4"}, r"RANK=4 is not within WORLD_SIZE=4"),
        ({"WORLD_SIZE": "0"}, r"RANK=3 is not within WORLD_SIZE=0"),
        ({"LOCAL_RANK": "2"}, r"LOCAL_RANK=2 is not within LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "0"}, r"LOCAL_WORLD_SIZE=0"),
        ({"LOCAL_WORLD_SIZE": "3"}, r"WORLD_SIZE=4 is not a multiple of LOCAL_WORLD_SIZE=3"),
        ({"MASTER_ADDR": None}, r"WORLD_SIZE=4 needs MASTER_ADDR"),
        ({"MASTER_PORT": None}, r"WORLD_SIZE=4 needs MASTER_PORT"),
        ({"MASTER_PORT": "http"}, r"MASTER_PORT='http'"),
        ({"MASTER_PORT": "0"}, r"MASTER_PORT=0 is no port"),
        ({"MASTER_PORT": "65536"}, r"MASTER_PORT=65536 is no port"),
    ],
)
def test_half_set_and_contradicting_variables_are_named(changes: dict[str, str | None], words: str) -> None:
    env = {name: value for name, value in (RANK_3 | changes).items() if value is not None}
    with pytest.raises(UserError, match=words):
        World.from_env(env)


def test_defaults_leave_what_the_user_has_set() -> None:
    assert thread_and_network_defaults({}, 3, 8) == {
        "OMP_NUM_THREADS": "2",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    assert thread_and_network_defaults({}, 8, 2)["OMP_NUM_THREADS"] == "1"
    chosen = {"OMP_NUM_THREADS": "9", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": ""}
    assert thread_and_network_defaults(chosen, 3, 8) == {}
