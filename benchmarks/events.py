"""What edged adds to an event: publish to answer over a real broker, with a worker that answers at once.

Broker, daemon and sensor are processes of their own. The sensor publishes by a fixed schedule and never waits for an
answer. ``added`` is the latency less the model's part, ``timings.total_ms`` of the answer: accepting durably, closing
durably, four passages through sockets. The flush of the disk under both databases is measured beside it.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.broker import Mosquitto
from tests.daemon_process import DaemonProcess
from tests.ports import find_free_port

SCHEDULES = ((50, 20.0), (200, 10.0))
WARM_UP = (20, 2.0)
REQUIRED_P99_MS = {50: 15.0}
FLUSHES = 300
PATIENCE_SECONDS = 20.0
MANUAL = "The relief valve of pump P7 opens at 12 bar.\n\nThe pump P7 holds 4 litres of oil."
QUESTION = "How much oil does pump P7 hold?"
# The tests' broker logs every packet. Without set_tcp_nodelay mosquitto holds small packets back until the receiver's
# kernel acknowledges the one before, up to 40 ms: that is the broker's setting, and no client can change it.
BROKER_OPTIONS = "allow_anonymous true\nlog_type none\nlog_type information\nset_tcp_nodelay true"


class Latency(msgspec.Struct, frozen=True):
    """One event, milliseconds: publish to answer, and the model's part of it."""

    whole_ms: float
    model_ms: float


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one schedule. Milliseconds."""

    events_per_second: int
    events: int
    figure: str
    p50: float
    p90: float
    p99: float
    max: float


class Sensor:
    """Publishes questions by a schedule and notes when each answer arrives. Runs in a process of its own."""

    def __init__(self, port: int) -> None:
        self._sent: dict[str, float] = {}
        self._latencies: dict[str, Latency] = {}
        self._subscribed = threading.Event()
        self._complete = threading.Event()
        self._expected = 0
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="sensor", protocol=MQTTProtocolVersion.MQTTv5
        )
        client.on_connect = lambda client, *_: client.subscribe("edged/answer/#", 1)
        client.on_subscribe = lambda *_: self._subscribed.set()
        client.on_message = self._answered
        client.on_socket_open = _send_at_once
        client.max_inflight_messages_set(0)
        client.connect("127.0.0.1", port, clean_start=True)

    def publish(self, rate: int, seconds: float, name: str) -> list[Latency]:
        """All latencies of one schedule. Raises ``TimeoutError`` when answers are missing."""
        self._expected = int(rate * seconds)
        self._client.loop_start()
        try:
            if not self._subscribed.wait(PATIENCE_SECONDS):
                raise TimeoutError("the broker did not take the subscription")
            self._follow_schedule(rate, name)
            if not self._complete.wait(PATIENCE_SECONDS):
                raise TimeoutError(f"{len(self._latencies)} of {self._expected} events were answered")
        finally:
            self._client.disconnect()
            self._client.loop_stop()
        return list(self._latencies.values())

    def _follow_schedule(self, rate: int, name: str) -> None:
        started = time.monotonic()
        for number in range(self._expected):
            time.sleep(max(0.0, started + number / rate - time.monotonic()))
            identity = f"{name}-{number}"
            body = json.dumps({"id": identity, "query": QUESTION})
            self._sent[identity] = time.monotonic()
            self._client.publish("edged/query", body, qos=1)

    def _answered(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        now = time.monotonic()
        body: dict[str, Any] = json.loads(message.payload)
        if "timings" not in body:
            raise RuntimeError(f"an event was not answered: {body}")
        whole_ms = (now - self._sent[body["id"]]) * 1e3
        self._latencies.setdefault(body["id"], Latency(whole_ms, body["timings"]["total_ms"]))
        if len(self._latencies) == self._expected:
            self._complete.set()


def _send_at_once(_client: paho.Client, _data: object, connection: Any) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def sense(port: int, rate: int, seconds: float, name: str) -> list[Latency]:
    """One schedule, from a process of its own."""
    return Sensor(port).publish(rate, seconds, name)


def flushes(folder: Path) -> list[float]:
    """Times of a 4 KiB append and its fdatasync, milliseconds: what one commit of a write-ahead log costs at least."""
    times = []
    page = bytes(4096)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(FLUSHES):
            started = time.perf_counter()
            file.write(page)
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - started) * 1e3)
    return times


def row(rate: int, figure: str, values: Sequence[float]) -> Row:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return Row(
        events_per_second=rate,
        events=len(values),
        figure=figure,
        p50=round(cuts[49], 2),
        p90=round(cuts[89], 2),
        p99=round(cuts[98], 2),
        max=round(max(values), 2),
    )


def rows_of(rate: int, latencies: Sequence[Latency]) -> list[Row]:
    return [
        row(rate, "whole", [each.whole_ms for each in latencies]),
        row(rate, "model", [each.model_ms for each in latencies]),
        row(rate, "added", [each.whole_ms - each.model_ms for each in latencies]),
    ]


def run(folder: Path) -> tuple[list[Row], list[float]]:
    """Start everything in ``folder``, follow each schedule, end everything."""
    times = flushes(folder)
    broker = Mosquitto(folder, find_free_port(), BROKER_OPTIONS)
    daemon = DaemonProcess(folder / "home", {"mqtt.url": broker.url, "log.level": "warning"})
    broker.start()
    try:
        daemon.start()
        url = f"http://127.0.0.1:{daemon.port}/v1/documents"
        httpx.post(url, json={"id": "p7", "text": MANUAL}, trust_env=False).raise_for_status()
        return [each for rate, latencies in _follow(broker.port) for each in rows_of(rate, latencies)], times
    finally:
        daemon.stop()
        broker.stop()


def _follow(port: int) -> list[tuple[int, list[Latency]]]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(sense, port, *WARM_UP, "warm-up").result()
        return [
            (rate, process.submit(sense, port, rate, seconds, f"at-{rate}").result()) for rate, seconds in SCHEDULES
        ]


def table(rows: Sequence[Row]) -> str:
    """Plain text with aligned columns."""
    lines = [f"{'events/s':>8} {'events':>7} {'ms':<6} {'p50':>7} {'p90':>7} {'p99':>7} {'max':>7}"]
    lines += [
        f"{each.events_per_second:>8} {each.events:>7} {each.figure:<6}"
        f" {each.p50:>7.2f} {each.p90:>7.2f} {each.p99:>7.2f} {each.max:>7.2f}"
        for each in rows
    ]
    return "\n".join(lines)


def requirements(rows: Sequence[Row]) -> list[str]:
    """What must hold, and whether it does."""
    found = {each.events_per_second: each.p99 for each in rows if each.figure == "whole"}
    return [
        f"p99 at {rate}/s at most {most:g} ms: {'yes' if found[rate] <= most else 'NO'} ({found[rate]:.2f})"
        for rate, most in REQUIRED_P99_MS.items()
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--folder", type=Path, help="a folder on the disk to measure; the temporary one if not given"
    )
    arguments.add_argument("--json", type=Path, help="write every figure to this file")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="edged-events-", dir=given.folder) as folder:
        Path(folder).chmod(0o755)
        rows, times = run(Path(folder))
    disk = row(0, "flush", times)
    print(table(rows))
    print(f"flush of 4 KiB in the same folder: p50 {disk.p50:.2f} ms, p99 {disk.p99:.2f} ms, max {disk.max:.2f} ms")
    print("\n".join(requirements(rows)))
    if given.json is not None:
        body = {"rows": msgspec.to_builtins(rows), "flush": msgspec.to_builtins(disk)}
        given.json.write_text(json.dumps(body, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
