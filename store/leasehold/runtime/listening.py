"""Where a daemon's API listens and where others reach it: host:port, an IPv6 address in brackets."""

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Self

from leasehold.runtime.tls import TlsSettings

_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_-]+)*\.?")
_NUMERIC = re.compile(r"[0-9.]+")
_LAST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Address:
    """`host` is a name or an IP address, without brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, setting: str, text: str) -> Self:
        """The address that `setting` gives as host:port. Raises ValueError, which names the setting."""
        wrong = f"{setting} {text!r} is not host:port"
        host, colon, port = text.rpartition(":")
        if not colon or not (port.isascii() and port.isdecimal()) or int(port) > _LAST_PORT:
            raise ValueError(f"{wrong}: the port is a number from 0 to {_LAST_PORT}")
        if host.startswith("[") and host.endswith("]"):
            if not _is_ip(host[1:-1], 6):
                raise ValueError(f"{wrong}: what stands in brackets is not an IPv6 address")
            return cls(host[1:-1], int(port))
        if ":" in host:
            raise ValueError(f"{wrong}: an IPv6 address stands in brackets, as in [::1]:7400")
        return cls(check_host(setting, host), int(port))

    @property
    def loopback(self) -> bool:
        """Reached from this host only. Of names only `localhost` is known to be."""
        if self.host.lower().rstrip(".") == "localhost":
            return True
        return _is_ip(self.host) and ipaddress.ip_address(self.host).is_loopback

    @property
    def wildcard(self) -> bool:
        """Every address of this host, and so none that others could be told."""
        return is_wildcard(self.host)

    def with_port(self, port: int) -> "Address":
        return Address(self.host, port)

    def obstacle(self) -> str:
        """Why it can not be listened on, in the kernel's words; empty if it could be just now."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, target in found:
                with socket.socket(family, kind, protocol) as tried:
                    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    tried.bind(target)
                    tried.listen()
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Listening:
    """The settings `listen`, `advertise`, `tls` and `insecure` of a daemon, as they go together.

    Raises ValueError where they do not, with what to do about it.
    """

    listen: str
    advertise: str = ""
    tls: TlsSettings | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        address = self.address
        if self.tls and self.insecure:
            raise ValueError("insecure = true contradicts [tls]: remove one of them")
        if not (address.loopback or self.tls or self.insecure):
            raise ValueError(
                f"listen {self.listen} can be reached from other hosts: set cert_file, key_file and ca_file"
                " under [tls], or insecure = true to let anybody in who reaches it, unencrypted"
            )
        if self.advertise:
            told = Address.parse("advertise", self.advertise)
            if told.wildcard or not told.port:
                raise ValueError(
                    f"advertise {self.advertise!r} is nowhere to be reached: it needs a host and a port"
                )
        elif address.wildcard:
            raise ValueError(
                f"listen {self.listen} is every address of this host: set advertise to the host:port at which"
                " others reach it"
            )

    @property
    def address(self) -> Address:
        return Address.parse("listen", self.listen)

    def endpoint(self, port: int) -> str:
        """host:port to tell others, when it listens on `port`."""
        return self.advertise or str(self.address.with_port(port))


def check_host(setting: str, host: str) -> str:
    """`host` if it is a name or an IP address without brackets. Raises ValueError that names the setting."""
    if host.startswith("[") and host.endswith("]"):
        raise ValueError(f"{setting} {host!r}: only with a port does an IPv6 address stand in brackets")
    # What has only digits and dots is a mistyped address, and no name.
    named = _NAME.fullmatch(host) is not None and not _NUMERIC.fullmatch(host)
    if not named and not _is_ip(host):
        raise ValueError(f"{setting} {host!r} is neither a host's name nor an IP address")
    return host


def is_wildcard(host: str) -> bool:
    return _is_ip(host) and ipaddress.ip_address(host).is_unspecified


def _is_ip(text: str, family: int | None = None) -> bool:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return False
    return family is None or found.version == family
