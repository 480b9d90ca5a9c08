"""Kills a run of the digits, again and again, and compares its end with that of a run that nobody killed.

  python -m benchmarks.kill_test --directory=runs/kill_test
  python -m benchmarks.kill_test --directory=runs/kill_test --kills=10 --first_seed=7

TRACT from a teacher, in two phases, of a small network and few steps, which saves often and is scored. Each run gets
`--kills_each` times kill -9, and after each the same command is started again; there are as many runs as `--kills`
needs. What a kill meets is planned in equal shares and drawn in its order, start-up, training, saving, the change from
one phase to the next, or evaluation; when exactly is drawn too, after the run has come there. At the end the hash of
the last checkpoints of all phases (parameters, averages, optimiser, target network, step), the scores and the metrics
of every report must be those of the whole run. Prints a line for each run and what the kills met; exit status 1 after a
difference.
"""

import collections
import hashlib
import itertools
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from mscm.checkpoint import reading
from mscm.config import load_config
from mscm.experiment import Experiment, build
from mscm.report import events
from mscm.report.table import format_table

ROOT = Path(__file__).resolve().parents[1]
# What a kill meets, and how long after it came there the run is killed at the latest, in seconds.
MOMENTS = {"start-up": 6.0, "training": 0.5, "saving": 0.1, "phase change": 2.0, "evaluation": 6.0}
# How fast it was: not the same in any two runs.
_TIMES = ("steps_per_second", "images_per_second", "data_wait_fraction", "model_flops_utilisation")

CONFIG = "configs/digits_tract2.py"
# Of the teacher and of the student.
SMALL = {
    "model.middle.width": 32,
    "model.middle.num_blocks": 1,
    "model.emb_dim": 16,
    "model.head_dim": 16,
    "optimizer.warmup_steps": 2,
    "train.batch_size": 8,
    "train.steps_per_dispatch": 2,
}
LENGTH = {"train.num_steps": 120, "train.log_every_steps": 4, "train.save_every_steps": 10}
EVALUATION = {"eval.num_images": 200, "eval.batch_size": 20, "eval.teacher_steps": (2, 8)}

# The same network as the student's, which no override can reach.
TEACHER = """
from configs import digits


def get_config():
    config = digits.teacher()
    config.update_from_flattened_dict({settings!r})
    return config
"""

# Not `--workdir`, which mscm defines: a test imports both.
DIRECTORY = flags.DEFINE_string("directory", None, "Directory of all runs; empty, or not there.")
KILLS = flags.DEFINE_integer("kills", 100, "Kills of all runs together.", lower_bound=1)
KILLS_EACH = flags.DEFINE_integer("kills_each", 20, "Kills of one run.", lower_bound=1)
FIRST_SEED = flags.DEFINE_integer("first_seed", 0, "Of the moments of the first run; the next has the next.")


class Command:
    """The command of all runs, apart from the work directory."""

    def __init__(self, folder: Path, **changes: Any):
        """Writes the teacher's config to `folder`; `changes` are to the settings, a dot written as two underscores."""
        settings = SMALL | LENGTH | EVALUATION | {name.replace("__", "."): value for name, value in changes.items()}
        teacher = folder / "teacher.py"
        of_both = {name: settings[name] for name in SMALL | LENGTH}
        teacher.write_text(TEACHER.format(settings=of_both))
        self._settings = settings | {"teacher.config": str(teacher)}

    def words(self, workdir: Path) -> list[str]:
        """The command line."""
        overrides = [f"--config.{name}={value}" for name, value in self._settings.items()]
        return [sys.executable, "-m", "mscm.main", f"--config={CONFIG}", f"--workdir={workdir}", *overrides]

    def experiment(self) -> Experiment:
        """What it trains."""
        config = load_config(CONFIG)
        config.update_from_flattened_dict(self._settings)
        return build(config)


def moment(said: str, *, saves: bool) -> str:
    """Where a process is, by what it has written to its log and whether a save is under way."""
    if saves:
        return "saving"
    if "Scoring" in said:
        return "evaluation"
    steps = re.findall(r"Training|step (\d+)/(\d+)", said)
    if not any(number for number, _ in steps):
        return "start-up"
    number, of = steps[-1]
    return "phase change" if number == of else "training"  # both are empty where a phase has just begun


def unfinished(workdir: Path) -> set[Path]:
    """The folders of saves that have not come to their end: under way, or cut."""
    folders = [workdir, workdir / "teacher", *workdir.glob("phases/*")]
    return {path for folder in folders for path in folder.glob("checkpoints/*.orbax-checkpoint-tmp*")}


def run(words: list[str], workdir: Path, kill: str | None = None, *, wait: float = 0.0) -> str | None:
    """Runs the command to its end, which is None; or kills it `wait` seconds after the moment `kill`: what it met.

    Raises:
      RuntimeError: it failed by itself.
    """
    before = unfinished(workdir)
    log = workdir.with_suffix(".log")
    start = log.stat().st_size if log.exists() else 0

    def now() -> str:
        with log.open("rb") as file:
            file.seek(start)
            return moment(file.read().decode(errors="replace"), saves=bool(unfinished(workdir) - before))

    with log.open("ab") as file:
        process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file)
    try:
        while process.poll() is None and kill is not None and now() != kill:
            time.sleep(0.01)
        process.wait(wait if kill is not None else None)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return now()
    finally:
        process.kill()
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}, see {log}")
    return None


def plan(seed: int, kills: int) -> list[tuple[str, float]]:
    """What the kills of a run are to meet, in this order, and how long after it came there: equal shares of all.

    Evaluation comes last, because it takes the place of all that is left of training.
    """
    chance = random.Random(seed)
    names = [name for _, name in zip(range(kills), itertools.cycle(MOMENTS), strict=False)]
    chance.shuffle(names)
    names.sort(key="evaluation".__eq__)
    return [(name, chance.uniform(0.0, MOMENTS[name])) for name in names]


def run_and_kill(words: list[str], workdir: Path, seed: int, kills: int) -> list[str]:
    """Runs the command to its end with at most so many kills on the way; what they met."""
    met = []
    for name, wait in plan(seed, kills):
        found = run(words, workdir, name, wait=wait)
        if found is None:  # it was done before it came there again
            return met
        met.append(found)
    run(words, workdir)
    return met


def ending(experiment: Experiment, workdir: Path) -> dict[str, Any]:
    """What a run has come to, by name: hashes of its last checkpoints, its scores, and the metrics of its reports."""
    found = {}
    for member in experiment.lineage(str(workdir)):
        with reading(member.workdir) as checkpoints:
            state = checkpoints.restore(member.experiment.abstract_state())
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
            digest.update(np.asarray(leaf).tobytes())
        name = member.experiment.name
        found[f"checkpoint of {name}"] = int(state.step), digest.hexdigest()
        found[f"metrics of {name}"] = scalars(Path(member.workdir))
    found["scores"] = json.loads((workdir / "report" / "scores.json").read_text())
    found["all scores"] = (workdir / "eval" / "scores.jsonl").read_text()
    return found


def scalars(folder: Path) -> list[events.Scalar]:
    """What the event files of a folder say, but for speeds."""
    return [scalar for scalar in events.read(folder).scalars if scalar.name not in _TIMES]


def main(_: list[str]) -> None:
    """The whole run, the killed ones, what they met."""
    logging.set_verbosity(logging.WARNING)
    directory = Path(DIRECTORY.value).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        sys.exit(f"--directory: got {directory}, which is not empty, expected a new one")
    command = Command(directory)
    started = time.monotonic()
    run(command.words(directory / "whole"), directory / "whole")
    expected = ending(command.experiment(), directory / "whole")
    print(f"whole: {time.monotonic() - started:.0f} s", flush=True)
    met, wrong = [], []
    for seed in itertools.count(FIRST_SEED.value):
        if len(met) >= KILLS.value:
            break
        workdir, started = directory / f"seed_{seed}", time.monotonic()
        kills = min(KILLS_EACH.value, KILLS.value - len(met))
        met_here = run_and_kill(command.words(workdir), workdir, seed, kills)
        got = ending(command.experiment(), workdir)
        different = [name for name in expected if got[name] != expected[name]]
        said = f"other {', '.join(different)}" if different else "the same end"
        print(f"seed {seed}: {len(met_here)} kills, {said}, {time.monotonic() - started:.0f} s", flush=True)
        met += met_here
        wrong += different
    counts = collections.Counter(met)
    print(format_table(["killed in", "kills"], [*((name, counts[name]) for name in MOMENTS), ("all", len(met))]))
    for name in expected:
        print(f"{name}: {expected[name][1][:16] if name.startswith('checkpoint') else len(expected[name])}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    flags.mark_flag_as_required("directory")
    app.run(main)
