"""The teacher's step as an x and an x_var: where it lands, what it evaluates, and guidance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.diffusion import steps
from mscm.objectives import solvers
from mscm.types import Guided, Level

T, S = jnp.array([0.3, 0.9, 1.0]), jnp.array([0.2, 0.1, 0.9])
X, Z = (jax.random.normal(jax.random.key(seed), (3, 4, 4, 2)) for seed in (0, 1))
ALL = {
    "addim": functools.partial(solvers.addim, x_var_frac=0.75),
    "ddim": solvers.ddim,
    "clipped_ddim": solvers.clipped_ddim,
    "heun": solvers.heun,
}


def trigonometric(t):
    phi = (jnp.pi / 2 * t)[:, None, None, None]
    return Level(jnp.cos(phi), jnp.sin(phi))


def teacher(z, t):
    return 0.4 * z * t[:, None, None, None] - 0.3 + jnp.sin(2 * z)


def landing(name, answer=teacher):
    lvl_t, lvl_s = trigonometric(T), trigonometric(S)
    x_teacher, x_var = ALL[name](answer, X, Z, T, S, lvl_t, lvl_s)
    return steps.addim(x_teacher, x_var, Z, lvl_t, lvl_s), x_var


def test_where_they_land():
    """DDIM of the output, of the clipped output, aDDIM with 0.75 mean (x_T - x)^2, Heun."""
    lvl_t, lvl_s, x_hat = trigonometric(T), trigonometric(S), teacher(Z, T)
    x_var = 0.75 * jnp.mean((x_hat - X) ** 2, axis=(1, 2, 3))
    expected = {
        "addim": steps.addim(x_hat, x_var, Z, lvl_t, lvl_s),
        "ddim": steps.ddim(x_hat, Z, lvl_t, lvl_s),
        "clipped_ddim": steps.ddim(jnp.minimum(jnp.maximum(x_hat, -1), 1), Z, lvl_t, lvl_s),
        "heun": steps.heun(teacher, Z, T, S, lvl_t, lvl_s),
    }
    assert np.max(np.abs(x_hat)) > 1.1 and np.min(np.abs(x_hat)) < 0.9
    for name in ALL:
        np.testing.assert_allclose(landing(name)[0], expected[name], rtol=0, atol=1e-6)
        assert name == "addim" or not np.any(landing(name)[1])


@pytest.mark.parametrize("name", ALL)
def test_guided_answers(name):
    """The step uses the guided output, aDDIM's variance the conditional one."""
    guided, x_var = landing(name, lambda z, t: Guided(teacher(z, t), X + 0.2))
    if name == "addim":
        np.testing.assert_allclose(x_var, 0.75 * 0.04, rtol=1e-5)
    else:
        np.testing.assert_array_equal(guided, landing(name)[0])
