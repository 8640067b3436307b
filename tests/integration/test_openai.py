"""The OpenAI routes of a whole daemon, spoken to by OpenAI's own client."""

import asyncio
import contextlib
import json
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from tests.daemon_process import DaemonProcess

KEY = "0123456789abcdef"
SMOLLM = "smollm2-135m-instruct"
MINILM = "all-minilm-l6-v2"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Device:
    """A running daemon: OpenAI's client of it, and a plain one."""

    def __init__(self, port: int, key: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.plain = httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=60)
        self.plain.headers["authorization"] = f"Bearer {key}"
        self.client = self.client_with(key)

    def client_with(self, key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key=key,
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        )

    def sync_client(self) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(trust_env=False)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=http)

    async def ready(self) -> None:
        while (await self.plain.get("/health/ready")).status_code != 200:
            pass

    async def active(self, count: int) -> None:
        """Return when so many requests are being worked on."""
        while (await self.plain.get("/health")).json()["chat"]["active"] != count:
            pass


@contextlib.contextmanager
def daemon(home: Path, *, fake: bool = True, **overrides: Any) -> Iterator[int]:
    """The port of a daemon in a process of its own."""
    names = {"mqtt.enabled": False, **{name.replace("__", "."): value for name, value in overrides.items()}}
    process = DaemonProcess(home, names, fake=fake)
    process.start()
    try:
        yield process.port
    finally:
        process.stop()


@contextlib.asynccontextmanager
async def connected(port: int, key: str = "none") -> AsyncIterator[Device]:
    opened = Device(port, key)
    async with opened.plain, opened.client:
        await opened.ready()
        yield opened


@contextlib.asynccontextmanager
async def device(home: Path, *, key: str = "none", **overrides: Any) -> AsyncIterator[Device]:
    """A daemon of the test's own."""
    running = daemon(home, **overrides)
    port = await asyncio.to_thread(running.__enter__)
    try:
        async with connected(port, key) as opened:
            yield opened
    finally:
        await asyncio.to_thread(running.__exit__, None, None, None)


@pytest.fixture(scope="module")
def fake_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with daemon(tmp_path_factory.mktemp("openai") / "home") as port:
        yield port


@pytest.fixture
async def fake(fake_port: int) -> AsyncIterator[Device]:
    """A device whose model does what its prompt tells it."""
    async with connected(fake_port) as opened:
        yield opened


@pytest.fixture(scope="module")
def real_port(tmp_path_factory: pytest.TempPathFactory, models_home: Path) -> Iterator[int]:
    home = tmp_path_factory.mktemp("openai") / "home"
    (home / "models").mkdir(parents=True)
    for file in (models_home / "models").iterdir():
        (home / "models" / file.name).hardlink_to(file)
    with daemon(home, fake=False) as port:
        yield port


@pytest.fixture
async def real(real_port: int) -> AsyncIterator[Device]:
    """A device with its two models."""
    async with connected(real_port) as opened:
        yield opened


def said(text: str, role: str = "user") -> ChatCompletionMessageParam:
    return {"role": role, "content": text}  # type: ignore[return-value,misc]


async def ask(device: Device, text: str, **parameters: Any) -> Any:
    """A chat of one message with the fake model."""
    return await device.client.chat.completions.create(model="chat", messages=[said(text)], **parameters)


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# --- chats -----------------------------------------------------------------------------------------


async def test_a_chat_is_answered_whole(fake: Device) -> None:
    answer = await ask(fake, "tokens=3", user="me")
    assert answer.id.startswith("chatcmpl-")
    assert answer.model.startswith("chat@")
    assert answer.choices[0].message.content == "word0 word1 word2"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 3, 6)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_a_chat_is_answered_piece_by_piece_with_its_usage_last(fake: Device) -> None:
    stream = await ask(fake, "tokens=3", stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text_of(chunks) == "word0 word1 word2"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_cut_at_its_longest_says_so(fake: Device, stream: bool) -> None:
    answer = await ask(fake, "tokens=9", max_completion_tokens=2, stream=stream)
    if stream:
        reasons = [chunk.choices[0].finish_reason async for chunk in answer]
        assert reasons[-1] == "length"
    else:
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("word0 word1", "length")


async def test_the_synchronous_client_is_served_as_well(fake: Device) -> None:
    def use() -> tuple[str | None, str]:
        with fake.sync_client() as client:
            whole = client.chat.completions.create(model="chat", messages=[said("tokens=2")])
            chunks = list(client.chat.completions.create(model="chat", messages=[said("tokens=2")], stream=True))
        return whole.choices[0].message.content, text_of(chunks)

    assert await asyncio.to_thread(use) == ("word0 word1", "word0 word1")


async def test_a_stream_is_what_the_standard_says_byte_by_byte(fake: Device) -> None:
    body = {"model": "chat", "messages": [said("tokens=2")], "stream": True}
    response = await fake.plain.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert (events[-2:], len(events)) == (["data: [DONE]", ""], 6)
    assert all(event.startswith("data: {") for event in events[:-2])


async def test_a_text_is_continued_past_the_template(fake: Device) -> None:
    whole = await fake.client.completions.create(model="chat", prompt="tokens=20")
    assert (whole.object, whole.choices[0].finish_reason) == ("text_completion", "length")
    assert whole.choices[0].text.split()[-1] == "word15"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 1
    stream = await fake.client.completions.create(model="chat", prompt="tokens=2", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "word0 word1"


# --- clients and workers that go away --------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels_its_answer(fake: Device, stream: bool) -> None:
    body = {"model": "chat", "messages": [said("tokens=5 pause=60")], "stream": stream}
    asking = asyncio.create_task(fake.plain.post("/v1/chat/completions", json=body))
    await fake.active(1)
    asking.cancel()
    await asyncio.wait_for(fake.active(0), timeout=10)


async def test_leaving_a_stream_half_way_cancels_its_answer(fake: Device) -> None:
    stream = await ask(fake, "tokens=500 pause=0.05", stream=True)
    async for _ in stream:
        break
    await stream.close()
    await asyncio.wait_for(fake.active(0), timeout=10)


async def test_a_worker_that_dies_before_the_first_piece_is_not_noticed(fake: Device, tmp_path: Path) -> None:
    stream = await ask(fake, f"tokens=3 kill@request counter={tmp_path / 'deaths'} times=1", stream=True)
    assert text_of([chunk async for chunk in stream]) == "word0 word1 word2"
    assert (tmp_path / "deaths").stat().st_size == 1


async def test_a_whole_answer_survives_a_worker_that_dies_in_the_middle(fake: Device, tmp_path: Path) -> None:
    answer = await ask(fake, f"tokens=3 kill@stream counter={tmp_path / 'deaths'} times=1")
    assert answer.choices[0].message.content == "word0 word1 word2"
    assert (tmp_path / "deaths").stat().st_size == 1


async def test_a_stream_whose_worker_dies_in_the_middle_ends_with_an_error(fake: Device, tmp_path: Path) -> None:
    stream = await ask(fake, f"tokens=3 pause=0.05 kill@stream counter={tmp_path / 'deaths'} times=1", stream=True)
    chunks: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError, match="failed in the middle") as caught:
        async for chunk in stream:
            chunks += [chunk]
    assert text_of(chunks) == "word0"
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["code"] == "worker_lost"
    await asyncio.wait_for(fake.active(0), timeout=10)


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"extra_body": {"mirostat": 2}}, "mirostat"),
    ],
)
async def test_what_is_not_supported_is_a_bad_request_by_name(
    fake: Device, parameters: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=f"'{param}'") as caught:
        await ask(fake, "a", **parameters)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)
    assert caught.value.type == "invalid_request_error"


async def test_images_are_a_bad_request_by_name(fake: Device) -> None:
    image: Any = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
    with pytest.raises(openai.BadRequestError, match="image_url") as caught:
        await fake.client.chat.completions.create(model="chat", messages=[image])
    assert caught.value.param == "messages[0].content[0]"


async def test_a_model_that_is_not_served_is_not_found(fake: Device) -> None:
    for stream in (True, False):
        with pytest.raises(openai.NotFoundError, match="gpt-5") as caught:
            await fake.client.chat.completions.create(model="gpt-5", messages=[said("a")], stream=stream)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        await fake.client.embeddings.create(model="chat", input="a")
    with pytest.raises(openai.NotFoundError):
        await fake.client.models.retrieve("gpt-5")


async def test_a_prompt_beyond_the_context_is_a_bad_request(fake: Device) -> None:
    for stream in (True, False):
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(fake, "a " * 9000, stream=stream)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


async def test_a_full_queue_is_a_rate_limit_that_says_when_to_come_again(tmp_path: Path) -> None:
    async with device(tmp_path / "home", chat__sequences=1, chat__queue_limit=1) as full:
        waiting = [asyncio.create_task(ask(full, "tokens=1 pause=60")) for _ in range(2)]
        while (await full.plain.get("/health")).json()["chat"]["queued"] != 1:
            pass
        with pytest.raises(openai.RateLimitError) as caught:
            await ask(full, "a", stream=True)
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_deadline_that_passes_is_a_gateway_timeout(fake: Device) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(fake, "tokens=2 pause=60", extra_body={"deadline_ms": 100})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")


async def test_a_deadline_that_passes_in_the_middle_of_a_stream_ends_it_with_an_error(fake: Device) -> None:
    stream = await ask(fake, "tokens=1000 pause=0.05", stream=True, extra_body={"deadline_ms": 500})
    with pytest.raises(openai.APIError) as caught:
        async for _ in stream:
            pass
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["code"] == "deadline_exceeded"


async def test_without_models_the_routes_are_unavailable_and_list_nothing(tmp_path: Path) -> None:
    async with device(tmp_path / "home", fake=False) as bare:
        assert (await bare.client.models.list()).data == []
        for request in (ask(bare, "a"), bare.client.embeddings.create(model="m", input="a")):
            with pytest.raises(openai.InternalServerError) as caught:
                await request
            assert (caught.value.status_code, caught.value.code) == (503, "worker_unavailable")
            assert caught.value.response.headers["retry-after"]


async def test_with_a_key_only_its_holders_are_served(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "api-key").write_text(KEY)
    async with device(home, http__listen="0.0.0.0:0", key=KEY) as guarded:
        assert (await ask(guarded, "tokens=1")).choices[0].message.content == "word0"
        async with guarded.client_with("wrong") as stranger:
            with pytest.raises(openai.AuthenticationError) as caught:
                await stranger.chat.completions.create(model="chat", messages=[said("a")])
        assert caught.value.code == "invalid_api_key"
        assert caught.value.response.headers["www-authenticate"].startswith("Bearer")


async def test_refusals_of_http_itself_have_openais_form_too(tmp_path: Path) -> None:
    async with device(tmp_path / "home", http__max_body_bytes=2048) as small:
        with pytest.raises(openai.APIStatusError) as caught:
            await ask(small, "a" * 4096)
        assert (caught.value.status_code, caught.value.code) == (413, "payload_too_large")
        plain = small.plain
        for response, status, code in (
            (await plain.post("/v1/chat/completions", content=b"{"), 415, "unsupported_media_type"),
            (await plain.get("/v1/chat/completions"), 405, "method_not_allowed"),
            (await plain.get("/v1/models", headers={"host": "evil.example"}), 421, "misdirected_request"),
            (
                await plain.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}),
                400,
                "invalid_value",
            ),
        ):
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
        assert (await plain.get("/v1/nowhere")).headers["content-type"] == "application/problem+json"


# --- models and embeddings -------------------------------------------------------------------------


async def test_the_models_in_service_are_listed_and_found_by_both_their_names(fake: Device) -> None:
    models = (await fake.client.models.list()).data
    assert [model.id for model in models] == ["chat", "embed"]
    identity = models[0].root  # type: ignore[attr-defined]
    assert identity.startswith("chat@")
    assert await fake.client.models.retrieve(identity) == models[0] == await fake.client.models.retrieve("chat")
    answer = await fake.client.chat.completions.create(model=identity, messages=[said("tokens=1")])
    assert answer.model == identity


async def test_embeddings_are_the_same_as_numbers_and_as_bytes(fake: Device) -> None:
    by_bytes = await fake.client.embeddings.create(model="embed", input=["pump oil", "boiler"])
    numbers = await fake.client.embeddings.create(
        model="embed", input=["pump oil", "boiler"], encoding_format="float", dimensions=384
    )
    assert [row.index for row in by_bytes.data] == [0, 1]
    assert [row.embedding for row in by_bytes.data] == [row.embedding for row in numbers.data]
    assert (by_bytes.usage.prompt_tokens, by_bytes.usage.total_tokens) == (3, 3)
    response = await fake.plain.post(
        "/v1/embeddings", json={"model": "embed", "input": "oil", "encoding_format": "base64"}
    )
    assert len(response.json()["data"][0]["embedding"]) == len(struct.pack("<384f", *[0.0] * 384)) * 4 // 3


async def test_as_many_texts_as_openai_takes_are_embedded_and_no_more(fake: Device) -> None:
    texts = [f"text {number}" for number in range(2048)]
    answer = await fake.client.embeddings.create(model="embed", input=texts)
    assert [row.index for row in answer.data] == list(range(2048))
    with pytest.raises(openai.BadRequestError) as caught:
        await fake.client.embeddings.create(model="embed", input=[*texts, "one more"])
    assert (caught.value.code, caught.value.param) == ("invalid_value", "input")


async def test_other_dimensions_than_the_models_own_are_refused_by_name(fake: Device) -> None:
    with pytest.raises(openai.BadRequestError, match="384") as caught:
        await fake.client.embeddings.create(model="embed", input="oil", dimensions=128)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "dimensions")


# --- real models -----------------------------------------------------------------------------------


@pytest.mark.models
async def test_a_conversation_of_two_turns_with_the_real_model(real: Device) -> None:
    messages = [said("You answer in one short sentence.", "system"), said("What is the capital of France?")]
    first = await real.client.chat.completions.create(model=SMOLLM, messages=messages, temperature=0, max_tokens=40)
    text = first.choices[0].message.content
    assert text is not None
    assert "Paris" in text
    assert first.usage is not None
    messages += [first.choices[0].message.model_dump(), said("And of Italy?")]  # type: ignore[list-item]
    stream = await real.client.chat.completions.create(
        model=SMOLLM,
        messages=messages,
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "Rome" in text_of(chunks)
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens > first.usage.total_tokens - 5
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= first.usage.prompt_tokens // 2


@pytest.mark.models
async def test_streamed_and_whole_answers_of_the_real_model_are_the_same(real: Device) -> None:
    asked: dict[str, Any] = {"model": SMOLLM, "messages": [said("Name three colours.")], "temperature": 0, "seed": 1}
    whole = await real.client.chat.completions.create(**asked, max_tokens=24)
    stream = await real.client.chat.completions.create(**asked, max_tokens=24, stream=True)
    assert text_of([chunk async for chunk in stream]) == whole.choices[0].message.content


@pytest.mark.models
async def test_a_stop_text_ends_the_real_models_answer_and_is_not_shown(real: Device) -> None:
    answer = await real.client.completions.create(
        model=SMOLLM, prompt="1, 2, 3, 4, 5, 6,", temperature=0, stop=[" 9"], max_tokens=32
    )
    assert (answer.choices[0].text.strip(" ,"), answer.choices[0].finish_reason) == ("7, 8", "stop")


@pytest.mark.models
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_held_to_a_schema_is_json_that_the_schema_accepts(real: Device, stream: bool) -> None:
    held: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    messages = [said("Describe a person called Ada, who is 36 years old.")]
    answer: Any = await real.client.chat.completions.create(
        model=SMOLLM, messages=messages, response_format=held, max_tokens=100, stream=stream
    )
    text = text_of([chunk async for chunk in answer]) if stream else answer.choices[0].message.content
    jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.models
async def test_an_answer_in_json_is_an_object_unless_it_was_cut(real: Device) -> None:
    for seed in range(4):
        answer = await real.client.chat.completions.create(
            model=SMOLLM,
            messages=[said("Give me a JSON object with a city and its country.")],
            response_format={"type": "json_object"},
            max_tokens=200,
            seed=seed,
        )
        text = answer.choices[0].message.content
        assert text is not None
        assert text.lstrip().startswith("{")
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text), dict)


@pytest.mark.models
async def test_an_answer_held_to_a_grammar_is_one_of_its_sentences(real: Device) -> None:
    answer = await real.client.chat.completions.create(
        model=SMOLLM,
        messages=[said("Is the sky blue?")],
        extra_body={"grammar": 'root ::= "yes" | "no" | "perhaps"'},
    )
    assert answer.choices[0].message.content in ("yes", "no", "perhaps")


@pytest.mark.models
@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"extra_body": {"grammar": "root ::= nowhere"}}, "grammar"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "colour"}}}},
            "response_format",
        ),
    ],
)
async def test_a_format_that_cannot_be_held_to_is_a_bad_request(
    real: Device, parameters: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await real.client.chat.completions.create(model=SMOLLM, messages=[said("a")], **parameters)
    assert (caught.value.code, caught.value.param) == ("output_format_invalid", param)


@pytest.mark.models
async def test_leaving_a_stream_of_the_real_model_frees_its_place(real: Device) -> None:
    stream = await real.client.chat.completions.create(
        model=SMOLLM, messages=[said("Tell a long story.")], max_tokens=1000, stream=True
    )
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    await asyncio.wait_for(real.active(0), timeout=10)


@pytest.mark.models
async def test_eight_streams_of_the_real_model_run_side_by_side(real: Device) -> None:
    async def one(number: int) -> int:
        stream = await real.client.chat.completions.create(
            model=SMOLLM,
            messages=[said(f"Count to {number + 10}.")],
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
        last = [chunk async for chunk in stream][-1]
        assert last.usage is not None
        return last.usage.completion_tokens

    assert all(0 < tokens <= 16 for tokens in await asyncio.gather(*map(one, range(8))))


@pytest.mark.models
async def test_real_embeddings_count_their_tokens_and_put_like_to_like(real: Device) -> None:
    texts = ["The pump leaks oil.", "Oil drips from the pump.", "The cat sleeps."]
    answer = await real.client.embeddings.create(model=MINILM, input=texts)
    one, two, other = (row.embedding for row in answer.data)
    assert sum(map(float.__mul__, one, two)) > sum(map(float.__mul__, one, other)) + 0.3
    assert abs(sum(value * value for value in one) - 1) < 1e-3
    assert 15 <= answer.usage.prompt_tokens <= 30
