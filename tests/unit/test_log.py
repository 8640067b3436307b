"""A log line that cannot be written is lost; what logged it goes on."""

import contextlib
import sys
from pathlib import Path

import pytest

from edged.log import Stderr


def test_without_room_or_a_stream_a_line_is_lost_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.suppress(OSError), Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        for _ in range(2):
            Stderr().write("no room\n")
            Stderr().flush()
    assert full.closed
    Stderr().write("closed\n")
    Stderr().flush()


def test_other_lines_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    Stderr().write("told\n")
    assert capsys.readouterr().err == "told\n"
