"""Chat templates: from messages to prompt pieces, so that nothing a message says can become a special token.

Contents are stood in for by sentinels while the template renders; what surrounds them afterwards is the template's
own, and only that may be tokenised as special tokens.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Final, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edged.errors import ModelError, RequestError
from edged.models.gguf import GgufHeader
from edged.models.manifest import TemplateSource
from edged.types import Segment

ROLES: Final = frozenset({"system", "user", "assistant", "tool"})

_OPEN, _CLOSE = "\ue000", "\ue001"  # private use: in no template, and no template trims or changes them
_SENTINEL: Final = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")

_CHATML: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PLAIN: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}Question: {{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}Answer: {{ message['content'] }}\n\n"
    "{% else %}{{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


class ChatTemplate:
    """A compiled template. ``stop`` are texts that end an answer where the model has no token for it."""

    def __init__(
        self, source: str, *, bos_token: str = "", eos_token: str = "", adds_bos: bool = False, stop: Sequence[str] = ()
    ) -> None:
        """``adds_bos``: the tokenizer puts ``bos_token`` in front by itself, so a rendered one is taken off."""
        self._bos_token = bos_token
        self._eos_token = eos_token
        self._adds_bos = adds_bos
        self.stop = tuple(stop)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(
                f"the model's chat template does not compile: {error}", hint='choose the template "chatml" or "plain"'
            ) from error

    @classmethod
    def from_gguf(cls, header: GgufHeader) -> "ChatTemplate":
        """The template inside the model file. Raises :class:`ModelError` where there is none."""
        if not header.chat_template:
            raise ModelError(
                f"the model '{header.name}' has no chat template of its own", hint='choose the template "plain"'
            )
        return cls(
            header.chat_template,
            bos_token=header.bos_token,
            eos_token=header.eos_token,
            adds_bos=header.adds_bos,
        )

    @classmethod
    def chatml(cls) -> "ChatTemplate":
        """ChatML, which Qwen, SmolLM and many others were trained with."""
        return cls(_CHATML)

    @classmethod
    def plain(cls) -> "ChatTemplate":
        """A dialogue in plain text, for base models: ``Question: … Answer:``."""
        return cls(_PLAIN, stop=("\nQuestion:", "\n\n"))

    @classmethod
    def of(cls, source: TemplateSource, header: GgufHeader) -> "ChatTemplate":
        """The template a manifest names. Raises :class:`ModelError` for a model that does not chat."""
        match source:
            case "gguf":
                return cls.from_gguf(header)
            case "chatml":
                return cls.chatml()
            case "plain":
                return cls.plain()
            case "none":
                raise ModelError(f"the model '{header.name}' is no chat model", hint="choose a model of kind chat")

    def render(self, messages: Sequence[tuple[str, str]]) -> list[Segment]:
        """The prompt for ``messages``, (role, content) each, up to where the assistant's turn begins.

        Raises :class:`RequestError` for an unknown role, :class:`ModelError` where the template refuses the messages
        or loses, repeats, reorders or alters a content.
        """
        for role, _ in messages:
            if role not in ROLES:
                raise RequestError(f"'{role}' is no role", hint=f"roles are {', '.join(sorted(ROLES))}", role=role)
        text = self._rendered([role for role, _ in messages])
        if self._adds_bos and self._bos_token:
            text = text.removeprefix(self._bos_token)
        return list(_segments(text, [content for _, content in messages]))

    def _rendered(self, roles: Sequence[str]) -> str:
        stand_ins = [{"role": role, "content": f"{_OPEN}{index}{_CLOSE}"} for index, role in enumerate(roles)]
        try:
            return self._template.render(
                messages=stand_ins,
                add_generation_prompt=True,
                bos_token=self._bos_token,
                eos_token=self._eos_token,
                tools=None,
            )
        # what an expression inside a template can raise besides Jinja's own errors
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelError(
                f"the model's chat template refuses these messages: {error}",
                hint='send other roles, or choose the template "chatml"',
                roles=", ".join(roles),
            ) from error


def _segments(text: str, contents: Sequence[str]) -> Iterator[Segment]:
    pieces = _SENTINEL.split(text)  # template, index, template, index, …, template
    found = [int(index) for index in pieces[1::2]]
    stray = any(mark in piece for piece in pieces[0::2] for mark in (_OPEN, _CLOSE))
    if stray or found != list(range(len(contents))):
        raise ModelError(
            "the model's chat template does not pass every message on once, in order and unchanged",
            hint='choose the template "chatml" or "plain" for this model',
            messages=len(contents),
            found=", ".join(map(str, found)),
        )
    for place, piece in enumerate(pieces):
        segment = Segment(contents[int(piece)]) if place % 2 else Segment(piece, special=True)
        if segment.text:
            yield segment


def _environment() -> jinja2.Environment:
    """As model publishers' tools set it up. No clock: a date in the prompt would spoil its reusable prefix daily."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
