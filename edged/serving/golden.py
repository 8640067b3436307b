"""Golden questions: what a model must be able to say before it may serve. The file, and the judging of answers ◇."""

import json
import re
import tomllib
from collections.abc import Sequence
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edged.errors import RequestError
from edged.types import JsonSchema, OutputFormat

MOST_QUESTIONS: Final = 200
SAME_WORD_SHARE: Final = 0.75
"""A text of which one word makes up more than this has lost its way."""
WORDS_TO_TELL: Final = 12
"""Fewer words may well be all the same."""


class GoldenQuestion(BaseModel):
    """A question and what its answer must hold. Without any demand it must only be speech."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ask: str = Field(min_length=1)
    system: str = ""
    contains: tuple[str, ...] = ()
    matches: str | None = None
    json_schema: dict[str, Any] | None = None
    max_tokens: int = Field(64, ge=1, le=4096)

    @model_validator(mode="after")
    def _usable(self) -> Self:
        try:
            re.compile(self.matches or "")
        except re.error as error:
            raise ValueError(f"matches = {self.matches!r} is no regular expression: {error}") from error
        return self

    @property
    def messages(self) -> list[tuple[str, str]]:
        system = [("system", self.system)] if self.system else []
        return [*system, ("user", self.ask)]

    @property
    def output(self) -> OutputFormat | None:
        return None if self.json_schema is None else JsonSchema(json.dumps(self.json_schema))

    def objection(self, text: str, *, complete: bool) -> str:
        """What is wrong with an answer, in a few words; empty when nothing is. ``complete``: the model ended itself."""
        if not well_formed(text, self.output, complete=complete):
            return "no JSON of its schema" if self.json_schema is not None else "no speech"
        missing = next((wanted for wanted in self.contains if wanted.casefold() not in text.casefold()), None)
        if missing is not None:
            return f"'{missing}' is not in it"
        if self.matches is not None and re.search(self.matches, text) is None:
            return f"it does not match {self.matches}"
        return ""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    question: tuple[GoldenQuestion, ...] = Field(min_length=1, max_length=MOST_QUESTIONS)


DEFAULT_QUESTIONS: Final = tuple(
    GoldenQuestion(ask=ask, max_tokens=32)
    for ask in (
        "What is the capital of France?",
        "What is water?",
        "Why must a pump not run dry?",
        "Write one sentence about the weather.",
    )
)
"""Asked where no file is given: nothing is demanded but speech, so any model that works passes."""


def parse_golden(text: str) -> tuple[GoldenQuestion, ...]:
    """The questions of a TOML text: ``[[question]]`` tables with ``ask`` and demands on the answer.

    Raises :class:`RequestError` saying what is wrong.
    """
    try:
        return _File.model_validate(tomllib.loads(text)).question
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"the golden questions are no valid TOML: {error}", hint="mend the line named") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RequestError(
            f"the golden questions have '{place}': {first['msg']}",
            hint="docs/OPERATIONS.md shows such a file",
            field=place,
        ) from error


def well_formed(text: str, output: OutputFormat | None, *, complete: bool) -> bool:
    """Whether an answer has the form asked for. Without one it must be speech; JSON cut by its length is none."""
    if isinstance(output, JsonSchema):
        return complete and _is_json(text)
    return output is not None or speaks(text)


def speaks(text: str) -> bool:
    """Whether a text could have been said: it has letters or digits, whole characters, and is not one word for ever."""
    words = re.findall(r"\w+", text.casefold())
    if not words or "\ufffd" in text.rstrip("\ufffd"):  # the last character may be cut
        return False
    return len(words) < WORDS_TO_TELL or _most_common_share(words) <= SAME_WORD_SHARE


def _most_common_share(words: Sequence[str]) -> float:
    return max(words.count(word) for word in set(words)) / len(words)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
