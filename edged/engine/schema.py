"""JSON schema to a GBNF grammar; what the grammar could not hold a model to is refused by name, not ignored; pure.

The conversion itself is llama-cpp-python's. It overlooks keywords it does not know, so only what it enforces is let
through, after small rewritings (integer ranges become enumerations, references get names of their own).
"""

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from llama_cpp.llama_grammar import json_schema_to_gbnf

Schema = dict[str, Any]

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$schema", "$id", "$comment", "$defs", "definitions"}
)
KEYWORDS: dict[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset({"minimum", "maximum"}),
    "number": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
}
FORMATS = frozenset({"date", "time", "date-time", "uuid"})
CHARACTER_RULE = (
    r'char ::= [^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F])'
)
"""The conversion's own rule lets raw control characters into strings, which JSON (RFC 8259, section 7) forbids."""
LARGEST_RANGE = 1000
LARGEST_REPETITION = 1000


class SchemaError(ValueError):
    """A schema that cannot be held to; the message names the place as a JSON pointer (RFC 6901)."""


def to_gbnf(text: str) -> str:
    """The grammar of the JSON that a schema, given as JSON text, accepts. Raises :class:`SchemaError`."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"the JSON schema is no JSON: {error}") from error
    try:
        grammar: str = json_schema_to_gbnf(json.dumps(_Rewriting(schema).root()))
    except (AssertionError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, SchemaError):
            raise
        raise SchemaError(f"the JSON schema cannot be made a grammar: {error}") from error
    return re.sub(r"^char ::= .*$", lambda _: CHARACTER_RULE, grammar, flags=re.MULTILINE)


class _Rewriting:
    """One schema on its way to what the conversion understands."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._references: dict[str, str] = {}
        self._definitions: Schema = {}

    def root(self) -> Schema:
        root = self._rewritten(self._schema, "#")
        if not self._definitions:
            return root
        # Beside a reference the conversion does not look at the definitions.
        return {**({"anyOf": [root]} if "$ref" in root else root), "$defs": self._definitions}

    def _rewritten(self, schema: Any, at: str) -> Schema:
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            _refuse(at, "is no schema")
        given = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
        for keyword, rewrite in self._special().items():
            if keyword in given:
                _only(given, {keyword} | ({"type"} if keyword in ("enum", "const") else set()), at)
                return rewrite(given, at)
        kind = given.get("type", _implied_type(given))
        if isinstance(kind, list):
            _only(given, {"type"}, at)
            return {"anyOf": [self._rewritten({"type": each}, at) for each in kind]}
        if kind is None:
            _only(given, frozenset(), at)
            return {}
        if kind not in KEYWORDS:
            _refuse(at, f"has the type {kind!r}")
        _only(given, KEYWORDS[kind] | {"type"}, at)
        return self._typed(kind, given, at)

    def _special(self) -> dict[str, Callable[[Schema, str], Schema]]:
        return {"$ref": self._reference, "anyOf": self._any_of, "enum": _enumeration, "const": _constant}

    def _typed(self, kind: str, given: Schema, at: str) -> Schema:
        match kind:
            case "object":
                return self._object(given, at)
            case "array":
                return self._array(given, at)
            case "integer":
                return _integer(given, at)
            case "string":
                return _string(given, at)
        return {"type": kind}

    def _object(self, given: Schema, at: str) -> Schema:
        properties = given.get("properties", {})
        required = given.get("required", [])
        for name in required:
            if name not in properties:
                _refuse(f"{at}/required", f"names '{name}', which is not among the properties")
        for name in properties:
            _check_text(name, f"{at}/properties")
        additional = given.get("additionalProperties", not properties)
        if not properties and additional is True:
            return {"type": "object"}
        rewritten: Schema = {"type": "object", "required": required}
        rewritten["properties"] = {
            name: self._rewritten(value, f"{at}/properties/{name}") for name, value in properties.items()
        }
        rewritten["additionalProperties"] = (
            self._rewritten(additional, f"{at}/additionalProperties") if isinstance(additional, dict) else additional
        )
        return rewritten

    def _array(self, given: Schema, at: str) -> Schema:
        if "prefixItems" in given:
            _only(given, {"type", "prefixItems"} | ({"items"} if given.get("items") is False else set()), at)
            items = [self._rewritten(each, f"{at}/prefixItems/{n}") for n, each in enumerate(given["prefixItems"])]
            return {"type": "array", "prefixItems": items}
        bounds = _counts(given, ("minItems", "maxItems"), at)
        return {"type": "array", "items": self._rewritten(given.get("items", True), f"{at}/items"), **bounds}

    def _any_of(self, given: Schema, at: str) -> Schema:
        return {"anyOf": [self._rewritten(each, f"{at}/anyOf/{n}") for n, each in enumerate(given["anyOf"])]}

    def _reference(self, given: Schema, at: str) -> Schema:
        """A reference under a name of its own: the conversion takes equal last parts for the same thing."""
        reference = given["$ref"]
        if reference not in self._references:
            name = f"reference-{len(self._references)}"
            self._references[reference] = name
            self._definitions[name] = self._rewritten(self._target(reference, at), reference)
        return {"$ref": f"#/$defs/{self._references[reference]}"}

    def _target(self, reference: Any, at: str) -> Any:
        if not isinstance(reference, str) or not reference.startswith("#/"):
            _refuse(f"{at}/$ref", f"refers to {reference!r}; only '#/…', within the schema, can be followed")
        found = self._schema
        for part in reference[2:].split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or name not in found:
                _refuse(f"{at}/$ref", f"refers to {reference}, which is not there")
            found = found[name]
        return found


def _integer(given: Schema, at: str) -> Schema:
    """A range as an enumeration; the conversion knows no bounds of numbers."""
    if "minimum" not in given and "maximum" not in given:
        return {"type": "integer"}
    low, high = given.get("minimum"), given.get("maximum")
    if not (isinstance(low, int) and isinstance(high, int) and 0 <= high - low < LARGEST_RANGE):
        _refuse(at, f"needs both minimum and maximum, integers fewer than {LARGEST_RANGE} apart")
    return {"enum": list(range(low, high + 1))}


def _string(given: Schema, at: str) -> Schema:
    if "pattern" in given:
        _only(given, {"type", "pattern"}, at)
        _check_pattern(given["pattern"], f"{at}/pattern")
    if "format" in given:
        _only(given, {"type", "format"}, at)
        if given["format"] not in FORMATS:
            _refuse(f"{at}/format", f"is {given['format']!r}; held to are {', '.join(sorted(FORMATS))}")
    bounds = _counts(given, ("minLength", "maxLength"), at)
    return {**given, "type": "string", **bounds}


def _check_pattern(pattern: Any, at: str) -> None:
    """A string inside JSON: what a pattern matches must not hold quotes, backslashes or control characters."""
    if not isinstance(pattern, str):
        _refuse(at, f"is {pattern!r}")
    if not pattern.isascii() or not pattern.isprintable() or '"' in pattern:
        _refuse(at, "holds a quote or a character that is not printable ASCII")
    if re.search(r"\\[^-./()\[\]{}+*?|^$]", pattern):
        _refuse(at, "holds an escape other than one of a mark; write [0-9] for a digit")
    bare = re.sub(r"\\.", "0", pattern)
    if "[^" in bare or "." in re.sub(r"\[[^\]]*\]", "", bare):
        _refuse(at, "matches any character but some; name the characters instead")
    for low, high in re.findall(r"(?=(.)-(.))", bare):
        if any(low <= mark <= high for mark in '"\\'):
            _refuse(at, f"has the range {low}-{high}, which holds a quote or a backslash")


def _enumeration(given: Schema, at: str) -> Schema:
    if not isinstance(given["enum"], list) or not given["enum"]:
        _refuse(f"{at}/enum", "is no list of values")
    for value in given["enum"]:
        _check_text(value, f"{at}/enum")
    return {"enum": given["enum"]}


def _constant(given: Schema, at: str) -> Schema:
    _check_text(given["const"], f"{at}/const")
    return {"const": given["const"]}


def _check_text(value: Any, at: str) -> None:
    """The conversion does not escape backslashes, which JSON writes before quotes and control characters."""
    if "\\" in json.dumps(value, ensure_ascii=False):
        _refuse(at, f"holds {value!r}: quotes, backslashes and control characters cannot be held to")


def _implied_type(given: Schema) -> str | None:
    return next((kind for kind in ("object", "array", "string") if KEYWORDS[kind] & given.keys()), None)


def _counts(given: Schema, keywords: tuple[str, ...], at: str) -> Schema:
    counts = {keyword: given[keyword] for keyword in keywords if keyword in given}
    for keyword, value in counts.items():
        if not isinstance(value, int) or not 0 <= value <= LARGEST_REPETITION:
            _refuse(f"{at}/{keyword}", f"is {value!r}; it must be 0 to {LARGEST_REPETITION}")
    return counts


def _only(given: Schema, allowed: set[str] | frozenset[str], at: str) -> None:
    for keyword in given:
        if keyword not in allowed:
            _refuse(f"{at}/{keyword}", "cannot be held to here")


def _refuse(at: str, why: str) -> NoReturn:
    raise SchemaError(f"JSON schema: {at} {why}")
