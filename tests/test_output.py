"""Output that nobody reads any more, or that has no room: the work goes on, and nobody sees a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mscm import output
from tests import commands

ROOT = Path(__file__).resolve().parents[1]
# Prints without a flush and with one; then works.
PROGRAM = """
import sys, warnings
from absl import logging
from mscm import cli

def main():
    print("one")
    print("two", flush=True)
    logging.info("three")
    warnings.warn("four")
    print("five", file=sys.stderr)
    open(done, "w").close()
    print("six")

done = sys.argv.pop()
cli.run(main, doc="", required=())
"""


def closed_pipe() -> int:
    """Where to write to a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.fixture(params=["a pipe", "a disk"])
def broken(request):
    """A stream that fails when it is written to, and cannot be closed before something is done about it."""
    with open(closed_pipe() if request.param == "a pipe" else "/dev/full", "w") as stream:
        yield stream, request.param == "a disk"


def test_printing_goes_on(broken, monkeypatch):
    """Flushed or not."""
    stream, is_full = broken
    monkeypatch.setattr(sys, "stdout", stream)
    with output.lasting() as printed:
        assert printed.error is None
        print("one")
        print("two", flush=True)
        assert (printed.error is not None) == is_full
        print("three", flush=True)
    assert sys.stdout is stream


def test_what_is_read_is_whole(capfd):
    with output.lasting() as printed:
        print("one")
        print("two", file=sys.stderr)
        assert printed.error is None and not printed.isatty()
    assert capfd.readouterr() == ("one\n", "two\n")


def test_a_command_says_a_full_disk_and_no_closed_pipe(broken, tmp_path, monkeypatch, capfd):
    stream, is_full = broken
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "stdout", stream)
    assert commands.run("report", f"--workdir={tmp_path}") == (73 if is_full else 0)
    errors = capfd.readouterr().err
    assert errors[:60] == ("error: standard output: got an error (No space left on devic" if is_full else "")
    assert (tmp_path / "report" / "index.html").exists()


def test_a_process_whose_reader_has_left_works_to_its_end(tmp_path):
    """As in 2>&1 | head -1: what is still to be written when Python ends does not change its status either."""
    pipe = closed_pipe()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "done")]
    try:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        assert subprocess.run(command, env=environment, stdout=pipe, stderr=pipe, timeout=300).returncode == 0
    finally:
        os.close(pipe)
    assert (tmp_path / "done").exists()
