"""Secrets and certificates that the configuration names, read in one way by the daemon's start, each connection to the
broker, ``edged check`` and ``edged doctor``. All of it blocks.
"""

import contextlib
import errno
import os
import pwd
import shlex
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

from edged.config import Config, Http, Mqtt, is_loopback, split_broker_url, split_listen
from edged.errors import ConfigError

SHORTEST_KEY_CHARACTERS = 16
DAY_SECONDS = 86_400
EXPIRES_SOON_DAYS = 14
HANDSHAKE_TURNS = 6  # TLS 1.3 takes three


def require(config: Config) -> str | None:
    """See to what the HTTP door cannot open without; the API key that requests must carry, none on loopback.

    Raises :class:`ConfigError` for what keeps the daemon from starting.
    """
    server_context(config.http.tls_cert, config.http.tls_key)
    return api_key(config)


def refusals(config: Config) -> Iterator[ConfigError]:
    """What :func:`require` would raise, and what would keep the daemon from ever reaching its broker."""
    http, mqtt = config.http, config.mqtt
    readings: list[Callable[[], object]] = [
        lambda: server_context(http.tls_cert, http.tls_key),
        lambda: api_key(config),
        lambda: password(mqtt) if mqtt.enabled else None,
        lambda: client_context(mqtt) if mqtt.enabled else None,
    ]
    for read in readings:
        try:
            read()
        except ConfigError as error:
            yield error


# --- the API key -----------------------------------------------------------------------------------


def api_key(config: Config) -> str | None:
    """The key that requests must carry; none on loopback. Raises :class:`ConfigError`."""
    host, _ = split_listen(config.http.listen)
    if is_loopback(host):
        return None
    path = config.api_key_path
    make = _how_to_make(path, _user_of(config.home))
    try:
        key = path.read_text(encoding="ascii").strip()
    except FileNotFoundError as error:
        problem = f"http.listen {config.http.listen} is open to others and there is no API key in {path}"
        raise ConfigError(problem, hint=f"make one, {make}") from error
    except OSError as error:
        raise _unreadable("the API key", path, error) from error
    except UnicodeDecodeError as error:
        problem = f"the API key in {path} has characters beyond ASCII"
        raise ConfigError(problem, hint=f"make another, {make}") from error
    if len(key) < SHORTEST_KEY_CHARACTERS:
        problem = f"the API key in {path} has {len(key)} characters, and needs at least {SHORTEST_KEY_CHARACTERS}"
        raise ConfigError(problem, hint=f"make another, {make}")
    if not key.isprintable():
        raise ConfigError(f"the API key in {path} is not of one line", hint=f"leave one line, or make another, {make}")
    return key


def _how_to_make(path: Path, user: str) -> str:
    """A command that leaves a key which ``user`` can read and nobody else, whichever of the two runs it."""
    makers = " or ".join(dict.fromkeys((user, "root")))
    return f"as {makers}: openssl rand -hex 32 | install -o {user} -m 600 /dev/stdin {shlex.quote(str(path))}"


def _user_of(home: Path) -> str:
    """Who runs the daemon: the home's owner, or whoever runs this where there is no home yet."""
    try:
        user = home.stat().st_uid
    except OSError:
        user = os.geteuid()
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(user).pw_name
    return str(user)


# --- HTTPS -----------------------------------------------------------------------------------------


def server_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """For HTTPS; none without a certificate. Raises :class:`ConfigError`."""
    if certificate is None or key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, ("http.tls_cert", certificate), ("http.tls_key", key))
    return context


def trusting(certificate: Path) -> ssl.SSLContext:
    """A client's context that trusts just this certificate, whatever host it names. Raises ``OSError``."""
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def objection(http: Http, now: float) -> str:
    """Why clients refuse the certificate at the Unix time ``now``, or soon will; empty where they do not.

    It does not keep the daemon from starting: a device without a clock of its own starts in 1970. Raises
    :class:`ConfigError` for a certificate that cannot be served at all.
    """
    server = server_context(http.tls_cert, http.tls_key)
    if server is None or http.tls_cert is None:
        return ""
    try:
        expires = _greet(server, trusting(http.tls_cert))
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    days = (ssl.cert_time_to_seconds(expires) - now) / DAY_SECONDS
    return f"it expires in {days:.0f} days, {expires}" if days < EXPIRES_SOON_DAYS else ""


def _greet(server: ssl.SSLContext, client: ssl.SSLContext) -> str:
    """A handshake of the two in memory; when the server's certificate expires. Raises ``SSLCertVerificationError``."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server)
    for _ in range(HANDSHAKE_TURNS):
        for side in (theirs, ours):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    certificate = theirs.getpeercert()
    assert certificate is not None
    return str(certificate["notAfter"])


# --- the broker ------------------------------------------------------------------------------------


def password(mqtt: Mqtt) -> str | None:
    """The password at the broker; none without a user name, or without a file. Raises :class:`ConfigError`."""
    if mqtt.username is None or mqtt.password_file is None:
        return None
    try:
        return mqtt.password_file.read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise _unreadable("mqtt.password_file", mqtt.password_file, error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"mqtt.password_file {mqtt.password_file} is no UTF-8 text", hint="write the password alone into it"
        ) from error


def client_context(mqtt: Mqtt) -> ssl.SSLContext | None:
    """For mqtts://. Raises :class:`ConfigError`."""
    if not split_broker_url(mqtt.url)[2]:
        return None
    if mqtt.ca_file is not None:
        _open("mqtt.ca_file", mqtt.ca_file)
    try:
        context = ssl.create_default_context(cafile=str(mqtt.ca_file) if mqtt.ca_file else None)
    except ssl.SSLError as error:
        raise ConfigError(
            f"mqtt.ca_file {mqtt.ca_file} holds no certificate: {_reason(error)}",
            hint="give the PEM file of the CA that signed the broker's certificate",
        ) from error
    if mqtt.cert_file is not None and mqtt.key_file is not None:
        _load(context, ("mqtt.cert_file", mqtt.cert_file), ("mqtt.key_file", mqtt.key_file))
    return context


# --- files -----------------------------------------------------------------------------------------

Named = tuple[str, Path]
"""A setting and the file it names."""


def _load(context: ssl.SSLContext, certificate: Named, key: Named) -> None:
    def refuse() -> str:
        raise ConfigError(
            f"{key[0]} {key[1]} is encrypted, and nobody is there to type its passphrase",
            hint=f"write it without: openssl pkey -in {shlex.quote(str(key[1]))} -out FILE, for edged's user alone",
        )

    _open(*certificate)
    _open(*key)
    try:
        context.load_cert_chain(certificate[1], key[1], password=refuse)
    except ssl.SSLError as error:
        raise ConfigError(
            f"cannot use {certificate[0]} {certificate[1]} with {key[0]} {key[1]}: {_reason(error)}",
            hint="both must be PEM files, and the key the one that the certificate was made for",
        ) from error


def _open(setting: str, path: Path) -> None:
    """Find out whether a file can be read: what OpenSSL raises then does not name it."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise _unreadable(setting, path, error) from error


def _unreadable(what: str, path: Path, error: OSError) -> ConfigError:
    hint = "correct the path, or put the file there"
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = f"let the user that edged runs as read it: chown or chmod {path}, or the folders above it"
    return ConfigError(f"{what} {path} cannot be read: {error.strerror}", hint=hint, file=path)


def _reason(error: ssl.SSLError) -> str:
    """In words: OpenSSL's names for the two usual mistakes help nobody."""
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key is another certificate's"
    return error.reason.replace("_", " ").lower() if error.reason else "one of them is no PEM file"
