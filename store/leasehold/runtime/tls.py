"""The `[tls]` table of a daemon: the certificate it shows, and whom it lets in."""

from dataclasses import dataclass
from pathlib import Path

import grpc

from leasehold.runtime.config import ConfigError
from leasehold.store import pem


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """PEM files. With `ca_file` a client has to show a certificate signed by one of its authorities.

    A daemon is a client too, of coordinators: there it shows the same certificate, and trusts the authorities
    of `ca_file`; without one, those that gRPC brings along. The files are read at the start only.
    """

    cert_file: Path
    key_file: Path
    ca_file: Path | None = None

    def __post_init__(self) -> None:
        self._read()

    def server(self) -> grpc.ServerCredentials:
        """For a listener. Raises ConfigError if the files are no longer what they were."""
        found = self._again()
        return grpc.ssl_server_credentials(
            [(found.key or b"", found.cert or b"")],
            root_certificates=found.ca,
            require_client_auth=found.ca is not None,
        )

    def client(self) -> grpc.ChannelCredentials:
        """For connections to other daemons. Raises ConfigError if the files are no longer what they were."""
        found = self._again()
        return grpc.ssl_channel_credentials(found.ca, found.key, found.cert)

    def _again(self) -> pem.Pem:
        try:
            return self._read()
        except ValueError as error:
            raise ConfigError(f"tls: {error}") from error

    def _read(self) -> pem.Pem:
        return pem.read(self.ca_file, self.cert_file, self.key_file)
