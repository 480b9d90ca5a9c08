"""One holder at a time: the living is respected, the dead is replaced, and who was replaced is told."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mscm import lease, processes

ROOT = Path(__file__).resolve().parents[1]

# Holds the file and says so, until it is killed.
PROGRAM = """
import sys, time
from mscm import lease

with lease.holding(sys.argv[1], "evaluation"):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "eval" / "owner.json"


@pytest.fixture
def other(path):
    """A process that holds the file."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only while somebody waits; calls what is in `then` after each wait."""

    class Clock:
        now = 1000.0
        then = staticmethod(lambda: None)

        def pause(self, seconds):
            self.now += seconds
            assert self.now < 2000.0, "it waits without end"
            self.then()

    clock = Clock()
    monkeypatch.setattr(lease, "_now", lambda: clock.now)
    monkeypatch.setattr(lease, "_pause", clock.pause)
    return clock


def elsewhere(path, **changes):
    """Writes the file as a process on another machine would, whose number may well be in use here."""
    holder = lease._this_process() | {"place": ["node7", "boot", "pid:[1]"], "token": "theirs", "renewals": 0} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(holder))


def test_it_is_there_while_it_is_held(path):
    with lease.holding(path, "evaluation") as held:
        record = json.loads(path.read_text())
        assert record["pid"] == os.getpid() and record["place"][0]
        assert record["command"].startswith(os.path.basename(sys.executable))
        held.check()
    assert list(path.parent.iterdir()) == []
    with pytest.raises(KeyError), lease.holding(path, "evaluation"):
        raise KeyError
    assert list(path.parent.iterdir()) == []


def test_a_living_process_is_respected_until_it_is_killed(path, other):
    """With a sentence that names it; killed, it is not in the way, also before its parent has looked at it."""
    sentence = rf"owner.json: process {other.pid} on .* is at work on this evaluation"
    with pytest.raises(lease.LeaseError, match=sentence), lease.holding(path, "evaluation"):
        pass
    os.kill(other.pid, signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead and not yet waited for
    with lease.holding(path, "evaluation"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_it_waits_for_the_end_of_a_living_process(path, other, clock):
    waits = itertools.count(1)

    def then():
        if next(waits) == 3:
            other.kill()
            other.wait()

    clock.then = then
    with lease.holding(path, "evaluation", wait=True):
        pass
    assert next(waits) == 5  # three until its end, one to settle


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the kernel does not say when a process started")
def test_a_number_that_is_used_again_is_another_process(path):
    """Alive, and not the one that wrote the file."""
    elsewhere(path, place=processes.place(), process_start="1")
    with lease.holding(path, "evaluation"):
        pass


def test_a_process_elsewhere_that_renews_is_respected(path, clock):
    """Found out at its next renewal, whatever its clock says."""
    elsewhere(path)
    clock.then = lambda: elsewhere(path, renewals=1) if clock.now >= 1000.0 + lease.RENEW_SECONDS else None
    with pytest.raises(lease.LeaseError, match="on node7"), lease.holding(path, "evaluation"):
        pass
    assert clock.now <= 1000.0 + 2 * lease.RENEW_SECONDS


def test_a_process_elsewhere_that_is_silent_is_dead(path, clock):
    """Not before the stated time; a holder that came in between has a time of its own."""
    elsewhere(path)
    clock.then = lambda: elsewhere(path, token="third") if clock.now == 1000.0 + lease.RENEW_SECONDS else None
    with lease.holding(path, "evaluation"):
        assert clock.now >= 1000.0 + lease.RENEW_SECONDS + lease.STALE_SECONDS
    assert clock.now < 1000.0 + 2 * lease.RENEW_SECONDS + lease.STALE_SECONDS
    assert not path.exists()


def test_of_two_who_write_at_once_the_last_has_it(path, clock):
    """The first finds the second's name after the pause, and is refused as soon as that one shows that it lives."""
    renewals = itertools.count()
    clock.then = lambda: elsewhere(path, renewals=next(renewals))
    with pytest.raises(lease.LeaseError, match="on node7"), lease.holding(path, "evaluation"):
        pass
    assert json.loads(path.read_text())["token"] == "theirs"


@pytest.mark.parametrize("renews", [True, False])  # or is asked before it does
def test_who_was_replaced_is_told_and_touches_nothing(path, renews):
    with lease.holding(path, "evaluation") as held:
        held._renew()
        assert json.loads(path.read_text())["renewals"] == 1
        held.check()
        elsewhere(path)
        if renews:
            held._renew()
        with pytest.raises(lease.LeaseError, match="not heard of for 90 s, and process .* on node7 .* has taken over"):
            held.check()
    assert json.loads(path.read_text()) | {"token": "theirs", "renewals": 0} == json.loads(path.read_text())


def test_a_file_that_vanished_is_written_again(path):
    with lease.holding(path, "evaluation") as held:
        path.unlink()
        held._renew()
        assert json.loads(path.read_text())["renewals"] == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_a_damaged_file_holds_nothing(path, text):
    path.parent.mkdir()
    path.write_text(text)
    with lease.holding(path, "evaluation"):
        pass


def test_a_thread_renews(path, monkeypatch):
    """Also after an error of the file system."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.001)
    renew, count, done = lease.Lease._renew, itertools.count(), lease.threading.Event()

    def failing_at_first(self):
        if next(count) == 0:
            raise OSError("stale handle")
        renew(self)
        done.set()

    monkeypatch.setattr(lease.Lease, "_renew", failing_at_first)
    with lease.holding(path, "evaluation"):
        assert done.wait(60)
        assert json.loads(path.read_text())["renewals"] > 0
