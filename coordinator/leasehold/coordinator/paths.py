"""The paths that clients get: the driver's own, or what a device's `path_template` makes of it.

A template is a URI with fields: `nbd://{data_host}:10809/{device}-{epoch}`, or `{path}?tls=on`. A field is
filled in as it is, and nothing else can stand in braces:

    {device}      the device's id
    {controller}  the holder's name
    {data_host}   the host that the holder has registered for paths; an IPv6 address gets its brackets
    {epoch}       the epoch
    {path}        the driver's path

{epoch} or {path} must be among them: a path is the path of one epoch, and one that outlived it would lead a
client that has lost its device to the client that has it now. Whoever stands behind a template (a proxy, a
gateway) has to keep that: what it leads to must end with the epoch.

The holder's record in etcd has the driver's path, so another template needs no word of the holder.
"""

import re
from urllib.parse import urlsplit

import grpc

from leasehold.coordinator.view import DeviceView
from leasehold.runtime.api import ApiError
from leasehold.store.records import Holder

LONGEST = 1024
_FIELD = re.compile(r"\{([^{}]*)\}")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:([A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+")
_SAMPLE = {
    "device": "d",
    "controller": "c",
    "data_host": "h",
    "epoch": "1",
    "path": "nbd://h:1/d-1",
}
"""What every field might stand for, by its name."""
_OF_AN_EPOCH = frozenset({"epoch", "path"})


class NoPath(Exception):
    """There is no path to be handed out now. The message says why; it may change."""


def check_template(template: str) -> None:
    """Raises `ApiError`, which names the field and what is wrong, if no path can be made of `template`."""
    if not template:
        return
    if len(template) > LONGEST:
        raise _bad(f"is longer than {LONGEST} characters")
    names = _FIELD.findall(template)
    for name in names:
        if name not in _SAMPLE:
            fields = ", ".join(f"{{{known}}}" for known in _SAMPLE)
            raise _bad(f"has {{{name[:40]}}}, which is no field; there are {fields}")
    rest = _FIELD.sub("", template)
    if "{" in rest or "}" in rest:
        raise _bad("has a brace that belongs to no field; in a URI it is written %7B or %7D")
    if not _OF_AN_EPOCH.intersection(names):
        raise _bad("must have {epoch} or {path}, so that no path is that of two epochs")
    if wrong := _no_uri(_filled(template, _SAMPLE)):
        raise _bad(f"makes no URI: {wrong}")


def client_path(view: DeviceView, holder: Holder, path: str) -> str:
    """Where clients reach a device that `holder` serves under the driver's `path`. Raises `NoPath`."""
    spec = view.state.spec
    template = spec.value.path_template if spec else ""
    if not template:
        return path
    registered = view.controllers.get(holder.controller)
    if registered is not None and registered.session_lease != holder.session_lease:
        # Another start of it, which may have another address; this hold is over, or soon will be.
        registered = None
    host = registered.data_host if registered else ""
    if "{data_host}" in template and not host:
        lacks = "is not registered now" if registered is None else "has not registered a host for paths"
        raise NoPath(f"its path_template needs the data_host of {holder.controller}, which {lacks}")
    made = _filled(
        template,
        {
            "device": view.device,
            "controller": holder.controller,
            "data_host": f"[{host}]" if ":" in host else host,
            "epoch": str(holder.epoch),
            "path": path,
        },
    )
    if wrong := _no_uri(made):
        raise NoPath(f"its path_template makes no URI in epoch {holder.epoch}: {wrong}")
    return made


def _filled(template: str, values: dict[str, str]) -> str:
    # Once over: what a value has in braces is no field.
    return _FIELD.sub(lambda field: values[field[1]], template)


def _no_uri(text: str) -> str:
    """Why `text` is no URI; empty if it is one."""
    if not _URI.fullmatch(text):
        at = next((char for char in text if not _URI.fullmatch(f"a:{char}") and char != "%"), "")
        return f"{at!r} can not stand in one" if at else "it needs a scheme, such as nbd:, and %XX for a %"
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as error:
        return str(error)
    return "it has no host" if parts.netloc and not parts.hostname else ""


def _bad(what: str) -> ApiError:
    return ApiError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        f"path_template {what}",
        field="path_template",
    )
