"""What keeps edged from opening its doors is told by one reading, with the file and what to do."""

import datetime
import os
import pwd
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edged import credentials
from edged.config import Config, load
from edged.errors import ConfigError
from edged.runtime import home

NOW = datetime.datetime.now(datetime.UTC)
OPEN = "0.0.0.0:3000"


def pair(
    folder: Path, name: str = "box", *, days: tuple[int, int] = (-1, 400), passphrase: str = ""
) -> tuple[Path, Path]:
    """A certificate that signs itself, valid from and to so many days from now, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin, end = (NOW + datetime.timedelta(days=each) for each in days)
    unsigned = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    dated = unsigned.serial_number(1).not_valid_before(begin).not_valid_after(end)
    pem, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        locked = serialization.BestAvailableEncryption(passphrase.encode())
    certificate_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    certificate_file.write_bytes(dated.sign(key, hashes.SHA256()).public_bytes(pem))
    key_file.write_bytes(key.private_bytes(pem, private, locked))
    return certificate_file, key_file


def configured(folder: Path, **names: Any) -> Config:
    values = {name.replace("__", "."): str(value) for name, value in names.items()}
    return load(None, {}, {"home": str(folder), **values})


def refused(config: Config) -> ConfigError:
    (refusal,) = credentials.refusals(config)
    return refusal


# --- the API key -----------------------------------------------------------------------------------


def test_loopback_needs_no_key_and_other_addresses_get_the_one_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "api-key").write_text(f" {'k' * 16}\n")
    assert credentials.require(configured(tmp_path)) is None
    assert credentials.require(configured(tmp_path, http__listen=OPEN)) == "k" * 16


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"k" * 15, "has 15 characters, and needs at least 16"),
        (b" \n", "has 0 characters"),
        ("schlüsselschlüssel".encode(), "beyond ASCII"),
        (b"k" * 16 + b"\n" + b"k" * 16, "not of one line"),
        (None, "there is no API key"),
    ],
)
def test_a_key_that_the_door_would_not_open_with_is_refused_by_check_and_start_alike(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "api-key").write_bytes(content)
    config = configured(tmp_path, http__listen=OPEN)
    assert words in refused(config).message
    with pytest.raises(ConfigError, match=words):
        credentials.require(config)


def test_the_command_of_the_hint_makes_a_key_that_edged_and_nobody_else_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "my home"
    folder.mkdir()
    config = configured(folder, http__listen=OPEN)
    before, _, command = refused(config).hint.partition(": ")
    assert before.startswith(f"make one, as {pwd.getpwuid(os.geteuid()).pw_name}")
    subprocess.run(["sh", "-c", command], check=True, umask=0)
    assert not list(credentials.refusals(config))
    assert (folder / "api-key").stat().st_mode & 0o777 == 0o600


# --- certificates ----------------------------------------------------------------------------------


def test_a_certificate_with_its_key_is_taken_for_both_doors(tmp_path: Path) -> None:
    certificate, key = pair(tmp_path)
    config = configured(
        tmp_path,
        http__tls_cert=certificate,
        http__tls_key=key,
        mqtt__url="mqtts://broker",
        mqtt__ca_file=certificate,
        mqtt__cert_file=certificate,
        mqtt__key_file=key,
    )
    assert not list(credentials.refusals(config))
    assert credentials.objection(config.http, NOW.timestamp()) == ""


@pytest.mark.parametrize("door", ["http.tls", "mqtt"])
def test_certificates_and_keys_that_cannot_be_used_are_named_with_the_reason(tmp_path: Path, door: str) -> None:
    def reason(certificate: Path, key: Path) -> str:
        if door == "mqtt":
            names = {"mqtt__url": "mqtts://broker", "mqtt__cert_file": certificate, "mqtt__key_file": key}
        else:
            names = {"http__tls_cert": certificate, "http__tls_key": key}
        refusal = refused(configured(tmp_path, **names))
        assert refusal.hint
        assert door in refusal.message
        return refusal.message

    certificate, key = pair(tmp_path)
    junk = tmp_path / "junk"
    junk.write_text("no PEM")
    assert "the key is another certificate's" in reason(certificate, pair(tmp_path, "other")[1])
    assert "no PEM file" in reason(junk, key)
    assert "no PEM file" in reason(certificate, junk)
    assert "none.pem cannot be read: No such file" in reason(tmp_path / "none.pem", key)
    assert "is encrypted" in reason(*pair(tmp_path, "locked", passphrase="secret"))


@pytest.mark.parametrize(
    ("days", "words"),
    [((-20, -10), "has expired"), ((10, 20), "not yet valid"), ((-10, 5), "expires in 5 days"), ((-10, 15), "")],
)
def test_a_certificate_whose_dates_clients_refuse_is_objected_to_and_does_not_keep_the_daemon_from_starting(
    tmp_path: Path, days: tuple[int, int], words: str
) -> None:
    certificate, key = pair(tmp_path, days=days)
    config = configured(tmp_path, http__tls_cert=certificate, http__tls_key=key)
    objection = credentials.objection(config.http, NOW.timestamp())
    assert words in objection
    assert bool(objection) == bool(words)
    credentials.require(config)


# --- the broker ------------------------------------------------------------------------------------


def test_the_files_of_the_broker_are_looked_at_where_they_are_used(tmp_path: Path) -> None:
    none = tmp_path / "none"
    unused = {"mqtt__password_file": none, "mqtt__ca_file": none}
    assert not list(credentials.refusals(configured(tmp_path, **unused)))
    found = credentials.refusals(configured(tmp_path, **unused, mqtt__username="me", mqtt__url="mqtts://broker"))
    assert [refusal.message.split()[0] for refusal in found] == ["mqtt.password_file", "mqtt.ca_file"]


def test_a_password_is_utf_8_without_its_last_newline(tmp_path: Path) -> None:
    file = tmp_path / "password"
    config = configured(tmp_path, mqtt__username="me", mqtt__password_file=file)
    file.write_bytes("größer \r\n".encode())
    assert credentials.password(config.mqtt) == "größer "
    file.write_bytes(b"\xff")
    assert "is no UTF-8 text" in refused(config).message


# --- the home --------------------------------------------------------------------------------------


def test_a_home_that_could_not_be_made_is_named_and_none_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not list(home.refusals(configured(tmp_path / "new/home")))
    (refusal,) = home.refusals(configured(tmp_path / "file/home"))
    assert "cannot use the home directory" in refusal.message
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
