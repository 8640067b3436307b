"""The command line: what it prints, where to, and with which exit code."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from edged import daemon
from edged.cli import app
from edged.client import Client
from edged.config import Config, load
from edged.errors import ConfigError
from edged.gateway import wire
from edged.probe.profile import Device, Profile, Warmth, from_json, merge, to_json
from edged.probe.profile import profile as make_profile
from tests.samples import NOW, process, sample

Handler = Callable[[httpx.Request], httpx.Response]

CITED = {
    "sentence_id": "1.0",
    "chunk_id": 1,
    "document_id": "pump.md",
    "title": "Pump",
    "headings": ["Upkeep"],
    "text": "It is\x1b[31m hot.",
    "start": 0,
    "end": 10,
}
TIMES = {
    "embed_ms": 3,
    "retrieve_ms": 2,
    "queue_ms": 0,
    "prefill_ms": 40,
    "generate_ms": 300,
    "first_token_ms": 50,
    "total_ms": 345,
}
ANSWER = {
    "id": "e",
    "answer": "Hot pump",
    "citations": [CITED],
    "step": "generated",
    "note": "",
    "timings": TIMES,
    "model": "tiny",
}
STATUS = wire.StatusBody(
    status="degraded",
    version="0",
    uptime=200.0,
    model_loaded=True,
    vector_store_ready=True,
    conditions=[
        wire.ConditionBody(
            code="mqtt_disconnected", severity="degraded", text="refused", hint="check the broker", since=1.0
        )
    ],
    chat=wire.WorkerBody(model="tiny", state="ready", threads=2),
    embed=wire.WorkerBody(model="mini", state="ready"),
    documents=1,
    chunks=2,
    events=wire.EventsBody(open=4),
    mqtt=wire.MqttBody(connected=False),
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and an address where nothing serves."""
    monkeypatch.setenv("EDGED_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EDGED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGED_HTTP__LISTEN", "127.0.0.1:1")
    monkeypatch.delenv("EDGED_CONFIG", raising=False)
    return tmp_path


@pytest.fixture
def answer_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Handler], None]:
    """Let ``handler`` stand for the daemon."""

    def install(handler: Handler) -> None:
        def client_of(_config: Config) -> Client:
            return Client("http://device", transport=httpx.MockTransport(handler))

        monkeypatch.setattr(Client, "of", client_of)

    return install


def edged(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def sse(*events: tuple[str, dict[str, Any]]) -> httpx.Response:
    body = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    return httpx.Response(200, text=body, headers={"content-type": "text/event-stream"})


def problem(status: int, code: str) -> httpx.Response:
    body = {"status": status, "code": code, "detail": "it is so", "hint": "do that", "retryable": False}
    return httpx.Response(status, json=body)


# --- the program -----------------------------------------------------------------------------------


def test_help_needs_none_of_the_heavy_modules() -> None:
    heavy = ["pydantic", "httpx", "fastapi", "numpy", "uvicorn", "paho", "edged.daemon"]
    program = f"import sys, edged.cli; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_version_is_shown_as_text_and_as_json() -> None:
    assert edged("version").stdout.startswith("edged ")
    assert "edged" in json.loads(edged("version", "--json").stdout)


@pytest.mark.parametrize("arguments", [["nonsense"], ["ask"], ["ask", "why", "--deadline-ms", "x"], ["docs", "add"]])
def test_wrong_use_exits_with_2(arguments: list[str]) -> None:
    assert edged(*arguments).exit_code == 2


@pytest.mark.parametrize("arguments", [["status"], ["ask", "why?"], ["docs", "list"], ["docs", "remove", "a"]])
def test_without_a_daemon_the_exit_code_is_3_and_the_hint_says_how_to_start_one(arguments: list[str]) -> None:
    result = edged(*arguments)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "error: no daemon answers at http://127.0.0.1:1" in result.stderr
    assert "edged serve" in result.stderr


def test_with_json_an_error_is_json_on_stderr() -> None:
    result = edged("status", "--json")
    assert json.loads(result.stderr)["error"]["code"] == "daemon_unreachable"


# --- configuration ---------------------------------------------------------------------------------


def test_serve_hands_its_options_to_the_daemon(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    served: list[Config] = []

    def serve(config: Config, read_again: Callable[[], Config]) -> int:
        served.extend([config, read_again()])
        return 7

    monkeypatch.setattr(daemon, "serve", serve)
    file = home / "some.toml"
    file.write_text("[log]\nlevel = 'error'\n")
    result = edged("serve", "--config", str(file), "--host", "127.0.0.1:4000", "--model-path", "/m.gguf")
    assert result.exit_code == 7
    assert served[0] == served[1]
    assert served[0].http.listen == "127.0.0.1:4000"
    assert (served[0].chat.path, served[0].log.level) == (Path("/m.gguf"), "error")


def test_a_configuration_is_found_by_option_then_environment_then_home(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: home / name / "edged.toml" for name in ("home", "environment", "option")}
    for file in files.values():
        file.parent.mkdir()
        file.write_text("")
    assert json.loads(edged("check", "--json").stdout)["file"] == str(files["home"])
    monkeypatch.setenv("EDGED_CONFIG", str(files["environment"]))
    assert json.loads(edged("check", "--json").stdout)["file"] == str(files["environment"])
    option = ["--config", str(files["option"]), "check", "--json"]
    assert json.loads(edged(*option).stdout)["file"] == str(files["option"])


def test_check_names_a_wrong_setting_and_the_nearest_right_one(home: Path) -> None:
    file = home / "edged.toml"
    file.write_text("[mqtt]\nclientid = 'a'\n")
    result = edged("--config", str(file), "check")
    assert result.exit_code == 1
    assert "did you mean mqtt.client_id?" in result.stderr


def test_check_fails_when_the_daemon_could_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGED_HTTP__LISTEN", "0.0.0.0:3000")
    result = edged("check")
    assert result.exit_code == 1
    assert "there is no API key" in result.stdout


def test_check_passes_with_warnings_where_models_are_missing() -> None:
    result = edged("check", "--json")
    assert result.exit_code == 0
    findings = json.loads(result.stdout)["findings"]
    assert {finding["severity"] for finding in findings} == {"warning"}
    assert "run 'edged models pull smollm2-135m-instruct', then restart edged" in [found["hint"] for found in findings]


def test_check_advises_about_a_models_path_and_about_an_unknown_name_by_what_would_help(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGED_CHAT__PATH", str(home / "none.gguf"))
    monkeypatch.setenv("EDGED_EMBED__MODEL", "all-minilm-l6-v3")
    chat, embed = json.loads(edged("check", "--json").stdout)["findings"]
    assert "correct chat.path" in chat["hint"]
    assert "pull" not in chat["hint"]
    assert embed["hint"].startswith("correct embed.model: did you mean all-minilm-l6-v2")


def test_check_fails_for_what_the_start_or_the_broker_would_refuse(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGED_HTTP__LISTEN", "0.0.0.0:3000")
    monkeypatch.setenv("EDGED_MQTT__USERNAME", "me")
    monkeypatch.setenv("EDGED_MQTT__PASSWORD_FILE", str(home / "none"))
    (home / "home").mkdir()
    (home / "home/api-key").write_text("short")
    result = edged("check")
    assert result.exit_code == 1
    assert "error: the API key in" in result.stdout
    assert "error: mqtt.password_file" in result.stdout
    monkeypatch.setenv("EDGED_MQTT__QUERY_TOPIC", "a/#/b")
    assert "[mqtt] query_topic = 'a/#/b'" in edged("check").stderr


def test_a_reload_reads_the_file_of_the_start_and_refuses_the_defaults_in_its_place(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = home / "home/edged.toml"
    file.parent.mkdir()
    file.write_text("[rag]\nnear = 0.7\n")
    read: list[Callable[[], Config]] = []

    def serve(_config: Config, read_again: Callable[[], Config]) -> int:
        read.append(read_again)
        return 0

    monkeypatch.setattr(daemon, "serve", serve)
    assert edged("serve").exit_code == 0
    assert read[0]().rag.near == 0.7
    file.unlink()
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read[0]()
    file.symlink_to(home / "nowhere")
    assert "cannot read the configuration" in edged("check").stderr


def test_a_reload_refuses_what_the_next_start_could_not_use(home: Path) -> None:
    config = load(None, {}, {"home": str(home), "http.listen": "0.0.0.0:3000"})
    with pytest.raises(ConfigError, match="there is no API key"):
        daemon._startable(lambda: config)
    (home / "api-key").write_text("k" * 16)
    assert daemon._startable(lambda: config) is config


# --- with a daemon ---------------------------------------------------------------------------------


def test_status_shows_conditions_with_their_hints(answer_with: Callable[[Handler], None]) -> None:
    answer_with(lambda _request: httpx.Response(200, json=STATUS.model_dump()))
    result = edged("status")
    assert result.exit_code == 0
    assert "degraded: refused (mqtt_disconnected)\n  hint: check the broker" in result.stdout


def test_status_of_a_failing_daemon_exits_with_1(answer_with: Callable[[Handler], None]) -> None:
    failing = STATUS.model_copy(update={"status": "failing"})
    answer_with(lambda _request: httpx.Response(503, json=failing.model_dump()))
    assert edged("status").exit_code == 1


def test_another_program_at_the_port_is_told_from_a_daemon(answer_with: Callable[[Handler], None]) -> None:
    answer_with(lambda _request: httpx.Response(200, text="hello"))
    result = edged("status")
    assert result.exit_code == 3
    assert "is no edged" in result.stderr


def test_ask_shows_the_answer_its_sources_and_times(answer_with: Callable[[Handler], None]) -> None:
    answer_with(lambda _request: sse(("delta", {"text": "Hot "}), ("delta", {"text": "pump"}), ("answer", ANSWER)))
    result = edged("ask", "why?")
    lines = result.stdout.splitlines()
    assert lines[0] == "Hot pump"
    assert lines[1] == "  [1] Pump › Upkeep (pump.md): It is[31m hot."
    assert "first token 50 ms, total 345 ms" in lines[2]


def test_ask_shows_the_final_text_where_it_is_not_what_was_streamed(answer_with: Callable[[Handler], None]) -> None:
    events = (("delta", {"text": "Cold"}), ("restarted", {"reason": "worker lost"}), ("answer", ANSWER))
    answer_with(lambda _request: sse(*events))
    result = edged("ask", "why?")
    assert result.stdout.splitlines()[:2] == ["Cold", "Hot pump"]
    assert "worker lost" in result.stderr


def test_ask_sends_its_options_and_prints_the_answer_as_json(answer_with: Callable[[Handler], None]) -> None:
    asked: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return sse(("delta", {"text": "Hot"}), ("answer", ANSWER))

    answer_with(handler)
    options = ["--collection", "pumps", "--deadline-ms", "500", "--max-tokens", "9", "--json"]
    result = edged("ask", "why?", *options)
    assert json.loads(result.stdout)["answer"] == "Hot pump"
    assert asked == [{"query": "why?", "collection": "pumps", "deadline_ms": 500, "max_tokens": 9}]


def test_an_error_of_the_daemon_is_shown_with_its_hint(answer_with: Callable[[Handler], None]) -> None:
    answer_with(lambda _request: problem(404, "document_not_found"))
    result = edged("docs", "remove", "a")
    assert result.exit_code == 1
    assert result.stderr == "error: it is so\nhint:  do that\n"


def test_a_stream_that_breaks_off_is_a_lost_daemon(answer_with: Callable[[Handler], None]) -> None:
    answer_with(lambda _request: sse(("delta", {"text": "Hot"})))
    assert edged("ask", "why?").exit_code == 3


# --- documents -------------------------------------------------------------------------------------


def keeping(received: dict[str, dict[str, Any]]) -> Handler:
    """A daemon that keeps what it is given, and refuses what is empty."""

    def handler(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        received[body["id"]] = body
        document = {"id": body["id"], "collection": body["collection"], "title": "T", "format": body["format"]}
        sizes = {"sha256": "", "bytes": 1, "chunks": 2, "added_at": 1.0}
        return httpx.Response(201, json={"document": {**document, **sizes}, "outcome": "added"})

    return handler


def test_docs_add_takes_files_and_directories(home: Path, answer_with: Callable[[Handler], None]) -> None:
    for name in ("manuals/pumps/a.md", "manuals/b.txt", "manuals/c.pdf", "manuals/.git/d.md", "single.MD"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("It is hot.")
    received: dict[str, dict[str, Any]] = {}
    answer_with(keeping(received))
    result = edged("docs", "add", str(home / "manuals"), str(home / "single.MD"), "--collection", "m")
    assert result.exit_code == 0, result.output
    shown = {name: (body["format"], body["collection"]) for name, body in received.items()}
    assert shown == {"pumps/a.md": ("markdown", "m"), "b.txt": ("text", "m"), "single.MD": ("markdown", "m")}
    assert "added      b.txt (2 passages)" in result.stdout


def test_docs_add_goes_on_after_a_file_it_cannot_use(home: Path, answer_with: Callable[[Handler], None]) -> None:
    (home / "bad.txt").write_bytes(b"\xff\xfe")
    (home / "empty.txt").write_text(" ")
    (home / "good.txt").write_text("hot")
    answer_with(keeping({}))
    files = [str(home / name) for name in ("bad.txt", "empty.txt", "good.txt")]
    result = edged("docs", "add", *files, "--json")
    assert result.exit_code == 1
    bad, empty, good = json.loads(result.stdout)
    assert (bad["error"]["code"], empty["error"]["code"]) == ("request_invalid", "request_invalid")
    assert good["outcome"] == "added"


def test_docs_add_refuses_two_files_of_one_id(home: Path) -> None:
    for name in ("one/a.md", "two/a.md"):
        (home / name).parent.mkdir()
        (home / name).write_text("hot")
    result = edged("docs", "add", str(home / "one"), str(home / "two"))
    assert result.exit_code == 1
    assert "would both be the document 'a.md'" in result.stderr


def test_docs_list_is_not_cut_in_a_pipe(answer_with: Callable[[Handler], None]) -> None:
    long = "manuals/" + "a" * 200
    document = {"id": long, "collection": "c", "title": "[b]T[/b]", "format": "text", "sha256": ""}
    body = {"documents": [{**document, "bytes": 1500, "chunks": 2, "added_at": 1.0}]}
    answer_with(lambda _request: httpx.Response(200, json=body))
    result = edged("docs", "list")
    assert long in result.stdout
    assert "[b]T[/b]" in result.stdout
    assert json.loads(edged("docs", "list", "--json").stdout)[0]["id"] == long


# --- profiles --------------------------------------------------------------------------------------


def second(number: int) -> Profile:
    found = sample(process(cpu_seconds={0: 0.5}, minor_faults=number), at=NOW + number)
    return make_profile(found, Device(id="pi", software="1", cores={0: 1.0}), {}, Warmth())


def seconds(count: int) -> httpx.Response:
    return sse(*(("profile", json.loads(to_json(second(number)))) for number in range(1, count + 1)))


def test_top_shows_the_last_ten_seconds_once(answer_with: Callable[[Handler], None]) -> None:
    asked: list[httpx.URL] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        return httpx.Response(200, content=to_json(second(7)))

    answer_with(handler)
    shown = edged("top", "--once").stdout
    assert "pi, edged 1 · by ebpf" in shown
    assert "chat" in shown
    assert from_json(edged("top", "--once", "--json").stdout) == second(7)
    assert [each.params["window"] for each in asked] == ["10s", "10s"]


def test_top_shows_each_second_until_the_daemon_ends(answer_with: Callable[[Handler], None]) -> None:
    answer_with(lambda _request: seconds(3))
    result = edged("top", "--json")
    assert [from_json(line) for line in result.stdout.splitlines()] == [second(number) for number in (1, 2, 3)]
    assert result.exit_code == 3
    assert "BUSY over 3 s" in edged("top").stdout


def test_a_recording_is_shown_as_one_profile(answer_with: Callable[[Handler], None], home: Path) -> None:
    answer_with(lambda _request: seconds(5))
    recorded = edged("profile", "record", "--seconds", "4", str(home / "minute.jsonl"))
    assert recorded.exit_code == 0
    assert recorded.stdout.endswith("minute.jsonl (4 s)\n")
    whole = from_json(edged("profile", "show", str(home / "minute.jsonl"), "--json").stdout)
    assert whole == merge([second(number) for number in (1, 2, 3, 4)])
    assert "BUSY over 4 s" in edged("profile", "show", str(home / "minute.jsonl")).stdout


def test_what_is_no_recording_is_refused_and_where_none_can_be_written_that_is_said(
    answer_with: Callable[[Handler], None], home: Path
) -> None:
    answer_with(lambda _request: seconds(2))
    (home / "text").write_text("hello\n")
    (home / "empty").write_text("")
    assert "this is no profile" in edged("profile", "show", str(home / "text")).stderr
    assert "is empty" in edged("profile", "show", str(home / "empty")).stderr
    result = edged("profile", "record", "--seconds", "1", str(home / "none" / "file"))
    assert (result.exit_code, "cannot write" in result.stderr) == (1, True)


# --- models ----------------------------------------------------------------------------------------


def test_models_list_shows_the_catalogue() -> None:
    assert "smollm2-135m-instruct" in edged("models", "list").stdout
    assert {model["installed"] for model in json.loads(edged("models", "list", "--json").stdout)} == {False}


def test_an_unknown_model_is_answered_with_near_names() -> None:
    result = edged("models", "pull", "smolm2-135m-instruct")
    assert result.exit_code == 1
    assert "did you mean smollm2-135m-instruct" in result.stderr


def test_a_file_that_is_no_gguf_is_not_imported(home: Path) -> None:
    (home / "x.gguf").write_bytes(b"hello")
    result = edged("models", "import", str(home / "x.gguf"), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stderr)["error"]["code"] == "model_file_invalid"


@pytest.mark.parametrize(
    "arguments",
    [["models", "import"], ["models", "activate", "m", "--golden"], ["profile", "show"], ["bundle", "show"]],
)
def test_a_file_that_is_not_there_is_wrong_use_and_one_that_may_not_be_read_is_not_called_missing(
    arguments: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert edged(*arguments, str(home / "none")).exit_code == 2

    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    (home / "file").write_text("x")
    unreadable = edged(*arguments, str(home / "file"))
    monkeypatch.setattr(Path, "stat", denied)
    hidden = edged(*arguments, str(home / "file"))
    for result in (unreadable, hidden):
        assert result.exit_code == 1
        assert f"may not read {home / 'file'}" in result.stderr
        assert "sudo install -m 644" in result.stderr


def test_a_configured_model_is_not_removed_and_one_that_is_not_there_is_named() -> None:
    refused = edged("models", "remove", "all-minilm-l6-v2")
    assert (refused.exit_code, "the configuration names all-minilm-l6-v2" in refused.stderr) == (1, True)
    assert "not installed" in edged("models", "remove", "qwen2.5-0.5b-instruct").stderr


def test_verify_without_installed_models_has_nothing_to_do() -> None:
    assert json.loads(edged("models", "verify", "--json").stdout) == []
