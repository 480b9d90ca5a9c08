"""The README's table of methods: teacher and methods at 1, 2, 4 and 8 steps, with the spread over seeds.

  python benchmarks/methods_table.py --family=digits --workdir=runs/methods
  python benchmarks/methods_table.py --family=digits --workdir=runs/methods --methods=cd,cd_fixed
  python benchmarks/methods_table.py --family=cifar10 --workdir=runs/cifar10 --jobs=1 -- --config.data.path=cifar10.zip

Trains a teacher for each seed and its students with `python -m mscm.main`, several runs at once; what follows `--` goes
to each of them. On CPUs each run has a core of its own: small networks use one core better than two. Started again, it
goes on where it was. Prints a line for each run, then the table (fd_classifier by number of function evaluations, mean
and standard deviation over the seeds); mscm.compare draws the figure and writes all scores to WORKDIR/compare.
"""

import dataclasses
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
# Label of a method's row, and its configs without their family.
METHODS = {
    "cd": ("CD, DDIM", [f"cd{steps}" for steps in STEPS]),
    "ct": ("CT, DDIM", [f"ct{steps}" for steps in STEPS]),
    "pd": ("progressive distillation", ["pd"]),
    "tract": ("TRACT", [f"tract{steps}" for steps in STEPS]),
    "cm_cd": ("CM distillation, re-noising", ["cm_cd"]),
    "cm_ct": ("CM training, re-noising", ["cm_ct"]),
    "ict": ("iCT, re-noising", ["ict"]),
}
ALONE = ("cm_ct", "ict")  # without a teacher
# CD in one and two steps with a number of teacher steps that does not grow: Table 2 of arXiv:2403.06807v3.
FIXED = "cd_fixed"
FIXED_STEPS = {"digits": (16, 64, 256), "cifar10": (64, 256, 1280)}
# Only Linux tells, and can hold a process on one of them.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

FAMILY = flags.DEFINE_enum("family", None, sorted(FIXED_STEPS), "Family of configs.", required=True)
VARIANT = flags.DEFINE_string("variant", "", "Variant of the configs, such as 'small' of cifar10.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of all runs.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.", lower_bound=1)
METHOD = flags.DEFINE_list("methods", list(METHODS), f"Methods to run: also {FIXED}.")
JOBS = flags.DEFINE_integer("jobs", len(CORES) or 1, "Runs at once.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training, and the teacher's that it needs."""

    workdir: Path
    words: list[str]  # of its command line
    teacher: Path | None = None

    @property
    def is_ready(self) -> bool:
        """Whether its teacher is there."""
        return self.teacher is None or is_done(self.teacher)


def is_done(workdir: Path) -> bool:
    """Whether a run has its scores, the last thing that it writes."""
    return (workdir / "report" / "scores.json").exists()


def rows_of(methods: list[str], family: str) -> list[tuple[str, dict[str, list[str]]]]:
    """Rows of the table: a label, and by name of its run the config and overrides of each of its runs."""
    rows = []
    for method in methods:
        if method == FIXED:
            for number in FIXED_STEPS[family]:
                fixed = [f"--config.objective.teacher_steps.{end}={number}" for end in ("start", "end")]
                runs = {f"cd{steps}_fixed{number}": [f"cd{steps}", *fixed] for steps in STEPS[:2]}
                rows.append((f"CD, DDIM, N = {number} throughout", runs))
        else:
            label, names = METHODS[method]
            rows.append((label, {name: [name] for name in names}))
    return rows


def make_runs(root: Path, rows: list[tuple[str, dict[str, list[str]]]], common: list[str]) -> list[Run]:
    """Seed after seed, so that the later ones find compiled what the first has compiled."""

    def config(name: str) -> str:
        return f"--config=configs/{FAMILY.value}_{name}.py" + (f":{VARIANT.value}" if VARIANT.value else "")

    runs = []
    for seed in range(SEEDS.value):
        directory, words = root / f"seed_{seed}", [f"--config.seed={seed}", *common]
        teacher = directory / "teacher"
        # What evaluates 256 times an image takes as long to score as to train.
        steps = f"--config.eval.teacher_steps={(*STEPS, 64)}"
        runs.append(Run(teacher, [config("teacher"), *words, steps]))
        for name, (student, *overrides) in (item for _, names in rows for item in names.items()):
            own = [config(student), *words, *overrides]
            if student in ALONE:
                runs.append(Run(directory / name, own))
            else:
                # The teacher's own run has its scores.
                own += [f"--config.teacher.workdir={teacher}", "--config.eval.teacher_steps=(1,)"]
                runs.append(Run(directory / name, own, teacher))
    return runs


def run_all(runs: list[Run]) -> None:
    """Runs what is not done, `jobs` at once, students after their teacher; ends the program at the first failure."""
    waiting = [run for run in runs if not is_done(run.workdir)]
    running: dict[int, tuple[subprocess.Popen, Run, float]] = {}
    while waiting or running:
        for slot in range(JOBS.value):
            ready = next((run for run in waiting if run.is_ready), None)
            if slot not in running and ready is not None:
                waiting.remove(ready)
                running[slot] = (start(ready, slot), ready, time.monotonic())
        time.sleep(1.0)
        for slot, (process, run, started) in list(running.items()):
            if process.poll() is None:
                continue
            del running[slot]
            minutes, left = (time.monotonic() - started) / 60, len(waiting) + len(running)
            print(f"{run.workdir}: {minutes:.1f} min, {left} runs left", flush=True)
            if process.returncode:
                for other, *_ in running.values():
                    other.terminate()
                sys.exit(f"exit status {process.returncode}, see {run.workdir / 'log.txt'}")


def start(run: Run, slot: int) -> subprocess.Popen:
    """Starts mscm.main, on the core of a slot where several run, with its output in log.txt of the work directory."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    share_network(run.workdir)
    with open(run.workdir / "log.txt", "a") as log:
        command = [sys.executable, "-m", "mscm.main", f"--workdir={run.workdir}", *run.words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if CORES and JOBS.value > 1:
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


def main(argv: list[str]) -> None:
    """Teachers, students, table, figure."""
    choices = (*METHODS, FIXED)
    unknown = sorted(set(METHOD.value) - set(choices))
    if unknown:
        sys.exit(f"--methods: got {unknown[0]}, expected some of {', '.join(choices)}")
    root, rows = Path(WORKDIR.value).resolve(), rows_of(METHOD.value, FAMILY.value)
    runs = make_runs(root, rows, argv[1:])
    run_all(runs)
    directories = [root / f"seed_{seed}" for seed in range(SEEDS.value)]
    columns = sorted(scores(directories[0] / "teacher"))

    def cell(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}" if values else ""

    lines = []
    for label, names in [("teacher, aDDIM", {"teacher": []}), *rows]:
        of_seeds = [{k: v for name in names for k, v in scores(path / name).items()} for path in directories]
        lines.append([label, *(cell([found[nfe] for found in of_seeds if nfe in found]) for nfe in columns)])
    print(format_table(["NFE", *(str(nfe) for nfe in columns)], lines), flush=True)
    workdirs = ",".join(str(run.workdir) for run in runs)
    subprocess.run(
        [sys.executable, "-m", "mscm.compare", f"--workdir={workdirs}", f"--output={root / 'compare'}"],
        cwd=ROOT,
        check=True,
    )


if __name__ == "__main__":
    app.run(main)
