"""An eight-bit copy of the default model by llama.cpp, and a daemon that computes with it."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import httpx
import msgspec
import numpy as np
import pytest

from edged.config import Chat, Config
from edged.daemon import running
from edged.engine.llama import quiet
from edged.engine.widen import compare, widen
from edged.models.catalog import Catalog
from edged.models.gguf import read_header
from edged.models.wide import Copies, unsuitable
from edged.serving import widening
from edged.types import TokenSeconds, Trial
from edged.workers.process import WorkerProcess
from edged.workers.protocol import WorkerSettings
from tests.daemon_process import configure

pytestmark = [pytest.mark.models, pytest.mark.timeout(300)]

FASTER = Trial(file=TokenSeconds(prompt=2, answer=2), copy=TokenSeconds(prompt=1, answer=1))
Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def file(models_home: Path) -> Path:
    return Catalog(models_home / "models", models_home / "cache").path(Config().chat.model)


@pytest.fixture(scope="module")
def copy(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet()
    copy = tmp_path_factory.mktemp("wide") / "copy.gguf"
    widen(file, copy, 2)
    return copy


def test_the_default_model_suits(file: Path) -> None:
    assert unsuitable(read_header(file), memory_bytes=1 << 30, available_bytes=1 << 29) == ""


def test_the_copy_holds_the_values_of_the_file(file: Path, copy: Path) -> None:
    narrow, wide = ({each.name: each for each in gguf.GGUFReader(path).tensors} for path in (file, copy))
    assert narrow.keys() == wide.keys()
    quantised = [name for name, tensor in narrow.items() if tensor.tensor_type == Q4_1]
    assert quantised and all(wide[name].tensor_type == Q8_0 for name in quantised)
    for name in quantised[:8]:
        before = gguf.quants.dequantize(narrow[name].data, Q4_1).reshape(-1, 32)
        after = gguf.quants.dequantize(wide[name].data, Q8_0).reshape(-1, 32)
        largest = np.abs(before).max(axis=1, keepdims=True)
        assert np.all(np.abs(after - before) <= largest / 220)


def test_what_is_not_a_tensor_is_the_same(file: Path, copy: Path) -> None:
    before, after = read_header(file), read_header(copy)
    assert after.quantisation == "Q8_0"
    assert (after.chat_template, after.eos_token, after.vocabulary_size) == (
        before.chat_template,
        before.eos_token,
        before.vocabulary_size,
    )


def test_both_are_tried(file: Path, copy: Path) -> None:
    trial = compare(file, copy, 2)
    assert min(*msgspec.structs.astuple(trial.file), *msgspec.structs.astuple(trial.copy)) > 0


def test_a_copy_is_made_once_and_not_where_it_would_not_be_used(file: Path, tmp_path: Path) -> None:
    config = Config(home=tmp_path)
    identity = f"m@{'0' * 16}"
    for unused in (Chat(widen=False), Chat(gpu_layers=1)):
        assert widening.widen_once(Config(home=tmp_path, chat=unused), identity, file) is None
    copied = widening.widen_once(config, identity, file)
    assert copied is not None
    assert (Copies(config.wide_dir).find(identity) is not None) is copied.kept
    assert widening.widen_once(config, identity, file) is None


@pytest.mark.parametrize("content", [None, b"GGUF, but for the rest"])
async def test_a_worker_whose_copy_is_gone_or_broken_loads_the_model_itself(
    tmp_path: Path, file: Path, content: bytes | None
) -> None:
    broken = tmp_path / "copy.gguf"
    if content is not None:
        broken.write_bytes(content)
    settings = WorkerSettings(kind="chat", model=str(file), copy=str(broken), threads=1, context_tokens=512)
    worker = await WorkerProcess.start(settings, tmp_path / "worker.sock")
    try:
        assert worker.ready.description.endswith("Q4_1")
    finally:
        await worker.end()


@pytest.fixture
def home(tmp_path: Path, copy: Path, link_models: Callable[[Path], None]) -> Path:
    """Of a device that found the copy faster."""
    home = tmp_path / "home"
    link_models(home)
    config = configure(home, {}, fake=False)
    catalog = Catalog(config.models_dir, tmp_path / "cache")
    identity, file = catalog.identity(config.chat.model), catalog.path(config.chat.model)
    said = msgspec.json.encode(FASTER).decode()
    script = f"import shutil, sys; shutil.copy({str(copy)!r}, sys.argv[2]); print({said!r})"
    Copies(config.wide_dir).make(identity, file, 2, {}, (sys.executable, "-c", script))
    return home


@pytest.mark.parametrize(("widen", "weights"), [(True, "Q8_0"), (False, "Q4_1")])
async def test_a_daemon_computes_with_a_copy_and_calls_the_model_by_its_name(
    home: Path, widen: bool, weights: str
) -> None:
    served = await _chat(configure(home, {"mqtt.enabled": False, "chat.widen": widen}, fake=False))
    assert served["model"].startswith("smollm2-135m-instruct@b179c9523d0e6a0f")
    assert served["description"].endswith(weights)


async def _chat(config: Config) -> dict[str, Any]:
    """What ``/health`` says of the chat worker, once its model is loaded."""
    async with (
        running(config) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False, timeout=120) as http,
        asyncio.timeout(120),
    ):
        while True:
            chat: dict[str, Any] = (await http.get("/health")).json()["chat"]
            if chat["state"] == "ready":
                return chat
