"""What a program says: its exit code, a JSON object on standard output, and the end of its standard error."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from leasehold.controller.executing.run import Outcome

LONGEST_PATH = 1024
LONGEST_REASON = 500
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:([A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+")
_SECRETS = ("password", "secret", "token", "key")
_HIGHEST = 10**10 - 1
"""The keys of the history have ten digits for an epoch."""


class Code(IntEnum):
    """The exit codes of a program that mean something. Any other is FAILED."""

    DONE = 0
    FAILED = 1
    NOT_REACHABLE = 3
    EPOCH_PASSED = 4
    NOT_PROVED = 5
    FENCE_REFUSED = 6
    BAD_PARAMETERS = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """What to make of a run. `code` is DONE only if the program did what it was asked and said so properly.

    `path` is empty if it named none, `highest` 0, `field` empty. `reason` is never empty unless it is DONE.
    """

    code: Code
    reason: str = ""
    path: str = ""
    highest: int = 0
    field: str = ""


class Nonsense(ValueError):
    """What a program said can not be used. The message says why."""


def understand(outcome: Outcome, parameters: Mapping[str, str]) -> Answer:
    """`parameters` are the device's: what is secret of them is taken out of what is told."""
    heard = _quiet(outcome.errors, parameters)
    if outcome.code is None:
        return Answer(Code.FAILED, _sentence(outcome.ended, heard))
    code = Code(outcome.code) if outcome.code in set(Code) else Code.FAILED
    try:
        said = _object(outcome.output)
        reason = _quiet(_text(said, "reason", LONGEST_REASON), parameters)
        path, field, highest = _path(said), _text(said, "field", 63), _epoch(said)
    except Nonsense as error:
        return Answer(Code.FAILED, _sentence(f"it ended with exit code {outcome.code}, but {error}", heard))
    if code is Code.DONE:
        return Answer(code, reason, path)
    if not reason:
        how = f"signal {-outcome.code}" if outcome.code < 0 else f"exit code {outcome.code}"
        reason = _sentence(f"it ended with {how}", heard)
    return Answer(code, reason, path, highest, field)


def _object(output: bytes) -> Mapping[str, object]:
    """What it said, nothing being an object without anything. Raises Nonsense."""
    if not output.strip():
        return {}
    try:
        said = json.loads(output)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise Nonsense(f"wrote no JSON object: {output[:80].decode(errors='backslashreplace')!r}")
    return said


def _text(said: Mapping[str, object], name: str, longest: int) -> str:
    value = said.get(name, "")
    if not isinstance(value, str):
        raise Nonsense(f"its {name!r} is no text")
    return _printable(value)[:longest]


def _path(said: Mapping[str, object]) -> str:
    path = said.get("path", "")
    if path == "":
        return ""
    if not isinstance(path, str) or len(path) > LONGEST_PATH or not _URI.fullmatch(path):
        raise Nonsense(f"its 'path' is no URI of at most {LONGEST_PATH} characters: {str(path)[:80]!r}")
    return path


def _epoch(said: Mapping[str, object]) -> int:
    value = said.get("highest", 0)
    if type(value) is not int or not 0 <= value <= _HIGHEST:
        raise Nonsense("its 'highest' is no epoch")
    return value


def _sentence(what: str, heard: str) -> str:
    # Of what was heard the end is what tells most.
    return f"{what}: {heard[-LONGEST_REASON:]}" if heard else what


def _quiet(text: str, parameters: Mapping[str, str]) -> str:
    for name, value in parameters.items():
        if value and name.endswith(_SECRETS):
            text = text.replace(value, "***")
    return _printable(text)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).strip()
