"""TRACT: distillation by transitive closure, arXiv:2303.04248.

T teacher steps become T' student steps in one phase. In each group of T / T' steps, from t, the teacher makes one step,
an average of the student's past parameters jumps from there to the end of the group, and the student learns to go the
whole way in one DDIM step. This is multistep consistency distillation on a fixed grid, with an averaged self-teacher
(training/ema.py, bias_corrected_decay) and a squared distance.

Both x_hat of the target are clipped to [-1, 1] before the step that they make; the student's is not. The EDM variant
clips the self-teacher's only: solver = solvers.heun, distance = distance.edm_mse, schedule.karras with num_steps = T.
"""

import math

import jax.numpy as jnp

from mscm.objectives import distance as distances
from mscm.objectives import solvers
from mscm.objectives.multistep_consistency import consistency_loss
from mscm.types import Denoiser, Distance, Images, Key, Metrics, PerExample, Schedule, Teacher


def tract_loss(
    student: Denoiser,
    teacher: Teacher,
    self_teacher: Denoiser,
    schedule: Schedule,
    x: Images,
    key: Key,
    *,
    student_steps: int,
    teacher_steps: int,
    solver: solvers.Solver = solvers.clipped_ddim,
    distance: Distance = distances.truncated_snr_mse,
) -> tuple[PerExample, Metrics]:
    """One phase of TRACT: one loss per example, a sum over pixels, as the authors' code has it.

    Their gradients are that much larger, and the clipping of their norm at 1 makes nearly all of them equally long.

    Gradient flows through student(z_t, t) only. Consumes `key`. Metrics are per example: `logsnr`, `segment`.

    Raises:
      ValueError: `teacher_steps` is no multiple of `student_steps`.
    """
    if student_steps < 1 or teacher_steps < 1 or teacher_steps % student_steps:
        raise ValueError(f"got {teacher_steps} teacher steps for {student_steps} student steps, expected a multiple")
    mean, metrics = consistency_loss(
        student,
        teacher,
        schedule,
        x,
        key,
        student_steps=student_steps,
        teacher_steps=float(teacher_steps),
        self_teacher=lambda z_t, t: jnp.clip(self_teacher(z_t, t), -1, 1),
        solver=solver,
        distance=distance,
    )
    return math.prod(x.shape[1:]) * mean, metrics
