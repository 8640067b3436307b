"""Check of the probe: how well the workers are measured, as the probe itself says, and what is in the way of better."""

import os
import socket
import time
from pathlib import Path
from typing import Final

import msgspec

from edged.doctor.device import Device
from edged.doctor.finding import Finding, ok, skip, warn
from edged.errors import ProbeError
from edged.probe.protocol import Watch, decode_sample, encode
from edged.probe.sample import Sample, Step, Watched
from edged.probe.sampler import COMPILING, survey
from edged.workers.protocol import FrameBuffer, FrameError

PATIENCE_SECONDS: Final = 7.0
"""For a probe that has just begun to compile its programs."""


class Probe(msgspec.Struct, frozen=True):
    """``sample`` is the probe's; without one, ``problem`` says why, and ``alone`` how edged measures by itself."""

    enabled: bool
    sample: Sample | None = None
    problem: str = ""
    alone: Step = Step.COUNTERS


def read_probe(device: Device) -> Probe:
    settings = device.config.probe
    if not settings.enabled:
        return Probe(enabled=False)
    alone = Step.PROCFS if Step.COUNTERS in survey() else Step.COUNTERS
    try:
        return Probe(True, _ask(settings.socket), alone=alone)
    except (OSError, EOFError, FrameError, ProbeError) as error:
        return Probe(True, problem=str(error), alone=alone)


def judge_probe(facts: Probe) -> Finding:
    if not facts.enabled:
        return skip("probe.enabled is false: nothing is measured")
    if facts.sample is None:
        what = f"no probe answers ({facts.problem}): edged measures by {facts.alone} alone, with its own rights"
        return warn(what, "sudo systemctl enable --now edged-probe")
    if facts.sample.step is Step.EBPF:
        return ok("it counts every event, by eBPF")
    what = f"it measures by {facts.sample.step} alone: {facts.sample.reason}"
    if facts.sample.reason == COMPILING:
        return warn(what, "wait, and run this again")
    return warn(what, "mend what it says, or what 'tracing' says; journalctl -u edged-probe")


def _ask(path: Path) -> Sample:
    """The first sample that is final: not one from while the programs are still being compiled."""
    until = time.monotonic() + PATIENCE_SECONDS
    frames = FrameBuffer()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(str(path))
        connection.sendall(encode(Watch((Watched(name="doctor", pid=os.getpid()),))))
        while True:
            data = connection.recv(1 << 16)
            if not data:
                raise EOFError("it ended the connection")
            for payload in frames.feed(data):
                sample = decode_sample(payload)
                if sample.reason != COMPILING or time.monotonic() > until:
                    return sample
