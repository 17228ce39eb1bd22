"""The directory of a development cluster: what can not be used is told, and nothing is left of it."""

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from leasehold.client.dev import DevCluster, Unusable
from leasehold.client.workplace import ROOM, Workplace


def test_a_temporary_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    workplace = Workplace.enter(None)
    assert workplace.path.parent == tmp_path
    assert (workplace.path / "etcd").stat().st_mode & 0o777 == 0o700
    workplace.leave()
    assert list(tmp_path.iterdir()) == []


def test_one_that_was_named_stays_and_can_be_entered_again(tmp_path: Path) -> None:
    for _ in range(2):
        Workplace.enter(tmp_path / "a" / "b").leave()
    assert (tmp_path / "a" / "b" / "logs").is_dir()


def test_two_at_once(tmp_path: Path) -> None:
    first = Workplace.enter(tmp_path)
    with pytest.raises(Unusable, match=r"in use by another cluster: end that, or name another"):
        Workplace.enter(tmp_path)
    first.leave()
    Workplace.enter(tmp_path).leave()


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=ROOM - 1))
    with pytest.raises(Unusable, match=r"has 71 MiB left and 72 are needed.*--directory or TMPDIR"):
        Workplace.enter(None)
    assert list(tmp_path.iterdir()) == []


def test_one_with_a_log_needs_no_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etcd" / "member").mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    Workplace.enter(tmp_path).leave()


def test_nowhere_to_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(Unusable, match=r"No usable temporary directory .*: name another with --directory or"):
        Workplace.enter(None)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_is_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unusable, match=r"/file.*: (File exists|Not a directory): name another"):
        Workplace.enter(tmp_path / name)


def test_a_part_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(Unusable, match=r"/logs: File exists: name another"):
        DevCluster(tmp_path).start()
