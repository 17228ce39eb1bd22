"""The wall clock, which serves people and retention. No decision about control ever reads it."""

from datetime import UTC, datetime


def now() -> datetime:
    return datetime.now(UTC)


def timestamp() -> str:
    """Now, in RFC 3339 with milliseconds."""
    return now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
