"""Log lines as journal entries: what the native protocol says, and where they go when the journal is away."""

import errno
import os
import socket
import struct
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from edged import journal


def parse(entry: bytes) -> dict[str, str]:
    """The protocol's own rules, read backwards."""
    fields, position = {}, 0
    while position < len(entry):
        end = entry.index(b"\n", position)
        line = entry[position:end]
        if b"=" in line:
            name, _, value = line.partition(b"=")
            position = end + 1
        else:
            (length,) = struct.unpack_from("<Q", entry, end + 1)
            name, value = line, entry[end + 9 : end + 9 + length]
            assert entry[end + 9 + length : end + 10 + length] == b"\n"
            position = end + 10 + length
        fields[name.decode()] = value.decode()
    return fields


def test_an_entry_has_message_priority_and_a_field_for_each_value() -> None:
    event = {"event": "condition_set", "level": "warning", "condition": "mqtt_disconnected", "retry seconds": 1.5}
    assert parse(journal.render(None, "", event)) == {
        "MESSAGE": "condition_set condition=mqtt_disconnected retry seconds=1.5",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "edged",
        "EDGED_EVENT": "condition_set",
        "EDGED_CONDITION": "mqtt_disconnected",
        "EDGED_RETRY_SECONDS": "1.5",
    }


def test_a_trace_is_part_of_the_message_with_its_line_ends() -> None:
    entry = journal.render(None, "", {"event": "service_failed", "level": "error", "exception": "Trace\n  line"})
    assert parse(entry)["MESSAGE"] == "service_failed\nTrace\n  line"
    assert parse(entry)["PRIORITY"] == "3"


@given(st.dictionaries(st.text(min_size=1), st.one_of(st.text(), st.integers(), st.none())))
def test_whatever_is_logged_no_value_can_forge_a_field(values: dict[str, object]) -> None:
    entry = journal.render(None, "", {"event": "seen", **values})
    names = parse(entry).keys() - {"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER"}
    assert all(name.startswith("EDGED") and len(name) <= journal.LONGEST_NAME for name in names)


def test_entries_go_to_the_journals_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(path))
        listening.settimeout(5)
        processors: list[structlog.typing.Processor] = [structlog.processors.add_log_level, journal.render]
        log = structlog.wrap_logger(
            journal.JournalLogger(path), processors=processors, wrapper_class=structlog.make_filtering_bound_logger(20)
        )
        log.info("ready", seconds=1.25)
        assert parse(listening.recv(4096))["EDGED_SECONDS"] == "1.25"


def test_an_entry_that_the_journal_does_not_take_is_written_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.JournalLogger(tmp_path / "gone").warning(b"MESSAGE=kept\n")
    assert capsys.readouterr().err == "MESSAGE=kept\n"


def test_without_a_descriptor_left_an_entry_is_written_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", no_descriptor)
    journal.JournalLogger(tmp_path / "socket").warning(b"MESSAGE=kept\n")
    assert capsys.readouterr().err == "MESSAGE=kept\n"


def no_descriptor(*_arguments: int) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_only_the_very_stream_that_systemd_named_is_the_journal() -> None:
    with Path(os.devnull).open("w") as stream:
        status = os.fstat(stream.fileno())
        assert journal.is_journal(stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        assert not journal.is_journal(stream, {"JOURNAL_STREAM": "1:2"})
        assert not journal.is_journal(stream, {})
