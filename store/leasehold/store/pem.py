"""Certificates and keys, checked before they are used.

gRPC takes any bytes for a certificate and says at the first handshake that it can do nothing with them; what
is wrong with a file is said here, when it is read.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Pem:
    """The contents of the files; None for one that was not given."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None


def read(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> Pem:
    """The files' contents. Raises `ValueError` with the name of a file that is of no use, and why.

    The certificate and the key must be given together and belong together; the key must not be encrypted.
    """
    if (cert_file is None) != (key_file is None):
        raise ValueError("cert_file and key_file must be given together")
    ca, cert, key = (
        _read(name, path)
        for name, path in (("ca_file", ca_file), ("cert_file", cert_file), ("key_file", key_file))
    )
    for name, path in (("ca_file", ca_file), ("cert_file", cert_file)):
        if path is not None:
            _certificate(name, path)
    if cert_file is not None and key_file is not None:
        _pair(cert_file, key_file)
    return Pem(ca, cert, key)


def explain(details: str, *, secure: bool) -> str:
    """What gRPC says of a connection that did not come about, and what that means where it is about TLS."""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return f"its certificate is not trusted: {details}"
    if "WRONG_VERSION_NUMBER" in details:
        return f"it does not speak TLS: {details}"
    if "Socket closed" in details or "reset by peer" in details:
        perhaps = "it may want a client certificate, or not trust ours" if secure else "it may speak TLS only"
        return f"it closed the connection, {perhaps}: {details}"
    return details


def _read(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{name} {path}: {error.strerror}") from error


def _certificate(name: str, path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise ValueError(f"{name} {path}: holds no certificate in PEM") from error


def _pair(cert_file: Path, key_file: Path) -> None:
    try:
        # Without a password OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert_file, key_file, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(
                f"cert_file {cert_file} and key_file {key_file} do not belong together"
            ) from error
        raise ValueError(f"key_file {key_file}: holds no unencrypted private key in PEM") from error
