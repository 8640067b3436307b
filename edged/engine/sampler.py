"""Choosing the next token: llama.cpp's sampler chain, and a grammar that a generation is held to."""

import ctypes
import itertools
from typing import Protocol

import llama_cpp as C
import numpy as np

from edged.engine.llama import Model, float_view, last_log
from edged.engine.schema import to_gbnf
from edged.types import Grammar, JsonSchema, OutputFormat, Sampling

PENALTY_WINDOW_TOKENS = 64
CLOSING_BIAS = 1000.0
DEEPEST_GRAMMAR = 2000
CLOSING_MARKS = ('"', "}", "]", '"}', '"]', "}}", "]}", '"}}', '"]}')
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class FormatError(ValueError):
    """The grammar or JSON schema asked for cannot be held to."""


class Sampler(Protocol):
    """Chooses the tokens of one generation."""

    def sample(self, context: ctypes.c_void_p, index: int, *, closing: bool) -> int:
        """The token for output ``index`` of the last decode step. ``closing`` matters to a grammar alone."""

    def close(self) -> None:
        """Free what llama.cpp holds for it."""


class GreedySampler:
    """The likeliest token, straight from the logits: ten times faster than llama.cpp's chain of samplers."""

    def __init__(self, model: Model) -> None:
        self._tokens = model.vocabulary_tokens

    def sample(self, context: ctypes.c_void_p, index: int, *, closing: bool) -> int:
        del closing
        return int(_logits(context, index, self._tokens).argmax())

    def close(self) -> None:
        """Nothing is held."""


class ChainSampler:
    """The plain chain: temperature and its filters, or greedy."""

    def __init__(self, sampling: Sampling) -> None:
        self._chain = _create_chain(sampling)

    def sample(self, context: ctypes.c_void_p, index: int, *, closing: bool) -> int:
        del closing
        return int(C.llama_sampler_sample(self._chain, context, index))

    def close(self) -> None:
        C.llama_sampler_free(self._chain)


class FormatSampler(ChainSampler):
    """A chain held to a grammar.

    The model's own choice is tried first; only where the grammar forbids it is the grammar applied to the whole
    vocabulary, which costs far more. While ``closing``, marks that end strings, lists and objects are preferred, so
    that a text is whole before its last token.
    """

    def __init__(self, model: Model, sampling: Sampling, output: OutputFormat) -> None:
        super().__init__(sampling)
        self._tokens = model.vocabulary_tokens
        self._closing = np.array(_closing_tokens(model), np.int64)
        self._candidates = np.zeros(self._tokens, _CANDIDATE)
        self._all_ids = np.arange(self._tokens, dtype=np.int32)
        grammar = _gbnf(output).encode()
        if _depth(grammar) > DEEPEST_GRAMMAR:
            super().close()
            raise FormatError(f"the grammar is nested deeper than {DEEPEST_GRAMMAR} parentheses")
        # An empty grammar would be none at all to llama.cpp, and hold the model to nothing.
        self._grammar = C.llama_sampler_init_grammar(model.vocabulary, grammar, b"root") if grammar.strip() else None
        if not self._grammar:
            super().close()
            raise FormatError(f"the grammar is not valid: {last_log()}")

    def sample(self, context: ctypes.c_void_p, index: int, *, closing: bool) -> int:
        token = None if closing else self._choose(context, index, held=False, closing=False)
        if token is None or not self._allowed(token):
            token = self._choose(context, index, held=True, closing=closing)
        C.llama_sampler_accept(self._chain, token)
        C.llama_sampler_accept(self._grammar, token)
        return token

    def close(self) -> None:
        C.llama_sampler_free(self._grammar)
        super().close()

    def _choose(self, context: ctypes.c_void_p, index: int, *, held: bool, closing: bool) -> int:
        self._candidates["id"] = self._all_ids
        self._candidates["logit"] = _logits(context, index, self._tokens)
        if closing:
            self._candidates["logit"][self._closing] += CLOSING_BIAS
        candidates = _token_data_array(self._candidates)
        if held:
            C.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
        C.llama_sampler_apply(self._chain, ctypes.byref(candidates))
        return int(candidates.data[candidates.selected].id)

    def _allowed(self, token: int) -> bool:
        one = np.array([(token, 1.0, 0.0)], _CANDIDATE)
        candidates = _token_data_array(one)
        C.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
        return bool(np.isfinite(one["logit"][0]))


def create_sampler(model: Model, sampling: Sampling, output: OutputFormat | None) -> Sampler:
    """Raises :class:`FormatError`, naming what is wrong with ``output``."""
    if output is not None:
        return FormatSampler(model, sampling, output)
    if sampling.temperature <= 0 and sampling.repeat_penalty == 1.0:
        return GreedySampler(model)
    return ChainSampler(sampling)


def _logits(context: ctypes.c_void_p, index: int, count: int) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    """A view of llama.cpp's memory, valid until the next decode step."""
    return float_view(C.llama_get_logits_ith(context, index), count)


def _gbnf(output: OutputFormat) -> str:
    match output:
        case Grammar(gbnf=text):
            return text
        case JsonSchema(schema=text):
            try:
                return to_gbnf(text)
            except ValueError as error:
                raise FormatError(str(error)) from error


def _depth(grammar: bytes) -> int:
    """How deep parentheses are nested, those in literals counted too: llama.cpp's parser recurses without a limit."""
    depths = itertools.accumulate((mark == ord("(")) - (mark == ord(")")) for mark in grammar)
    return max(depths, default=0)


def _closing_tokens(model: Model) -> list[int]:
    """Tokens that are exactly one of the marks, and those that end a generation."""
    single = [model.tokenize(mark, add_special=False, parse_special=False) for mark in CLOSING_MARKS]
    return [tokens[0] for tokens in single if len(tokens) == 1] + model.end_tokens


def _token_data_array(candidates: "np.ndarray[tuple[int], np.dtype[np.void]]") -> C.llama_token_data_array:
    # Not ctypes.data_as(): its cast makes a cycle, which only the collector frees.
    data = ctypes.pointer(C.llama_token_data.from_address(candidates.ctypes.data))
    return C.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)


def _create_chain(sampling: Sampling) -> ctypes.c_void_p:
    chain: ctypes.c_void_p = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
    if sampling.repeat_penalty != 1.0:
        C.llama_sampler_chain_add(
            chain, C.llama_sampler_init_penalties(PENALTY_WINDOW_TOKENS, sampling.repeat_penalty, 0.0, 0.0)
        )
    if sampling.temperature <= 0:
        C.llama_sampler_chain_add(chain, C.llama_sampler_init_greedy())
        return chain
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_top_k(sampling.top_k))
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_top_p(sampling.top_p, 1))
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_min_p(sampling.min_p, 1))
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_temp(sampling.temperature))
    seed = C.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed & 0xFFFFFFFF
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_dist(seed))
    return chain
