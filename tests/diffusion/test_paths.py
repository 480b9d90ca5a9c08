"""Paths end where the sampler ends, and those of the exact denoiser are the exact flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from mscm.diffusion import denoiser, paths, sampler, schedule

MEANS, STDS, WEIGHTS = np.array([-0.5, 0.6]), np.array([0.12, 0.2]), np.array([0.4, 0.6])


def oracle(levels=schedule.cosine):
    components = dict(means=MEANS.tolist(), variances=(STDS**2).tolist(), weights=WEIGHTS.tolist())
    return denoiser.mixture_oracle(levels, **components)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("levels", [schedule.cosine, schedule.karras])
def test_a_path_ends_where_the_sampler_ends(levels, num_steps):
    """Its first state is the noise, its last the sample; a path of images that differ."""
    z_1 = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    states = paths.ddim_path(oracle(levels), levels, z_1, num_steps=num_steps)
    assert states.shape == (num_steps + 1, 3, 2, 2, 1)
    np.testing.assert_array_equal(states[0], levels(jnp.ones(3)).sigma * z_1)
    expected = sampler.sample(oracle(levels), levels, z_1, num_steps=num_steps)
    np.testing.assert_allclose(states[-1], expected, rtol=0, atol=1e-6)


def test_the_exact_denoisers_path_keeps_quantiles():
    """In one dimension the probability flow carries the q-quantile of the noise to that of every level, at which z has
    the components N(alpha m, alpha^2 s^2 + sigma^2). First order, so the error of twice the steps is half."""
    quantiles = np.array([0.02, 0.2, 0.39, 0.45, 0.8, 0.99])  # the weights part the components at 0.4
    z_1 = jnp.asarray(stats.norm.ppf(quantiles), jnp.float32)[:, None, None, None]

    def exact(t):
        alpha, sigma = (float(part[0, 0, 0, 0]) for part in schedule.cosine(jnp.array([t])))
        spreads = np.sqrt((alpha * STDS) ** 2 + sigma**2)
        return [
            optimize.brentq(lambda z, q=q: WEIGHTS @ stats.norm.cdf((z - alpha * MEANS) / spreads) - q, -9, 9)
            for q in quantiles
        ]

    errors = []
    for num_steps in (128, 256):
        states = np.asarray(paths.ddim_path(oracle(), schedule.cosine, z_1, num_steps=num_steps))[..., 0, 0, 0]
        difference = [np.abs(states[round((1 - t) * num_steps)] - exact(t)).max() for t in (0.75, 0.5, 0.25, 0.0)]
        errors.append(max(difference))
    assert errors[1] < 0.01 and 1.7 < errors[0] / errors[1] < 2.3, errors


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="got num_steps=0, expected at least 1 step"):
        paths.ddim_path(oracle(), schedule.cosine, jnp.zeros((1, 1, 1, 1)), num_steps=0)
