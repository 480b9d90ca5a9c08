"""Consistency models: intervals and their weights, limits, the Gaussian's exact function, and other methods' losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from mscm.diffusion import schedule, steps
from mscm.diffusion.denoiser import gaussian_oracle
from mscm.objectives import consistency as cm
from mscm.objectives import distance, solvers
from mscm.objectives import multistep_consistency as msc
from mscm.types import Guided, Level
from tests.objectives.recorder import Recorder

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (32, 4, 4, 2), minval=-1.0)
THETA = jnp.array([0.7, -0.2, 0.4])


def karras(t):
    """EDM's grid, in float64 where that is enabled."""
    return schedule.karras(t.astype(jnp.result_type(float)))


def preserving(t):
    """Variance preserving with the sigma / alpha of `karras`."""
    _, u = karras(t)
    return Level(1 / jnp.sqrt(1 + u**2), u / jnp.sqrt(1 + u**2))


def network(theta, y, sigma):
    """A small f with CM's preconditioning, so that f(y, 0.002) = y."""
    c_skip, c_out = 0.25 / ((sigma - 0.002) ** 2 + 0.25), 0.5 * (sigma - 0.002) / jnp.sqrt(sigma**2 + 0.25)
    scaled = y / jnp.sqrt(sigma**2 + 0.25)
    return c_skip * y + c_out * jnp.tanh(theta[0] * scaled + theta[1] * jnp.log(sigma) + theta[2])


def exploding_f(theta):
    return lambda z, t: network(theta, z, karras(t).sigma)


def log_weights(grid_points, schedule_=karras, **options):
    return cm.lognormal_log_weights(schedule_, grid_points, **{"max_points": grid_points} | options)


# ----------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("how", ["eager", "traced"])
@pytest.mark.parametrize("grid_points", [2, 18, 151, 1281])
def test_intervals_lie_between_neighbours(grid_points, how):
    """s = i / (N - 1) and t = (i + 1) / (N - 1) exactly in float32, i = 0 .. N - 2, all of them, uniformly."""
    draw = functools.partial(cm.sample_interval, KEY, 30_000)
    t, s = (jax.jit(draw) if how == "traced" else draw)(grid_points=grid_points)
    grid = np.arange(grid_points, dtype=np.float32) / np.float32(grid_points - 1)
    index = np.searchsorted(grid, s)
    np.testing.assert_array_equal(s, grid[index])
    np.testing.assert_array_equal(t, grid[index + 1])
    if grid_points > 2:
        assert stats.chisquare(np.bincount(index, minlength=grid_points - 1)).pvalue > 1e-3


def test_intervals_follow_the_weights():
    """With weights, i is drawn with their probabilities: chi-square of all intervals."""
    weights = log_weights(41)
    _, s = cm.sample_interval(KEY, 30_000, grid_points=41, log_weights=weights)
    counts = np.bincount(np.rint(s * 40).astype(int), minlength=40)
    expected = np.exp(np.asarray(weights, np.float64))
    assert stats.chisquare(counts, 30_000 * expected / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("grid_points", [2, 11, 161, 1281])
@pytest.mark.parametrize("schedule_", [schedule.karras, schedule.cosine])
def test_lognormal_weights_are_the_normal_distribution(schedule_, grid_points):
    """p(i) ~ erf((log u_{i+1} - m) / (sqrt 2 std)) - erf((log u_i - m) / ...), sum 1; float32 keeps both tails."""
    actual = np.exp(np.asarray(log_weights(grid_points, schedule_), np.float64))
    with jax.enable_x64(True):
        lvl = schedule_(jnp.arange(grid_points, dtype=jnp.float64) / (grid_points - 1))
    scaled = (np.log(np.asarray(lvl.sigma / lvl.alpha, np.float64))[:, 0, 0, 0] + 1.1) / 2.0
    # In the upper tail the complement: erf's differences cancel in float64, too, beyond 7 standard deviations.
    lower, upper = np.diff(special.ndtr(scaled)), -np.diff(special.ndtr(-scaled))
    expected = np.where(scaled[1:] < 0, lower, upper)
    np.testing.assert_allclose(actual.sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(actual, expected / expected.sum(), rtol=2e-3)


def test_lognormal_weights_of_the_paper():
    """N = 1281: mean of log sigma_i -1.093, standard deviation 1.935 (truncated to the grid)."""
    p = np.exp(np.asarray(log_weights(1281), np.float64))
    log_sigma = np.log(schedule.karras_sigma(jnp.arange(1280) / 1280))
    mean = np.sum(p * log_sigma)
    assert mean == pytest.approx(-1.093, abs=6e-4)
    assert np.sqrt(np.sum(p * (log_sigma - mean) ** 2)) == pytest.approx(1.935, abs=6e-4)


def test_lognormal_weights_mask_what_is_not_there():
    """A traced N below the maximum: the same probabilities, and none for the rest."""
    traced = jax.jit(lambda n: log_weights(n, max_points=161))
    for grid_points in (11, 41, 161):
        actual = traced(jnp.int32(grid_points))
        np.testing.assert_allclose(actual[: grid_points - 1], log_weights(grid_points), rtol=0, atol=2e-4)
        assert np.all(np.isneginf(actual[grid_points - 1 :]))
        _, s = cm.sample_interval(KEY, 4096, grid_points=jnp.int32(grid_points), log_weights=actual)
        assert np.max(s) < 1


def test_lognormal_weights_see_only_sigma_over_alpha():
    """The same for variance-preserving and exploding levels of one SNR; another mean moves the mass."""
    np.testing.assert_allclose(log_weights(41, preserving), log_weights(41), rtol=0, atol=1e-4)
    assert np.argmax(log_weights(41, mean=2.0)) > np.argmax(log_weights(41)) > np.argmax(log_weights(41, mean=-4.0))


def test_impossible_grids_are_named():
    """Fewer than two points, or more than the array holds."""
    with pytest.raises(ValueError, match="grid_points=1,"):
        cm.sample_interval(KEY, 4, grid_points=1)
    with pytest.raises(ValueError, match="grid_points=12,.*max_points=11"):
        log_weights(12, max_points=11)


# ------------------------------------------------------------------------------------------------------------- the loss


def test_training_keeps_the_noise_sample(x64):
    """Without a teacher z_t and z_s share eps; f_ref sees z_s, the student z_t; the rest is weight and distance."""
    x = X.astype(jnp.float64)
    student, reference = Recorder(exploding_f(THETA)), Recorder(exploding_f(2 * THETA))
    loss, metrics = cm.consistency_model_loss(student, None, karras, x, KEY, grid_points=18, reference=reference)
    ((z_t, t),), ((z_s, s),) = student.calls, reference.calls
    eps = (z_t - x) / karras(t).sigma
    np.testing.assert_allclose(z_s, x + karras(s).sigma * eps, rtol=0, atol=1e-12)
    assert stats.kstest(np.asarray(eps).ravel(), "norm").pvalue > 1e-3
    np.testing.assert_allclose((t - s) * 17, 1, rtol=1e-5)
    expected = np.mean(np.square(student(z_t, t) - reference(z_s, s)), axis=(1, 2, 3))
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(metrics["logsnr"], -2 * np.log(karras(t).sigma[:, 0, 0, 0]), rtol=1e-12)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_distillation_steps_the_teacher(x64, solver):
    """z_s is Euler's, or Heun's, step d = (z - D(z)) / sigma of the teacher, as EDM writes them; the guided output."""
    x, teacher = X.astype(jnp.float64), gaussian_oracle(karras, 0.25, 0.1)
    student, reference = Recorder(exploding_f(THETA)), Recorder(exploding_f(THETA))
    cm.consistency_model_loss(
        student, lambda z, t: Guided(teacher(z, t), jnp.full_like(z, jnp.nan)), karras, x, KEY,
        grid_points=18, reference=reference, solver=getattr(solvers, solver),
    )
    ((z_t, t),), ((z_s, s),) = student.calls, reference.calls
    sigma_t, sigma_s = karras(t).sigma, karras(s).sigma
    slope = (z_t - teacher(z_t, t)) / sigma_t
    expected = z_t + (sigma_s - sigma_t) * slope
    if solver == "heun":
        corrected = (expected - teacher(expected, s)) / sigma_s
        expected = z_t + (sigma_s - sigma_t) * (slope + corrected) / 2
    np.testing.assert_allclose(z_s, expected, rtol=0, atol=1e-10)


def test_weight_and_distance_are_the_callers():
    """A feature distance receives (f, f_ref), in this order, and is multiplied by the weight of (t, s)."""
    student, reference = Recorder(exploding_f(THETA)), Recorder(exploding_f(2 * THETA))

    def features(a, b):
        return jnp.sum(a * jnp.sin(b), axis=(1, 2, 3))

    loss, _ = cm.consistency_model_loss(
        student, None, karras, X, KEY, grid_points=11, reference=reference, weight=distance.inverse_gap,
        distance=features,
    )
    (z_t, t), (z_s, s) = student.calls[0], reference.calls[0]
    gap = (karras(t).sigma - karras(s).sigma)[:, 0, 0, 0]
    expected = features(exploding_f(THETA)(z_t, t), exploding_f(2 * THETA)(z_s, s)) / gap
    np.testing.assert_allclose(loss, expected, rtol=2e-4)


def test_gradient_flows_through_the_student_only(x64):
    """f = theta z: the gradient is that with f_ref, teacher and step held constant."""
    x = X.astype(jnp.float64)
    student = Recorder(lambda z, t: 0.8 * z)

    def loss(theta, student):
        return jnp.mean(cm.consistency_model_loss(
            student, lambda z, t: 0.5 * theta * z, karras, x, KEY, grid_points=18, weight=distance.inverse_gap
        )[0])

    loss(0.8, student)
    (z_s, s), (z_t, t) = student.calls
    factor = 2 / (karras(t).sigma - karras(s).sigma)
    expected = jnp.mean(factor * (0.8 * z_t - 0.8 * z_s) * z_t)
    actual = jax.grad(lambda theta: loss(theta, lambda z, t: theta * z))(0.8)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_grid_points_change_without_compiling_again():
    """N(k) is traced: one compilation, and the values of the constants."""
    traces = []

    def loss(grid_points):
        traces.append(None)
        return cm.consistency_model_loss(
            exploding_f(THETA), None, karras, X, KEY, grid_points=grid_points,
            log_weights=log_weights(grid_points, max_points=1281), distance=distance.norm_pseudo_huber,
        )[0]

    compiled = jax.jit(loss)
    losses = [compiled(jnp.int32(n)) for n in (11, 81, 1281)]
    assert len(traces) == 1
    np.testing.assert_allclose(losses[1], loss(81), rtol=1e-3, atol=1e-5)


def test_loss_does_not_see_batch_mates():
    """One number per example; other images in the batch change nothing."""

    def loss(x):
        return cm.consistency_model_loss(
            exploding_f(THETA), gaussian_oracle(karras, 0.25), karras, x, KEY, grid_points=18, solver=solvers.heun,
            distance=distance.norm_pseudo_huber,
        )[0]

    assert loss(X).shape == (32,)
    np.testing.assert_allclose(loss(X.at[16:].mul(-30.0))[:16], loss(X)[:16], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- limits and oracles


@pytest.mark.parametrize("kind, order", [("training", 1), ("ddim", 2), ("heun", 3)])
def test_exact_function_of_gaussian_data(x64, kind, order):
    """f*(x, sigma) = x sqrt((v + sigma_0^2) / (v + sigma^2)): the rms residual vanishes as N grows.

    It falls as 1 / N in training (one sample's noise is not the flow), else with the local order of the teacher's step.
    """
    v, x = 0.25, 0.5 * jax.random.normal(jax.random.key(3), (4096, 2, 2, 1), jnp.float64)
    teacher = None if kind == "training" else gaussian_oracle(karras, v)

    @jax.jit
    def residual(grid_points):
        loss, _ = cm.consistency_model_loss(
            lambda z, t: z * jnp.sqrt((v + 0.002**2) / (v + karras(t).sigma ** 2)), teacher, karras, x, KEY,
            grid_points=grid_points, solver=solvers.heun if kind == "heun" else solvers.ddim,
        )
        return jnp.sqrt(jnp.mean(loss))

    coarse, fine = residual(129), residual(257)
    assert float(fine) < 0.01
    assert float(jnp.log2(coarse / fine)) == pytest.approx(order, abs=0.15)


def test_continuous_time_limit(x64):
    """(N - 1) gradient of CT's squared loss -> gradient of E 2 sigma' f^T sg(df/dsigma + df/dx (z - x) / sigma).

    sigma' = d sigma / dt is the 1 / omega of the paper's expression. The difference falls as 1 / N.
    """
    x = 0.5 * jax.random.normal(jax.random.key(3), (512, 2, 2, 1), jnp.float64)

    def difference(grid_points):
        def loss(theta, student=None):
            per_example, _ = cm.consistency_model_loss(
                student or exploding_f(theta), None, karras, x, KEY, grid_points=grid_points
            )
            return jnp.mean(per_example)

        recorder = Recorder(exploding_f(THETA))
        loss(THETA, recorder)
        z_t, t = recorder.calls[1]
        t = t.astype(jnp.float64)
        sigma, speed = jax.jvp(lambda t: karras(t).sigma, (t,), (jnp.ones_like(t),))
        f = functools.partial(network, THETA.astype(jnp.float64))
        _, tangent = jax.jvp(f, (z_t, sigma), ((z_t - x) / sigma, jnp.ones_like(sigma)))
        limit = jax.grad(lambda theta: jnp.mean(2 * speed * network(theta, z_t, sigma) * tangent))(THETA)
        gradient = (grid_points - 1) * jax.jit(jax.grad(loss))(THETA)
        return np.linalg.norm(gradient - limit) / np.linalg.norm(limit)

    coarse, fine = difference(257), difference(2049)
    assert fine < 0.01
    assert np.log2(coarse / fine) == pytest.approx(3, abs=0.5)


# --------------------------------------------------------------------------------------------------------- equivalences


@pytest.mark.parametrize("kind", ["training", "ddim", "heun"])
def test_variance_preserving_is_variance_exploding(x64, kind):
    """With f(z, t) of z / alpha, both levels give one loss and gradient, weights and interval weights included."""
    x = X.astype(jnp.float64)

    def loss(theta, schedule_):
        def scaled(function):
            return lambda z, t: function(z / schedule_(t).alpha, t)

        teacher = None if kind == "training" else scaled(gaussian_oracle(karras, 0.25, 0.1))
        per_example, _ = cm.consistency_model_loss(
            scaled(exploding_f(theta)), teacher, schedule_, x, KEY, grid_points=18, weight=distance.inverse_gap,
            log_weights=log_weights(18, schedule_), distance=distance.norm_pseudo_huber,
            solver=solvers.heun if kind == "heun" else solvers.ddim,
        )
        return jnp.mean(per_example)

    evaluate = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    values, gradients = zip(*(evaluate(THETA, levels) for levels in (karras, preserving)), strict=True)
    np.testing.assert_allclose(values[1], values[0], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["training", "distillation"])
def test_one_segment_of_multistep_consistency(x64, monkeypatch, kind, weighted):
    """Multistep consistency with S = 1 on the Karras grid and iCT's loss, intervals and weights is iCT (or CD).

    f maps to the sample at sigma_0 > 0, and x_hat = invDDIM_{t->0}(f, z_t) is what a DDIM step to it uses. Then the
    residual of x_hat, times A(t, 0), is that of f: the same loss and gradient, example by example.
    """
    x, num_intervals = X.astype(jnp.float64), 8
    teacher = None if kind == "training" else gaussian_oracle(karras, 0.25, 0.1)
    weights = log_weights(num_intervals + 1) if weighted else None

    def ict(theta, student=None):
        return cm.consistency_model_loss(
            student or exploding_f(theta), teacher, karras, x, KEY, grid_points=num_intervals + 1, log_weights=weights,
            weight=distance.inverse_gap, distance=distance.norm_pseudo_huber,
        )[0]

    recorder = Recorder(exploding_f(THETA))
    ict(THETA, recorder)
    (_, s), (_, t) = recorder.calls
    assert np.min(s) == 0  # the anchor of the one method is the boundary condition of the other
    zeros, n_rel = jnp.zeros_like(t), jnp.rint(t * num_intervals).astype(jnp.int32)
    monkeypatch.setattr(msc, "sample_grid", lambda *_, **__: msc.Grid(t, s, zeros, jnp.zeros_like(n_rel), n_rel))

    def ict_distance(diff, lvl_t):
        moved = (1 - 0.002 / lvl_t.sigma) * diff
        c = 0.00054 * np.sqrt(x[0].size)
        gap = (karras(t).sigma - karras(s).sigma)[:, 0, 0, 0]
        return (jnp.sqrt(jnp.sum(moved**2, axis=(1, 2, 3)) + c**2) - c) / gap

    def multistep(theta):
        def student(z_t, t):
            return steps.inv_ddim(exploding_f(theta)(z_t, t), z_t, karras(t), karras(jnp.zeros_like(t)))

        return msc.consistency_loss(
            student, teacher, karras, x, KEY, student_steps=1, teacher_steps=float(num_intervals), x_var_frac=0.0,
            distance=ict_distance,
        )[0]

    np.testing.assert_allclose(multistep(THETA), ict(THETA), rtol=1e-7)
    gradients = (jax.jit(jax.jacobian(function))(THETA) for function in (multistep, ict))
    np.testing.assert_allclose(*gradients, rtol=1e-7, atol=1e-9)
