"""The wall clock, for what people say of times: "the last five minutes". Nothing else reads it here."""

from datetime import UTC, datetime


def now() -> datetime:
    return datetime.now(UTC)
