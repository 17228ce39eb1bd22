"""TLS towards coordinators and controllers, and why it did not come about.

gRPC tells a refused certificate from a broken network only sometimes. So when a connection was closed before
anything was answered, one more is made with the ssl module, which says what is wrong.
"""

import asyncio
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import grpc

from leasehold.client.errors import Untrusted

CA, CERT, KEY = "LEASEHOLD_TLS_CA", "LEASEHOLD_TLS_CERT", "LEASEHOLD_TLS_KEY"
PROBE = 1.0
"""Seconds that it may take to find out what is wrong."""
_SUSPECT = ("handshake failed", "Hostname Verification", "Peer name", "Socket closed", "reset by peer")
"""gRPC's words, of any of its versions, for a connection that was accepted and came to nothing."""


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. `ca`: the authorities that a server's certificate must be signed by. `cert` and `key`, both
    or neither: what this client shows, which it must if the server asks for it; the key is not encrypted.

    Raises `Untrusted`, which names the file, if they can not be used.
    """

    ca: Path | str
    cert: Path | str | None = None
    key: Path | str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise Untrusted(f"a certificate and its key go together: set both {CERT} and {KEY}", "TLS_FILES")
        for name, path in (("ca", self.ca), ("cert", self.cert), ("key", self.key)):
            if path is not None:
                _read(name, path)
        _certificate("ca", self.ca)
        if self.cert is not None and self.key is not None:
            _certificate("cert", self.cert)
            _pair(self.cert, self.key)

    @classmethod
    def from_environment(cls) -> Self | None:
        """What LEASEHOLD_TLS_CA, LEASEHOLD_TLS_CERT and LEASEHOLD_TLS_KEY say; None if none is set."""
        ca, cert, key = (os.environ.get(name) or None for name in (CA, CERT, KEY))
        if ca is None:
            if cert or key:
                raise Untrusted(f"{CERT} and {KEY} need {CA}: whom to show them to", "TLS_FILES")
            return None
        try:
            return cls(ca, cert, key)
        except Untrusted as error:
            raise Untrusted(f"of {CA}, {CERT} and {KEY}: {error.message}", error.reason) from error

    def credentials(self) -> grpc.ChannelCredentials:
        cert = None if self.cert is None else _read("cert", self.cert)
        key = None if self.key is None else _read("key", self.key)
        return grpc.ssl_channel_credentials(_read("ca", self.ca), key, cert)


Security = Tls | Literal[False] | None
"""TLS, plaintext, or what the environment says."""


def settled(given: Security) -> Tls | None:
    """What `given` comes down to; None is plaintext. Raises `Untrusted`."""
    if given is None:
        return Tls.from_environment()
    return given or None


def suspect(details: str) -> bool:
    """Whether gRPC's `details` of a failed call can be about TLS."""
    return any(words in details for words in _SUSPECT)


async def obstacle(address: str, tls: Tls | None) -> str:
    """What keeps a client with `tls`, or one in plaintext, from talking to the server at `address`.

    Empty if it is not TLS, or could not be found out within PROBE seconds.
    """
    try:
        async with asyncio.timeout(PROBE):
            return await (_plaintext(address) if tls is None else _secure(address, tls))
    # Also the time-out, and a certificate that was replaced meanwhile.
    except OSError:
        return ""


async def _plaintext(address: str) -> str:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        await _greeting(address, context)
    except ssl.SSLError:
        return ""
    return f"it speaks TLS: set {CA}"


async def _secure(address: str, tls: Tls) -> str:
    context = ssl.create_default_context(cafile=tls.ca)
    if tls.cert is not None:
        context.load_cert_chain(tls.cert, tls.key)
    try:
        greeted = await _greeting(address, context)
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not trusted: {error.verify_message}"
    except ssl.SSLError:
        return "it does not speak TLS"
    if greeted:
        return ""
    return f"it wants a client certificate: set {CERT} and {KEY}" if tls.cert is None else "it refuses ours"


async def _greeting(address: str, context: ssl.SSLContext) -> bool:
    """Whether the server says anything after the handshake, as gRPC does at once if it lets us in."""
    host, _, port = address.rpartition(":")
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
    try:
        return bool(await reader.read(1))
    finally:
        writer.transport.abort()


def _read(name: str, path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Untrusted(f"{name} {path}: {error.strerror}", "TLS_FILES") from error


def _certificate(name: str, path: Path | str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise Untrusted(f"{name} {path}: holds no certificate in PEM", "TLS_FILES") from error


def _pair(cert: Path | str, key: Path | str) -> None:
    try:
        # Without a password OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise Untrusted(f"{cert} and {key} do not belong together", "TLS_FILES") from error
        raise Untrusted(f"key {key}: holds no unencrypted private key in PEM", "TLS_FILES") from error
