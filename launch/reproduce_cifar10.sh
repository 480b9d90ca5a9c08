#!/usr/bin/env bash
# Trains every method on CIFAR-10 at 1, 2, 4 and 8 steps on one GPU, and draws table and figure as for the digits.
#
#   launch/reproduce_cifar10.sh DIR DATA [SEEDS [FLAG...]]
#
# DATA is a folder, an archive or prepared records of CIFAR-10's training images; what follows SEEDS (1) goes to every
# run, such as --config.train.num_steps=20000 or --config.eval.network=inception. The consistency models compare images
# by LPIPS, whose weights are a file (python -m mscm.metrics.convert). VARIANT=small in the environment: networks for
# two CPU cores, which need no such file. Killed, the same command goes on where it was.
set -euo pipefail

if (( $# < 2 )); then
  echo "usage: $0 DIR DATA [SEEDS [FLAG...]]" >&2
  exit 2
fi
mkdir -p "$1"
root="$(cd "$1" && pwd)"
data="$(cd "$(dirname "$2")" && pwd)/$(basename "$2")"
seeds="${3:-1}"
shift "$(( $# < 3 ? $# : 3 ))"
jobs=()
if [[ "${VARIANT:-}" != small ]]; then
  jobs=(--jobs=1)  # one at a time on the GPU
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python benchmarks/methods_table.py --family=cifar10 --variant="${VARIANT:-}" --workdir="$root" --seeds="$seeds" \
  "${jobs[@]}" -- --config.data.path="$data" "$@"
