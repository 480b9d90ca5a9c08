"""The digits table of the README: teacher, CT and CD at S = 1, 2, 4, 8, with the spread over seeds.

  python benchmarks/digits_table.py --workdir=runs/digits_table

Trains a teacher for each seed and its eight students with `python -m mscm.main`, several runs at once, each on one core
(small networks use one core better than two). Started again, it goes on where it was. Prints a line for each run, then
the table: fd_classifier by number of function evaluations, mean and standard deviation over the seeds.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

from mscm.report.table import format_table

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("cd", "ct")
STUDENT_STEPS = (1, 2, 4, 8)
# Only Linux tells, and can hold a process on one of them.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of all runs.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.", lower_bound=1)
TEACHER_STEPS = flags.DEFINE_integer("teacher_steps", 6400, "Optimiser steps of a teacher.", lower_bound=100)
NUM_STEPS = flags.DEFINE_integer("num_steps", 9600, "Optimiser steps of a student.", lower_bound=100)
JOBS = flags.DEFINE_integer("jobs", len(CORES) or 1, "Runs at once, each on one core.", lower_bound=1)


def runs(root: Path) -> list[list[str]]:
    """Command lines of the teachers, then of the students, which need them."""
    teachers, students = [], []
    for seed in range(SEEDS.value):
        directory = root / f"seed_{seed}"
        teachers.append([
            "--config=configs/digits_teacher.py",
            f"--workdir={directory / 'teacher'}",
            *common_flags(seed, TEACHER_STEPS.value),
        ])
        for kind in KINDS:
            for student_steps in STUDENT_STEPS:
                name = f"{kind}{student_steps}"
                students.append([
                    f"--config=configs/digits_{name}.py",
                    f"--workdir={directory / name}",
                    *common_flags(seed, NUM_STEPS.value),
                    # Finer than the config's: what a longer run has the time for.
                    "--config.objective.teacher_steps.start=64",
                    "--config.objective.teacher_steps.end=1024",
                    f"--config.objective.teacher_steps.anneal_steps={3 * NUM_STEPS.value // 4}",
                    f"--config.teacher.workdir={directory / 'teacher'}",
                    "--config.eval.teacher_steps=(1,)",  # the teacher's own run has its scores
                ])
    return teachers + sorted(students, key=lambda words: "_ct" in words[0])  # all CD first


def common_flags(seed: int, num_steps: int) -> list[str]:
    """Seed and length of a run."""
    train = [f"--config.train.{key}={num_steps}" for key in ("num_steps", "save_every_steps")]
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
    with open(workdir / "log.txt", "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mscm.main", *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
    if CORES:
        os.sched_setaffinity(process.pid, {CORES[slot % len(CORES)]})
    return process


def scores(workdir: Path) -> dict[tuple[str, int], float]:
    """fd_classifier of a run by (model, NFE)."""
    rows = json.loads((workdir / "report" / "scores.json").read_text())
    return {(row["model"], row["nfe"]): row["fd_classifier"] for row in rows}


def main(_: list[str]) -> None:
    """Teachers, students, table."""
    root = Path(WORKDIR.value).resolve() / f"teacher_{TEACHER_STEPS.value}_student_{NUM_STEPS.value}"
    run_all(runs(root))
    directories = [root / f"seed_{seed}" for seed in range(SEEDS.value)]
    teachers = [scores(directory / "teacher") for directory in directories]
    columns = sorted(nfe for name, nfe in teachers[0] if name == "digits_teacher")

    def cell(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    rows = [["teacher, aDDIM", *(cell([of_seed["digits_teacher", nfe] for of_seed in teachers]) for nfe in columns)]]
    for kind in KINDS:
        row = [f"{kind.upper()}, DDIM"]
        for nfe in columns:
            students = [directory / f"{kind}{nfe}" for directory in directories if nfe in STUDENT_STEPS]
            row.append(cell([scores(path)[f"digits_{kind}{nfe}", nfe] for path in students]) if students else "")
        rows.append(row)
    print(format_table(["NFE", *(str(nfe) for nfe in columns)], rows))


if __name__ == "__main__":
    app.run(main)
