"""What can not be is answered by a sentence that names it, and leaves nothing behind, by daemons as processes
and on the command line. etcd is dumped before and after, and is the same.
"""

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from leasehold.client.dev import DevCluster, free_port
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.kv import Kv
from leasehold.v1 import (
    access_pb2,
    access_pb2_grpc,
    devices_pb2,
    devices_pb2_grpc,
    maintenance_pb2,
    maintenance_pb2_grpc,
    records_pb2,
)

SOON = 30.0
BIG = "x" * 900_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=2, controllers=("a", "b")) as cluster:
        # Beside the first: what is asked of one must not find the other.
        cluster.add_device("disk-10")
        yield cluster


@pytest.fixture(autouse=True)
def nothing_is_written(cluster: DevCluster) -> Iterator[None]:
    before = dump(cluster)
    yield
    assert dump(cluster) == before


def dump(cluster: DevCluster) -> list[tuple[str, bytes, int]]:
    async def everything() -> list[tuple[str, bytes, int]]:
        async with Connection(EtcdConfig((cluster.etcd_endpoint,))) as connection:
            found = await Kv(connection).get_prefix("/")
        return [(item.key, item.value, item.mod_revision) for item in found.items]

    return asyncio.run(everything())


# Daemons: what stands in their file.

NAME = 'name = "n"\n'
STATE = 'name = "n"\nstate_dir = "{tmp}/state"\n'
ETCD = '[etcd]\nendpoints = ["{etcd}"]\nthrowaway = true\n'
BOTH = (
    ("x", r"not TOML"),
    ("", r"name: missing"),
    ('name = "../x"{state}', r"'\.\./x' is not an id"),
    ("name = 7{state}", r"name: expected str, found 7"),
    ("{base}sesion_ttl = 3", r"sesion_ttl: no such setting; there are "),
    ("{base}session_ttl = 1", r"2 s <= session_ttl <= 600 s does not hold: it is 1 s"),
    ("{base}session_ttl = 100000000000000000000", r"session_ttl <= 600 s does not hold"),
    ('{base}session_ttl = "10"', r"session_ttl: expected int, found '10'"),
    ("{base}session_ttl = true", r"session_ttl: expected int, found True"),
    ('{base}log_level = "LOUD"', r"log_level 'LOUD' is none of DEBUG"),
    ('{base}listen = "7400"', r"listen '7400' is not host:port"),
    ('{base}listen = "127.0.0.1:65536"', r"listen '127.0.0.1:65536' is not host:port"),
    ('{base}listen = "0.0.0.0:7400"', r"listen 0.0.0.0:7400 can be reached from other hosts: set cert_file"),
    ('{base}[etcd]\nendpoints = "x"', r"etcd.endpoints: expected a list, found 'x'"),
    ("{base}[etcd]\nendpoints = []", r"etcd: no etcd endpoint is given"),
    ('{base}[etcd]\nendpoints = ["127.0.0.1:2379"]', r"etcd: the etcd endpoint '127.0.0.1:2379' is not of"),
    ('{base}[etcd]\nendpoints = ["ftp://h:2379"]', r"etcd: .*'ftp://h:2379'.*its scheme is 'ftp'"),
    ('{base}[etcd]\nendpoints = ["http://h"]', r"etcd: .*'http://h'.*it has no port"),
    ('{base}[etcd]\nendpoints = ["http://h:2379/x"]', r"etcd: .*it has more than a host and a port"),
    ('{base}[etcd]\nendpoints = ["http://[::1:2379"]', r"etcd: the etcd endpoint 'http://\[::1:2379'"),
    ('{base}[etcd]\nendpoints = ["http://h:1", "https://h:2"]', r"etcd: etcd endpoints mix http and https"),
    (
        '{base}[etcd]\nprefix = "leasehold"',
        r"etcd: the etcd prefix 'leasehold' must begin and end with a slash",
    ),
    ('{base}[etcd]\nprefx = "/x/"', r"etcd.prefx: no such setting"),
    (
        '{base}[etcd]\nca_file = "/no/ca.pem"',
        r"etcd: .*certificates are given, but the etcd endpoints are http",
    ),
    (
        '{base}[etcd]\nendpoints = ["https://h:2379"]\nca_file = "/no/ca.pem"',
        r"etcd: ca_file /no/ca.pem: No such file",
    ),
    (
        '{base}[tls]\nca_file = "/no/ca.pem"\ncert_file = "/no/c.pem"\nkey_file = "/no/k.pem"',
        r"tls: ca_file /no/ca.pem: No such file or directory",
    ),
    ('{base}[tls]\nca_file = "/no/ca.pem"', r"tls.cert_file: missing"),
    ('{base}listen = "{taken}"\n{etcd_table}', r"can not listen on {taken}: Address already in use"),
)
CONTROLLER = (
    (NAME, r"state_dir: missing"),
    ('name = "n"\nstate_dir = "/proc/no"', r"state_dir: /proc/no: No such file or directory"),
    ('name = "n"\nstate_dir = "/etc/passwd"', r"state_dir: /etc/passwd: File exists"),
    ('name = "n"\nstate_dir = "/x\\u0000"', r"state_dir: '/x\\x00' has characters that a path here can not"),
    ("{base}drivers = []", r"drivers is empty"),
    (
        '{base}drivers = ["tape"]\n{etcd_table}',
        r"drivers: tape not installed; there are exec, filesystem, iscsi, nbd",
    ),
    ("{base}drain_seconds = 60.0", r"0 <= drain < stop does not hold: 60 s and 20 s"),
    ('{base}host = "a\\nb"', r"host 'a\\nb' is not printable or longer than 253 characters"),
    ("{base}drain_seconds = nan", r"0 <= drain < stop does not hold"),
    ("{base}[data]\nslots = 0", r"data: slots is 0, and must be from 1 to "),
    ("{base}[data]\nworkers = 0", r"data: workers is 0"),
    ("{base}[data]\nbase_port = 65535", r"data: base_port 65535 leaves no room for 2 workers"),
    ('{base}[data]\nlisten_host = "0.0.0.0"', r"data: 0.0.0.0 is every address of this host: set host"),
    ('{base}[data]\ngate_dir = "/proc/no"', r"data.gate_dir: /proc/no/\S+: No such file or directory"),
    ('{base}[filesystem]\nroot = "mnt"', r"filesystem: root 'mnt' is no absolute path"),
)
COORDINATOR = (
    ("{base}access_ttl = 0", r"2 s <= access_ttl <= 600 s does not hold: it is 0 s"),
    ("{base}access_ttl = 601", r"access_ttl <= 600 s does not hold: it is 601 s"),
    ('{base}state_dir = "/x"', r"state_dir: no such setting; there are access_ttl"),
)
DAEMONS = (
    *(("controller", *case) for case in (*BOTH, *CONTROLLER)),
    *(("coordinator", *case) for case in (*BOTH, *COORDINATOR)),
)


@pytest.mark.parametrize(("role", "text", "told"), DAEMONS)
def test_a_daemon_refuses_its_file(
    cluster: DevCluster, tmp_path: Path, role: str, text: str, told: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = f"127.0.0.1:{listener.getsockname()[1]}"
        values = {
            "{base}": STATE if role == "controller" else NAME,
            "{etcd_table}": ETCD.replace("{etcd}", cluster.etcd_endpoint),
            "{state}": '\nstate_dir = "s"' if role == "controller" else "",
            "{taken}": taken,
            "{tmp}": str(tmp_path),
        }
        for name, value in values.items():
            text, told = text.replace(name, value), told.replace(name, value)
        file = tmp_path / "daemon.toml"
        file.write_text(text, encoding="utf-8")
        # The end of its output is the end of every process that it may have started.
        done = _process("-m", "leasehold.client.daemon", role, str(file))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    # Besides, gRPC has a word of its own for a port in use, and an old etcd gets a warning.
    (line,) = (line for line in done.stderr.splitlines() if " ERROR " in line)
    assert re.search(f" ERROR .*{told}", line), line
    if "ERROR   leasehold-" in line:
        # Nothing but the file was looked at yet.
        assert f"{file}: " in line
        assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("role", ["controller", "coordinator"])
def test_nobody_at_the_etcd_endpoint(tmp_path: Path, role: str) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    file = tmp_path / "daemon.toml"
    base = STATE.replace("{tmp}", str(tmp_path)) if role == "controller" else NAME
    file.write_text(base + ETCD.replace("{etcd}", endpoint))
    done = _process("-m", "leasehold.client.daemon", role, str(file))
    # It may be there the next time, so this is no fault of the configuration.
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{endpoint}: can not be connected to" in line


# The command line.

NO = "/no/such"
COMMANDS: tuple[tuple[tuple[str, ...], int, str], ...] = (
    (("get", "devices", "-c", "somewhere"), 2, r"'somewhere' is not host:port"),
    (("get", "devices", "-c", "127.0.0.1:65536"), 2, r"'127.0.0.1:65536' is not host:port"),
    (("get", "device"), 2, r"No such command 'device'"),
    (("get", "devices", "-o", "xml"), 2, r"--output.*'xml' is not one of"),
    (("controller", "--config", NO), 2, r"--config.*/no/such"),
    (
        ("dev", "--directory", "/proc/no"),
        2,
        r"/proc/no: No such file or directory: name another with --directory",
    ),
    (("dev", "--size", "0"), 2, r"--size: '0' is no size"),
    (("dev", "--etcd-port", "70000"), 2, r"--etcd-port"),
    (
        ("create", "device", "d", "--ttl", "4294967296", "--backing", NO),
        65,
        r"ttl_seconds 4294967296 can not",
    ),
    (("create", "device", "d", "--ttl", "1", "--backing", NO), 65, r"ttl_seconds must be 0 for the default"),
    (("create", "device", "d", "--ttl", "601", "--backing", NO), 65, r"ttl_seconds must be .* to 600"),
    (("create", "device", "d", "-p", "backing"), 2, r"'backing' is not KEY=VALUE"),
    (("create", "device", "d", "-p", "size=1"), 65, r"driver nbd: parameter 'size' is unknown to the nbd"),
    (
        ("create", "device", "d", "--backing", NO, "-p", "cache=off"),
        65,
        r"driver nbd: parameter 'cache' must be none \(the default\) or writeback",
    ),
    (("create", "device", "d"), 65, r"driver nbd: parameter 'backing' is required"),
    (("create", "device", "d", "-p", "backing=x"), 65, r"parameter 'backing' must be an absolute path"),
    (("create", "device", "d", "-p", "backing=/a/../b"), 65, r"parameter 'backing' must be an absolute path"),
    (("create", "device", "d", "-p", "backing=/a\n"), 65, r"parameters.backing must be printable"),
    (("create", "device", "d", "--backing", NO), 77, r"a: /no/such: No such file.*b: /no/such.*--unchecked"),
    (("create", "device", "d", "--backing", "/"), 77, r"a: / is neither a regular file nor a block device"),
    (
        ("create", "device", "d", "--backing", NO, "--controllers", "b"),
        77,
        r"could serve it now: b: /no/such",
    ),
    (
        ("create", "device", "d", "--driver", "tape"),
        77,
        r"driver tape of device d .*; there are nbd; to make",
    ),
    (("create", "device", "d", "--driver", "../nbd"), 65, r"driver '\.\./nbd' is not an id"),
    (("create", "device", "d", "--controllers", "a,../x"), 65, r"controllers '\.\./x' is not an id"),
    (("create", "device", "d", "--controllers", "a,a"), 65, r"controllers must be named once each"),
    (("create", "device", "d", "--label", "pool"), 2, r"--label: 'pool' is not KEY=VALUE"),
    (("create", "device", "d", "--label", "Pool=x"), 65, r"labels 'Pool' is not an id"),
    (("create", "device", "d", "--label", "pool="), 65, r"labels.pool must be printable, not empty and at"),
    (("create", "device", "d", "--preemption", "always"), 2, r"--preemption.*'always' is not one of"),
    (
        ("create", "device", "d", "--preemption-grace", "3601"),
        65,
        r"preemption_grace_seconds must be .* 3600",
    ),
    (("create", "device", "d", "--min-hold", "86401"), 65, r"min_hold_seconds must be from 0 to 86400"),
    (("create", "device", "d", "--min-hold", "-1"), 2, r"--min-hold"),
    (("create", "device", "d", "--cool-down", "86401"), 65, r"cool_down_seconds must be from 0 to 86400"),
    (("create", "device", "d", "--fail-back", "home"), 2, r"--fail-back.*'home' is not one of"),
    (("create", "device", "d", "--path-template", "x"), 65, r"path_template must have {epoch} or {path}"),
    (
        ("create", "device", "d", "--path-template", "nbd://h/{x}{epoch}"),
        65,
        r"path_template has {x}, which is",
    ),
    (("create", "device", "../x", "--backing", NO), 65, r"device '\.\./x' is not an id: 1 to 63 of a-z"),
    (("create", "device", "--backing", NO, "--", "--version"), 65, r"device '--version' is not an id"),
    (("create", "device", "a,suid", "--backing", NO), 65, r"device 'a,suid' is not an id"),
    (("create", "device", "", "--backing", NO), 65, r"device '' is not an id"),
    (("create", "device", "d" * 64, "--backing", NO), 65, r"is not an id: 1 to 63"),
    (("create", "device", "d" * 100_000, "--backing", NO), 65, r"is not an id: 1 to 63"),
    (("create", "device", "\udcff", "--backing", NO), 65, r"device '.udcff' can not be sent"),
    (("create", "device", "disk-1", "--backing", "/other"), 65, r"device disk-1 exists already with another"),
    (("describe", "device", "disk-"), 66, r"there is no device disk-"),
    (("describe", "device", "disk-1/"), 65, r"device 'disk-1/' is not an id"),
    (("get", "history", "disk-1/../disk-2"), 65, r"device 'disk-1/\.\./disk-2' is not an id"),
    (("delete", "device", "disk-1\x01"), 65, r"device 'disk-1.x01' is not an id"),
    (("delete", "device", "disk"), 66, r"there is no device disk"),
    (("transfer", "disk-1", "--to", "../a"), 65, r"controller '\.\./a' is not an id"),
    (
        ("transfer", "disk-1", "--to", "nobody"),
        77,
        r"disk-1 was not transferred to nobody: .* is not registered",
    ),
    (("transfer", "disk-3", "--to", "a"), 66, r"there is no device disk-3"),
    (("transfer", "disk-1", "--to", "a", "--reason", "\x1b[2J"), 65, r"reason must be printable"),
    (("drain", "../a"), 65, r"controller '\.\./a' is not an id"),
    (("drain", "a", "--reason", "\x1b[2J"), 65, r"reason must be one printable line"),
    (("drain", "a", "--reason", ""), 65, r"reason must be one printable line"),
    (("drain", "a", "--operator", "me (root)"), 65, r"operator must be the name of who says so, .*without p"),
    (("drain", "a", "--within", "soon"), 2, r"--within: 'soon' is no time"),
    (("undrain", "a/b"), 65, r"controller 'a/b' is not an id"),
    (("pause", "disk-3"), 66, r"there is no device disk-3"),
    (("pause", "disk-1/"), 65, r"device 'disk-1/' is not an id"),
    (("pause",), 2, r"either a device or --all"),
    (("pause", "disk-1", "--all"), 2, r"either a device or --all"),
    (("resume", "../x"), 65, r"device '\.\./x' is not an id"),
    (("request", "../x"), 65, r"device '\.\./x' is not an id"),
    (("request", "disk-3"), 66, r"there is no device disk-3"),
    (("request", "disk-1", "--request-id", "--version"), 65, r"request_id '--version' is not an id"),
    (("request", "disk-1", "--priority", "101"), 2, r"--priority"),
    (("request", "disk-1", "--via", "a,b"), 65, r"controller 'a,b' is not an id"),
    (("request", "disk-1", "--client", "x\n"), 65, r"client must be a printable name"),
    (("request", "disk-1", "--wait", "soon"), 2, r"--wait: 'soon' is no time"),
    (("renew", "nobody"), 66, r"there is no request nobody"),
    (("release", "../x"), 65, r"request_id '\.\./x' is not an id"),
    (("cancel", "x" * 64), 65, r"request_id 'x+\.\.\.?'? ?.*is not an id|is not an id"),
    (("run", "disk-1"), 2, r"Missing argument '-- COMMAND'"),
    (("run", "../x", "--", "true"), 65, r"device '\.\./x' is not an id"),
    (("run", "disk-1", "--grace", "-1s", "--", "true"), 2, r"--grace"),
    (("history", "--since", "yesterday"), 2, r"--since: 'yesterday' is no time"),
    (("apply", "-f", NO), 2, r"--file: /no/such: No such file or directory"),
)
FILES: tuple[tuple[str, int, str], ...] = (
    ("{", 65, r"stdin is not YAML"),
    ("device: [1]", 65, r"device: must be a text"),
    (
        "{device: d, colour: red}",
        65,
        r"colour: is no field of a device; there are device, driver, .*path_templ",
    ),
    ("{device: ../x, parameters: {backing: /no/such}}", 65, r"device '\.\./x' is not an id"),
    ("{device: d, parameters: {backing: /no/such}}", 77, r"\(d\): parameters of device d: .*a: /no/such: No"),
    ("{device: d, driver: tape}", 77, r"\(d\): driver tape of device d can not be had"),
    ("{device: d, labels: {pool: 7}}", 65, r"labels.pool: must be a text and is a number: put it in quotes"),
    ("{device: d, labels: {Pool: x}}", 65, r"labels 'Pool' is not an id"),
    ("{device: d, preemption: always}", 65, r"preemption: must be one of never, lower, at-safe-point"),
    ("{device: d, preemption_grace_seconds: 9999}", 65, r"preemption_grace_seconds must be from 0 to 3600"),
    ("{device: d, min_hold_seconds: soon}", 65, r"min_hold_seconds: must be a whole number of seconds"),
    ("{device: d, cool_down_seconds: 86401}", 65, r"cool_down_seconds must be from 0 to 86400"),
    ("{device: d, fail_back: home}", 65, r"fail_back: must be one of stay, preferred, and is 'home'"),
    ("{device: d, path_template: 7}", 65, r"path_template: must be a text and is a number"),
    ("{device: d, path_template: '{path!r}'}", 65, r"path_template has {path!r}, which is no field"),
    ("{device: disk-1, parameters: {backing: /no/such}, ttl_seconds: 5}", 77, r"a: /no/such: No such file"),
    ("{device: disk-1, driver: tape, ttl_seconds: 5}", 77, r"driver tape of device disk-1 can not be had"),
)


@pytest.mark.parametrize(("arguments", "code", "told"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_command_says_what_is_wrong(
    cluster: DevCluster, arguments: tuple[str, ...], code: int, told: str
) -> None:
    _says(cluster, arguments, "", code, told)


@pytest.mark.parametrize(("file", "code", "told"), FILES)
def test_a_file_of_devices_is_refused(cluster: DevCluster, file: str, code: int, told: str) -> None:
    for more in ("--dry-run", "--yes"):
        _says(cluster, ("apply", "-f", "-", more), file, code, told)


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("LEASEHOLD_COORDINATORS", "", r"no coordinator is named: give host:port, or set LEASEHOLD_COORD"),
        ("LEASEHOLD_COORDINATORS", "x", r"LEASEHOLD_COORDINATORS: 'x' is not host:port"),
        ("LEASEHOLD_TLS_CA", NO, r"of LEASEHOLD_TLS_CA, .*: ca /no/such: No such file or directory"),
        ("LEASEHOLD_TLS_CA", "/dev/null", r"ca /dev/null: holds no certificate in PEM"),
        ("LEASEHOLD_TLS_CERT", NO, r"LEASEHOLD_TLS_CERT and LEASEHOLD_TLS_KEY need LEASEHOLD_TLS_CA"),
    ],
)
def test_an_environment_that_can_not_be_used(
    cluster: DevCluster, variable: str, value: str, told: str
) -> None:
    _says(cluster, ("get", "devices"), "", 2, told, **{variable: value})


def _says(
    cluster: DevCluster, arguments: tuple[str, ...], stdin: str, code: int, told: str, **environment: str
) -> None:
    given = {"LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints), "COLUMNS": "500", **environment}
    done = _process("-m", "leasehold.client.cli", *arguments, stdin=stdin, **given)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert re.search(told, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 2000, "it can not be read"


def _process(*arguments: str, stdin: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
        env={**os.environ, **environment},
    )


# The API, for what no shell lets through.

Ask = Callable[[Any, Any, Any], Awaitable[Any]]


def created(**fields: Any) -> Ask:
    spec = records_pb2.Device(**{"device": "d", "driver": "nbd", **fields})
    return lambda devices, *_: devices.CreateDevice(devices_pb2.CreateDeviceRequest(device=spec))


def updated(**fields: Any) -> Ask:
    spec = records_pb2.Device(**{"device": "disk-1", "driver": "nbd", **fields})
    return lambda devices, *_: devices.UpdateDevice(devices_pb2.UpdateDeviceRequest(device=spec))


def submitted(request: str = "q", **fields: Any) -> Ask:
    spec = access_pb2.AccessSpec(**{"device": "disk-1", **fields})
    return lambda _, access, *__: access.SubmitAccess(
        access_pb2.SubmitAccessRequest(request_id=request, spec=spec)
    )


def drained(**fields: Any) -> Ask:
    asked = maintenance_pb2.DrainControllerRequest(
        **{"controller": "a", "reason": "r", "operator": "o", **fields}
    )
    return lambda _, __, maintenance: maintenance.DrainController(asked)


def paused(**fields: Any) -> Ask:
    asked = maintenance_pb2.PauseDeviceRequest(
        **{"device": "disk-1", "reason": "r", "operator": "o", **fields}
    )
    return lambda _, __, maintenance: maintenance.PauseDevice(asked)


CALLS: tuple[tuple[Ask, str, str, str], ...] = (
    (created(device="d\0"), "INVALID_ID", "device", r"device 'd.x00' is not an id"),
    (created(device=BIG), "INVALID_ID", "device", r"device 'x+\.\.\.' is not an id"),
    (created(driver=BIG), "INVALID_ID", "driver", r"driver 'x+\.\.\.' is not an id"),
    (created(controllers=["a", "/b"]), "INVALID_ID", "controllers", r"controllers '/b' is not an id"),
    (created(controllers=[f"c{n}" for n in range(300)]), "INVALID_FIELD", "controllers", r"at most 256"),
    (created(parameters={"Backing": "/x"}), "INVALID_ID", "parameters", r"parameters 'Backing' is not an id"),
    (created(parameters={"backing": BIG}), "INVALID_FIELD", "parameters.backing", r"at most 4096 characters"),
    (created(parameters={"backing": "/x\0"}), "INVALID_FIELD", "parameters.backing", r"must be printable"),
    (
        created(parameters={"backing": "/x", "o": "a,suid"}),
        "BAD_PARAMETER",
        "parameters.o",
        r"'o' is unknown",
    ),
    (
        created(parameters={"backing": NO}),
        "NOT_REACHABLE",
        "parameters",
        r"a: /no/such: No such file.*b: /no",
    ),
    (
        created(driver="tape"),
        "NO_SUCH_DRIVER",
        "driver",
        r"no controller that is registered has it; there are nbd",
    ),
    (created(ttl_seconds=-1), "INVALID_FIELD", "ttl_seconds", r"from 2 to 600"),
    (created(version=2), "INVALID_FIELD", "version", r"version must be 1"),
    (created(takeover=9), "INVALID_FIELD", "takeover", r"HOLD_OFF or STRICT"),
    (created(labels={"a/b": "x"}), "INVALID_ID", "labels", r"labels 'a/b' is not an id"),
    (created(labels={"pool": "x\0"}), "INVALID_FIELD", "labels.pool", r"must be printable, not empty"),
    (created(labels={"pool": BIG}), "INVALID_FIELD", "labels.pool", r"at most 63 characters"),
    (created(labels={f"l{n}": "x" for n in range(17)}), "INVALID_FIELD", "labels", r"at most 16"),
    (created(preemption=9), "INVALID_FIELD", "preemption", r"NEVER, LOWER or AT_SAFE_POINT"),
    (updated(preemption_grace_seconds=-1), "INVALID_FIELD", "preemption_grace_seconds", r"from 0 to 3600"),
    (created(min_hold_seconds=-1), "INVALID_FIELD", "min_hold_seconds", r"from 0 to 86400"),
    (created(cool_down_seconds=1 << 30), "INVALID_FIELD", "cool_down_seconds", r"from 0 to 86400"),
    (created(fail_back=9), "INVALID_FIELD", "fail_back", r"STAY or PREFERRED"),
    (created(path_template="nbd://h/\0{epoch}"), "INVALID_FIELD", "path_template", r"makes no URI"),
    (created(path_template="x" * 900_000), "INVALID_FIELD", "path_template", r"longer than 1024 characters"),
    (updated(parameters={"backing": NO}), "NOT_REACHABLE", "parameters", r"b: /no/such: No such file"),
    (
        updated(path_template="{epoch:d}"),
        "INVALID_FIELD",
        "path_template",
        r"has {epoch:d}, which is no field",
    ),
    (submitted("q\0"), "INVALID_ID", "request_id", r"request_id 'q.x00' is not an id"),
    (submitted(BIG), "INVALID_ID", "request_id", r"is not an id"),
    (submitted(device="disk-1\0"), "INVALID_ID", "device", r"is not an id"),
    (submitted(priority=101), "INVALID_FIELD", "priority", r"priority must be"),
    (submitted(mode=99), "INVALID_FIELD", "mode", r"mode must be"),
    (submitted(wait_seconds=-1), "INVALID_FIELD", "wait_seconds", r"wait_seconds must be"),
    (submitted(client="x" * 254), "INVALID_FIELD", "client", r"client must be a printable name"),
    (drained(controller=""), "INVALID_ID", "controller", r"controller '' is not an id"),
    (drained(controller="a\0"), "INVALID_ID", "controller", r"controller 'a.x00' is not an id"),
    (drained(controller="_any"), "INVALID_ID", "controller", r"controller '_any' is not an id"),
    (drained(reason=""), "INVALID_FIELD", "reason", r"one printable line of at most 200 characters"),
    (drained(reason="x" * 201), "INVALID_FIELD", "reason", r"one printable line of at most 200 characters"),
    (drained(operator=""), "INVALID_FIELD", "operator", r"the name of who says so"),
    (drained(operator="alice (root)"), "INVALID_FIELD", "operator", r"without parentheses"),
    (paused(device="_any"), "INVALID_ID", "device", r"device '_any' is not an id"),
    (paused(reason="two\nlines"), "INVALID_FIELD", "reason", r"one printable line"),
    (paused(operator=BIG), "INVALID_FIELD", "operator", r"the name of who says so"),
    (
        lambda _, __, maintenance: maintenance.UndrainController(
            maintenance_pb2.UndrainControllerRequest(controller="a/../b")
        ),
        "INVALID_ID",
        "controller",
        r"controller 'a/\.\./b' is not an id",
    ),
    (
        lambda _, __, maintenance: maintenance.ResumeDevice(
            maintenance_pb2.ResumeDeviceRequest(device="disk-1/")
        ),
        "INVALID_ID",
        "device",
        r"device 'disk-1/' is not an id",
    ),
    (
        lambda _, __, maintenance: maintenance.GetMaintenance(
            maintenance_pb2.GetMaintenanceRequest(controller="../a")
        ),
        "INVALID_ID",
        "controller",
        r"controller '\.\./a' is not an id",
    ),
)


@pytest.mark.parametrize("asked", CALLS, ids=lambda asked: f"{asked[1]}-{asked[2]}")
def test_a_call_names_the_field_and_the_reason(cluster: DevCluster, asked: tuple[Ask, str, str, str]) -> None:
    ask, reason, field, told = asked

    async def refused(endpoint: str) -> tuple[error_details_pb2.ErrorInfo, str]:
        async with grpc.aio.insecure_channel(endpoint) as channel:
            stubs = (
                devices_pb2_grpc.DeviceServiceStub(channel),
                access_pb2_grpc.AccessServiceStub(channel),
                maintenance_pb2_grpc.MaintenanceServiceStub(channel),
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(ask(*stubs), SOON)
        info = error_details_pb2.ErrorInfo()
        status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
        assert status is not None, caught.value
        assert status.details[0].Unpack(info)
        return info, caught.value.details() or ""

    # A controller passes it on.
    for endpoint in (cluster.endpoints[0], cluster.controllers["a"].endpoint):
        info, details = asyncio.run(refused(endpoint))
        assert (info.reason, info.metadata["field"]) == (reason, field)
        assert re.search(told, details), details
        assert len(details) < 1000


def test_a_message_over_the_limit_is_not_tried_again(cluster: DevCluster) -> None:
    async def ask() -> None:
        from leasehold.client import BadRequest, connect  # noqa: PLC0415

        async with connect(*cluster.endpoints) as leasehold:
            with pytest.raises(BadRequest, match="larger than max"):
                await leasehold.device("x" * (2 << 20))

    asyncio.run(ask())
