"""The examples for the driver `exec`, as they are documented, with real controllers and a real tgtd."""

import asyncio
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import library
from leasehold.client import Access, connect
from leasehold.client.dev import DevCluster, DevFailed
from leasehold.controller.iscsi.session import Address, Lost, Session
from leasehold.controller.scsi import commands
from leasehold.controller.scsi.sense import Reply
from targets import Target, target

pytestmark = pytest.mark.needs("tgtd")

EXAMPLES = Path(__file__).parents[2] / "docs" / "drivers" / "examples"
BLOCK = 512
RECORD = 1024
FILEMARK = (0, 0, 1)
"""Sense key, ASC and ASCQ of a read that has come to one."""
WAIT = 30.0


def install(directory: Path, name: str, settings: str) -> str:
    """An example as an operator installs it; where it is."""
    program = directory / name
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    # There is no Python in /opt/leasehold here.
    program.write_text(text.replace("/opt/leasehold/bin/python3", sys.executable), encoding="utf-8")
    program.chmod(0o755)
    program.with_suffix(".toml").write_text(settings, encoding="utf-8")
    return str(program)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with target(tmp_path_factory.mktemp("head"), luns=0) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(head: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    directory = tmp_path_factory.mktemp("examples")
    for name in ("luns", "registers", "cartridges"):
        (directory / name).mkdir()
    with (directory / "luns" / "disk-1.img").open("wb") as image:
        image.truncate(1 << 20)
    library.install(head, directory / "cartridges")
    export = "\n".join(
        (
            f'portal = "{head.portal}"',
            f"control = {head.control}",
            'prefix = "iqn.2026-11.test.leasehold"',
            f'directory = "{directory}/luns"',
            f'registers = "{directory}/registers"',
        )
    )
    tables = {
        "exec.lun": {"command": install(directory, "tgt-export", export), "fence": "reservation"},
        "exec.tape": {"command": install(directory, "tape", library.settings(head))},
    }
    with DevCluster(devices=0, drivers=("exec",), tables=tables) as running:
        running.create_device("disk-1", "exec", {"program": "lun", "image": "disk-1.img"})
        tape = {"program": "tape", "cartridge": library.CARTRIDGES[1]}
        running.create_device("weekly-1", "exec", tape)
        yield running


class Initiator:
    """A client of the LUN that a path names."""

    def __init__(self, path: str) -> None:
        found = re.fullmatch(r"iscsi://([^/]+)/([^/]+)/(\d+)(#.*)?", path)
        assert found, path
        me = ("iqn.2026-11.test.leasehold:client", path)
        self._session = Session(Address(found[1], found[2], int(found[3]), *me), patience=5.0)

    def close(self) -> None:
        self._session.close()

    def write(self, block: int, data: bytes) -> None:
        cdb = commands.write(block, len(data) // BLOCK)
        assert self._tried(cdb, out=data).good

    def read(self, block: int, count: int) -> bytes:
        into = bytearray(count * BLOCK)
        assert self._tried(commands.read(block, count), into=into).good
        return bytes(into)

    def write_record(self, data: bytes) -> None:
        assert self._tried(bytes((0x0A, 0, *len(data).to_bytes(3, "big"), 0)), out=data).good

    def read_record(self) -> tuple[bytes, Reply]:
        into = bytearray(RECORD)
        reply = self._tried(bytes((0x08, 0, *RECORD.to_bytes(3, "big"), 0)), into=into)
        return bytes(into), reply

    def _tried(self, cdb: bytes, out: bytes | None = None, into: bytearray | None = None) -> Reply:
        while True:
            reply = self._session.command(
                cdb,
                out=memoryview(bytearray(out)) if out is not None else None,
                into=memoryview(into) if into is not None else None,
            )
            # Said once to whoever is new.
            if reply.key != 6:
                return reply


async def moved(access: Access, epoch: int) -> str:
    """The path in an epoch after `epoch`."""
    async with asyncio.timeout(WAIT):
        while access.epoch <= epoch:
            await asyncio.sleep(0.05)
    return access.path


async def test_an_export_is_gone_before_the_next_one_is_there(cluster: DevCluster, head: Target) -> None:
    first, second, third = (bytes((number,)) * BLOCK for number in (1, 2, 3))
    async with connect(*cluster.endpoints, tls=False) as leasehold:
        async with leasehold.access("disk-1", controller="a") as access:
            old_path = access.path
            old = Initiator(old_path)
            old.write(0, first)
        async with leasehold.access("disk-1", controller="b") as access:
            with pytest.raises(Lost):
                old.write(0, third)
            with pytest.raises(OSError, match="iscsi://"):
                Initiator(old_path)
            current = Initiator(access.path)
            assert current.read(0, 1) == first
            current.write(1, second)
            cluster.kill("b")
            path = await moved(access, access.epoch)
            assert access.controller != "b"
            with pytest.raises(Lost):
                current.write(1, third)
            last = Initiator(path)
            assert last.read(0, 2) == first + second
            assert head.admin("show", "target").count(":disk-1-") == 1
    for client in (old, current, last):
        client.close()


async def test_a_cartridge_goes_from_one_to_the_next(cluster: DevCluster) -> None:
    records = [bytes((number,)) * RECORD for number in (1, 2)]
    async with connect(*cluster.endpoints, tls=False) as leasehold:
        async with leasehold.access("weekly-1", controller="a") as access:
            assert access.path.endswith(f"#weekly-1-{access.epoch}")
            drive = Initiator(access.path)
            for record in records:
                drive.write_record(record)
            drive.close()
        async with leasehold.access("weekly-1", controller="c") as access:
            drive = Initiator(access.path)
            for record in records:
                found, reply = drive.read_record()
                assert (found, reply.good) == (record, True)
            _, reply = drive.read_record()
            assert (reply.key, reply.asc, reply.ascq) == FILEMARK
            drive.close()


@pytest.mark.parametrize(
    ("parameters", "wrong"),
    [
        ({"program": "tape", "cartridge": "../A"}, "is no volume tag"),
        ({"program": "tape", "cartridge": "A00009L5"}, "cartridge A00009L5 is in 0 slots"),
        ({"program": "lun", "image": "../passwd"}, "is no plain file name"),
        ({"program": "lun", "image": "disk-9.img"}, "there is no "),
    ],
)
def test_what_can_not_be_used_is_named(cluster: DevCluster, parameters: dict[str, str], wrong: str) -> None:
    with pytest.raises(DevFailed, match=re.escape(wrong)):
        cluster.create_device("wrong", "exec", parameters)
