"""Models brought into service over HTTP and by the command line, with a daemon as a process of its own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from edged.cli import app
from tests.daemon_process import DaemonProcess
from tests.rollout_rig import Rig

PACE = "pause=0.005"
GOLDEN = '[[question]]\nask = "Is all well?"\ncontains = ["well"]\n'


@pytest.fixture
def home(tmp_path: Path) -> Path:
    rig = Rig(tmp_path / "home")
    rig.home.mkdir()
    rig.install()
    for model in "bc":
        rig.tell(model, PACE)
    (rig.home / "chat.gguf.words").write_text(PACE)
    return rig.home


@pytest.fixture
def daemon(home: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(home, {"mqtt.enabled": False, "cache": str(home / "cache")})
    daemon.start()
    yield daemon
    daemon.kill()


@pytest.fixture
def http(daemon: DaemonProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{daemon.port}", trust_env=False, timeout=30) as client:
        yield client


@pytest.fixture
def edged(daemon: DaemonProcess, home: Path, monkeypatch: pytest.MonkeyPatch) -> "Cli":
    monkeypatch.setenv("EDGED_HOME", str(home))
    monkeypatch.setenv("EDGED_CACHE", str(home / "cache"))
    monkeypatch.setenv("EDGED_CHAT__MODEL", "a")
    monkeypatch.setenv("EDGED_HTTP__LISTEN", f"127.0.0.1:{daemon.port}")
    monkeypatch.delenv("EDGED_CONFIG", raising=False)
    return Cli()


class Cli:
    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["models", *arguments])


def tell(home: Path, model: str, words: str) -> None:
    (home / "models" / f"{model}.gguf.words").write_text(words)


def followed(http: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    while body["outcome"] is None:
        seen = body["progress"]["version"] if body["progress"] else 0
        body = http.get(f"/v1/rollouts/{body['id']}", params={"seen": seen, "wait_s": 20}).json()
    return body


# --- HTTP ------------------------------------------------------------------------------------------


def test_a_rollout_is_begun_followed_and_remembered(http: httpx.Client) -> None:
    begun = http.post("/v1/rollouts", json={"model": "b", "golden": GOLDEN})
    assert (begun.status_code, begun.headers["location"]) == (202, f"/v1/rollouts/{begun.json()['id']}")
    ended = followed(http, begun.json())
    assert (ended["outcome"], ended["reason"]) == ("promoted", "it passed 1 of 1 golden questions")
    assert ended["evidence"]["golden"]["candidate"]["of"] == 1
    listed = http.get("/v1/rollouts").json()
    assert listed["rollouts"] == [ended]
    assert listed["serving"]["chat"]["model"].startswith("b@")
    assert listed["serving"]["chat"]["previous"].endswith("/chat.gguf")
    assert http.get("/health").json()["chat"]["model"].startswith("b@")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "nobody"}, 404, "model_not_found"),
        ({"model": "x"}, 422, "model_error"),
        ({"model": "b", "canary": 1.0}, 422, "request_invalid"),
        ({"model": "b", "golden": "question = 1"}, 422, "request_invalid"),
        ({"model": "y", "role": "embed", "canary": 0.5}, 422, "request_invalid"),
        ({"modell": "b"}, 422, "request_invalid"),
    ],
)
def test_what_cannot_be_begun_is_refused_with_its_reason(
    http: httpx.Client, body: dict[str, Any], status: int, code: str
) -> None:
    refused = http.post("/v1/rollouts", json=body)
    assert (refused.status_code, refused.json()["code"]) == (status, code)


def test_a_broken_file_is_refused_and_the_active_model_serves(http: httpx.Client, home: Path) -> None:
    (home / "models" / "b.gguf").write_bytes(b"GGUF")
    assert http.post("/v1/rollouts", json={"model": "b"}).json()["code"] == "model_file_invalid"
    assert http.get("/v1/rollouts").json()["serving"]["chat"]["model"].startswith("chat@")


def test_a_second_rollout_waits_its_turn(http: httpx.Client, home: Path) -> None:
    tell(home, "b", "pause=0.2")
    begun = http.post("/v1/rollouts", json={"model": "b"}).json()
    assert http.post("/v1/rollouts", json={"model": "c"}).json()["code"] == "rollout_busy"
    ended = http.post("/v1/rollouts/rollback", json={}).json()
    assert ended["id"] == begun["id"]
    assert followed(http, ended)["outcome"] == "rolled_back"


def test_an_unknown_rollout_is_not_found(http: httpx.Client) -> None:
    assert http.get("/v1/rollouts/99").json()["code"] == "rollout_not_found"
    assert http.get("/v1/rollouts/x").status_code == 422
    assert http.get("/v1/rollouts/1", params={"wait_s": 3600}).status_code == 422


def test_a_regression_is_named_in_health_and_counted(http: httpx.Client, home: Path) -> None:
    tell(home, "b", "babble")
    assert followed(http, http.post("/v1/rollouts", json={"model": "b"}).json())["outcome"] == "rolled_back"
    texts = {held["code"]: held["text"] for held in http.get("/health").json()["conditions"]}
    assert texts["model_rolled_back"].startswith("b: it passed 0 of 4 golden questions")
    assert 'edged_rollouts_total{outcome="rolled_back",role="chat"} 1.0' in http.get("/metrics").text


def test_after_kill_9_in_the_middle_the_active_model_serves(daemon: DaemonProcess, home: Path) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{daemon.port}", trust_env=False) as http:
        assert followed(http, http.post("/v1/rollouts", json={"model": "c"}).json())["outcome"] == "promoted"
        tell(home, "b", "pause=0.3")
        begun = http.post("/v1/rollouts", json={"model": "b"}).json()
        while begun["progress"] and "candidate" not in begun["progress"]["step"]:
            parameters = {"seen": begun["progress"]["version"], "wait_s": 20}
            begun = http.get(f"/v1/rollouts/{begun['id']}", params=parameters).json()
    daemon.kill()
    daemon.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{daemon.port}", trust_env=False) as http:
        shown = http.get("/v1/rollouts").json()
        assert shown["serving"]["chat"]["model"].startswith("c@")
        assert [rollout["outcome"] for rollout in shown["rollouts"]] == ["interrupted", "promoted"]


# --- the command line ------------------------------------------------------------------------------


def test_activate_waits_shows_its_steps_and_status_tells(edged: Cli, home: Path) -> None:
    golden = home / "golden.toml"
    golden.write_text(GOLDEN)
    result = edged("activate", "b", "--golden", str(golden))
    assert (result.exit_code, result.stdout) == (0, "chat b: promoted: it passed 1 of 1 golden questions\n")
    assert "· golden questions to the candidate" in result.stderr
    status = edged("status").stdout.splitlines()
    assert status[0].startswith("chat:  b@")
    assert status[0].endswith("chat.gguf")
    assert "chat b: promoted" in status[2]


def test_a_rollback_and_activating_what_serves_are_no_failures(edged: Cli, home: Path) -> None:
    assert edged("activate", "b").exit_code == 0
    again = edged("activate", "b")
    assert (again.exit_code, again.stdout) == (0, "chat b: unchanged: it is active already\n")
    assert edged("activate", "c").exit_code == 0
    back = edged("rollback", "--json")
    assert (back.exit_code, json.loads(back.stdout)["reason"]) == (0, "it served before")
    assert edged("status").stdout.startswith("chat:  b@")


def test_a_model_is_removed_once_it_serves_no_more(edged: Cli, daemon: DaemonProcess, home: Path) -> None:
    assert edged("activate", "b").exit_code == 0
    refused = edged("remove", "b")
    assert (refused.exit_code, "b serves" in refused.stderr) == (1, True)
    assert "the configuration names a" in edged("remove", "a").stderr
    assert edged("activate", "c").exit_code == 0
    removed = edged("remove", "b", "--json")
    assert (removed.exit_code, json.loads(removed.stdout)["model"]) == (0, "b")
    assert not (home / "models" / "b.gguf").exists()
    back = edged("rollback")
    assert (back.exit_code, "there is no model 'b'" in back.stderr) == (1, True)
    daemon.kill()
    unknown = edged("remove", "c")
    assert (unknown.exit_code, "known to a running daemon alone" in unknown.stderr) == (3, True)


def test_the_first_model_named_by_a_path_can_be_gone_back_to(edged: Cli) -> None:
    assert edged("activate", "b").exit_code == 0
    assert edged("rollback").exit_code == 0
    assert edged("status").stdout.startswith("chat:  chat@")


def test_a_regression_fails_the_command_with_the_reason(edged: Cli, home: Path) -> None:
    tell(home, "b", "exit@start")
    result = edged("activate", "b", "--json")
    assert result.exit_code == 1
    body = json.loads(result.stdout)
    assert (body["outcome"], "out of luck" in body["reason"]) == ("rolled_back", True)


def test_without_waiting_the_rollout_goes_on_by_itself(edged: Cli, http: httpx.Client) -> None:
    result = edged("activate", "b", "--no-wait")
    assert result.exit_code == 0
    assert "under way" in result.stdout or "promoted" in result.stdout
    (begun,) = http.get("/v1/rollouts").json()["rollouts"]
    assert followed(http, begun)["outcome"] == "promoted"


def test_an_embedder_is_activated_with_its_own_option(edged: Cli) -> None:
    result = edged("activate", "y", "--embed")
    assert (result.exit_code, result.stdout) == (0, "embed y: promoted: all documents were embedded anew\n")
    assert edged("activate", "y").exit_code == 1


@pytest.mark.parametrize(("share", "complaint"), [("100%", "no share"), ("-1", "no share"), ("much", "no share")])
def test_a_canary_takes_a_share(edged: Cli, share: str, complaint: str) -> None:
    result = edged("activate", "b", "--canary", share)
    assert result.exit_code == 1
    assert complaint in result.stderr
