"""A file is the old one or the new one, whatever happens while it is written."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from mscm import atomic, processes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def umask():
    """The usual one, whatever the session runs under."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize("old", [None, b"old and long"])
def test_the_new_file_appears_at_the_end(tmp_path, old):
    """Folders are made; until the end a reader sees what was there."""
    path = tmp_path / "a" / "b" / "file"
    if old is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(old)
    with atomic.writing(path) as file:
        file.write(b"new")
        file.flush()
        assert (path.read_bytes() if path.exists() else None) == old
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


def test_what_takes_the_name_is_whole(tmp_path, monkeypatch):
    """Not what a buffer still holds a part of."""
    path, seen = tmp_path / "file", []
    cls = type(epath.Path(path))
    replace = cls.replace
    monkeypatch.setattr(cls, "replace", lambda self, goal: (seen.append(self.read_bytes()), replace(self, goal))[1])
    with atomic.writing(path) as file:
        file.write(b"new")
    assert seen == [b"new"] == [path.read_bytes()]


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_was_there(tmp_path, old, error):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(error), atomic.writing(path) as file:
        file.write(b"half of the")
        raise error
    assert {other.name: other.read_bytes() for other in tmp_path.iterdir()} == ({} if old is None else {"file": old})


def test_a_name_that_cannot_be_taken_leaves_nothing(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError), atomic.writing(tmp_path / "folder") as file:
        file.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(OSError), atomic.writing(tmp_path / "folder" / "inside" / ("x" * 300)):
        pass
    assert not list((tmp_path / "folder" / "inside").iterdir())


@pytest.mark.usefixtures("umask")
def test_others_may_read_it(tmp_path):
    """An evaluator may be another user."""
    with atomic.writing(tmp_path / "file") as file:
        file.write(b"new")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_two_processes_do_not_mix(tmp_path, monkeypatch):
    """The last to end wins, whole."""
    path = tmp_path / "file"
    with atomic.writing(path) as one:
        one.write(b"on")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with atomic.writing(path) as other:
            other.write(b"another")
        assert path.read_bytes() == b"another"
        one.write(b"e")
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]


# Is killed while it writes.
PROGRAM = """
import os, signal, sys
from mscm import atomic

with atomic.writing(sys.argv[1]) as file:
    file.write(b"half of the")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed(tmp_path):
    """By the next process that writes into the folder; nothing of those that live, are elsewhere or are nobody's."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "killed")]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith("killed.") and leftover.name.endswith(".tmp")
    elsewhere, users = tmp_path / "killed.0123456789ab.4194999.7.tmp", tmp_path / "notes.tmp"
    elsewhere.touch()
    users.touch()
    with atomic.writing(tmp_path / "one"):
        atomic._remove_leftovers.cache_clear()
        atomic.write_text(tmp_path / "two", "")
        assert len(list(tmp_path.iterdir())) == 4  # also what is being written
    assert sorted(path.name for path in tmp_path.iterdir()) == [elsewhere.name, users.name, "one", "two"]


def test_hosts_do_not_share_names(tmp_path, monkeypatch):
    """Nor do containers of one host: process 7 of one is not that of another."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    names = []
    for place in (["a", "boot", "pid:[1]"], ["b", "boot", "pid:[1]"], ["a", "boot", "pid:[2]"]):
        monkeypatch.setattr(processes, "place", lambda place=place: place)
        with atomic.writing(tmp_path / "file"):
            names += [path.name for path in tmp_path.glob("*.tmp")]
    assert len(set(names)) == 3


def test_a_name_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic.writing("file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_text_is_replaced_whole(tmp_path):
    """The new text, in a folder that is made, and nothing beside it."""
    path = tmp_path / "below" / "config.json"
    atomic.write_text(path, "old and long")
    atomic.write_text(path, "néw\n")
    assert path.read_bytes() == "néw\n".encode()
    assert list(path.parent.iterdir()) == [path]
