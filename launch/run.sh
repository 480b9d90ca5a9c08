#!/usr/bin/env bash
# Installs mscm on this machine and runs one command until it succeeds: again after each failure that came later than
# MIN_SECONDS (60) after its start, at most MAX_RETRIES (20) times, and not after a refusal (exit status 2).
#
#   launch/run.sh tpu    python -m mscm.main --config=configs/imagenet64_cd8.py --workdir=DIR --config.data.path=DATA
#   launch/run.sh cuda   python -m mscm.main --config=... --workdir=DIR                           # GPU, CUDA 13
#   launch/run.sh cuda12 python -m mscm.main --config=... --workdir=DIR                           # GPU, CUDA 12
#
# The first argument is an extra of setup.cfg. A run continues from the last checkpoint of its work directory, so the
# same command is right for a start and for a restart; as a start-up script of the machine it also survives a reboot.
# Exit status 75 (stopped by SIGTERM, and saved) is started again after ten seconds and is no failure. SIGTERM to this script,
# Ctrl-C and the end of its terminal are passed on to the command, and its end is then the script's too.
# VENV, PYTHON, MAX_RETRIES and MIN_SECONDS may be set in the environment.
set -euo pipefail

if (( $# < 2 )); then
  echo "usage: $0 tpu|cuda|cuda12 COMMAND [ARGUMENT...]" >&2
  exit 2
fi
extra="$1"
shift
case "$extra" in
  tpu | cuda | cuda12) ;;
  *) echo "$0: got '$extra', expected one of tpu, cuda, cuda12" >&2; exit 2 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${VENV:-$PWD/.venv}"
max_retries="${MAX_RETRIES:-20}"
min_seconds="${MIN_SECONDS:-60}"

python="${PYTHON:-python3}"
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
{
  # Several jobs may start in one checkout on a shared disk.
  flock 9 || echo "$0: no locks on this disk; jobs that install at the same time may fail" >&2
  if [[ ! -x "$venv/bin/python" ]]; then
    if ! "$python" -c "import sys; sys.exit(sys.version_info < (3, 11))"; then
      echo "$0: got $("$python" --version), expected Python 3.11 or newer; set PYTHON to one" >&2
      exit 2
    fi
    "$python" -m venv "$venv"
  fi
  python -m pip install --quiet --no-input -e ".[$extra]"
} 9>"$venv.lock"

child="" asked="" told=""
# shellcheck disable=SC2329  # called by the traps
pass_on() {
  asked="$1" told="$child"
  [[ -z "$child" ]] || kill -s "$1" "$child" 2>/dev/null || true
}
for signal in TERM INT HUP; do
  # shellcheck disable=SC2064  # this signal
  trap "pass_on $signal" "$signal"
done
# Each command a group of its own: without, bash starts it deaf to Ctrl-C, which also the terminal would send it.
set -m

pause() {
  sleep 10 &
  wait "$!" || true
}

attempt=0 status=143  # as a shell says SIGTERM
while [[ -z "$asked" ]]; do
  started=$SECONDS
  status=0
  "$@" &
  child=$!
  [[ -z "$asked" || "$told" == "$child" ]] || pass_on "$asked"  # it came while the command was being started
  while kill -0 "$child" 2>/dev/null; do  # a signal ends the wait, not the command
    wait "$child" || true
  done
  wait "$child" || status=$?
  child=""
  (( status != 0 )) || exit 0
  [[ -z "$asked" ]] || exit "$status"
  # 130 is Ctrl-C: the operator meant it.
  (( status != 130 )) || exit "$status"
  # 75 is a training that was asked to end and has saved: no failure, however often.
  if (( status == 75 )); then
    echo "$0: exit status 75, a run that was stopped and has saved; starting it again" >&2
    pause
    continue
  fi
  # 2 is a refusal, of a wrong flag or of a loss that is not finite: it would be the same again.
  if (( status == 2 )); then
    echo "$0: exit status 2, a refusal; giving up" >&2
    exit "$status"
  fi
  # What fails before anything compiles is no preemption either: a package that is missing, a disk that is full.
  if (( SECONDS - started < min_seconds )); then
    echo "$0: exit status $status within $min_seconds seconds; not a preemption, giving up" >&2
    exit "$status"
  fi
  if (( attempt >= max_retries )); then
    echo "$0: exit status $status after $max_retries retries; giving up" >&2
    exit "$status"
  fi
  (( ++attempt ))
  echo "$0: exit status $status; retry $attempt of $max_retries" >&2
  pause
done
exit "$status"
