"""Files of a work directory, and where compiled programs are."""

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


def test_a_cache_of_others_that_cannot_be_written_is_not_said():
    """Matplotlib's, in a container whose user has no home: nothing that a user would have to mend."""
    home = {name: "/proc/nowhere" for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    environment = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
    program = 'from mscm import cli\ncli.run(lambda: __import__("mscm.report.plots"), doc="", required=())'
    environment |= home | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
