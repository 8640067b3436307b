"""The wire models: what a sender may send, and what it hears when it may not."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edged.errors import QueueFullError, RequestError
from edged.gateway import wire
from edged.types import Answer, Citation, Timings

ANSWER = Answer(
    text="Replace the filter.",
    citations=(
        Citation(
            sentence_id="7.0",
            chunk_id=7,
            document_id="pump",
            title="Pump",
            headings=("Upkeep", "Filter"),
            text="Replace the filter at 80 °C.",
            start=10,
            end=38,
        ),
    ),
    step="generated",
    note="",
    model="tiny",
    timings=Timings(total_ms=12.5, first_token_ms=3.0),
)


def refused(payload: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        wire.parse_query(payload)
    return caught.value


@pytest.mark.parametrize(
    ("payload", "found"),
    [
        (b'{"id": "a-1", "quary": "?"}', "a-1"),
        (b'\xef\xbb\xbf{"id": "a-1", "query": 5}', "a-1"),
        (b'{"id": "a 1"}', None),
        (b'{"id": "a\\n"}', None),
        (b'{"id": 5}', None),
        (b'{"id": "a"', None),
        (b'{"id": "\xff"}', None),
        (b'["id", "a"]', None),
        (b'{"query": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b', "id": "a"}', None),
        (b"", None),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_the_id_of_an_unusable_request_is_found_where_it_is_one(payload: bytes, found: str | None) -> None:
    assert wire.id_of(payload) == found


@given(st.binary(max_size=300) | st.text(max_size=100).map(lambda text: b"{" + text.encode("utf-8", "replace")))
@example(b'{"query":"\\ud800"}')
@example(b'{"query":"a","deadline_ms":1' + b"0" * 400 + b"}")
@example(b'{"query":"a","expires_s":1e999}')
@example(b"[" * 5000)
@example(b'{"query":' * 5000)
def test_any_payload_is_a_query_or_a_request_error(payload: bytes) -> None:
    try:
        request = wire.parse_query(payload)
    except RequestError as error:
        assert error.message
        assert error.hint
        wire.encode(wire.error_body(None, error)).decode()
    else:
        assert request.query.strip()
        assert request.question().text == request.query


@given(
    st.dictionaries(
        st.sampled_from(["query", "id", "collection", "deadline_ms", "expires_s", "max_tokens", "extra"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.lists(st.integers()),
    )
)
def test_any_json_object_is_a_query_or_a_request_error(fields: dict[str, object]) -> None:
    try:
        wire.parse_query(json.dumps(fields).encode())
    except RequestError as error:
        assert error.hint


def test_plain_text_is_the_query_without_the_blanks_around_it() -> None:
    assert wire.parse_query(b"  Was bedeutet E42? \n").query == "Was bedeutet E42?"


def test_a_json_object_fills_the_fields_and_converts_its_units() -> None:
    request = wire.parse_query(b' {"query":"why?","id":"a:1","collection":"pumps","deadline_ms":1500,"max_tokens":9}')
    assert request.id == "a:1"
    question = request.question()
    assert (question.collection, question.deadline_seconds, question.max_tokens) == ("pumps", 1.5, 9)


def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    error = refused(b'{"query":"why?","deadlin_ms":5}')
    assert "'deadlin_ms'" in error.message
    assert error.hint == "did you mean 'deadline_ms'?"


def test_an_unknown_field_near_nothing_is_refused_with_all_names() -> None:
    assert "query, id, collection" in refused(b'{"query":"why?","zzz":5}').hint


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "query"),
        (b"   ", "query"),
        (b"a\x00b", "NUL"),
        (b"\xff", "byte 0 is 0xff"),
        (b"{", "no valid JSON"),
        (b"{}", "'query' is missing"),
        (b'{"query":5}', "'query' = 5"),
        (b'{"query":"a","deadline_ms":"5"}', "'deadline_ms' = '5'"),
        (b'{"query":"a","deadline_ms":0}', "'deadline_ms' = 0"),
        (b'{"query":"a","id":"a b"}', "'id' = 'a b'"),
        (b'{"query":"a","id":""}', "'id' = ''"),
        (b'{"query":"a","max_tokens":1.5}', "'max_tokens' = 1.5"),
        (b'{"query":"a","collection":" "}', "'collection' = ' '"),
    ],
)
def test_what_is_wrong_is_named(payload: bytes, words: str) -> None:
    assert words in refused(payload).message


def test_a_long_refused_value_is_shown_only_in_part() -> None:
    assert len(refused(b"a" * 9000).message) < 200


def test_the_longest_query_is_taken() -> None:
    assert len(wire.parse_query(b"a" * 8192).query) == 8192


def test_an_answer_shows_its_citations_and_timings() -> None:
    body = json.loads(wire.encode(wire.answer_body("e1", ANSWER)))
    assert list(body) == ["id", "answer", "citations", "step", "note", "timings", "model"]
    assert body["citations"][0]["headings"] == ["Upkeep", "Filter"]
    assert body["timings"]["total_ms"] == 12.5


def test_an_error_carries_id_code_and_facts() -> None:
    body = wire.error_body("e1", QueueFullError("256 wait already", hint="ask later", waiting=256))
    assert body == {
        "id": "e1",
        "error": {
            "code": "queue_full",
            "message": "256 wait already",
            "hint": "ask later",
            "retryable": True,
            "facts": {"waiting": 256},
        },
    }


def test_a_document_without_text_is_refused() -> None:
    with pytest.raises(RequestError, match="'text'"):
        wire.parse_json(b'{"text":" \\n"}', wire.DocumentRequest)
