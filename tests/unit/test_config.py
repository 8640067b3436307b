"""The configuration: strict, read once, and its errors say what to write instead."""

import errno
import os
from pathlib import Path

import pytest

from edged.config import Config, load, settings, split_broker_url, split_listen
from edged.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    """A configuration file."""
    file = folder / "edged.toml"
    file.write_text(text, encoding="utf-8")
    return file


def refused(folder: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(written(folder, text), {})
    return caught.value


def refused_environment(**environment: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(None, environment)
    return caught.value


def test_every_setting_has_a_default_that_works() -> None:
    config = load(None, {})
    assert config == Config()
    assert config.http.listen == "127.0.0.1:3000"


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in settings() if not field.description and "." in name] == []


def test_the_environment_goes_over_the_file_and_overrides_over_both(tmp_path: Path) -> None:
    file = written(tmp_path, "[http]\nlisten = '127.0.0.1:1'\n[chat]\nsequences = 2\nthreads = 3\n")
    environment = {"EDGED_HTTP__LISTEN": "127.0.0.1:2", "EDGED_CHAT__SEQUENCES": "4", "PATH": "/bin"}
    config = load(file, environment, {"http.listen": "127.0.0.1:3"})
    assert (config.http.listen, config.chat.sequences, config.chat.threads) == ("127.0.0.1:3", 4, 3)


@pytest.mark.parametrize(
    ("variable", "value", "name", "expected"),
    [
        ("EDGED_MQTT__ENABLED", "false", "enabled", False),
        ("EDGED_MQTT__KEEPALIVE_SECONDS", "60", "keepalive_seconds", 60),
        ("EDGED_MQTT__RECONNECT_MAX_SECONDS", "5", "reconnect_max_seconds", 5.0),
        ("EDGED_MQTT__CLIENT_ID", "42", "client_id", "42"),
        ("EDGED_MQTT__CA_FILE", "/ca.pem", "ca_file", Path("/ca.pem")),
    ],
)
def test_the_environment_is_read_as_the_settings_type(variable: str, value: str, name: str, expected: object) -> None:
    assert getattr(load(None, {variable: value}).mqtt, name) == expected


def test_an_environment_variable_of_no_setting_is_refused_with_the_nearest() -> None:
    error = refused_environment(EDGED_HTTP__LISTN="127.0.0.1:1")
    assert "EDGED_HTTP__LISTN" in error.message
    assert error.hint == "did you mean EDGED_HTTP__LISTEN?"


def test_an_environment_value_of_the_wrong_type_is_refused_by_its_setting() -> None:
    assert "[chat] threads = 'many'" in refused_environment(EDGED_CHAT__THREADS="many").message


def test_the_variable_naming_the_file_is_no_setting() -> None:
    assert load(None, {"EDGED_CONFIG": "/x.toml"}) == Config()


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("[mqtt]\nclientid = 'a'\n", "[mqtt] clientid = 'a'", "did you mean mqtt.client_id?"),
        ("[chatt]\nmodel = 'a'\n", "chatt", "chat"),
        (
            "[[events.topics]]\nfilter='a'\nquestion='b'\nfiltr='c'\n",
            "[events.topics.0] filtr",
            "events.topics[].filter",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path, text: str, place: str, hint: str) -> None:
    error = refused(tmp_path, text)
    assert place in error.message
    assert "there is no such setting" in error.message
    assert hint in error.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[chat]\nthreads = '4'\n", "[chat] threads = '4'"),
        ("[chat]\nthreads = -1\n", "[chat] threads = -1"),
        ("[chat]\nsequences = 65\n", "less than or equal to 64"),
        ("[mqtt]\nenabled = 1\n", "[mqtt] enabled = 1"),
        ("[log]\nlevel = 'loud'\n", "'debug', 'info'"),
        ("[http]\nlisten = '3000'\n", "'3000' is not host:port"),
        ("[http]\ntls_cert = '/c.pem'\n", "tls_cert and tls_key go together"),
        ("[mqtt]\nurl = 'tcp://a'\n", "'tcp://a' is not mqtt://host:port"),
        ("[mqtt]\nurl = 'mqtt://me:secret@a'\n", "mqtt.password_file"),
        ("[mqtt]\nanswer_prefix = 'a/#'\n", "[mqtt] answer_prefix = 'a/#'"),
        ("[mqtt]\nstatus_topic = 'a/+'\n", "takes no wildcard"),
        ("[mqtt]\nquery_topic = 'a/#/b'\n", "[mqtt] query_topic = 'a/#/b'"),
        ("[mqtt]\nquery_topic = 'edged/#'\n", "takes in edged/answer/id, where edged itself publishes"),
        ("[[events.topics]]\nfilter = 'a+'\nquestion = 'b'\n", "[events.topics.0] filter = 'a+'"),
        ("[[events.topics]]\nfilter = '+/status'\nquestion = 'b'\n", "events.topics.0.filter = '+/status' takes in"),
        ("[mqtt]\nreconnect_min_seconds = 90.0\n", "exceeds reconnect_max_seconds"),
        ("[[events.topics]]\nfilter = 'a'\n", "[events.topics.0] question"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name_and_reason(tmp_path: Path, text: str, words: str) -> None:
    error = refused(tmp_path, text)
    assert words in error.message
    assert str(tmp_path / "edged.toml") in error.message
    assert "secret" not in error.message


def test_a_file_that_this_user_may_not_read_is_said_with_who_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(file: Path, **_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ConfigError, match="Permission denied") as caught:
        load(tmp_path / "edged.toml", {})
    assert "use sudo; or join the service's group, edged" in caught.value.hint


def test_topics_are_tables_of_their_own(tmp_path: Path) -> None:
    text = """
        [[events.topics]]
        filter = "plant/+/alarm"
        question = "What does {value} mean?"
        deadline_ms = 1500

        [[events.topics]]
        filter = "hall/#"
        question = "Why {value}?"
        collection = "hall"
    """
    first, second = load(written(tmp_path, text), {}).events.topics
    assert (first.filter, first.deadline_ms, first.collection) == ("plant/+/alarm", 1500, "default")
    assert (second.collection, second.expires_s) == ("hall", None)


def test_a_file_that_is_not_there_or_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.toml", {})
    assert "is no valid TOML" in refused(tmp_path, "[http\n").message


def test_a_home_too_long_for_its_sockets_is_refused() -> None:
    assert "home is too long" in refused_environment(EDGED_HOME="/" + "a" * 100).message


def test_a_profile_needs_a_weight_a_topic_without_wildcards_and_a_name_that_fits_into_one(tmp_path: Path) -> None:
    weightless = "[probe]\nweight_memory = 0.0\nweight_latency = 0.0\n"
    assert "one of the weights" in refused(tmp_path, weightless).message
    assert "takes no wildcard" in refused(tmp_path, "[probe]\ntopic = 'edged/+/profile'\n").message
    assert "[probe] device" in refused(tmp_path, "[probe]\ndevice = 'a/b'\n").message


def test_a_devices_name_is_filled_in_wherever_a_topic_has_its_place(tmp_path: Path) -> None:
    text = """
        [mqtt]
        query_topic = "$share/{device}/edged/{device}/query"
        answer_prefix = "edged/{device}/answer"
        status_topic = "edged/{device}/status"
        [[events.topics]]
        filter = "plant/{device}/+"
        question = "Why {value}?"
    """
    there = load(written(tmp_path, text), {}).at_device("box/7")
    assert there.mqtt.query_topic == "$share/box-7/edged/box-7/query"
    assert (there.mqtt.answer_prefix, there.mqtt.status_topic) == ("edged/box-7/answer", "edged/box-7/status")
    assert (there.events.topics[0].filter, there.probe.topic) == ("plant/box-7/+", "edged/box-7/profile")


def test_paths_may_start_with_the_users_home(tmp_path: Path) -> None:
    assert load(written(tmp_path, "home = '~/device'\n"), {}).home == Path("~/device").expanduser()


@pytest.mark.parametrize(
    ("listen", "parts"),
    [("127.0.0.1:3000", ("127.0.0.1", 3000)), ("[::1]:0", ("::1", 0)), ("device:80", ("device", 80))],
)
def test_addresses_are_split(listen: str, parts: tuple[str, int]) -> None:
    assert split_listen(listen) == parts


@pytest.mark.parametrize("listen", ["3000", ":3000", "a:", "a:b", "a:70000"])
def test_what_is_no_address_is_refused(listen: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        split_listen(listen)


def test_broker_urls_know_their_port_and_tls() -> None:
    assert split_broker_url("mqtt://a") == ("a", 1883, False)
    assert split_broker_url("mqtts://a:9") == ("a", 9, True)
    assert split_broker_url("mqtts://[::1]") == ("::1", 8883, True)
