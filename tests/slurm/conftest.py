"""One Slurm cluster for all tests of this folder, without jobs at the start of each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, unavailable


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
