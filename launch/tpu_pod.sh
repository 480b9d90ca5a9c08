#!/usr/bin/env bash
# Runs one command on all workers of a TPU pod, or of several slices that the network of the data center connects, and
# again on new ones after each preemption, until it succeeds.
#
#   launch/tpu_pod.sh run NAME \
#       python -m mscm.main --config=configs/imagenet64_cd8.py --workdir=/mnt/mscm/cd8 \
#         --config.data.path=/mnt/mscm/imagenet64 --distributed=auto
#   launch/tpu_pod.sh delete NAME
#
# `run` requests the pod as a queued resource, waits until it is active, copies this checkout to all workers and starts
# launch/tpu_worker.sh on all of them at once. The command runs on the pod: where the connection breaks or this machine
# stops, the same `run` joins it. The pod is deleted when the command has succeeded; where the command fails by itself,
# its exit status is passed on and the pod stays (it costs) until `delete`, or until `run` starts the mended command.
#
# A run continues from the last checkpoint of its work directory, and the disks of a preempted pod are gone. The work
# directory must therefore lie on what outlives it: a mounted bucket or a shared disk. SETUP is the command that each
# worker runs first, such as SETUP='mountpoint -q /mnt/mscm || gcsfuse --implicit-dirs BUCKET /mnt/mscm'. A checkpoint
# is finished by renaming its folder, which a bucket does at once only with a hierarchical namespace.
#
# Environment, with defaults:
#   ZONE=us-central1-a  ACCELERATOR=v5litepod-64 (of each slice)  NUM_SLICES=1  TIER=spot (or on-demand, reserved)
#   RUNTIME=v2-alpha-tpuv5-lite (v5e; v2-alpha-tpuv5 is v5p's, v2-alpha-tpuv6e v6e's)
#   SETUP=true  POLL_SECONDS=30
#   LOGS=runs/logs (below it NAME/TIME/WORKER.log, of several slices NAME/TIME/SLICE/WORKER.log; the first is also shown)
set -euo pipefail

fail() {
  echo "$0: $*" >&2
  exit 2
}

usage="usage: $0 run NAME COMMAND [ARGUMENT...] | $0 delete NAME"
(( $# >= 2 )) || fail "$usage"
action="$1" name="$2"
shift 2
case "$action" in
  run) (( $# )) || fail "$usage" ;;
  delete) (( $# == 0 )) || fail "got 'delete $name $*', expected no more than delete and a name" ;;
  *) fail "got '$action', expected one of run, delete" ;;
esac
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "got the name '$name', expected at most 40 lower-case letters, digits and hyphens, the first a letter"
zone="${ZONE:-us-central1-a}" accelerator="${ACCELERATOR:-v5litepod-64}" runtime="${RUNTIME:-v2-alpha-tpuv5-lite}"
poll_seconds="${POLL_SECONDS:-30}" logs="${LOGS:-runs/logs}" num_slices="${NUM_SLICES:-1}"
[[ "$num_slices" =~ ^[1-9][0-9]*$ ]] || fail "got NUM_SLICES='$num_slices', expected a number such as 2"
request=(--accelerator-type="$accelerator" --runtime-version="$runtime")
if (( num_slices == 1 )); then
  nodes=("$name") request+=(--node-id="$name")
else  # one request, and all of them or none
  nodes=() request+=(--node-count="$num_slices" --node-prefix="$name")
  for (( i = 0; i < num_slices; i++ )); do nodes+=("$name-$i"); done
fi
case "${TIER:-spot}" in
  spot | reserved) request+=("--${TIER:-spot}") ;;
  on-demand) ;;
  *) fail "got TIER='$TIER', expected one of spot, on-demand, reserved" ;;
esac
[[ "$poll_seconds" =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "got POLL_SECONDS='$poll_seconds', expected a number of seconds"
if [[ "$action" == run ]]; then
  [[ " $* " == *" --distributed=auto "* ]] ||
    fail "got a command without --distributed=auto, with which the workers find each other; add it"
  [[ " $* " == *" --workdir=/"* ]] ||
    fail "got a command without --workdir=/..., expected the absolute path of a mounted bucket or shared disk"
fi
command -v gcloud >/dev/null || fail "got no gcloud in PATH, expected the Google Cloud CLI; install it and log in"

say() {
  echo "$(date -u +%H:%M:%S) $name: $*" >&2
}

tpus() {
  gcloud compute tpus "$@" --zone="$zone" --quiet
}

# The state of the request; of a node, where one was taken from an active request; NONE without a request.
state() {
  local request node of_node
  request="$(tpus queued-resources list --filter="name~/$name\$" --format="value(state.state)")" || return
  if [[ "$request" == ACTIVE ]]; then
    for node in "${nodes[@]}"; do
      of_node="$(tpus tpu-vm list --filter="name~/$node\$" --format="value(state)")" || return
      case "$of_node" in PREEMPTED | TERMINATED) request="$of_node" ;; esac
    done
  fi
  echo "${request:-NONE}"
}

delete() {
  tpus queued-resources delete "$name" --force
}

if [[ "$action" == delete ]]; then
  delete
  exit
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
temporary="$(mktemp -d)"
connections=""
trap 'for pid in $connections; do kill -- "-$pid" 2>/dev/null || :; done; rm -rf "$temporary"' EXIT
# Not what git knows: a config that was edited for this run goes with it.
tar -czf "$temporary/mscm.tar.gz" --exclude=__pycache__ mscm configs launch setup.cfg pyproject.toml README.md LICENSE
# One name for all connections of this run: a worker that has finished says so again instead of starting again.
remote="$(printf '%q ' bash tpu_worker.sh "$(date +%s)-$$" "${SETUP:-true}" "$@")"

# One connection to all workers of a slice, to the end of the command there.
connect_slice() {
  local node="$1" folder="$2" shown="$3" line
  mkdir -p "$folder"
  # Kept alive, because a machine that is taken away does not say goodbye. Not --output-directory, which has written
  # to a folder named None (Google Cloud CLI 528): each line begins with its worker instead.
  tpus tpu-vm ssh "$node" --worker=all --command="$remote" \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=6 </dev/null |
    while IFS= read -r line; do
      [[ "$line" =~ ^([0-9]+)\|(.*)$ ]] || continue
      echo "${BASH_REMATCH[2]}" >>"$folder/${BASH_REMATCH[1]}.log"
      [[ "$shown ${BASH_REMATCH[1]}" != "true 0" ]] || echo "${BASH_REMATCH[2]}"
    done
}

# One connection to each slice. Status 255: a connection failed, and no command.
connect() {
  local folder="$1" status=0 one node of_slice
  for node in "${nodes[@]}"; do  # all, before a command waits for those on the others
    tpus tpu-vm scp "$temporary/mscm.tar.gz" launch/tpu_worker.sh "$node:" --worker=all || return 255
  done
  set -m  # each a process group, which the end of this script can end: a connection is more than one process
  for node in "${nodes[@]}"; do
    of_slice="$folder"
    (( num_slices == 1 )) || of_slice+="/${node##*-}"
    connect_slice "$node" "$of_slice" "$([[ "$node" != "${nodes[0]}" ]] || echo true)" &
    connections+=" $!"
  done
  set +m
  for pid in $connections; do
    one=0
    wait "$pid" || one=$?
    (( one == 0 || (one == 255 && status != 0) )) || status="$one"
  done
  connections=""
  return "$status"
}

state >/dev/null  # not logged in, no such project: gcloud says so, and this is the end
requests=0 broken=0
while true; do
  current="$(state)" || current=UNKNOWN
  case "$current" in
    NONE)
      # A request that fails before it was ever active fails again: no quota, no such type in this zone.
      if (( ++requests > 3 )); then
        say "three requests in a row failed; is there $accelerator, and quota for it, in $zone? Giving up"
        exit 1
      fi
      say "requesting $( (( num_slices == 1 )) || echo "$num_slices times ")$accelerator in $zone"
      tpus queued-resources create "$name" "${request[@]}" || sleep "$poll_seconds"
      ;;
    FAILED | SUSPENDED | PREEMPTED | TERMINATED)
      say "state $current; deleting the request, to make it again"
      delete || sleep "$poll_seconds"
      ;;
    ACTIVE)
      requests=0 started=$SECONDS status=0
      folder="$logs/$name/$(date -u +%Y%m%d-%H%M%S)"
      say "active; logs of all workers in $folder"
      connect "$folder" || status=$?
      if (( status == 0 )); then
        say "done; deleting the pod"
        delete
        exit
      fi
      for (( look = 0; look < 4; look++ )); do  # the state follows a preemption, but not at once
        sleep "$poll_seconds"
        current="$(state)" || current=UNKNOWN
        [[ "$current" == ACTIVE ]] || continue 2
      done
      (( SECONDS - started < 600 )) || broken=0
      if (( status == 255 && ++broken <= 10 )); then
        say "the connection broke; joining again"
        continue
      fi
      say "exit status $status, and the pod was not preempted; it costs until: ZONE=$zone $0 delete $name"
      exit "$status"
      ;;
    *)
      say "state $current"
      sleep "$poll_seconds"
      ;;
  esac
done
