"""TLS certificate and token of a run's control service.

Owns: making, storing and reading them, and comparing tokens.
Must never: log or print a secret, or leave one where another user can read it.

A run makes its own at every launch: whoever may read the run's ``control`` directory may steer the run. The
certificate is self-signed and is its own root, so a client that has the file talks to this run or to nobody.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CERTIFICATE = "certificate.pem"
PRIVATE_KEY = "private_key.pem"
TOKEN = "token"  # noqa: S105  the file's name
LIFETIME = timedelta(days=397)


class CredentialsError(RuntimeError):
    """Credentials that are missing, or that others can read; ``str()`` is one sentence for the user."""


@dataclass(frozen=True)
class Credentials:
    """PEM certificate and key, and the bearer token (256 bits, URL-safe base64)."""

    certificate: bytes
    private_key: bytes = field(repr=False)
    token: str = field(repr=False)


def create(directory: Path, host: str = "localhost") -> Credentials:
    """Makes new credentials valid for ``host`` and this machine's loopback names, and stores them in ``directory``.

    The directory gets mode 0700, its files 0600; credentials that were there are replaced.
    """
    certificate, private_key = _self_signed(host)
    made = Credentials(certificate, private_key, secrets.token_urlsafe(32))
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    _write(directory / CERTIFICATE, made.certificate)
    _write(directory / PRIVATE_KEY, made.private_key)
    _write(directory / TOKEN, made.token.encode())
    return made


def load(directory: Path) -> Credentials:
    """Reads what ``create`` stored; ``CredentialsError`` if a file is missing or open to other users."""
    return Credentials(
        certificate=_read(directory / CERTIFICATE),
        private_key=_read(directory / PRIVATE_KEY),
        token=_read(directory / TOKEN).decode(),
    )


def same_token(expected: str, given: str) -> bool:
    """Whether two tokens are equal, in a time that does not tell how far they agree."""
    return hmac.compare_digest(expected.encode(), given.encode())


def _self_signed(host: str) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "paceline control")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName(_alternative_names(host)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private_key = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private_key


def _alternative_names(host: str) -> list[x509.GeneralName]:
    names = dict.fromkeys(("localhost", "127.0.0.1", "::1", host))
    return [_alternative_name(name) for name in names]


def _alternative_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: Path, data: bytes) -> None:
    """Replaces a file in one step; it is private from its first byte on (``mkstemp`` gives 0600)."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(temporary, path)


def _read(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as error:
        raise CredentialsError(f"{path} cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise CredentialsError(f"{path} is open to other users (mode {mode & 0o777:04o}): expected 0600; chmod 600 it")
    return data
