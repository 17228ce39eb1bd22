"""What a backup site can run its night on: nobody urgent waits long, nobody starves, nothing stands idle."""

import asyncio

import pytest

from simulation.clock import Deadlock, run
from simulation.night import JOBS, Night, night
from simulation.plot import plot


@pytest.fixture(scope="module", params=[1, 2, 3])
def found(request: pytest.FixtureRequest) -> Night:
    return night(request.param)


def test_every_job_is_served(found: Night) -> None:
    assert len(found.jobs) == JOBS
    assert {job.outcome for job in found.jobs} == {"ENDED"}


def test_no_restore_waits_for_longer_than_ten_minutes(found: Night) -> None:
    assert found.longest("restore") <= 600


def test_devices_that_somebody_waits_for_are_used(found: Night) -> None:
    assert found.utilisation >= 0.8
    assert max(found.waiting) >= 10, "there is more to be done at times than can be"


def test_devices_are_moved_little(found: Night) -> None:
    assert 0.1 <= found.transfers / JOBS <= 1.2
    assert found.takeovers > 0, "controllers died"


def test_a_night_is_the_same_each_time() -> None:
    once, again = night(9), night(9)
    assert once == again
    assert plot(once) == plot(again)


def test_who_waits_for_nothing_is_told_so() -> None:
    with pytest.raises(Deadlock):
        run(_for_ever())


async def _for_ever() -> None:
    await asyncio.Event().wait()
