#!/usr/bin/env bash
# Trains every method on the digits at 1, 2, 4 and 8 steps, and draws the README's table of methods and its figure.
#
#   launch/reproduce_digits.sh DIR [SEEDS]
#
# From a checkout with mscm installed; three seeds by default, each run on one core. Killed, the same command goes on where
# it was. Below DIR: the runs, and compare/ with table, figure and samples.
set -euo pipefail

if (( $# < 1 || $# > 2 )); then
  echo "usage: $0 DIR [SEEDS]" >&2
  exit 2
fi
mkdir -p "$1"
root="$(cd "$1" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python benchmarks/methods_table.py --family=digits --workdir="$root" --seeds="${2:-3}"
