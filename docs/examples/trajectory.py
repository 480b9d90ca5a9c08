"""Distillation of whole trajectories into one step (Luhman & Luhman, arXiv:2101.02388).

The teacher's DDIM path takes the noise z_1 to an image z_0, always the same one. The student regresses it:

  (1) L = distance(f(z_1, 1) - z_0),  z_0 = DDIM in n steps from z_1 with the teacher

The loss asks the teacher n times for every example, and needs no data but the conditions.
"""

import jax
import jax.numpy as jnp

from mscm.config import Section
from mscm.diffusion import sampler
from mscm.diffusion.prediction import x_hat_of
from mscm.methods import OBJECTIVES, SQUARED, Method, Parts, denoiser_of, example_of, scaled
from mscm.objectives import distance as distances
from mscm.types import Denoiser, Distance, Images, Metrics, PerExample, Schedule, Teacher


def trajectory_loss(
    student: Denoiser,
    teacher: Teacher,
    schedule: Schedule,
    z_1: Images,
    *,
    teacher_steps: int,
    distance: Distance = distances.v_mse,
) -> tuple[PerExample, Metrics]:
    """Equation (1): one loss per example; gradient flows through the student only. Metrics: `logsnr`."""
    z_0 = sampler.sample(x_hat_of(teacher), schedule, z_1, num_steps=teacher_steps)
    z_0 = jax.lax.stop_gradient(z_0)
    t = jnp.ones(z_1.shape[0])
    lvl_t = schedule(t)
    return distance(student(lvl_t.sigma * z_1, t) - z_0, lvl_t), {"logsnr": lvl_t.logsnr[:, 0, 0, 0]}


def build(section: Section, parts: Parts) -> Method:
    """What `config.objective` says, as a loss of parameters and a batch."""
    teacher_steps = section.number("teacher_steps", minimum=1)
    distance = scaled(section, section.choose("distance", SQUARED), parts)

    def loss_fn(params, target, frozen, batch, key, step):
        del target, step
        example = example_of(parts, parts.guidance_range, batch, key)
        return trajectory_loss(
            denoiser_of(parts, params, example),
            parts.teacher(frozen.teacher, example.condition, example.guidance),
            parts.schedule,
            jax.random.normal(example.keys[0], example.x.shape),
            teacher_steps=teacher_steps,
            distance=distance,
        )

    return Method(loss_fn, student_steps=1, distil=True, guidance_range=parts.guidance_range)


OBJECTIVES["trajectory"] = build
