#!/usr/bin/env bash
# Writes a JobSet that runs one command on all hosts of a TPU slice of Google Kubernetes Engine, or of several slices,
# again when one fails; not where the command refuses (exit status 2): a wrong flag would be refused again.
#
#   IMAGE=REGISTRY/mscm CLAIM=mscm launch/jobset.sh NAME \
#       python -m mscm.main --config=configs/imagenet64_cd8.py --workdir=/data/cd8 \
#         --config.data.path=/data/imagenet64 --distributed=auto |
#     kubectl apply -f -
#
# The cluster has the JobSet controller and a node pool of that accelerator and topology. CLAIM is a claim of a
# ReadWriteMany volume, such as Filestore, that is mounted at /data: it outlives the hosts, so that a restarted run
# continues from its last checkpoint. IMAGE has the checkout as its folder and mscm installed, such as:
#   FROM python:3.12
#   WORKDIR /mscm
#   COPY . .
#   RUN pip install -e .[tpu]
#
# Environment, with defaults: ACCELERATOR=tpu-v5-lite-podslice  TOPOLOGY=8x8  CHIPS_PER_HOST=4  NUM_SLICES=1
#   MAX_RESTARTS=20
set -euo pipefail

fail() {
  echo "$0: $*" >&2
  exit 2
}

(( $# >= 2 )) || fail "usage: IMAGE=... CLAIM=... $0 NAME COMMAND [ARGUMENT...]"
name="$1"
shift
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "got the name '$name', expected at most 40 lower-case letters, digits and hyphens, the first a letter"
[[ " $* " == *" --distributed=auto "* ]] ||
  fail "got a command without --distributed=auto, with which the hosts find each other; add it"
[[ " $* " == *" --workdir=/data/"* ]] ||
  fail "got a command without --workdir=/data/..., expected a folder of the claim"
[[ "$*" != *$'\n'* ]] || fail "got a command of several lines, expected one"
[[ -n "${IMAGE:-}" ]] || fail "got no IMAGE, expected a container image with mscm installed; set it"
[[ -n "${CLAIM:-}" ]] || fail "got no CLAIM, expected the name of a PersistentVolumeClaim; set it"
topology="${TOPOLOGY:-8x8}" chips_per_host="${CHIPS_PER_HOST:-4}" max_restarts="${MAX_RESTARTS:-20}"
num_slices="${NUM_SLICES:-1}"
[[ "$topology" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
  fail "got TOPOLOGY='$topology', expected one such as 8x8 or 4x4x8"
[[ "$chips_per_host" =~ ^[1-9][0-9]*$ ]] || fail "got CHIPS_PER_HOST='$chips_per_host', expected a number such as 4"
[[ "$num_slices" =~ ^[1-9][0-9]*$ ]] || fail "got NUM_SLICES='$num_slices', expected a number such as 2"
[[ "$max_restarts" =~ ^[0-9]+$ ]] || fail "got MAX_RESTARTS='$max_restarts', expected a number"
chips=$(( ${topology//x/*} ))
(( chips % chips_per_host == 0 )) ||
  fail "got $chips chips ($topology) of $chips_per_host on each host, expected whole hosts; set CHIPS_PER_HOST"
hosts=$(( chips / chips_per_host ))

words=""
for word in "$@"; do
  word="${word//\\/\\\\}"
  words+="${words:+, }\"${word//\"/\\\"}\""
done

cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    # The hosts of a slice are one node pool.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  network:
    enableDNSHostnames: true  # the headless service by which the hosts find each other
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $num_slices
      template:
        spec:
          completionMode: Indexed
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0  # one host cannot be restarted alone: the JobSet restarts them all
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: mscm, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: ${ACCELERATOR:-tpu-v5-lite-podslice}
                cloud.google.com/gke-tpu-topology: $topology
              containers:
                - name: mscm
                  image: $IMAGE
                  command: [$words]
                  resources:
                    limits:
                      google.com/tpu: $chips_per_host
                  volumeMounts:
                    - {name: data, mountPath: /data}
              volumes:
                - name: data
                  persistentVolumeClaim:
                    claimName: $CLAIM
END
