"""Messages made of what a caller gave."""

from collections.abc import Callable
from typing import Any, TypeVar

from leasehold.client.errors import BadRequest

M = TypeVar("M")

_SHOWN = 70


def made(message: Callable[..., M], **fields: Any) -> M:
    """A message with these fields. Raises `BadRequest`, which names one that no message can carry."""
    try:
        return message(**fields)
    except (ValueError, TypeError):
        for name, value in fields.items():
            try:
                message(**{name: value})
            except (ValueError, TypeError) as error:
                raise BadRequest(
                    f"{name} {repr(value)[:_SHOWN]} can not be sent: {error}",
                    "INVALID_FIELD",
                    {"field": name},
                ) from error
        raise
