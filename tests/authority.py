"""Certificates for tests, made by the openssl command."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from equipment import find_tool


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a directory, and what it signs."""

    directory: Path
    name: str

    def __post_init__(self) -> None:
        self._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *(
                "-keyout",
                str(self.key),
                "-out",
                str(self.certificate),
                "-days",
                "1",
                "-subj",
                f"/CN={self.name}",
            ),
        )

    @property
    def key(self) -> Path:
        return self.directory / f"{self.name}.key"

    @property
    def certificate(self) -> Path:
        return self.directory / f"{self.name}.pem"

    def sign(self, name: str, addresses: str = "IP:127.0.0.1,IP:::1") -> tuple[Path, Path]:
        """Certificate and key of `name`, for servers at `addresses` and for clients."""
        key, request = self.directory / f"{name}.key", self.directory / f"{name}.csr"
        certificate, extensions = self.directory / f"{name}.pem", self.directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={addresses}\nextendedKeyUsage=serverAuth,clientAuth\n")
        self._openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", str(key), "-out", str(request), "-subj", f"/CN={name}"),
        )
        self._openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.certificate), "-CAkey", str(self.key)),
            *("-CAcreateserial", "-days", "1", "-extfile", str(extensions), "-out", str(certificate)),
        )
        return certificate, key

    def _openssl(self, *arguments: str) -> None:
        command = [find_tool("openssl"), *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=30)
