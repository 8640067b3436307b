"""The demo as a newcomer and a program see it: a broker, a daemon, real models, three events."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.models, pytest.mark.timeout(600)]

DEMO_SECONDS = 250.0


@contextlib.contextmanager
def demo(home: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EDGED_")}
    process = subprocess.Popen(
        # as a terminal starts it: in the background of a shell Ctrl-C is ignored, and children inherit that
        ["env", "--default-signal=INT", sys.executable, "-m", "edged.cli", "demo", *options],
        env={**environment, "EDGED_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()


def output(home: Path, *options: str) -> str:
    """Run it to its end; returns stdout."""
    with demo(home, *options) as process:
        said, complained = process.communicate(timeout=DEMO_SECONDS)
    assert process.returncode == 0, complained
    return said


def test_the_demo_shows_three_answers_and_a_second_run_is_one_json_document_of_the_same(
    tmp_path: Path, link_models: Callable[[Path], None]
) -> None:
    link_models(tmp_path)
    first = output(tmp_path)
    assert [first.count(mark) for mark in ("\n? ", "  [1] ", "first token ", "from sensor to sensor ")] == [3, 3, 3, 3]
    again = json.loads(output(tmp_path, "--json"))
    assert any("unchanged" in step for step in again["steps"])
    assert len(again["events"]) == 3
    for event in again["events"]:
        assert event["question"] in first
        assert event["streamed"]
        assert event["answer"]["citations"]
        assert event["round_trip_ms"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_demo_told_to_end_takes_its_daemon_and_broker_along(
    tmp_path: Path, link_models: Callable[[Path], None], number: signal.Signals
) -> None:
    link_models(tmp_path)
    with demo(tmp_path) as process:
        assert process.stdout is not None
        while "edged ready" not in process.stdout.readline():
            pass
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        status = process.wait(timeout=DEMO_SECONDS)
    assert len(children) >= 4  # broker, daemon, two workers
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert status != 0
