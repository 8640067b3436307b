"""Turn a MiniLM sentence embedder (safetensors, BERT) into a GGUF file, Q8_0, once at install.

The result embeds with cosine ≥ 0.999 to the original. Needs the ``convert`` extra (gguf, safetensors).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edged.errors import ModelError

MINILM_INPUTS: Final = ("config.json", "model.safetensors", "vocab.txt")
"""Files of the model directory that the conversion reads."""

_DROPPED: Final = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
_KEPT_F32: Final = ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight")
_CONTROL_TOKENS: Final[Mapping[str, str]] = {
    "[CLS]": "add_bos_token_id",
    "[SEP]": "add_eos_token_id",
    "[UNK]": "add_unk_token_id",
    "[PAD]": "add_pad_token_id",
    "[MASK]": "add_mask_token_id",
}
"""Control token → the GGUF writer's method that records its id."""


def convert_minilm(model_directory: Path, out: Path) -> None:
    """Write the GGUF form of the MiniLM model in ``model_directory`` to ``out``, mean pooling included.

    Raises :class:`ModelError` when the ``convert`` extra is missing or the directory is no BERT model.
    """
    gguf, safetensors_numpy = _libraries()
    config, vocabulary = _read_inputs(model_directory)
    writer = gguf.GGUFWriter(out, "bert")
    try:
        _write_parameters(writer, gguf, config)
        _write_tokenizer(writer, gguf, vocabulary)
        tensors = safetensors_numpy.load_file(model_directory / "model.safetensors")
        for name, data, kind in _tensors(gguf, tensors, int(config["num_hidden_layers"])):
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except KeyError as error:
        raise ModelError(
            f"{model_directory} is no BERT model: {error} is missing", directory=model_directory
        ) from error
    finally:
        writer.close()


def _libraries() -> tuple[Any, Any]:
    try:
        import gguf  # noqa: PLC0415  an extra: only the conversion needs it
        import safetensors.numpy as safetensors_numpy  # noqa: PLC0415
    except ImportError as error:
        raise ModelError(
            f"converting a model needs the Python package '{error.name}'",
            hint="pip install 'edged[convert]', then pull the model again",
        ) from error
    return gguf, safetensors_numpy


def _read_inputs(directory: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        vocabulary = (directory / "vocab.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the model in {directory}: {error}", directory=directory) from error
    if not isinstance(config, dict) or config.get("model_type") != "bert":
        raise ModelError(
            f"{directory} is no BERT model", hint="only MiniLM embedders are converted", directory=directory
        )
    return config, vocabulary


def _write_parameters(writer: Any, gguf: Any, config: Mapping[str, Any]) -> None:
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_token_type_count(config["type_vocab_size"])


def _write_tokenizer(writer: Any, gguf: Any, vocabulary: list[str]) -> None:
    control = {token for token in vocabulary if token.startswith("[") and token.endswith("]") and len(token) > 2}
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token if token in control else phantom_space(token) for token in vocabulary])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL for token in vocabulary]
    )
    for token, method in _CONTROL_TOKENS.items():
        if token not in vocabulary:
            raise KeyError(token)
        getattr(writer, method)(vocabulary.index(token))
    writer.add_sep_token_id(vocabulary.index("[SEP]"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


def phantom_space(token: str) -> str:
    """A WordPiece token the way llama.cpp keeps it: word starts carry U+2581, continuations nothing."""
    return token[2:] if token.startswith("##") else "\u2581" + token


def _tensors(
    gguf: Any, tensors: Mapping[str, npt.NDArray[Any]], layers: int
) -> Iterator[tuple[str, npt.NDArray[Any], Any]]:
    """Name, data and type of each tensor as the file holds it."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, layers)
    for original, values in sorted(tensors.items()):
        if original in _DROPPED:
            continue
        name = names.get_name(original, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise KeyError(f"a place for tensor {original}")
        data = values.astype(np.float32)
        if data.ndim == 2 and data.shape[1] % 32 == 0 and original not in _KEPT_F32:
            kind = gguf.GGMLQuantizationType.Q8_0
            yield name, gguf.quants.quantize(data, kind), kind
        else:
            yield name, data, gguf.GGMLQuantizationType.F32
