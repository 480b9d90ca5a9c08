"""TRACT: its algorithm as it is printed, its limits, and what it shares with its neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.diffusion import schedule
from mscm.objectives import distance, solvers
from mscm.objectives import multistep_consistency as msc
from mscm.objectives.tract import tract_loss
from mscm.types import Level
from tests.objectives.recorder import Recorder

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (64, 4, 4, 2), minval=-1.0)
PIXELS = 4 * 4 * 2


def cosine(t):
    """The bounded cosine, in float64 where that is enabled."""
    return schedule.cosine(t.astype(jnp.result_type(float)), logsnr_min=-20.0, logsnr_max=20.0)


def exploding(t):
    """alpha = 1, sigma_0 = 0 and then the Karras curve, as EDM appends 0 to its grid."""
    sigma = schedule.karras(t.astype(jnp.result_type(float))).sigma
    return Level(jnp.ones_like(sigma), jnp.where((t > 0)[:, None, None, None], sigma, 0))


def student(z, t):
    return 0.8 * z + t[:, None, None, None]


def teacher(z, t):
    return 1.3 * jnp.sin(2 * z) - 0.2 * t[:, None, None, None]


def self_teacher(z, t):
    return 1.6 * jnp.cos(z) * (1 - t[:, None, None, None])


def run(schedule_, *, student_steps, teacher_steps, **options):
    """Loss, metrics, residual, and what student and self-teacher were asked."""
    asked, jumped, residuals = Recorder(student), Recorder(self_teacher), []
    weighted = options.pop("distance", distance.truncated_snr_mse)

    def keeping(diff, lvl_t):
        residuals.append(diff)
        return weighted(diff, lvl_t)

    loss, metrics = tract_loss(
        asked, teacher, jumped, schedule_, X.astype(jnp.result_type(float)), KEY,
        student_steps=student_steps, teacher_steps=teacher_steps, distance=keeping, **options,
    )
    assert len(asked.calls) == len(jumped.calls) == 1
    return loss, metrics, residuals[0], asked.calls[0], jumped.calls[0]


def clipped_step(x, z, lvl_t, lvl_s):
    """x to [-1, 1], eps of it, and both to the level s."""
    x = np.clip(x, -1, 1)
    return lvl_s.alpha * x + lvl_s.sigma * (z - lvl_t.alpha * x) / lvl_t.sigma


@pytest.mark.parametrize("student_steps, teacher_steps", [(1, 8), (4, 32), (8, 16)])
def test_algorithm_as_printed(x64, student_steps, teacher_steps):
    """Teacher one step, self-teacher to the end of the group, both clipped; the target is DDIM solved for x."""
    loss, metrics, residual, (z_t, t), (z_r, r) = run(cosine, student_steps=student_steps, teacher_steps=teacher_steps)
    index, group = np.rint(np.asarray(t) * teacher_steps).astype(int), teacher_steps // student_steps
    end = (index - 1) // group * group
    np.testing.assert_array_equal(metrics["segment"], end // group)
    np.testing.assert_allclose(r, (index - 1) / teacher_steps, rtol=1e-6)
    assert set(index - end) == set(range(1, group + 1))
    lvl_t, lvl_r, lvl_s = (cosine(jnp.asarray(i, jnp.float32) / teacher_steps) for i in (index, index - 1, end))
    expected_r = clipped_step(teacher(z_t, t), z_t, lvl_t, lvl_r)
    np.testing.assert_allclose(z_r, expected_r, rtol=0, atol=1e-6)
    z_s = clipped_step(self_teacher(expected_r, r), expected_r, lvl_r, lvl_s)
    z_s = np.where((index - 1 == end)[:, None, None, None], expected_r, z_s)
    x_target = (z_s * lvl_t.sigma - z_t * lvl_s.sigma) / (lvl_s.alpha * lvl_t.sigma - lvl_t.alpha * lvl_s.sigma)
    np.testing.assert_allclose(residual, student(z_t, t) - x_target, rtol=0, atol=2e-6)
    squares = np.mean((student(z_t, t) - x_target) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(loss, PIXELS * np.maximum(np.exp(metrics["logsnr"]), 1) * squares, rtol=2e-4)


@pytest.mark.parametrize("student_steps", [1, 4])
def test_edm_variant(x64, student_steps):
    """Heun's teacher unclipped, the self-teacher clipped, x = (sigma_t x_s - sigma_s x_t) / (sigma_t - sigma_s).

    Where r = s = 0 that is the teacher's x. The weight is EDM's.
    """
    loss, _, residual, (z_t, t), (z_r, r) = run(
        exploding, student_steps=student_steps, teacher_steps=16, solver=solvers.heun, distance=distance.edm_mse
    )
    index, group = np.rint(np.asarray(t) * 16).astype(int), 16 // student_steps
    end = (index - 1) // group * group
    sigma_t, sigma_r, sigma_s = (np.asarray(exploding(jnp.asarray(i / 16)).sigma) for i in (index, index - 1, end))
    slope = (z_t - teacher(z_t, t)) / sigma_t
    euler = z_t + (sigma_r - sigma_t) * slope
    safe = np.where(sigma_r > 0, sigma_r, 1)
    mean_slope = np.where(sigma_r > 0, (slope + (euler - teacher(euler, r)) / safe) / 2, slope)
    expected_r = z_t + (sigma_r - sigma_t) * mean_slope
    np.testing.assert_allclose(z_r, expected_r, rtol=1e-5, atol=1e-5)
    x_ref = np.clip(self_teacher(expected_r, r), -1, 1)
    z_s = np.where(sigma_r > sigma_s, x_ref + sigma_s / safe * (expected_r - x_ref), expected_r)
    x_target = (sigma_t * z_s - sigma_s * z_t) / (sigma_t - sigma_s)
    np.testing.assert_allclose(residual, student(z_t, t) - x_target, rtol=1e-5, atol=1e-5)
    last = index == 1
    assert last.any()
    np.testing.assert_allclose(x_target[last], teacher(z_t, t)[last], rtol=0, atol=1e-10)
    weight = ((sigma_t**2 + 0.25) / (0.5 * sigma_t) ** 2)[:, 0, 0, 0]
    np.testing.assert_allclose(loss, weight * np.sum(np.square(residual), axis=(1, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("student_steps", [1, 4])
def test_multistep_distillation_with_an_averaged_self_teacher(student_steps):
    """Multistep CD with DDIM teacher, self-teacher, fixed grid and squared loss, summed, is TRACT, gradient included.

    With values in [-1, 1] nothing is clipped.
    """

    def small(z, t):
        return jnp.tanh(teacher(z, t))

    def small_self(z, t):
        return jnp.tanh(self_teacher(z, t))

    def loss(theta, objective, **options):
        return jnp.mean(objective(
            student=lambda z, t: theta * z, teacher=small, schedule=cosine, x=X, key=KEY, student_steps=student_steps,
            self_teacher=small_self, **options,
        )[0])

    tract = jax.value_and_grad(functools.partial(loss, objective=tract_loss, teacher_steps=32))(0.7)
    multistep = functools.partial(
        loss, objective=msc.consistency_loss, teacher_steps=32.0, x_var_frac=0.0, distance=distance.truncated_snr_mse
    )
    np.testing.assert_allclose(tract, PIXELS * np.array(jax.value_and_grad(multistep)(0.7)), rtol=1e-6)


def test_groups_of_one_regress_the_teacher():
    """T = T': the target is the teacher's clipped x."""
    _, _, residual, (z_t, t), _ = run(cosine, student_steps=8, teacher_steps=8)
    expected = student(z_t, t) - jnp.clip(teacher(z_t, t), -1, 1)
    np.testing.assert_allclose(residual, expected, rtol=0, atol=1e-6)


def test_gradient_flows_through_the_student_only():
    """Teacher and self-teacher of the same parameter as the student get none."""

    def gradient(theta, frozen):
        def loss(theta):
            other = frozen if frozen is not None else theta
            return jnp.mean(tract_loss(
                lambda z, t: theta * z, lambda z, t: other * jnp.sin(z), lambda z, t: other * z, cosine, X, KEY,
                student_steps=2, teacher_steps=8,
            )[0])

        return jax.grad(loss)(theta)

    np.testing.assert_allclose(gradient(0.4, None), gradient(0.4, 0.4), rtol=1e-6)


@pytest.mark.parametrize("student_steps, teacher_steps", [(3, 8), (8, 4), (0, 8), (4, 0)])
def test_groups_must_be_whole(student_steps, teacher_steps):
    """Steps that do not divide raise with both numbers."""
    with pytest.raises(ValueError, match=f"{teacher_steps} teacher steps for {student_steps} student steps"):
        run(cosine, student_steps=student_steps, teacher_steps=teacher_steps)
