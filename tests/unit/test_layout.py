"""How the tree is laid out: five source roots of one namespace, and what none of their files may do."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOTS = ("client", "controller", "coordinator", "proto", "store")
LEAVES = sorted(path for root in ROOTS for path in (ROOT / root / "leasehold").iterdir() if path.is_dir())
WALL_CLOCKS = tuple(ROOT / role / "leasehold" / role / "walltime.py" for role in ("store", "client"))


def sources() -> Iterator[Path]:
    for root in ROOTS:
        for path in sorted((ROOT / root).rglob("*.py")):
            if not re.search(r"_pb2(_grpc)?\.py$", path.name):
                yield path


def test_the_same_roots_are_named_everywhere() -> None:
    tool = PROJECT["tool"]
    assert tuple(tool["hatch"]["build"]["dev-mode-dirs"]) == ROOTS
    wheel = tool["hatch"]["build"]["targets"]["wheel"]
    assert tuple(wheel["sources"]) == ROOTS
    assert tuple(wheel["only-include"]) == tuple(f"{root}/leasehold" for root in ROOTS)
    assert tuple(name for name in tool["mypy"]["mypy_path"] if name != "tests") == ROOTS
    assert f"ROOTS := {' '.join(ROOTS)}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("root", ROOTS)
def test_leasehold_is_a_namespace(root: str) -> None:
    """An `__init__.py` here would hide the other four."""
    assert [path.name for path in (ROOT / root / "leasehold").iterdir() if path.is_file()] == []


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.name)
def test_a_leaf_is_a_typed_package(leaf: Path) -> None:
    assert (leaf / "py.typed").is_file()
    for package in {path.parent for path in leaf.rglob("*.py")}:
        assert (package / "__init__.py").is_file(), f"{package} is no package"


@pytest.mark.parametrize("proto", sorted((ROOT / "proto").rglob("*.proto")), ids=lambda path: path.name)
def test_the_stubs_stand_beside_their_proto(proto: Path) -> None:
    for suffix in ("_pb2.py", "_pb2.pyi"):
        assert proto.with_name(proto.stem + suffix).is_file()


def test_every_entry_point_leads_somewhere() -> None:
    tables = {"console_scripts": PROJECT["project"]["scripts"], **PROJECT["project"]["entry-points"]}
    for group, table in tables.items():
        for name, target in table.items():
            point = importlib.metadata.EntryPoint(name, target, group)
            assert callable(point.load()), f"{group} {name}"


def test_no_source_reads_the_wall_clock() -> None:
    """Decisions read CLOCK_BOOTTIME. What people and retention need comes from one module
    of the daemons, and one of the client."""
    forbidden = re.compile(r"(^|\.)(time\.(time|time_ns)|datetime\.(now|utcnow|today)|date\.today)$")
    for path in sources():
        if path in WALL_CLOCKS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert not forbidden.search(ast.unparse(node)), f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert not {"time", "time_ns"} & {name.name for name in node.names}, f"{path}:{node.lineno}"


def test_only_one_module_spells_a_key() -> None:
    """A prefix that is put together elsewhere would not move with the configured one."""
    place = re.compile(r"['\"{/](devices|holders|epochs|assignments|grants|queue|requests|history)/['\"{]")
    for path in sources():
        if path.name == "keys.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                assert not place.search(ast.unparse(node)), f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_the_lowest_versions_are_told_of_everything_that_is_needed() -> None:
    told = subprocess.run(
        [sys.executable, ROOT / "tests" / "tools" / "lowest"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = {line.partition("==")[0] for line in told}
    needed = {re.split(r"[><=]", item)[0] for item in PROJECT["project"]["dependencies"]}
    assert needed <= names
    assert all("==" in line for line in told)
