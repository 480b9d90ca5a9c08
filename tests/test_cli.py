"""Files of a work directory, and times as a person reads them."""

import contextlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mscm import atomic, cli

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
from mscm import cli

def main():
    import jax
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    print(jax.config.jax_compilation_cache_dir, jax.jit(lambda x: x + 1)(1))

cli.run(main, doc="", required=())
"""


def test_compiled_programs_are_kept(tmp_path):
    """Where the user says; else for each user and host; nowhere if that cannot be written to."""
    (tmp_path / "file").write_text("")
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}

    def run(**changes):
        environment = inherited | {"PYTHONPATH": str(ROOT)} | {name: str(path) for name, path in changes.items()}
        result = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()[0]

    default, chosen = tmp_path / "mscm" / f"jax-{platform.node()}", tmp_path / "chosen"
    assert run(XDG_CACHE_HOME=tmp_path) == str(default) and list(default.glob("jit__lambda*-cache"))
    assert run(XDG_CACHE_HOME=tmp_path / "other", JAX_COMPILATION_CACHE_DIR=chosen) == str(chosen)
    assert list(chosen.iterdir()) and not (tmp_path / "other").exists()
    assert run(XDG_CACHE_HOME=tmp_path / "file") == "None"


def test_lines_are_appended_in_their_order(tmp_path):
    """Any JSON, one object a line, in a folder that is made; no file holds none."""
    path = tmp_path / "below" / "scores.jsonl"
    assert cli.read_json_lines(path) == [] and not path.parent.exists()
    records = [{"step": 1, "fid": 2.5}, {"name": "two\nlines\u2028ü", "list": [1, None]}, {}, {"step": 1, "fid": 2.5}]
    for i, record in enumerate(records):
        cli.append_json_line(path, record)
        assert cli.read_json_lines(path) == records[: i + 1]
    assert path.read_text().startswith('{"step": 1, "fid": 2.5}\n{"name"') and path.read_text().count("\n") == 4
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_append_changes_nothing(tmp_path, monkeypatch):
    """Killed in the middle of a line, or given what is no JSON."""
    path, writing = tmp_path / "scores.jsonl", atomic.writing
    cli.append_json_line(path, {"step": 1})
    with pytest.raises(TypeError):
        cli.append_json_line(path, {"step": object()})

    @contextlib.contextmanager
    def interrupted(path):
        with writing(path) as file:
            yield file
            file.truncate(15)
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "writing", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli.append_json_line(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (3599.6, "1h 00m"), (3600.0 * 30 + 305, "30h 05m")],
)
def test_duration(seconds, text):
    assert cli.duration(seconds) == text


def test_meter(monkeypatch):
    """A line every ten seconds; the rate is that of this process, which begins with 100 of 300 images done."""
    now, lines = 1000.0, []
    monkeypatch.setattr(cli.time, "monotonic", lambda: now)
    monkeypatch.setattr(cli.logging, "info", lambda text, *values: lines.append(text % values))
    meter = cli.Meter("photos/train", 300, 100)
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
        meter(num_images)
        assert lines == ([] if line is None else [f"photos/train: {line}"]), seconds
        lines.clear()
