#!/usr/bin/env bash
#SBATCH --job-name=mscm
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Runs one command on all GPUs of a SLURM job, and again when the job was preempted or its time is up.
#
#   sbatch --nodes=2 --cpus-per-task=8 launch/slurm.sh cuda \
#       python -m mscm.main --config=configs/imagenet64_cd8.py --workdir=DIR --config.data.path=DATA --distributed=auto
#
# Submitted from the root of the checkout, which all nodes must see, as they must the work directory. The first argument
# is an extra, cuda or cuda12. Nodes of four GPUs: sbatch --gpus-per-node=4 --ntasks-per-node=4. What each task prints
# is in $LOGS/slurm-JOB/TASK.log; LOGS is runs/logs unless it is set.
#
# One task for each GPU, because jax.distributed gives a process of a SLURM job the one GPU of its SLURM_LOCALID; one
# task for each node would train on the first GPU of each. Tasks must see all GPUs of their node (--gpu-bind=none), or
# that number would name a GPU that is hidden from them.
set -euo pipefail

fail() {
  echo "launch/slurm.sh: $*" >&2  # not $0: sbatch runs a copy
  exit 2
}

(( $# >= 2 )) || fail "usage: sbatch launch/slurm.sh cuda|cuda12 COMMAND [ARGUMENT...]"
case "$1" in cuda | cuda12) ;; *) fail "got '$1', expected one of cuda, cuda12" ;; esac
[[ " $* " == *" --distributed=auto "* ]] ||
  fail "got a command without --distributed=auto, with which the tasks find each other; add it"
[[ -n "${SLURM_JOB_ID:-}" ]] || fail "got no SLURM job, expected to be started by sbatch: sbatch launch/slurm.sh $*"
[[ -x launch/run.sh ]] || fail "got the folder $PWD, expected the root of the checkout; run sbatch there"
tasks="${SLURM_NTASKS_PER_NODE:-1}" gpus="${SLURM_GPUS_ON_NODE:-0}"
[[ "$tasks" == "$gpus" ]] ||
  fail "got $tasks tasks for $gpus GPUs on a node, expected as many; set --ntasks-per-node and --gpus-per-node"

extra="$1"
shift
logs="${LOGS:-runs/logs}/slurm-$SLURM_JOB_ID"
mkdir -p "$logs"
# srun has not taken it from sbatch since SLURM 22.05, and a task with one core waits for its data.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# Two minutes before the time limit. After a preemption or the failure of a node SLURM requeues by itself.
# shellcheck disable=SC2329  # called by the trap
requeue() {
  echo "launch/slurm.sh: the time is nearly up; requeueing job $SLURM_JOB_ID" >&2
  scontrol requeue "$SLURM_JOB_ID" || true  # ends this job; refused, it runs to its limit
}
trap requeue USR1

# run.sh around srun and not within it: one installation, before the tasks start, and one restart of all of them, also
# of those that SIGTERM has stopped with status 75, which no task reports before all have saved.
launch/run.sh "$extra" srun --kill-on-bad-exit=1 --gpu-bind=none --open-mode=append --output="$logs/%t.log" "$@" &
while kill -0 "$!" 2>/dev/null; do  # the signal ends the wait, not the run
  wait "$!" || true
done
status=0
wait "$!" || status=$?
# Within the grace time of a preemption only the tasks are told to end. A job that ends with them has failed; one that
# is still there when the time is over is requeued.
if (( status != 0 )) && scontrol show job "$SLURM_JOB_ID" | grep --quiet "PreemptTime=[0-9]"; then
  echo "launch/slurm.sh: preempted; waiting to be requeued" >&2
  sleep 600
fi
exit "$status"
