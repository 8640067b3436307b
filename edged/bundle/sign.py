"""Keys that sign bundles, Ed25519 in PEM files, and their signatures. Needs the ``bundle`` extra (cryptography).

Devices verify without it, by :mod:`edged.bundle.unpack`.
"""

import os
from collections.abc import Callable
from pathlib import Path

from edged.errors import BundleError

try:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
except ImportError as error:
    raise BundleError(
        "signing needs the package cryptography", hint="install it: pip install 'edged[bundle]'"
    ) from error


def make_key(private: Path, public: Path, passphrase: str = "") -> bytes:
    """Write a new key pair; the public key's 32 bytes. Neither file may exist: a key lost to another is lost for good.

    The private file is for its owner alone, and encrypted where there is a ``passphrase``.
    """
    key = Ed25519PrivateKey.generate()
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    known = key.public_key()
    text = known.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for file in (private, public):
        if file.exists():
            raise BundleError(f"{file} is there already", hint="keep that key, or give another --out", file=file)
    try:
        for file, content, mode in ((private, secret, 0o600), (public, text, 0o644)):
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as writable:
                writable.write(content)
    except OSError as error:
        raise BundleError(f"cannot write {file}: {error.strerror}", hint="give another --out", file=file) from error
    return known.public_bytes_raw()


def load_key(file: Path, ask_passphrase: Callable[[], str]) -> Ed25519PrivateKey:
    """The private key of a PEM file; ``ask_passphrase`` is called for an encrypted one."""
    try:
        content = file.read_bytes()
        try:
            key = serialization.load_pem_private_key(content, None)
        except TypeError:  # it is encrypted
            key = serialization.load_pem_private_key(content, ask_passphrase().encode())
    except (OSError, ValueError) as error:
        raise BundleError(
            f"the key {file} cannot be used: {error}", hint="'edged bundle keygen' makes one", file=file
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BundleError(f"{file} is no Ed25519 key", hint="'edged bundle keygen' makes one", file=file)
    return key


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The 32 bytes of a key's public half."""
    return key.public_key().public_bytes_raw()
