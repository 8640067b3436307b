"""Which conditions follow from what the workers report about their models."""

import re
from pathlib import Path

import msgspec

from edged.runtime.health import CPU_UNUSED, GPU_MISSING, MODEL_NOT_LOCKED, Health
from edged.serving.findings import Findings, findings
from edged.workers.protocol import Ready, WorkerSettings

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
CHAT = WorkerSettings(kind="chat", model="chat.gguf", threads=2)
EMBED = WorkerSettings(kind="embed", model="embed.gguf", threads=1)
READY = Ready(
    pid=1,
    description="model",
    context_tokens=512,
    dimensions=384,
    system="CPU : AVX2 = 1 | FMA = 1 | F16C = 1 | ",
    model_bytes=97_000_000,
)
FLAGS = frozenset({"avx2", "fma", "f16c"})


def with_(ready: Ready = READY, **changes: object) -> Ready:
    return msgspec.structs.replace(ready, **changes)


def settings(base: WorkerSettings = CHAT, **changes: object) -> WorkerSettings:
    return msgspec.structs.replace(base, **changes)


def test_models_that_are_as_asked_for_are_no_finding() -> None:
    locked = settings(EMBED, load_mode="mlock", gpu_layers=-1)
    ready = with_(gpu=True, locked_bytes=4096)
    assert dict(findings({"chat": (CHAT, READY), "embed": (locked, ready)}, FLAGS)) == {}


def test_gpu_layers_without_a_gpu_build_are_a_condition_that_names_the_workers() -> None:
    found = dict(findings({"chat": (settings(gpu_layers=-1), READY), "embed": (EMBED, READY)}, FLAGS))
    assert list(found) == [GPU_MISSING]
    assert "the CPU computes chat" in found[GPU_MISSING]


def test_weights_that_are_locked_in_part_are_a_condition_that_says_how_much() -> None:
    asked = settings(load_mode="mlock")
    assert dict(findings({"chat": (asked, with_(locked_bytes=97_000_000))}, FLAGS)) == {}
    found = dict(findings({"chat": (asked, with_(locked_bytes=8_000_000))}, FLAGS))
    assert found == {MODEL_NOT_LOCKED: "8 of 97 MB of the chat model are locked in memory"}


def test_features_of_the_cpu_that_the_build_leaves_out_are_a_condition_that_names_them() -> None:
    ready = with_(system="CPU : AVX2 = 1 | ")
    found = dict(findings({"chat": (CHAT, ready), "embed": (EMBED, ready)}, FLAGS))
    assert found == {CPU_UNUSED: "llama.cpp was built without FMA, F16C, which this CPU has"}


def test_the_advice_to_compile_names_the_version_that_edged_is_made_for() -> None:
    pinned = re.search(r"llama-cpp-python==[\d.]+", PYPROJECT.read_text())
    assert pinned is not None
    assert f" {pinned[0]} " in CPU_UNUSED.hint


def test_a_condition_is_cleared_when_a_later_process_reports_better() -> None:
    health = Health()
    seen = Findings(health, FLAGS)
    asked = settings(load_mode="mlock")
    seen.loaded(asked, READY)
    seen.loaded(EMBED, READY)
    assert health.holds(MODEL_NOT_LOCKED)
    seen.loaded(asked, with_(locked_bytes=97_000_000))
    assert not health.holds(MODEL_NOT_LOCKED)
