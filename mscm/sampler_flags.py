"""Flags of the commands that sample a checkpoint: which sampler, which checkpoint, which of its averages."""

from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from mscm.experiment import Experiment
    from mscm.sampling import SamplerSpec

NUM_STEPS = flags.DEFINE_integer(
    "num_steps", None, "Sampling steps. Default: a student's own; the last of config.eval for a teacher."
)
SAMPLER = flags.DEFINE_string(
    "sampler",
    None,
    "Such as ddim:eta=0.5: docs/howto/sample.md. Default: the last of config.eval; ddim for a student without.",
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to read. Default: the newest.")
EMA = flags.DEFINE_string(
    "ema", "main", "Average of the parameters: main, a name in config.ema.further, or a sigma_rel."
)
FORCE = flags.DEFINE_bool("force", False, "Use a student with a sampler that it was not trained for.")


def chosen(experiment: "Experiment") -> tuple["SamplerSpec", str | None]:
    """Sampler and average; None is the main one.

    Raises:
      ConfigError: there is no such sampler or average, or the student was not trained for it.
    """
    from mscm import averages, evaluation  # here and not above: --help must not wait for jax

    spec = evaluation.chosen_sampler(experiment, SAMPLER.value, NUM_STEPS.value, force=FORCE.value)
    (average,) = averages.chosen(experiment, [EMA.value])
    return spec, average
