"""What ``/health`` says from the moment the board is switched on: never better than it is."""

import json
from typing import Any

import pytest

from tests.broker import Mosquitto
from tests.device.board import Board
from tests.device.installed import READY_SECONDS, wait_until, wait_until_ready

pytestmark = pytest.mark.timeout(5400)

WATCHER = """
import http.client, json, time

def ask(path):
    connection = http.client.HTTPConnection('127.0.0.1', 3000, timeout=30)
    try:
        connection.request('GET', path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (OSError, http.client.HTTPException):
        return None, {}
    finally:
        connection.close()

before = None
with open('/root/seen', 'w') as seen:
    while True:
        status, body = ask('/health')
        codes = [held['code'] for held in body.get('conditions', []) if held['severity'] != 'info']
        now = {'http': status, 'status': body.get('status'), 'codes': codes, 'model_loaded': body.get('model_loaded'),
               'chat': body.get('chat', {}).get('state'), 'embed': body.get('embed', {}).get('state')}
        if now != before:
            before = now
            print(json.dumps({**now, 'at': time.monotonic()}), file=seen, flush=True)
        time.sleep(0.1)
"""
UNIT = """
[Unit]
Before=edged.service
[Service]
ExecStart=/usr/bin/python3 /root/watcher.py
[Install]
WantedBy=multi-user.target
"""


def seen(board: Board) -> list[dict[str, Any]]:
    return [json.loads(line) for line in board.run("cat /root/seen").splitlines()]


def test_health_is_never_better_than_it_is_from_power_on_until_all_serves(
    installed_board: Board, broker: Mosquitto
) -> None:
    """First nobody answers, then it fails as it starts, then it serves without its broker, then all is well."""
    board = installed_board
    board.run("cat > /root/watcher.py", stdin=WATCHER)
    board.run("cat > /etc/systemd/system/watcher.service && systemctl enable watcher && sync", stdin=UNIT)
    broker.stop()
    try:
        board.shut_down()
        board.boot()
        wait_until_ready(board)
        wait_until(board, "grep -q mqtt_disconnected /root/seen")
        assert board.run("systemctl show --property StatusText --value edged").startswith("degraded")
    finally:
        broker.start()
    wait_until(board, "tail -n 1 /root/seen | grep -qv mqtt_disconnected")
    board.run("systemctl stop edged", timeout_seconds=READY_SECONDS)
    stages = seen(board)
    expect_honest(stages)
    kinds = [kind(stage) for stage in stages]
    assert [each for n, each in enumerate(kinds) if n == 0 or kinds[n - 1] != each][:4] == [
        "nobody answers",
        "starting",
        "without its broker",
        "well",
    ]


def kind(stage: dict[str, Any]) -> str:
    """What a stage is, for the order in which they come."""
    if stage["http"] is None:
        return "nobody answers"
    for code, name in (("stopping", "stopping"), ("starting", "starting"), ("mqtt_disconnected", "without its broker")):
        if code in stage["codes"]:
            return name
    return "well"


def expect_honest(stages: list[dict[str, Any]]) -> None:
    """Of each stage: its status follows from its conditions, and nothing is ready that is not."""
    for stage in stages:
        if stage["http"] is None:
            continue
        failing = {"starting", "stopping"} & set(stage["codes"])
        assert stage["http"] == (503 if failing else 200), stage
        assert stage["status"] == ("failing" if failing else "degraded" if stage["codes"] else "ok"), stage
        assert stage["model_loaded"] == (stage["chat"] == "ready"), stage
        if not failing:
            assert (stage["chat"], stage["embed"]) == ("ready", "ready"), stage
