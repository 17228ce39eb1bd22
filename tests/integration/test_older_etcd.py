"""The main job on the etcd that Debian 12 ships, 3.4.23: it works, and every daemon warns of the risk."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from equipment import missing
from leasehold.client.dev import DevCluster
from leasehold.client.sync import connect

VARIABLE = "LEASEHOLD_OLDER_ETCD"


def older_etcd() -> str:
    """The program that LEASEHOLD_OLDER_ETCD names, or an etcd 3.4 on PATH; or the end of this test."""
    found = os.environ.get(VARIABLE) or shutil.which("etcd")
    if not found:
        missing("an etcd 3.4", f"name one in {VARIABLE}")
    told = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    if "etcd Version: 3.4." not in told:
        missing("an etcd 3.4", f"name one in {VARIABLE}; {found} is {told.splitlines()[0]}")
    return found


def test_the_main_job_on_a_faulty_etcd_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEASEHOLD_ETCD", older_etcd())
    with DevCluster(devices=1) as cluster:
        with connect(*cluster.endpoints) as leasehold:
            with leasehold.access("disk-1", controller="a") as first:
                assert first.controller == "a"
            with leasehold.access("disk-1", controller="b") as second:
                assert second.epoch == first.epoch + 1
                cluster.kill("b")
                assert any(change for change in second.changes() if second.epoch > first.epoch + 1)
                assert second.controller != "b"
        daemons = (*cluster.coordinators.values(), *cluster.controllers.values())
        for daemon in daemons:
            warnings = warnings_in(daemon.log)
            assert any("a live lease may be revoked" in line for line in warnings), daemon.name
            assert any("renewing a revoked lease may seem to succeed" in line for line in warnings)


def warnings_in(log: Path) -> list[str]:
    return [line for line in log.read_text(encoding="utf-8").splitlines() if " WARNING " in line]
