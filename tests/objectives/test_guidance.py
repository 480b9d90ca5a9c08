"""Guided distillation, stage 1: its target, weights and times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mscm.diffusion import schedule
from mscm.objectives import distance
from mscm.objectives.guidance import guidance_loss, sample_guidance

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (16, 4, 4, 2), minval=-1.0)
W = sample_guidance(jax.random.key(2), 16)


def conditional(z, t):
    return jnp.tanh(z)


def unconditional(z, t):
    return 0.5 * z - t[:, None, None, None]


def guided(z, t, w):
    w = w[:, None, None, None]
    return (1 + w) * conditional(z, t) - w * unconditional(z, t)


def run(student, **options):
    return guidance_loss(student, conditional, unconditional, schedule.cosine, X, W, KEY, **options)


def test_guided_teacher_has_no_loss():
    """A student that answers (1 + w) x_cond - w x_null for its own w is the minimum."""
    loss, metrics = run(lambda z, t: guided(z, t, W))
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    np.testing.assert_array_equal(metrics["guidance"], W)


def test_constant_error_costs_its_weight():
    """x_hat = target + 0.1: 0.01 max(SNR, 1), or what the caller's distance says, at the log-SNR of the metrics."""
    loss, metrics = run(lambda z, t: guided(z, t, W) + 0.1)
    snr = np.exp(metrics["logsnr"])
    np.testing.assert_allclose(loss, 0.01 * np.maximum(snr, 1), rtol=1e-3)
    squared, _ = run(lambda z, t: guided(z, t, W) + 0.1, distance=distance.v_mse)
    np.testing.assert_allclose(squared, 0.01 * (snr + 1), rtol=1e-3)


def test_noise_and_time_belong_together():
    """z_t = alpha_t x + sigma_t eps with t ~ U(0, 1), drawn for each example by itself; all three see the same."""
    x, w, seen = jnp.full((4000, 2, 2, 1), 0.5), jnp.zeros(4000), []

    def denoiser(z, t):
        seen.append((z, t))
        return z

    guidance_loss(denoiser, denoiser, denoiser, schedule.cosine, x, w, KEY)
    (z_t, t), *others = seen
    assert len(others) == 2 and all(z is z_t or np.array_equal(z, z_t) for z, _ in others)
    assert all(np.array_equal(time, t) for _, time in others)
    lvl_t = schedule.cosine(t)
    assert stats.kstest(np.asarray((z_t - lvl_t.alpha * x) / lvl_t.sigma).ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(np.asarray(t), "uniform").pvalue > 1e-3
    assert len(set(np.floor(np.asarray(t) * 4000))) < 3600  # independent: about 1 - 1 / e of all strata are hit


def test_weights_are_uniform():
    """w ~ U[low, high]; one value where both agree."""
    w = sample_guidance(KEY, 4000, low=1.0, high=5.0)
    assert stats.kstest((np.asarray(w) - 1) / 4, "uniform").pvalue > 1e-3
    np.testing.assert_array_equal(sample_guidance(KEY, 4, low=2.0, high=2.0), [2, 2, 2, 2])
    assert 0 <= np.min(W) and 3 < np.max(W) <= 4
    with pytest.raises(ValueError, match="from 3.0 to 1.0"):
        sample_guidance(KEY, 4, low=3.0, high=1.0)


def test_gradient_flows_through_the_student_only():
    """Teachers of the same parameter get none."""

    def loss(theta, other):
        return jnp.mean(guidance_loss(
            lambda z, t: theta * z, lambda z, t: other * z, lambda z, t: other**2 * z, schedule.cosine, X, W, KEY
        )[0])

    shared = jax.grad(lambda theta: loss(theta, theta))(0.4)
    np.testing.assert_allclose(shared, jax.grad(loss)(0.4, 0.4), rtol=1e-6)
