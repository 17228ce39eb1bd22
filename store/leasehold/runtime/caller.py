"""Who a call comes from, for a record that people rely on.

What TLS has verified is the certificate of the peer. A call through a controller has that of the controller,
which tells in the call's metadata whose certificate it was shown; nothing vouches for that but its word, and
whoever calls directly can put the same there. So `shown` says first what is verified, and the rest as told. A
relay passes on no such metadata that it was given.
"""

from typing import Any

RELAY, CALLER = "leasehold-relay", "leasehold-caller-bin"
"""Metadata: the controller that passes a call on, and the name in the certificate that it was shown."""

_LONGEST = 253


def told(context: Any, relay: str) -> tuple[tuple[str, str | bytes], ...]:
    """What a relay adds to the metadata of the call of `context`."""
    return (RELAY, relay), (CALLER, _certificate(context).encode())


def shown(context: Any) -> str:
    """What is known of who calls, without parentheses; empty for a direct call without a certificate."""
    metadata = dict(context.invocation_metadata() or ())
    peer = _certificate(context)
    verified = f"certificate {peer}" if peer else "no certificate"
    if RELAY not in metadata and CALLER not in metadata:
        return verified if peer else ""
    relay, caller = _plain(metadata.get(RELAY, "")), _plain(metadata.get(CALLER, b""))
    return (
        f"{verified}; says that it is controller {relay or 'unknown'} and was shown"
        f" {f'certificate {caller}' if caller else 'no certificate'}"
    )


def identity(context: Any) -> str:
    """The name in the certificate of who calls, as far as is known; empty if nothing is.

    For counting whose requests are whose. Of a call through a controller it is what that one tells.
    """
    metadata = dict(context.invocation_metadata() or ())
    return _plain(metadata[CALLER]) if CALLER in metadata else _certificate(context)


def _certificate(context: Any) -> str:
    """The names in the peer's certificate; none without one."""
    found = context.auth_context()
    names = found.get("x509_common_name") or found.get("x509_subject_alternative_name") or ()
    return _plain(b", ".join(names))


def _plain(text: "str | bytes") -> str:
    """On one line, and without what could be taken for words of `shown`."""
    name = text.decode(errors="replace") if isinstance(text, bytes) else text
    return "".join(char for char in name if char.isprintable() and char not in "();")[:_LONGEST].strip()
