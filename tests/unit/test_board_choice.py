"""Which emulated boards a run tests on follows from the machine and the time that is left."""

import dataclasses
from typing import Any

import pytest

from tests.device.choice import (
    COMPILING_WHEEL,
    DISK_BYTES,
    INSTALLING,
    MAKING_IMAGE,
    MEMORY_BYTES,
    ONE_TEST,
    Facts,
    minutes_needed,
    obstacle,
)

ENOUGH = Facts(
    is_root=True,
    cores=2,
    disk_bytes=DISK_BYTES,
    memory_bytes=MEMORY_BYTES,
    images=frozenset({"amd64"}),
    wheels=frozenset({"amd64"}),
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"is_root": False}, None),
        ({"is_root": False, "images": frozenset()}, "making the amd64 board's image needs root"),
        ({"cores": 1}, "a board needs 2 cores, and there are 1"),
        ({"disk_bytes": DISK_BYTES - 1}, "a board needs 12 GB of free disk, and there are 11"),
        ({"memory_bytes": 0}, "a board needs 3 GB of memory, and there are 0"),
    ],
)
def test_a_board_is_refused_with_what_the_machine_lacks(change: dict[str, Any], reason: str | None) -> None:
    assert obstacle("amd64", dataclasses.replace(ENOUGH, **change)) == reason


def test_the_first_test_on_a_board_waits_for_all_that_is_made_before_it() -> None:
    assert minutes_needed("amd64", ENOUGH, {"amd64"}) == ONE_TEST["amd64"]
    assert minutes_needed("amd64", ENOUGH, {"arm64"}) == ONE_TEST["amd64"] + INSTALLING["amd64"]
    assert minutes_needed("amd64", ENOUGH, {"amd64"}, preparing=10.0) == ONE_TEST["amd64"] + 10.0
    assert minutes_needed("amd64", ENOUGH, {"amd64"}, itself=8.0) == 8.0
    bare = ONE_TEST["arm64"] + INSTALLING["arm64"] + MAKING_IMAGE["arm64"] + COMPILING_WHEEL
    assert minutes_needed("arm64", ENOUGH, ()) == bare
