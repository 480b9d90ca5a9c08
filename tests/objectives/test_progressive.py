"""Progressive distillation: the target as it is printed, its weights and limits, and TRACT's groups of two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mscm.diffusion import schedule, steps
from mscm.diffusion.denoiser import gaussian_oracle
from mscm.objectives import distance, progressive, solvers
from mscm.objectives.progressive import progressive_loss
from mscm.objectives.tract import tract_loss
from mscm.types import Level
from tests.objectives.recorder import Recorder

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (64, 4, 4, 2), minval=-1.0)


def trigonometric(t):
    """cos(pi t / 2), sin(pi t / 2): sigma_0 = 0. In float64 where that is enabled."""
    phi = (jnp.pi / 2 * t.astype(jnp.result_type(float)))[:, None, None, None]
    return Level(jnp.cos(phi), jnp.sin(phi))


def cosine(t):
    return schedule.cosine(t.astype(jnp.result_type(float)))


def karras(t):
    return schedule.karras(t.astype(jnp.result_type(float)))


def teacher(z, t):
    return 1.3 * jnp.sin(z) - 0.2 * t[:, None, None, None]


def literal_target(x, z_t, t, r, s, schedule_, x_var_frac):
    """Two aDDIM steps and the inverse of one DDIM step, each as it is printed; where s = 0 the second prediction."""

    def step(z, t, lvl_t, lvl_s):
        x_hat = np.asarray(teacher(z, t))
        eps = (z - lvl_t.alpha * x_hat) / lvl_t.sigma
        x_var = x_var_frac * np.mean((x_hat - x) ** 2, axis=(1, 2, 3), keepdims=True)
        z_var = (lvl_s.alpha - lvl_t.alpha * lvl_s.sigma / lvl_t.sigma) ** 2 * x_var
        scale = np.sqrt(lvl_s.sigma**2 + z_var / np.mean(eps**2, axis=(1, 2, 3), keepdims=True))
        return x_hat, lvl_s.alpha * x_hat + scale * eps

    lvl_t, lvl_r, lvl_s = schedule_(t), schedule_(r), schedule_(s)
    _, z_r = step(z_t, t, lvl_t, lvl_r)
    x_r, z_s = step(z_r, r, lvl_r, lvl_s)
    shrink = lvl_s.sigma / lvl_t.sigma
    x_target = (z_s - shrink * z_t) / (lvl_s.alpha - shrink * lvl_t.alpha)
    return np.where((np.asarray(s) == 0)[:, None, None, None], x_r, x_target)


@pytest.mark.parametrize("schedule_", [trigonometric, cosine, karras])
@pytest.mark.parametrize("x_var_frac", [0.0, 0.75])
def test_algorithm_as_printed(x64, schedule_, x_var_frac):
    """t = i / N, r = t - 1 / 2N, s = t - 1 / N; the target, its residual and max(SNR, 1) of the literal steps."""
    x, student, residuals = X.astype(jnp.float64), Recorder(lambda z, t: jnp.tanh(z)), []

    def keeping(diff, lvl_t):
        residuals.append(diff)
        return distance.truncated_snr_mse(diff, lvl_t)

    answers = Recorder(teacher)
    solver = functools.partial(solvers.addim, x_var_frac=x_var_frac) if x_var_frac else solvers.ddim
    loss, metrics = progressive_loss(
        student, answers, schedule_, x, KEY, student_steps=4, solver=solver, distance=keeping
    )
    ((z_t, t),), (_, (_, r)) = student.calls, answers.calls
    i = np.rint(np.asarray(t) * 4)
    assert set(i) == {1, 2, 3, 4}
    np.testing.assert_array_equal(t, np.float32(i / 4))
    np.testing.assert_array_equal(r, np.float32((i - 0.5) / 4))
    np.testing.assert_array_equal(metrics["segment"], i - 1)
    eps = (z_t - schedule_(t).alpha * x) / schedule_(t).sigma
    assert stats.kstest(np.asarray(eps).ravel(), "norm").pvalue > 1e-3
    expected = jnp.tanh(z_t) - literal_target(x, z_t, t, r, jnp.asarray((i - 1) / 4), schedule_, x_var_frac)
    np.testing.assert_allclose(residuals[0], expected, rtol=0, atol=1e-7)
    weight = np.maximum(np.exp(metrics["logsnr"]), 1)
    np.testing.assert_allclose(loss, weight * np.mean(expected**2, axis=(1, 2, 3)), rtol=1e-6)


def test_defaults_are_those_of_the_paper():
    """Without more arguments: DDIM steps, weight max(SNR, 1)."""
    student, residuals = Recorder(lambda z, t: jnp.tanh(z)), []

    def keeping(diff, lvl_t):
        residuals.append(diff)
        return jnp.zeros(len(diff))

    progressive_loss(
        student, teacher, cosine, X, KEY, student_steps=4, solver=solvers.ddim, distance=keeping
    )
    loss, metrics = progressive_loss(student, teacher, cosine, X, KEY, student_steps=4)
    weight = np.maximum(np.exp(metrics["logsnr"]), 1)
    np.testing.assert_allclose(loss, weight * np.mean(np.square(residuals[0]), axis=(1, 2, 3)), rtol=1e-4)


def test_steps_are_uniform():
    """i ~ U{1..N}, t = 1 included: chi-square."""
    student = Recorder(lambda z, t: z)
    progressive_loss(student, teacher, cosine, jnp.zeros((8000, 1, 1, 1)), KEY, student_steps=16)
    counts = np.bincount(np.rint(student.calls[0][1] * 16).astype(int), minlength=17)
    assert counts[0] == 0 and stats.chisquare(counts[1:]).pvalue > 1e-3


def target_of(teacher, schedule_, index, num_steps, seed=2, **options):
    """The target of the student's steps `index`, and its z_t."""
    index = jnp.asarray(index)
    shape = (len(index), 4, 4, 2)
    z_t, x = (jax.random.normal(jax.random.key(seed + i), shape, jnp.result_type(float)) for i in (0, 1))
    t, r, s = index / num_steps, (index - 0.5) / num_steps, (index - 1) / num_steps
    return progressive.target(teacher, schedule_, x, z_t, t, r, s, **options), z_t, (t, r, s)


def test_constant_teacher_is_the_target(x64):
    """x_T = const gives that: the weights sum to 1."""
    actual, _, _ = target_of(lambda z, t: jnp.full_like(z, 0.37), trigonometric, [1, 2, 5, 8], 8)
    np.testing.assert_allclose(actual, 0.37, rtol=0, atol=1e-12)


def test_weights_of_the_two_predictions(x64):
    """A teacher that answers 1 at t and 0 at r shows w: 0 at the last step, and 1/2 as the steps become small."""

    def shown(index, num_steps):
        started = []

        def first_only(z, t):
            started.append(t)
            return jnp.full_like(z, 1.0 if len(started) == 1 else 0.0)

        return target_of(first_only, trigonometric, index, num_steps)[0][:, 0, 0, 0]

    np.testing.assert_allclose(shown([1], 4), 0, atol=1e-12)
    # w = sin phi_s sin(phi_t - phi_r) / (sin phi_r sin(phi_t - phi_s)), by hand
    phi_t, phi_r, phi_s = (np.pi / 2 * i / 4 for i in (3, 2.5, 2))
    expected = np.sin(phi_s) * np.sin(phi_t - phi_r) / (np.sin(phi_r) * np.sin(phi_t - phi_s))
    np.testing.assert_allclose(shown([3], 4), expected, rtol=1e-9)
    np.testing.assert_allclose(shown([2500, 5000, 10_000], 10_000), 0.5, atol=3e-4)


@pytest.mark.parametrize("schedule_", [cosine, karras])
def test_one_step_of_the_student_is_two_of_the_teacher(x64, schedule_):
    """DDIM with the target lands where two DDIM steps of the Gaussian's oracle do; at s = 0 it is the sample itself."""
    oracle = gaussian_oracle(schedule_, 0.25)
    x_target, z_t, (t, r, s) = target_of(oracle, schedule_, [1, 2, 5, 8], 8)
    lvl_t, lvl_r, lvl_s = schedule_(t), schedule_(r), schedule_(s)
    z_r = steps.ddim(oracle(z_t, t), z_t, lvl_t, lvl_r)
    z_s = steps.ddim(oracle(z_r, r), z_r, lvl_r, lvl_s)
    np.testing.assert_allclose(steps.ddim(x_target, z_t, lvl_t, lvl_s)[1:], z_s[1:], rtol=0, atol=1e-9)
    np.testing.assert_allclose(x_target[:1], oracle(z_r, r)[:1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("later", [0.0, 0.75])
def test_phases_keep_the_spread_of_a_gaussian(x64, later):
    """Steps of 64 halved to 1, each student the best linear one: only a diffusion model's lack the variance of x.

    The data is a standard Gaussian in a quarter of its dimensions, where the first teacher is the posterior mean.
    Corrected in every phase, as if students answered with means too, the samples become too wide.
    """
    rng = np.random.default_rng(0)
    inside = (np.arange(256) < 64).reshape(1, 16, 16, 1)
    x, noise = (jnp.asarray(rng.normal(size=(64, 16, 16, 1)) * part) for part in (inside, 1.0))

    @functools.partial(jax.jit, static_argnames="x_var_frac")
    def fit(gains, at, step, num_steps, x_var_frac):
        """The factors, inside and outside, by which a student answers that replaces the two steps of `gains`."""

        def linear(z, t):
            return gains[jnp.argmin(jnp.abs(at - t[0]))][None] * z

        t, r, s = (jnp.full(len(x), (step - part) / num_steps) for part in (0.0, 0.5, 1.0))
        lvl_t = trigonometric(t)
        z_t = lvl_t.alpha * x + lvl_t.sigma * noise
        solver = functools.partial(solvers.addim, x_var_frac=x_var_frac)
        x_target = progressive.target(linear, trigonometric, x, z_t, t, r, s, solver=solver)
        ratio = [jnp.sum(x_target * z_t * part) / jnp.sum(z_t**2 * part) for part in (inside, ~inside)]
        return jnp.where(inside, *ratio)

    at = jnp.arange(1, 65) / 64
    alpha = jnp.cos(jnp.pi / 2 * at)[:, None, None, None]
    gains = alpha * inside  # alpha / (alpha^2 + sigma^2) inside, and nothing where there is no data
    for num_steps in (32, 16, 8, 4, 2, 1):
        frac = 0.75 if num_steps == 32 else later
        gains = jnp.concatenate([fit(gains, at, step, num_steps, frac) for step in range(1, num_steps + 1)])
        at = jnp.arange(1, num_steps + 1) / num_steps
    spread = float(jnp.abs(gains[0, 0, 0, 0]))
    assert (1.1 < spread < 1.5) if later else spread == pytest.approx(1.0, abs=0.05)


def test_tract_groups_of_two(x64):
    """The first position of TRACT's groups of two, with the teacher as self-teacher, has this target, on VP and VE."""

    def small(z, t):
        return jnp.tanh(teacher(z, t))

    @functools.partial(jax.jit, static_argnames="schedule_")
    def both(x, schedule_):
        """Each example's index on the grid of 8, TRACT's target of it, and this module's."""
        student, residuals = Recorder(lambda z, t: jnp.zeros_like(z)), []

        def keeping(diff, lvl_t):
            residuals.append(diff)
            return distance.v_mse(diff, lvl_t)

        tract_loss(student, small, small, schedule_, x, KEY, student_steps=4, teacher_steps=8, distance=keeping)
        ((z_t, t),) = student.calls
        index = jnp.rint(8 * t)
        ours = progressive.target(small, schedule_, x, z_t, index / 8, (index - 1) / 8, (index - 2) / 8)
        return index.astype(int), -residuals[0], ours

    for schedule_ in (trigonometric, cosine, karras):
        index, tract, ours = both(X.astype(jnp.float64), schedule_)
        first = index % 2 == 0
        if schedule_ is not trigonometric:
            first &= index > 2  # there the two differ where sigma_0 > 0: the sampler's last step returns x_hat
        assert np.sum(first) > 10
        np.testing.assert_allclose(tract[first], ours[first], rtol=0, atol=2e-6)


@pytest.mark.parametrize("x_var_frac", [0.0, 0.75])
def test_rounding_of_the_target(x_var_frac):
    """At N = 512 the target keeps float32's precision; the steps one after the other lose two orders of magnitude."""
    index, rng = np.arange(2, 513), np.random.default_rng(0)
    times = [a / 512 for a in (index, index - 0.5, index - 1)]
    x, noise = (rng.normal(size=(len(index), 4, 4, 1)) for _ in range(2))
    solver = functools.partial(solvers.addim, x_var_frac=x_var_frac)

    def linear(z, t):
        return 0.5 * z

    def exact_levels(t):
        """Computed in float64 and rounded once, so that the schedule's own rounding does not count."""
        with jax.enable_x64(True):
            lvl = schedule.cosine(jnp.asarray(np.asarray(t, np.float64)))
        return Level(*(jnp.asarray(np.asarray(a).astype(t.dtype)) for a in lvl))

    alpha, sigma = (np.asarray(a) for a in exact_levels(times[0]))

    def targets(dtype):
        with jax.enable_x64(dtype == np.float64):
            data, z_t, t, r, s = (jnp.asarray(a.astype(dtype)) for a in (x, alpha * x + sigma * noise, *times))
            lvl_t, lvl_r, lvl_s = (exact_levels(time) for time in (t, r, s))
            z_r = steps.addim(*solver(linear, data, z_t, t, r, lvl_t, lvl_r), z_t, lvl_t, lvl_r)
            z_s = steps.addim(*solver(linear, data, z_r, r, s, lvl_r, lvl_s), z_r, lvl_r, lvl_s)
            convex = progressive.target(linear, exact_levels, data, z_t, t, r, s, solver=solver)
            return np.asarray(convex), np.asarray(steps.inv_ddim(z_s, z_t, lvl_t, lvl_s))

    (convex, literal), (exact, _) = targets(np.float32), targets(np.float64)
    assert np.max(np.abs(convex - exact)) < 1e-6
    assert np.max(np.abs(literal - exact)) > 3e-5


def test_gradient_flows_through_the_student_only():
    """A teacher of the same parameter gets none."""

    def loss(theta, other):
        return jnp.mean(progressive_loss(
            lambda z, t: theta * z, lambda z, t: other * z, cosine, X, KEY, student_steps=4
        )[0])

    shared = jax.grad(lambda theta: loss(theta, theta))(0.4)
    np.testing.assert_allclose(shared, jax.grad(loss)(0.4, 0.4), rtol=1e-6)


def test_no_steps():
    """N = 0 raises and says so."""
    with pytest.raises(ValueError, match="student_steps=0"):
        progressive_loss(teacher, teacher, cosine, X, KEY, student_steps=0)
