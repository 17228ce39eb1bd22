"""The operator's commands one after the other on a real cluster, as a person would use them."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from leasehold.client import exits
from leasehold.client.clock import now
from leasehold.client.dev import DevCluster

SOON = 60.0


ACCESS_TTL = 30
"""Seconds that nobody renews: longer than all the commands that a test runs meanwhile."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=1, ttl=ACCESS_TTL) as cluster:
        yield cluster


class Commands:
    """`leasehold` as processes."""

    def __init__(self, cluster: DevCluster) -> None:
        self._environment = {**os.environ, "LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)}

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "leasehold.client.cli", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
        )

    @contextlib.contextmanager
    def started(self, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
        with self.start(*arguments) as process:
            try:
                yield process
            finally:
                process.kill()

    def __call__(self, *arguments: str, stdin: str = "", code: int = 0) -> tuple[str, str]:
        """What it printed to stdout and stderr."""
        with self.start(*arguments) as process:
            out, err = process.communicate(stdin, timeout=SOON)
        assert process.returncode == code, (arguments, out, err)
        return out, err

    def data(self, *arguments: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self(*arguments, "-o", "json")[0])
        return found


def until(holds: Callable[[], bool], what: str) -> None:
    deadline, pause = now() + SOON, threading.Event()
    while not holds():
        assert now() < deadline, what
        pause.wait(0.05)


def test_the_life_of_a_device(cluster: DevCluster, tmp_path: Path) -> None:
    leasehold = Commands(cluster)
    image = cluster.device_image("shelf")
    image.write_bytes(bytes(1 << 20))
    file = tmp_path / "devices.yaml"

    def write(**fields: object) -> None:
        spec = {"device": "shelf", "parameters": {"backing": str(image)}, "ttl_seconds": 5, **fields}
        file.write_text(yaml.safe_dump(spec), encoding="utf-8")

    # It is made, and the same file once more changes nothing.
    write(controllers=["a", "b"])
    shown, _ = leasehold("apply", "-f", str(file), "--dry-run")
    assert shown.startswith("create device shelf\n")
    leasehold("describe", "device", "shelf", code=exits.NOT_FOUND)
    leasehold("apply", "-f", str(file), "--yes")
    assert leasehold("apply", "-f", str(file), "--yes")[0] == ""

    # A second asks while the first has it.
    with leasehold.started("history", "--device", "shelf", "--follow", "-o", "name") as following:
        leasehold("request", "shelf", "--request-id", "first", "--via", "a", "--wait", "1h")
        leasehold("request", "shelf", "--request-id", "second", "--client", "other")

        def granted(request: str) -> bool:
            (status,) = leasehold.data("get", "requests", request)
            return status["request"]["state"] == "REQUEST_STATE_GRANTED" and bool(status["access"]["path"])

        until(lambda: granted("first"), "the first is not granted")
        page, _ = leasehold("describe", "device", "shelf")
        assert "first" in page.partition("Waiting:")[0]
        assert "second" in page.partition("Waiting:")[2]
        assert "PENDING" in leasehold("describe", "request", "second")[0]
        assert "shelf" in leasehold("describe", "controller", "a")[0]
        leasehold("cancel", "first", code=exits.REFUSED)
        for name in ("first", "second"):
            leasehold("renew", name)

        # While it is held, it stays the device it is, and its holder among its controllers.
        assert granted("first")
        (held,) = leasehold.data("get", "devices", "shelf")
        printed, _ = leasehold("get", "devices", "shelf", "-o", "yaml")
        write(controllers=["b"])
        assert "transfer it first" in leasehold("apply", "-f", str(file), "-y", code=exits.REFUSED)[1]
        write(parameters={"backing": "/elsewhere"})
        assert "a holds it" in leasehold("apply", "-f", str(file), "-y", code=exits.REFUSED)[1]
        assert granted("first")
        write(controllers=["a", "b"], takeover="strict")
        shown, _ = leasehold("apply", "-f", str(file), "-y")
        assert shown == "update device shelf\n  - takeover: hold-off\n  + takeover: strict\n"
        (after,) = leasehold.data("get", "devices", "shelf")
        assert after["etag"] != held["etag"]
        assert after["holder"]["epoch"] == held["holder"]["epoch"], "changing it has cost its client nothing"
        stale = printed.replace("ttl_seconds: 5", "ttl_seconds: 6", 1)
        assert "was changed since" in leasehold("apply", "-f", "-", "-y", stdin=stale, code=exits.REFUSED)[1]

        # The first gives it back, the second gets it.
        leasehold("release", "first")
        until(lambda: granted("second"), "the second is not granted")
        leasehold("delete", "device", "shelf", "--release", code=exits.REFUSED)
        assert granted("second"), "a refused deletion has ended an access"
        leasehold("release", "second")
        ended = leasehold.data("get", "requests", "--device", "shelf", "--ended")
        assert [status["request"]["state"] for status in ended] == ["REQUEST_STATE_ENDED"] * 2

        # Who follows has seen what the history has.
        names = leasehold("history", "--device", "shelf", "-o", "name")[0].splitlines()
        assert following.stdout is not None
        assert [following.stdout.readline().strip() for _ in names] == names
        following.kill()

    exported = [json.loads(line) for line in leasehold("history", "export")[0].splitlines()]
    half = exported[len(exported) // 2]["revision"]
    rest = [
        json.loads(line) for line in leasehold("history", "export", "--after-revision", half)[0].splitlines()
    ]
    assert rest == exported[len(exported) // 2 + 1 :]

    # The refusal says how to be rid of it, and that is how.
    (device,) = leasehold.data("get", "devices", "shelf")
    holder = device["holder"]["controller"]
    _, told = leasehold("delete", "device", "shelf", code=exits.REFUSED)
    assert f"{holder} holds it" in told
    assert "SIGTERM" in told
    cluster.controllers[holder].terminate()
    assert cluster.controllers[holder].join(SOON)
    leasehold("delete", "device", "shelf")
    cluster.restart(holder)
    assert "shelf" not in leasehold("get", "devices", "-o", "name")[0].split()
    assert "DELETED" in leasehold("get", "devices", "--deleted")[0]


def test_every_door_tells_the_versions(cluster: DevCluster) -> None:
    leasehold = Commands(cluster)
    for endpoint in (*cluster.endpoints, cluster.controllers["a"].endpoint):
        found = leasehold.data("version", "-c", endpoint)
        roles = [item["role"] for item in found]
        assert roles == ["client", "coordinator", "coordinator", "controller", "controller", "controller"]
        assert len({item["version"] for item in found}) == 1
