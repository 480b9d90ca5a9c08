"""The averages of a training by the names that `--ema` takes: one that it kept, or one made of its snapshots.

    main       the average of config.ema.decay, from which students start and images are sampled by default
    NAME       a further one of config.ema.further
    0.08       the power-function average of this sigma_rel: not kept, but made of those that were (training/posthoc.py)

The last takes the snapshots of the work directory up to the step of a checkpoint, and that checkpoint's own averages.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from absl import logging

from mscm import evaluation
from mscm.checkpoint import CHECKPOINTS, SNAPSHOTS, CheckpointError, Checkpoints, is_there, reading
from mscm.config import ConfigError, nearest
from mscm.experiment import MAIN_AVERAGE, Experiment
from mscm.training import posthoc
from mscm.training.ema import MAX_SIGMA_REL, gamma_of
from mscm.types import Float, Params

_FAR = 0.1  # an error of a reconstruction that is worth a warning
_NOTHING = 1e-9  # a coefficient below float32's rounding


class Term(NamedTuple):
    """A snapshot in a sum."""

    folder: str
    step: int
    name: str
    coefficient: float


class Sum(NamedTuple):
    """What a power-function average is made of."""

    terms: list[Term]
    error: float  # of its profile, relative: `posthoc.Reconstruction`


def chosen(experiment: Experiment, texts: Sequence[str]) -> tuple[str | None, ...]:
    """The averages that a flag names, None being the main one; a number is printed in one way only.

    Raises:
      ConfigError: the config keeps no such average, or none that a number could be made of.
    """
    found = tuple(_parse(experiment, text) for text in texts)
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"--ema: got {','.join(texts)!r}, expected one or more averages, each of them once")
    return found


def _parse(experiment: Experiment, text: str) -> str | None:
    if text == MAIN_AVERAGE:
        return None
    if text in experiment.further:
        return text
    names = (MAIN_AVERAGE, *experiment.further)
    try:
        sigma_rel = float(text)
    except ValueError as error:
        raise ConfigError(
            f"--ema: got {text!r}{nearest(text, names)}, expected one of {', '.join(names)}, or a number"
        ) from error
    if not 0.01 <= sigma_rel <= MAX_SIGMA_REL:
        limit = math.floor(1e4 * MAX_SIGMA_REL) / 1e4
        raise ConfigError(f"--ema: got {text}, expected a sigma_rel from 0.01 to {limit}")
    if all(average.sigma_rel is None for average in experiment.further.values()):
        raise ConfigError(
            f"--ema: got {text} for {experiment.name!r}, expected one of {', '.join(names)}: its config.ema.further "
            "keeps no average of a sigma_rel, of which others could be made"
        )
    return repr(sigma_rel)


def describe(experiment: Experiment, workdir: str, average: str | None, step: int) -> dict[str, str]:
    """What a row of scores says of an average of a checkpoint; nothing of the main one, as before there were others.

    Raises:
      CheckpointError: as `read`.
    """
    if average is None:
        return {}
    if average in experiment.further:
        return {"ema": average}
    return {"ema": average, "ema_error": _percent(reconstruction(experiment, workdir, average, step).error)}


def reconstruction(experiment: Experiment, workdir: str, average: str, step: int | None = None) -> Sum:
    """What the average of a sigma_rel at a checkpoint (None: the newest) is made of; reads no array.

    Raises:
      CheckpointError: as `read`.
    """
    with reading(workdir) as checkpoints:
        step = checkpoints.check(experiment.facts(), step)
        _check_kept(experiment, checkpoints, step)
    steps = []
    if is_there(workdir, SNAPSHOTS):
        with reading(workdir, SNAPSHOTS) as snapshots:
            steps = [at for at in snapshots.steps() if at < step]
    gammas = {name: gamma_of(of.sigma_rel) for name, of in experiment.further.items() if of.sigma_rel is not None}
    places = [(SNAPSHOTS, at, name) for at in steps for name in gammas] + [(CHECKPOINTS, step, name) for name in gammas]
    profiles = [posthoc.Profile(gammas[name], at) for _, at, name in places]
    found = posthoc.solve(profiles, posthoc.Profile(gamma_of(float(average)), step))
    terms = [Term(*place, float(x)) for place, x in zip(places, found.coefficients, strict=True) if abs(x) > _NOTHING]
    return Sum(terms, found.error)


def read(experiment: Experiment, workdir: str, average: str | None, step: int | None = None) -> Params:
    """Averaged parameters of a checkpoint (None: the newest).

    Raises:
      CheckpointError: it was trained with other averages, or is a copy that holds the main one alone.
    """
    if average is None:
        return evaluation.read_ema(experiment, workdir, step)
    abstract = experiment.placed_state().ema
    if average in experiment.further:
        with reading(workdir) as checkpoints:
            step = checkpoints.check(experiment.facts(), step)
            _check_kept(experiment, checkpoints, step)
            return checkpoints.restore_ema(abstract, step, name=average)
    found = reconstruction(experiment, workdir, average, step)
    say = logging.warning if found.error > _FAR else logging.info
    say(
        "%s: the average of sigma_rel %s is made of %d snapshots, its profile is %s off",
        experiment.name, average, len(found.terms), _percent(found.error),
    )
    total = jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype, device=a.sharding), abstract)
    for folder in (SNAPSHOTS, CHECKPOINTS):
        terms = [term for term in found.terms if term.folder == folder]
        if not terms:
            continue
        with reading(workdir, folder) as snapshots:
            for term in terms:
                part = snapshots.restore_ema(abstract, term.step, name=term.name)
                total = _plus(total, part, term.coefficient)
    return total


def _percent(error: float) -> str:
    return f"{100 * error:.2g}%"


@functools.partial(jax.jit, donate_argnums=0)
def _plus(total: Params, part: Params, coefficient: Float[jax.Array, ""] | float) -> Params:
    return jax.tree.map(lambda a, b: a + coefficient * b, total, part)


def _check_kept(experiment: Experiment, checkpoints: Checkpoints, step: int) -> None:
    """Raises CheckpointError where a checkpoint has other averages than the config."""
    there = checkpoints.facts(step)["config"]
    got, expected = (config.get("ema", {}).get("further") for config in (there, experiment.config))
    if got != expected:
        raise CheckpointError(
            f"{checkpoints}: got a checkpoint of step {step} with config.ema.further = {got}, expected {expected}; "
            "use the config that it was trained with"
        )
    if not all(checkpoints.has_average(name, step) for name in experiment.further):
        raise CheckpointError(
            f"{checkpoints}: got a checkpoint of step {step} with the main average alone, expected one of a training; "
            "use --ema=main"
        )
