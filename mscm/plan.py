"""Compiles a training step for devices that you need not have: does it fit, and how fast can it be?

  python -m mscm.plan --config=configs/imagenet64_cd8.py --topology=v5e:8x8
  python -m mscm.plan --config=configs/digits_cd4.py --topology=host

A topology is CHIP:SHAPE; a name that is none lists those that are. It needs pip install -e .[aot] and no TPU; a large
network takes minutes. --num_slices=2 is two of them, which the network of the data center (DCN) connects. host compiles
for the devices of this machine and measures a few steps on them. Any key of the config can be overridden:
--config.train.batch_size=1024.
"""

import dataclasses
import json

from absl import flags
from ml_collections import config_flags

from mscm import atomic, cli, terminal
from mscm.cost.plan import Plan, describe, does_not_fit, where

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/imagenet64_cd8.py.")
TOPOLOGY = flags.DEFINE_string("topology", None, "CHIP:SHAPE such as v5e:8x8, or host.")
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices of that topology.", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "File to write the same to as JSON.")
LARGEST_BATCH = flags.DEFINE_bool(
    "largest_batch", False, "Also search the largest batch that fits, to an eighth; compiles about six times more."
)


def main() -> None:
    """Compiles, prints, writes."""
    from mscm import planning  # here and not above: --help must not wait for jax
    from mscm.config import ConfigError

    config, topology = CONFIG.value, cli.given(TOPOLOGY)
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    if LARGEST_BATCH.value and topology == planning.HOST:
        raise ConfigError("--largest_batch: got --topology=host, expected a topology, whose compiler knows what fits")
    if NUM_SLICES.value > 1 and topology == planning.HOST:
        raise ConfigError(f"--num_slices: got {NUM_SLICES.value} with --topology=host, expected a topology, or 1 slice")
    output = None if JSON.value is None else cli.output_of(JSON)
    with terminal.Elapsed(f"Compiling {config.get('name')} for {where(topology, NUM_SLICES.value)}"):
        if topology == planning.HOST:
            plan = planning.plan_here(config)
        else:
            plan = planning.plan_for(config, topology, NUM_SLICES.value, file=file)
        _write(plan, output)  # what the search finds comes minutes later, or never
        if LARGEST_BATCH.value:
            plan = planning.with_largest_batch(plan, config, file=file)
            _write(plan, output)
    if not plan.fits:
        raise ConfigError(does_not_fit(plan))
    print(describe(plan), flush=True)


def _write(plan: Plan, output: str | None) -> None:
    if output is not None:
        atomic.write_text(output, json.dumps(dataclasses.asdict(plan), indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=("config", "topology"))
