"""Configuration files: TOML read into a tree of frozen dataclasses.

A key that means nothing is refused, not ignored: a mistyped safety setting must not silently be the default.

`${NAME}` within a text is the environment variable NAME, for what only the place where a daemon runs knows:
one file then does for all of a kind. Where such a variable is unset or empty the file is refused.
"""

import os
import re
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from leasehold.store import pem
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.keys import DEFAULT_PREFIX, Keys

T = TypeVar("T")

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class ConfigError(Exception):
    """A configuration that can not be used. The operator corrects the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdSettings:
    """The `[etcd]` table: where etcd is and under which prefix this installation lives. Raises ValueError."""

    endpoints: tuple[str, ...] = ("http://127.0.0.1:2379",)
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    prefix: str = DEFAULT_PREFIX
    throwaway: bool = False
    """A single member that may lose everything, started by `leasehold dev`: faulty versions pass."""

    def __post_init__(self) -> None:
        self.connection()
        pem.read(self.ca_file, self.cert_file, self.key_file)
        Keys(self.prefix)

    def connect(self) -> Connection:
        """A connection, which the caller closes. Raises `ConfigError` if a file is no longer what it was."""
        try:
            return Connection(self.connection())
        except ValueError as error:
            raise ConfigError(f"etcd: {error}") from error

    def connection(self) -> EtcdConfig:
        return EtcdConfig(
            endpoints=self.endpoints, ca_file=self.ca_file, cert_file=self.cert_file, key_file=self.key_file
        )


def load(cls: type[T], path: Path) -> T:
    """The file at `path` as a `cls`.

    Raises `ConfigError`, which names the file, the field and what is wrong with it. A ValueError from a
    dataclass's own `__post_init__` is reported the same way.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    try:
        return _table(cls, document, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _table(cls: type[T], document: Mapping[str, Any], where: str) -> T:
    if not isinstance(document, Mapping):
        raise ConfigError(f"{where}: expected a table, found {document!r}")
    hints = get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for name in document:
        if name not in known:
            raise ConfigError(f"{prefix}{name}: no such setting; there are {', '.join(sorted(known))}")
    values = {}
    for name, item in known.items():
        if name in document:
            values[name] = _value(hints[name], document[name], prefix + name)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{prefix}{name}: missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{where or 'settings'}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hasattr(hint, "__supertype__"):
        return _value(hint.__supertype__, value, where)
    if origin in (Union, types.UnionType):
        return _value(next(part for part in get_args(hint) if part is not type(None)), value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return _table(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        return tuple(_value(get_args(hint)[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a table, found {value!r}")
        return {name: _value(get_args(hint)[1], item, f"{where}.{name}") for name, item in value.items()}
    value = _expanded(value, where)
    if hint is Path:
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{where}: expected a path, found {value!r}")
        if not value.isprintable():
            raise ConfigError(f"{where}: {value!r} has characters that a path here can not have")
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value


def _expanded(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    for name in _VARIABLE.findall(value):
        if not os.environ.get(name):
            raise ConfigError(
                f"{where}: ${{{name}}} is empty: set {name} in the environment, or write the value"
            )
    return _VARIABLE.sub(lambda found: os.environ[found[1]], value)
