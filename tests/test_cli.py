"""Files of a work directory, and where compiled programs are."""

import contextlib
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mscm import atomic, cli, run_report
from tests import commands

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


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch, capfd):
    """Also after an equals sign, where no shell replaces it, and in a list."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("")
    config = "--config=configs/digits_teacher.py"
    assert f"got '{tmp_path}/file', which is a" in commands.refusal(capfd, "main", config, "--workdir=~/file")
    said = commands.refusal(capfd, "main", config, f"--workdir={tmp_path}/x", "--config.data.path=~/none", "--dry_run")
    assert f"got '{tmp_path}/none', expected an existing folder" in said
    said = commands.refusal(capfd, "compare", "--workdir=~/b,~/a", f"--output={tmp_path}")
    assert f"got {tmp_path}/b, which has no config.json" in said
    assert cli._without_tilde("--workdir=~/b,~/a,c~/") == f"--workdir={tmp_path}/b,{tmp_path}/a,c~/"


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    said = commands.refusal(capfd, "demo", f"--output={tmp_path}/x.png")
    assert f"--output: got '{tmp_path}/x.png', expected a file to write to: Permission denied" in said
    with pytest.raises(PermissionError):
        cli.check_can_write(tmp_path)


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


@pytest.mark.parametrize("where", ["its imports", "its work"])
def test_an_interrupt_is_one_line_from_the_start(where, tmp_path, monkeypatch, capfd):
    """While it imports nothing is raised: a compiled library would make another error of it, or crash."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(os, "_exit", sys.exit)

    def interrupt(*_):
        with pytest.raises((KeyboardInterrupt, SystemExit)) as raised:
            signal.raise_signal(signal.SIGINT)
        assert raised.type is (SystemExit if where == "its imports" else KeyboardInterrupt)
        raise raised.value

    if where == "its imports":
        monkeypatch.setattr(cli, "_keep_compiled_programs", interrupt)
    else:
        monkeypatch.setattr(run_report, "write", interrupt)
    try:
        assert commands.run("report", f"--workdir={tmp_path}") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == "interrupted; run the same command again to continue\n"
