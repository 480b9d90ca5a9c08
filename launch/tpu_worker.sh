#!/usr/bin/env bash
# One worker's part of launch/tpu_pod.sh, which copies it there: starts a command that outlives the connection, prints
# its log, each line with this worker's number before it, and ends with its exit status.
#
#   tpu_worker.sh RUN SETUP COMMAND [ARGUMENT...]
#
# Called again while the command runs, it joins; called again for a RUN that has ended, it says what that one said.
set -euo pipefail

start() {
  local status=0
  # 9 is the lock, which a daemon of the setup, such as a mount, would hold for ever.
  { bash -c "$2" 9>&- && has_python && VENV="$PWD/mscm_venv" mscm/launch/run.sh tpu "${@:3}"; } || status=$?
  (( status != 255 )) || status=1  # which would read as ssh's own
  echo "$status" >mscm_run/status.tmp
  mv mscm_run/status.tmp "mscm_run/$1.status"
}

# Ubuntu 22.04, on which the images of TPU VMs build, has Python 3.10.
has_python() {
  python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" && return
  python3 -m pip install --quiet --user uv && python3 -m uv python install --quiet 3.12 || return
  PYTHON="$(python3 -m uv python find 3.12)" && export PYTHON
}

# A function: bash reads a script while it runs it, and the next connection copies this one over it.
main() {
  local worker run
  cd
  mkdir -p mscm_run
  worker="$(curl --silent --show-error --fail --header "Metadata-Flavor: Google" \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)"
  exec 9>>mscm_run/lock
  # The command and its children hold the lock, also when nobody listens to them. The status is looked for after the
  # lock, because a run may end between the two.
  if flock --nonblock 9 && [[ ! -e "mscm_run/$1.status" ]]; then
    rm -rf mscm
    mkdir mscm
    tar -xzf mscm.tar.gz -C mscm
    echo "$1" >mscm_run/run
    : >mscm_run/log  # here already, because tail may be first
    start "$@" >>mscm_run/log 2>&1 </dev/null &
    echo "$!" >mscm_run/pid
  fi
  exec 9>&-
  run="$(<mscm_run/run)"
  tail --pid="$(<mscm_run/pid)" --sleep-interval=0.2 --lines=+1 --follow mscm_run/log | sed --unbuffered "s/^/$worker|/"
  if [[ ! -e "mscm_run/$run.status" ]]; then
    echo "$worker|$0: the command was killed and left no exit status"
    exit 1
  fi
  exit "$(<"mscm_run/$run.status")"
}

main "$@"
