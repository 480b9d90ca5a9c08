"""Files of a work directory, and times as a person reads them."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mscm import cli

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


def test_a_line_that_an_interruption_cut_is_left_out_and_then_replaced(tmp_path):
    """Every whole record is kept, whatever a killed writer left behind it."""
    path = tmp_path / "below" / "scores.jsonl"
    assert cli.read_json_lines(path) == []
    cli.append_json_line(path, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "sco')
    assert cli.read_json_lines(path) == [{"step": 1}]
    cli.append_json_line(path, {"step": 2})
    cli.append_json_line(path, {"step": 3})
    assert cli.read_json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_text_is_replaced_whole(tmp_path):
    """The new text, in a folder that is made, and nothing beside it."""
    path = tmp_path / "below" / "config.json"
    cli.write_text(path, "old and long")
    cli.write_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (3599.6, "1h 00m"), (3600.0 * 30 + 305, "30h 05m")],
)
def test_duration(seconds, text):
    assert cli.duration(seconds) == text
