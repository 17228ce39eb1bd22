"""What the commands share: options, how to ask a coordinator, how to speak to the person at the terminal."""

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold

T = TypeVar("T")

CODES = "Exit codes are listed by leasehold --help."
POLLS = "It asks a coordinator every second."


class Form(StrEnum):
    """How to print what was found."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


Coordinators = Annotated[
    list[str] | None,
    typer.Option(
        "--coordinator",
        "-c",
        metavar="HOST:PORT",
        help="Whom to ask; may be repeated. By default $LEASEHOLD_COORDINATORS, separated by commas.",
        show_default=False,
    ),
]
Output = Annotated[Form, typer.Option("--output", "-o", help="How to print it; wide shows more columns.")]
Watch = Annotated[
    bool,
    typer.Option("--watch", "-w", help=f"Go on, and print what changes, until Ctrl-C. {POLLS}"),
]
DeviceName = Annotated[str, typer.Argument(metavar="DEVICE", help="Its id.")]
RequestName = Annotated[str, typer.Argument(metavar="REQUEST", help="Its id.")]


def group(text: str, **settings: Any) -> typer.Typer:
    """A command of commands, or the command line itself."""
    return typer.Typer(
        help=text,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **{"no_args_is_help": True, **settings},
    )


def say(message: str) -> None:
    """One line for the person at the terminal."""
    print(f"leasehold: {message}", file=sys.stderr, flush=True)  # noqa: T201 - the command line's own voice


def ask(coordinators: list[str] | None, work: "Callable[[Leasehold], Awaitable[T]]") -> T:
    """What `work` returns, run on an event loop of its own with the coordinators that were named."""
    from leasehold.client.connection import connect  # noqa: PLC0415

    async def asked() -> T:
        async with connect(*(coordinators or ())) as leasehold:
            return await work(leasehold)

    return asyncio.run(asked())


async def one(answer: Awaitable[T]) -> list[T]:
    """A list of the one answer."""
    return [await answer]


def limit(text: str, option: str) -> float | None:
    """As `seconds`; None for an empty text, which is no limit."""
    return seconds(text, option) if text else None


def seconds(text: str, option: str) -> float:
    """The seconds that `text` names: 90, 90s, 5m, 2h, 7d. Raises `typer.BadParameter` naming `option`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no time: 90, 90s, 5m, 2h or 7d", param_hint=option)
    return float(match[1]) * {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
