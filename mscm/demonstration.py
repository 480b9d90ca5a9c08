"""Digits in a few steps by networks that are in the package: what `mscm.demo` shows.

Their parameters are float16 in one file with a card, made by benchmarks/demo_networks.py; the Frechet distances in the
card are those of the networks as they are in the file.
"""

import os
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from mscm import evaluation
from mscm.config import load_config
from mscm.experiment import Experiment, build
from mscm.metrics import files
from mscm.sampling import SamplerSpec, steps_in_words
from mscm.types import Params

NETWORKS = os.path.join(os.path.dirname(__file__), "demo.npz")
TEACHER, LARGEST = "digits_teacher", 64
STUDENTS = {1: "digits_cd1", 2: "digits_cd2", 4: "digits_cd4", 8: "digits_cd8"}  # by their steps


class Row(NamedTuple):
    """Images of one model in one number of steps."""

    who: str
    num_steps: int
    images: UInt8[np.ndarray, "n 8 8 1"]
    distance: float  # fd_classifier, of other images of the same network

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.who}, {steps_in_words(self.num_steps)}"


def widened(params: Params) -> Params:
    """float32, in which networks compute, of the float16 in the file."""
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), params)


def sample(num_images: int, seed: int) -> tuple[list[Row], float]:
    """Teacher and student by turns, then the teacher in many steps; and the distance between halves of the real images.

    Image i of all rows starts from the same noise and is of the same class.
    """
    arrays, card = files.load(NETWORKS)
    networks, distances = widened(files.tree(arrays)), card["fd_classifier"]

    def row(who: str, experiment: Experiment, num_steps: int) -> Row:
        (images,) = evaluation.generate(
            experiment,
            networks[experiment.name],
            sampler_of(experiment, num_steps),
            num_images=num_images,
            batch_size=num_images,
            seed=seed,
            conditions=evaluation.conditions_in_turn(experiment),
        )
        return Row(who, num_steps, images, distances[experiment.name][str(num_steps)])

    teacher, rows = experiment_of(TEACHER), []
    for num_steps, name in STUDENTS.items():
        rows += [row("teacher", teacher, num_steps), row("student", experiment_of(name), num_steps)]
    return [*rows, row("teacher", teacher, LARGEST)], distances["real"]


def experiment_of(name: str) -> Experiment:
    """Of one of the networks."""
    return build(load_config(f"configs/{name}.py")).for_evaluation()


def sampler_of(experiment: Experiment, num_steps: int) -> SamplerSpec:
    """The first that the experiment is scored with."""
    return SamplerSpec(evaluation.default_samplers(experiment)[0].sampler, num_steps)
