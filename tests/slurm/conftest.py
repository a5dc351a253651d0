"""One Slurm cluster for all tests of this folder, without jobs at the start of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, unavailable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("slurm"))  # one cluster, which one worker keeps


# Not for the whole session: tests elsewhere check that they leave no process behind.
@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    if reason := unavailable():
        pytest.skip(reason)
    with Cluster() as running:
        yield running


@pytest.fixture(autouse=True)
def without_jobs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave no job of a test to the next one."""
    yield
    if "cluster" in request.fixturenames:
        running: Cluster = request.getfixturevalue("cluster")
        running.cancel_all()
