"""The engine on a GPU, where llama.cpp was built for one that is here; skipped elsewhere."""

import contextlib
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from edged.config import Config
from edged.models.catalog import Catalog
from edged.types import Segment
from edged.workers.process import WorkerProcess
from edged.workers.protocol import Embed, Finished, Generate, Piece, Ready, Vectors, WorkerSettings
from edged.workers.worker import FloatArray

pytestmark = [
    pytest.mark.models,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not llama_cpp.llama_supports_gpu_offload(),
        reason="llama.cpp was not built for a GPU, or there is none here",
    ),
]

ALL = -1
PROMPT = (
    "The relief valve of pump P7 opens at 12 bar. At how many bar does the relief valve of pump P7 open? It opens at"
)
TEXTS = ("The relief valve opens at 12 bar.", "Sugar beets are harvested in autumn.")


@pytest.fixture
def settings(models_home: Path) -> Callable[..., WorkerSettings]:
    """``settings(kind, gpu_layers)`` of a worker for the default model of that kind."""
    defaults = Config()
    catalog = Catalog(models_home / "models", defaults.models_cache_dir)
    names = {"chat": defaults.chat.model, "embed": defaults.embed.model}

    def make(kind: str, gpu_layers: int) -> WorkerSettings:
        model = str(catalog.path(names[kind]))
        return WorkerSettings(
            kind="chat" if kind == "chat" else "embed",
            model=model,
            threads=1,
            context_tokens=1024,
            sequences=2,
            gpu_layers=gpu_layers,
        )

    return make


@contextlib.asynccontextmanager
async def serving(settings: WorkerSettings, folder: Path) -> AsyncIterator[WorkerProcess]:
    process = await WorkerProcess.start(settings, folder / "w.sock")
    try:
        yield process
    finally:
        await process.end()


async def continued(process: WorkerProcess) -> str:
    process.send(Generate(id=1, prompt=(Segment(PROMPT),), max_tokens=8))
    text = ""
    async with contextlib.aclosing(process.replies()) as replies:
        async for reply in replies:
            match reply:
                case Piece():
                    text += reply.text
                case Finished():
                    return text
    raise AssertionError("the worker hung up")


async def embedded(process: WorkerProcess) -> FloatArray:
    process.send(Embed(1, TEXTS))
    async with contextlib.aclosing(process.replies()) as replies:
        async for reply in replies:
            if isinstance(reply, Vectors):
                return np.frombuffer(reply.data, dtype="<f4").reshape(len(TEXTS), -1)
    raise AssertionError("the worker hung up")


def gpu_megabytes() -> int:
    """Memory in use on the first NVIDIA GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


async def test_a_worker_says_that_it_can_use_the_gpu_and_what_it_was_built_with(
    tmp_path: Path, settings: Callable[..., WorkerSettings]
) -> None:
    async with serving(settings("embed", ALL), tmp_path) as process:
        assert isinstance(process.ready, Ready)
        assert process.ready.gpu
        assert "CPU : " in process.ready.system


@pytest.mark.parametrize("layers", [0, 10, ALL], ids=["none", "some", "all"])
async def test_answers_are_right_with_any_share_of_the_layers_on_the_gpu(
    tmp_path: Path, settings: Callable[..., WorkerSettings], layers: int
) -> None:
    async with serving(settings("chat", layers), tmp_path) as process:
        assert "12 bar" in await continued(process)


async def test_embeddings_on_the_gpu_are_those_of_the_cpu(
    tmp_path: Path, settings: Callable[..., WorkerSettings]
) -> None:
    vectors = {}
    for layers in (0, ALL):
        async with serving(settings("embed", layers), tmp_path) as process:
            vectors[layers] = await embedded(process)
    cosines = np.sum(vectors[0] * vectors[ALL], axis=1)
    assert np.all(cosines > 0.999)


async def test_all_layers_are_in_the_memory_of_the_gpu(tmp_path: Path, settings: Callable[..., WorkerSettings]) -> None:
    if shutil.which("nvidia-smi") is None:
        pytest.skip("nvidia-smi tells the memory in use, and is not here")
    used = {}
    for layers in (0, ALL):
        async with serving(settings("chat", layers), tmp_path) as process:
            await continued(process)
            used[layers] = gpu_megabytes()
            weights = process.ready.model_bytes / 1e6
    assert used[ALL] - used[0] > weights / 2
