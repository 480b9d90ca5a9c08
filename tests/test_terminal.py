"""The line of who waits, in real terminals of several kinds, and log lines where there is none."""

import os
import re
import subprocess
import sys
import threading

import pytest

from mscm import terminal
from tests import pseudo_terminal, tiny_run

# Twelve items, with a line of each kind in the middle; `end` is how it ends.
PROGRAM = """
import sys, time, warnings
from absl import logging
from mscm import cli, terminal

def main():
    with terminal.Elapsed("Compiling the step"):
        time.sleep(0.5)
    with terminal.Progress("photos/train", 12) as progress:
        for i in range(12):
            time.sleep(0.15)
            progress.add(1)
            if i == 5:
                logging.info("a line of the log")
                warnings.warn("a warning")
                print("no end", end="", file=sys.stderr)
                print(", an end", file=sys.stderr)
        {end}
    print("the result")

cli.run(main, doc="", required=())
"""


def run(end: str = "pass", **options) -> pseudo_terminal.Seen:
    return pseudo_terminal.run([sys.executable, "-c", PROGRAM.format(end=end)], **options)


def test_one_line_in_place_and_others_above_it():
    """What others write is whole, and the line ends with what it said last."""
    seen = run()
    assert seen.code == 0 and b"\x1b" not in seen.data
    screen = [line for line in seen.screen if line]
    assert re.fullmatch(r"Compiling the step, \ds", screen[0])
    assert re.fullmatch(r"I\d{4} .* a line of the log", screen[1])
    assert [line for line in screen if "a warning" in line and "UserWarning" in line]
    assert re.fullmatch(r"photos/train: 12/12 images, \d\.\d images/s, \ds", screen[-2])
    assert screen[-1] == "the result" and "no end, an end" in screen
    assert len([line for line in screen if "photos/train" in line]) == 1
    shown = [line for line in seen.drawn if line.startswith("photos/train")]
    assert len(shown) >= 6 and any(re.fullmatch(r".* [1-9]/12 images, \d\.\d images/s, \ds left", s) for s in shown)


@pytest.mark.parametrize("columns", [24, 60])
def test_no_line_is_wider_than_the_terminal(columns):
    """Which would leave the rest of it in the line below."""
    shown = [line for line in run(columns=columns).drawn if line.startswith("photos/train")]
    assert max(map(len, shown)) == min(columns - 1, max(map(len, shown))) >= columns - 16


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [
        ("raise FloatingPointError('got a loss of nan')", 2, "error: got a loss of nan"),
        ("raise KeyboardInterrupt", 130, "interrupted; run the same command again to continue"),
        ("sys.exit(3)", 3, "photos/train: 12/12 images, .*"),
    ],
)
def test_it_ends_cleanly(end, code, last):
    """What is said of the end has a line of its own."""
    seen = run(end)
    assert seen.code == code and seen.data.endswith(b"\n")
    lines = [line for line in seen.screen if line]
    assert re.fullmatch(last, lines[-1]) and sum("photos/train: 12/12" in line for line in lines) == 1


def test_ctrl_c_in_the_middle():
    seen = run("time.sleep(60)", interrupt=lambda data: b"photos/train: 12/12" in data)
    assert seen.code == 130
    *_, line, said = [line for line in seen.screen if line]
    assert re.fullmatch(r"photos/train: 12/12 images, .*", line) and said.startswith("interrupted; ")


@pytest.mark.parametrize("how", ["dumb", "unset", "file"])
def test_no_line_where_it_cannot_be_drawn(how, tmp_path):
    """A terminal that cannot go back, or none: the log says what is done, and nothing is written twice."""
    if how == "file":
        words = [sys.executable, "-c", PROGRAM.format(end="pass")]
        environment = os.environ | {"PYTHONPATH": str(pseudo_terminal.ROOT), "TERM": "xterm"}
        result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        text = result.stderr + result.stdout
    else:
        text = run(TERM="dumb" if how == "dumb" else "").data.decode().replace("\r\n", "\n")
    assert "\r" not in text and "photos/train" not in text and re.search(r"I\d{4} .*\] Compiling the step\n", text)
    assert "a line of the log" in text and "the result" in text


def test_the_log_says_it_every_ten_seconds(monkeypatch):
    """The rate is that of this process, which begins with 100 of 300 images done."""
    now, lines = 1000.0, []
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    monkeypatch.setattr(terminal.logging, "info", lambda text, *values: lines.append(text % values))
    with terminal.Progress("photos/train", 300, done=100) as progress:
        for seconds, num_images, line in [
            (9.9, 50, None),
            (10.0, 50, "200/300 images, 10.0 images/s, 10s left"),
            (15.0, 10, None),
            (19.9, 10, None),
            (25.0, 30, "250/300 images, 6.0 images/s, 8s left"),  # 150 in 25 s
            (200.0, 0, "250/300 images, 0.8 images/s, 1m 07s left"),
            (209.0, 10, None),
            (250.0, 40, "300/300 images, 0.8 images/s, 0s left"),
        ]:
            now = 1000.0 + seconds
            progress.add(num_images)
            assert lines == ([] if line is None else [f"photos/train: {line}"]), seconds
            lines.clear()


def test_what_an_earlier_run_has_done_does_not_count_for_the_speed(monkeypatch):
    """Also where that is known only later, and before anything is done there is only the time."""
    now, lines = 1000.0, []
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    monkeypatch.setattr(terminal.logging, "info", lambda text, *values: lines.append(text % values))
    with terminal.Progress("photos/train", 300, "captions") as progress:
        for seconds, done in ((20.0, 100), (40.0, 140), (41.0, 150), (42.0, 300)):
            now = 1000.0 + seconds
            progress.reach(done, before=100)
    assert lines == [
        "photos/train: 100/300 captions, 20s",
        "photos/train: 140/300 captions, 1.0 captions/s, 2m 40s left",
        "photos/train: 300/300 captions, 4.8 captions/s, 0s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (3599.6, "1h 00m"), (3600.0 * 30 + 305, "30h 05m")],
)
def test_duration(seconds, text):
    assert terminal.duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "columns", "fits"),
    [("abc", 3, ("abc", 3)), ("abc", 2, ("ab", 2)), ("数字.zip", 5, ("数字.", 5)), ("数字", 3, ("数", 2)),
     ("e\u0301a", 2, ("e\u0301a", 2)), ("a\x1b[2Jb\n", 9, ("a?[2Jb?", 7)), ("abc", 0, ("", 0))],
)
def test_a_text_is_cut_to_columns(text, columns, fits):
    """Characters may take two or none, and none moves the cursor."""
    assert terminal._fitting(text, columns) == fits


def test_nothing_is_left_behind(capsys):
    """Without a terminal no thread, and the streams are those of before."""
    before, threads = sys.stderr, threading.active_count()
    with terminal.Elapsed("work") as line:
        assert not line.is_drawn and sys.stderr is before and threading.active_count() == threads


def test_a_training_in_a_terminal(tmp_path):
    """One line for each model, which stays; the report and the exit are those of a training that nobody watches."""
    config = tmp_path / "config.py"
    config.write_text(tiny_run.CONFIG)
    words = [sys.executable, "-m", "mscm.main", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    seen = pseudo_terminal.run(words)
    lines = [line for line in seen.screen if "step " in line]
    assert seen.code == 0, seen.data.decode()
    assert len(lines) == 1 and re.fullmatch(
        r"digits_teacher: step 8/8, \w+, loss \d\.\d{4}, \d+ images/s, \d+% waiting for data", lines[0]
    )
    assert any(line.startswith("digits_teacher: step 0/8, ") for line in seen.drawn)  # while it compiles
    assert (tmp_path / "run" / "report" / "index.html").exists()
