"""The digits tables of the README: the teacher and the methods at 1, 2, 4, 8 steps, with the spread over seeds.

  python benchmarks/digits_table.py --workdir=runs/methods
  python benchmarks/digits_table.py --workdir=runs/digits_table --methods=cd,ct --teacher_steps=6400 --num_steps=9600

Trains a teacher for each seed and its students with `python -m mscm.main`, several runs at once, each on one core
(small networks use one core better than two). Started again, it goes on where it was. Prints a line for each run, then
the table: fd_classifier by number of function evaluations, mean and standard deviation over the seeds.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

from mscm.report.table import format_table

ROOT = Path(__file__).resolve().parents[1]
STEPS = (1, 2, 4, 8)
# The configs of each method, and what its row is called.
METHODS = {
    "cd": ("CD, DDIM", [f"digits_cd{steps}" for steps in STEPS]),
    "ct": ("CT, DDIM", [f"digits_ct{steps}" for steps in STEPS]),
    "pd": ("progressive distillation", ["digits_pd"]),
    "tract": ("TRACT", [f"digits_tract{steps}" for steps in STEPS]),
    "cm_cd": ("CM distillation, re-noising", ["digits_cm_cd"]),
    "cm_ct": ("CM training, re-noising", ["digits_cm_ct"]),
    "ict": ("iCT, re-noising", ["digits_ict"]),
}
MULTISTEP = ("cd", "ct")
ALONE = ("cm_ct", "ict")  # without a teacher
# Only Linux tells, and can hold a process on one of them.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of all runs.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.", lower_bound=1)
METHOD = flags.DEFINE_list("methods", list(METHODS), "Methods to run.")
TEACHER_STEPS = flags.DEFINE_integer(
    "teacher_steps", None, "Optimiser steps of a teacher. Default: the config's.", lower_bound=100
)
NUM_STEPS = flags.DEFINE_integer(
    "num_steps", None, "Optimiser steps of a CD or CT student. Default: the config's.", lower_bound=100
)
JOBS = flags.DEFINE_integer("jobs", len(CORES) or 1, "Runs at once, each on one core.", lower_bound=1)


def runs(root: Path) -> list[list[str]]:
    """Command lines of the teachers, then of the others, method after method."""
    commands = [
        [
            "--config=configs/digits_teacher.py",
            f"--workdir={root / f'seed_{seed}' / 'teacher'}",
            *common_flags(seed, TEACHER_STEPS.value),
        ]
        for seed in range(SEEDS.value)
    ]
    for method in METHOD.value:
        for name in METHODS[method][1]:
            for seed in range(SEEDS.value):
                directory = root / f"seed_{seed}"
                words = [f"--config=configs/{name}.py", f"--workdir={directory / name.removeprefix('digits_')}"]
                words += common_flags(seed, NUM_STEPS.value if method in MULTISTEP else None)
                if method in MULTISTEP and NUM_STEPS.value:
                    # Finer than the config's: what a longer run has the time for.
                    words += [
                        "--config.objective.teacher_steps.start=64",
                        "--config.objective.teacher_steps.end=1024",
                        f"--config.objective.teacher_steps.anneal_steps={3 * NUM_STEPS.value // 4}",
                    ]
                if method not in ALONE:
                    words.append(f"--config.teacher.workdir={directory / 'teacher'}")
                # The teacher's own run has its scores.
                commands.append([*words, "--config.eval.teacher_steps=(1,)"])
    return commands


def common_flags(seed: int, num_steps: int | None) -> list[str]:
    """Seed and length of a run."""
    train = [f"--config.train.{key}={num_steps}" for key in ("num_steps", "save_every_steps")] if num_steps else []
    return [f"--config.seed={seed}", *train]


def value_of(flag: str, words: list[str]) -> Path | None:
    """The path that a flag of a command line gives."""
    return next((Path(word.partition("=")[2]) for word in words if word.startswith(f"--{flag}=")), None)


def is_done(workdir: Path) -> bool:
    """Whether a run has its scores, the last thing that it writes."""
    return (workdir / "report" / "scores.json").exists()


def run_all(commands: list[list[str]]) -> None:
    """Runs what is not done, `jobs` at once, students after their teacher; ends the program at the first failure."""
    waiting = [words for words in commands if not is_done(value_of("workdir", words))]
    running: dict[int, tuple[subprocess.Popen, list[str], float]] = {}
    while waiting or running:
        for slot in range(JOBS.value):
            ready = [words for words in waiting if is_ready(words)]
            if slot not in running and ready:
                waiting.remove(ready[0])
                running[slot] = (start(ready[0], slot), ready[0], time.monotonic())
        time.sleep(1.0)
        for slot, (process, words, started) in list(running.items()):
            if process.poll() is None:
                continue
            del running[slot]
            seconds, workdir = time.monotonic() - started, value_of("workdir", words)
            print(f"{workdir}: {seconds / 60:.1f} min, {len(waiting) + len(running)} runs left", flush=True)
            if process.returncode:
                for other, *_ in running.values():
                    other.terminate()
                sys.exit(f"exit status {process.returncode}, see {workdir / 'log.txt'}")


def is_ready(words: list[str]) -> bool:
    """Whether the teacher that a run needs is there."""
    teacher = value_of("config.teacher.workdir", words)
    return teacher is None or is_done(teacher)


def start(words: list[str], slot: int) -> subprocess.Popen:
    """Starts mscm.main on the core of a slot, with its output in log.txt of the work directory."""
    workdir = value_of("workdir", words)
    workdir.mkdir(parents=True, exist_ok=True)
    share_network(workdir)
    with open(workdir / "log.txt", "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mscm.main", *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
    if CORES:
        os.sched_setaffinity(process.pid, {CORES[slot % len(CORES)]})
    return process


def share_network(workdir: Path) -> None:
    """Copies the classifier and the reference of another run, which are the same for all: each would train its own."""
    done = next((path for path in sorted(workdir.parents[1].glob("*/*/eval")) if is_done(path.parent)), None)
    if done is None or (workdir / "eval").exists():
        return
    (workdir / "eval").mkdir()
    for path in (*done.glob("classifier*"), *done.glob("reference*")):
        shutil.copy(path, workdir / "eval")


def scores(workdir: Path) -> dict[int, float]:
    """fd_classifier of a run's model by NFE, and of the phases before it."""
    rows = json.loads((workdir / "report" / "scores.json").read_text())
    own = rows[0]["model"]
    return {row["nfe"]: row["fd_classifier"] for row in rows if row["model"].startswith(own)}


def main(_: list[str]) -> None:
    """Teachers, students, table."""
    unknown = sorted(set(METHOD.value) - set(METHODS))
    if unknown:
        sys.exit(f"--methods: got {unknown[0]}, expected some of {', '.join(METHODS)}")
    lengths = f"teacher_{TEACHER_STEPS.value or 'default'}_student_{NUM_STEPS.value or 'default'}"
    root = Path(WORKDIR.value).resolve() / lengths
    run_all(runs(root))
    directories = [root / f"seed_{seed}" for seed in range(SEEDS.value)]
    teachers = [scores(directory / "teacher") for directory in directories]
    columns = sorted(teachers[0])

    def row(label: str, of_seeds: list[dict[int, float]]) -> list[str]:
        return [label, *(cell([of_seed[nfe] for of_seed in of_seeds if nfe in of_seed]) for nfe in columns)]

    def cell(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}" if values else ""

    rows = [row("teacher, aDDIM", teachers)]
    for method in METHOD.value:
        label, names = METHODS[method]
        of_seeds = [
            {nfe: value for name in names for nfe, value in scores(path / name.removeprefix("digits_")).items()}
            for path in directories
        ]
        rows.append(row(label, of_seeds))
    print(format_table(["NFE", *(str(nfe) for nfe in columns)], rows))


if __name__ == "__main__":
    app.run(main)
