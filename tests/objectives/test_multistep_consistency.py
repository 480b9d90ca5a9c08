"""Algorithm 1 of arXiv:2403.06807v3: grid, target, limits, oracle residuals and the flow of gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mscm.diffusion import schedule, steps
from mscm.diffusion.denoiser import gaussian_oracle
from mscm.objectives import distance, solvers
from mscm.objectives import multistep_consistency as msc
from mscm.objectives.diffusion import diffusion_loss
from mscm.types import Guided, Level
from tests.objectives.recorder import Recorder

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (64, 4, 4, 2), minval=-1.0)
UNEVEN = [(1, 64.0), (3, 64.0), (5, 7.0), (7, 100.0), (4, 135.3), (16, 3.0), (6, 605.3), (8, 1280.0), (7, 1000.0)]


def level(phi, kind="vp"):
    phi = jnp.asarray(phi)[:, None, None, None]
    return Level(jnp.cos(phi), jnp.sin(phi)) if kind == "vp" else Level(jnp.ones_like(phi), jnp.tan(phi))


def trigonometric(t):
    """cos(pi t / 2), sin(pi t / 2), without bounds: sigma_0 = 0. In float64 where that is enabled."""
    return level(jnp.pi / 2 * t.astype(jnp.result_type(float)))


def cosine(t):
    """The bounded cosine, in float64 where that is enabled."""
    return schedule.cosine(t.astype(jnp.result_type(float)))


def karras(t):
    """EDM's grid, in float64 where that is enabled."""
    return schedule.karras(t.astype(jnp.result_type(float)))


def images(seed, shape=(4, 3, 3, 2)):
    return jax.random.normal(jax.random.key(seed), shape)


# ---------------------------------------------------------------------------------------------------------------- grid


@functools.lru_cache
def grid_of(student_steps, teacher_steps, how):
    if how == "traced":
        compiled = jax.jit(lambda n: msc.sample_grid(KEY, 4096, student_steps=student_steps, teacher_steps=n))
        return compiled(jnp.float32(teacher_steps))
    make = functools.partial(msc.sample_grid, KEY, 4096, student_steps=student_steps, teacher_steps=teacher_steps)
    return jax.jit(make)() if how == "constant" else make()


@pytest.mark.parametrize("how", ["eager", "constant", "traced"])
@pytest.mark.parametrize("student_steps, teacher_steps", UNEVEN)
def test_times_lie_in_their_segments(student_steps, teacher_steps, how):
    """0 <= k / S = t_step <= s < t <= (k + 1) / S <= 1 exactly in float32, where N is no multiple of S too."""
    grid = grid_of(student_steps, teacher_steps, how)
    seams = np.arange(student_steps + 1, dtype=np.float32) / np.float32(student_steps)
    np.testing.assert_array_equal(grid.t_step, seams[grid.segment])
    assert np.all(grid.t <= seams[grid.segment + 1]) and np.all(grid.t_step <= grid.s) and np.all(grid.s < grid.t)
    assert np.max(grid.t) == 1.0 and np.min(grid.t) > 0 and np.min(grid.s) == 0.0
    per_segment = np.max(grid.n_rel)
    np.testing.assert_array_equal(grid.t[grid.n_rel == per_segment], seams[1:][grid.segment[grid.n_rel == per_segment]])
    np.testing.assert_array_equal(grid.s == grid.t_step, grid.n_rel == 1)


@pytest.mark.parametrize("student_steps, expected", [
    (1, (64, 135, 286, 605, 1280)), (2, (32, 68, 143, 303, 640)), (4, (16, 34, 72, 151, 320)),
    (8, (8, 17, 36, 76, 160)), (16, (4, 8, 18, 38, 80)),
])
def test_steps_per_segment(student_steps, expected):
    """n = round(N / S) along the schedule of the paper, read off t - k / S = m / (n S)."""
    for teacher_steps, per_segment in zip((64.0, 135.3, 286.2, 605.3, 1280.0), expected, strict=True):
        grid = msc.sample_grid(KEY, 256, student_steps=student_steps, teacher_steps=jnp.float32(teacher_steps))
        measured = np.median(grid.n_rel / ((grid.t - grid.t_step) * student_steps))
        assert round(measured) == per_segment
        np.testing.assert_allclose(grid.t - grid.s, 1 / (per_segment * student_steps), rtol=0, atol=1.5e-7)


def test_at_least_one_step_per_segment():
    """N < S / 2 would round to no step at all: n = 1, so t = (k + 1) / S and s = k / S."""
    grid = msc.sample_grid(KEY, 256, student_steps=16, teacher_steps=3.0)
    np.testing.assert_array_equal(grid.n_rel, np.ones(256))
    np.testing.assert_array_equal(grid.t, (grid.segment + 1) / 16)


@pytest.mark.parametrize("student_steps, per_segment", [(3, 5), (1, 16), (8, 2)])
def test_segment_and_index_are_uniform(student_steps, per_segment):
    """(k, m) is uniform on {0..S-1} x {1..n}, n included: chi-square of all cells."""
    grid = msc.sample_grid(KEY, 20_000, student_steps=student_steps, teacher_steps=float(student_steps * per_segment))
    counts = np.zeros((student_steps, per_segment + 2), int)
    np.add.at(counts, (np.asarray(grid.segment), np.asarray(grid.n_rel)), 1)
    assert np.sum(counts[:, 0]) == np.sum(counts[:, -1]) == 0
    assert stats.chisquare(counts[:, 1:-1].ravel()).pvalue > 1e-3


def test_no_segments():
    """S = 0 raises and says so."""
    with pytest.raises(ValueError, match="student_steps=0"):
        msc.sample_grid(KEY, 4, student_steps=0, teacher_steps=64.0)


# -------------------------------------------------------------------------------------------------------------- target


PHI_T, PHI_S, PHI_STEP = (0.3, 0.9, 1.3, 1.56), (0.2, 0.85, 1.0, 1.55), (0.1, 0.01, 0.4, 0.0)


def literal_target(x_ref, x_teacher, x_var, z_t, lvl_t, lvl_s, lvl_step):
    """invDDIM_{t->tau}(DDIM_{s->tau}(x_ref, aDDIM_{t->s}(x_T, z_t)), z_t), every step as it is printed."""
    eps = (z_t - lvl_t.alpha * x_teacher) / lvl_t.sigma
    z_var = (lvl_s.alpha - lvl_t.alpha * lvl_s.sigma / lvl_t.sigma) ** 2 * x_var
    scale = np.sqrt(lvl_s.sigma**2 + z_var / np.mean(eps**2, axis=(1, 2, 3), keepdims=True))
    z_s = lvl_s.alpha * x_teacher + scale * eps
    z_ref = lvl_step.alpha * x_ref + lvl_step.sigma * (z_s - lvl_s.alpha * x_ref) / lvl_s.sigma
    shrink = lvl_step.sigma / lvl_t.sigma
    return (z_ref - shrink * z_t) / (lvl_step.alpha - lvl_t.alpha * shrink)


@pytest.mark.parametrize("kind", ["vp", "ve"])
@pytest.mark.parametrize("x_var", [(0.0,) * 4, (0.3, 0.02, 1.0, 0.0)])
def test_target_is_the_chain_of_steps(x64, kind, x_var):
    """The convex form equals the literal composition of aDDIM, DDIM and inverse DDIM, in float64."""
    lvl_t, lvl_s, lvl_step = (level(phi, kind) for phi in (PHI_T, PHI_S, PHI_STEP))
    x_ref, x_teacher, z_t = images(0), images(1), images(2)
    actual = msc.target(
        x_ref, x_teacher, jnp.asarray(x_var), z_t, lvl_t, lvl_s, lvl_step, is_first=jnp.zeros(4, bool)
    )
    variance = np.asarray(x_var)[:, None, None, None]
    arrays = (np.asarray(array) for array in (x_ref, x_teacher, variance, z_t))
    levels = (Level(*(np.asarray(array) for array in lvl)) for lvl in (lvl_t, lvl_s, lvl_step))
    np.testing.assert_allclose(actual, literal_target(*arrays, *levels), rtol=0, atol=1e-10)
    through_steps = steps.inv_ddim(
        steps.ddim(x_ref, steps.addim(x_teacher, jnp.asarray(x_var), z_t, lvl_t, lvl_s), lvl_s, lvl_step),
        z_t, lvl_t, lvl_step,
    )
    np.testing.assert_allclose(actual, through_steps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("phi_step", [PHI_S, (0.0,) * 4])
def test_first_index_is_the_anchor(x64, phi_step):
    """m = 1: x_T + (c - sigma_s) / A(t, s) eps_T, even if x_ref is nan or sigma_s = 0; x_T itself for x_var = 0."""
    lvl_t, lvl_step = level(PHI_T), level(phi_step)
    x_teacher, z_t = images(1), images(2)
    x_var = jnp.array([0.3, 0.02, 1.0, 0.5])
    anchored = functools.partial(
        msc.target, jnp.full_like(z_t, jnp.nan), x_teacher, z_t=z_t,
        lvl_t=lvl_t, lvl_s=lvl_step, lvl_step=lvl_step, is_first=jnp.ones(4, bool),
    )
    np.testing.assert_allclose(anchored(x_var=jnp.zeros(4)), x_teacher, rtol=0, atol=0)
    eps = (z_t - lvl_t.alpha * x_teacher) / lvl_t.sigma
    coefficient = lvl_step.alpha - lvl_t.alpha * lvl_step.sigma / lvl_t.sigma
    mean_square = np.mean(np.square(eps), axis=(1, 2, 3), keepdims=True)
    c = np.sqrt(lvl_step.sigma**2 + coefficient**2 * x_var[:, None, None, None] / mean_square)
    tail = (c - lvl_step.sigma) / coefficient * eps
    np.testing.assert_allclose(anchored(x_var=x_var), x_teacher + tail, rtol=0, atol=1e-12)
    if phi_step == (0.0,) * 4:
        np.testing.assert_allclose(np.mean(np.square(tail), axis=(1, 2, 3)), x_var, rtol=1e-9)


def test_clean_end_is_an_ordinary_consistency_model(x64):
    """S = 1, sigma_tau = 0: the target is f(z_s, s) itself, whatever the teacher."""
    x_ref = images(0)
    actual = msc.target(
        x_ref, images(1), jnp.full(4, 0.2), images(2), level(PHI_T), level(PHI_S), level((0.0,) * 4),
        is_first=jnp.zeros(4, bool),
    )
    np.testing.assert_allclose(actual, x_ref, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_first", [False, True])
def test_constant_predictions_give_the_constant(is_first):
    """x_ref = x_T = const gives target = const: the weights sum to 1."""
    constant = jnp.full((4, 3, 3, 2), 0.37)
    lvl_s = level(PHI_STEP if is_first else PHI_S)
    actual = msc.target(
        constant, constant, jnp.zeros(4), images(2), level(PHI_T), lvl_s, level(PHI_STEP),
        is_first=jnp.full(4, is_first),
    )
    np.testing.assert_allclose(actual, constant, rtol=1e-6)


def chain_errors(student_steps, total=1280):
    """Largest float32 errors of (convex form, literal chain) over the whole grid, against float64."""
    index = np.arange(1, total + 1)
    start = (index - 1) // (total // student_steps) * (total // student_steps)
    keep = index - 1 > start  # without the first of each segment, which has no weight on x_ref
    rng = np.random.default_rng(0)
    noise, x = rng.normal(size=(total, 4, 4, 1)), 0.5 * rng.normal(size=(total, 4, 4, 1))
    levels = []
    for times in (index, index - 1, start):
        phi = np.arctan(np.exp(-np.asarray(schedule.cosine_logsnr(jnp.asarray(times / total))) / 2))
        levels.append(Level(np.cos(phi)[:, None, None, None], np.sin(phi)[:, None, None, None]))
    z_t = levels[0].alpha * x + levels[0].sigma * noise
    x_teacher = x + 0.01 * rng.normal(size=x.shape)
    x_ref = x_teacher + 1e-3 * rng.normal(size=x.shape)
    doubles = tuple(np.asarray(array)[keep] for array in (x_ref, x_teacher, np.zeros_like(x[:, :1, :1, :1]), z_t))
    levels = tuple(Level(*(np.asarray(array)[keep] for array in lvl)) for lvl in levels)
    exact = literal_target(*doubles, *levels)
    singles = jax.tree.map(lambda array: array.astype(np.float32), (doubles, levels))
    literal = literal_target(*singles[0], *singles[1])
    x_ref, x_teacher, x_var, z_t = (jnp.asarray(array) for array in singles[0])
    convex = msc.target(
        x_ref, x_teacher, x_var[:, 0, 0, 0], z_t, *(Level(*map(jnp.asarray, lvl)) for lvl in singles[1]),
        is_first=jnp.zeros(len(z_t), bool),
    )
    return np.max(np.abs(convex - exact)), np.max(np.abs(literal - exact))


@pytest.mark.parametrize("student_steps", [1, 4, 16])
def test_rounding_of_the_target(x64, student_steps):
    """At T = 1280 the convex form keeps float32 precision; the literal chain loses over an order of magnitude."""
    convex, literal = chain_errors(student_steps)
    assert convex < 1e-6
    if student_steps > 1:  # tau = 0 divides by A(t, 0), which is about 1, and nothing is lost
        assert literal > 10 * convex


# ---------------------------------------------------------------------------------------------- consistency training


@pytest.mark.parametrize("student_steps, teacher_steps", [(1, 32.0), (4, 18.0)])
def test_training_keeps_the_noise_sample(x64, student_steps, teacher_steps):
    """Without a teacher, z_t = alpha_t x + sigma_t eps and z_s = alpha_s x + sigma_s eps share eps."""
    student, x = Recorder(lambda z, t: z), X.astype(jnp.float64)
    msc.consistency_loss(
        student, None, trigonometric, x, KEY, student_steps=student_steps, teacher_steps=teacher_steps
    )
    (z_s, s), (z_t, t) = student.calls
    lvl_t, lvl_s = trigonometric(t), trigonometric(s)
    eps = (z_t - lvl_t.alpha * x) / lvl_t.sigma
    np.testing.assert_allclose(z_s, lvl_s.alpha * x + lvl_s.sigma * eps, rtol=0, atol=1e-12)
    assert stats.kstest(np.asarray(eps).ravel(), "norm").pvalue > 1e-3
    np.testing.assert_allclose(t - s, 1 / (round(teacher_steps / student_steps) * student_steps), rtol=1e-4)


@pytest.mark.parametrize("schedule_", [trigonometric, cosine])
@pytest.mark.parametrize("student_steps, teacher_steps", [(1, 8.0), (3, 10.0), (8, 8.0)])
def test_perfect_student_has_no_loss(x64, schedule_, student_steps, teacher_steps):
    """A student that returns the true x has zero loss for every (k, m), also where sigma_0 = 0."""
    x = X.astype(jnp.float64)
    loss, _ = msc.consistency_loss(
        lambda z, t: x, None, schedule_, x, KEY,
        student_steps=student_steps, teacher_steps=teacher_steps, distance=distance.v_mse,
    )
    np.testing.assert_allclose(loss, 0, atol=1e-24)


@pytest.mark.parametrize("student_steps", [1, 4, 16])
def test_as_many_steps_as_the_teacher_is_diffusion(student_steps):
    """S = N: the loss is sqrt(SNR + 1) |x - x_hat| in rms, the diffusion loss unsquared."""
    denoiser = gaussian_oracle(schedule.cosine, 0.25)
    student = Recorder(denoiser)
    loss, metrics = msc.consistency_loss(
        student, None, schedule.cosine, X, KEY,
        student_steps=student_steps, teacher_steps=float(student_steps), huber_epsilon=0.0,
    )
    error = np.mean(np.square(denoiser(*student.calls[1]) - X), axis=(1, 2, 3))
    np.testing.assert_allclose(loss, np.sqrt((1 + np.exp(metrics["logsnr"])) * error), rtol=2e-4)


def test_many_segments_have_the_mean_of_the_diffusion_loss():
    """S = N large, squared: the same expectation as the diffusion objective over uniform times."""
    x = 0.5 * jax.random.normal(jax.random.key(3), (1024, 2, 2, 1))
    denoiser = gaussian_oracle(schedule.cosine, 0.25)
    loss, _ = msc.consistency_loss(
        denoiser, None, schedule.cosine, x, KEY, student_steps=256, teacher_steps=256.0, distance=distance.v_mse
    )
    diffusion, _ = diffusion_loss(denoiser, schedule.cosine, x, jax.random.key(4))
    np.testing.assert_allclose(jnp.mean(loss), jnp.mean(diffusion), rtol=0.1)  # standard error 2 %


# ----------------------------------------------------------------------------------------------- distillation, oracles


def exact_student(student_steps):
    """f*(z, t) = invDDIM_{t->tau}(flow of N(0, 1/4) data from t to tau, z), tau the start of the segment (tau, t]."""

    def variance(lvl):
        return 0.25 * jnp.square(lvl.alpha) + jnp.square(lvl.sigma)

    def student(z_t, t):
        tau = (jnp.ceil(t * student_steps) - 1) / student_steps
        lvl_t, lvl_tau = trigonometric(t), trigonometric(tau)
        flow = z_t * jnp.sqrt(variance(lvl_tau) / variance(lvl_t))
        return steps.inv_ddim(flow, z_t, lvl_t, lvl_tau)

    return student


RESIDUALS = [
    (1, (4, 8, 16, 32, 64, 128), (0.154, 0.0687, 0.0274, 0.0103, 0.0038, 0.0014)),
    (4, (16, 32, 64, 128, 256, 512), (0.0313, 0.0119, 0.0044, 0.0016, 0.00058, 0.00021)),
]


@pytest.mark.parametrize("student_steps, totals, expected", RESIDUALS)
def test_exact_student_residual_converges(x64, student_steps, totals, expected):
    """The exact consistency function under the oracle's DDIM teacher, at z = sqrt(alpha^2 v + sigma^2)."""
    student, teacher = exact_student(student_steps), gaussian_oracle(trigonometric, 0.25)

    @jax.jit
    def residual(t, s, t_step, is_first):
        lvl_t, lvl_s, lvl_step = trigonometric(t), trigonometric(s), trigonometric(t_step)
        z_t = jnp.sqrt(0.25 * lvl_t.alpha**2 + lvl_t.sigma**2)
        x_teacher = teacher(z_t, t)
        z_s = steps.ddim(x_teacher, z_t, lvl_t, lvl_s)
        target = msc.target(
            student(z_s, s), x_teacher, jnp.zeros_like(t), z_t, lvl_t, lvl_s, lvl_step, is_first=is_first
        )
        return jnp.sqrt(jnp.mean(distance.v_mse(student(z_t, t) - target, lvl_t)))

    actual = []
    for total in totals:
        index = np.arange(1, total + 1)
        start = (index - 1) // (total // student_steps) * (total // student_steps)
        times = (jnp.asarray(i / total) for i in (index, index - 1, start))
        actual.append(residual(*times, jnp.asarray(index - 1 == start)))
    np.testing.assert_allclose(actual, expected, rtol=0.03)


@pytest.mark.parametrize("student_steps, total, expected", [(1, 16, 0.0274), (4, 32, 0.0119)])
def test_exact_student_loss(student_steps, total, expected):
    """The same residual through the whole objective: the flow is linear, so E z_t^2 is all that matters."""
    x = 0.5 * jax.random.normal(jax.random.key(3), (2048, 8, 8, 1))
    loss, _ = jax.jit(lambda x: msc.consistency_loss(
        exact_student(student_steps), gaussian_oracle(trigonometric, 0.25), trigonometric, x, KEY,
        student_steps=student_steps, teacher_steps=float(total), x_var_frac=0.0, distance=distance.v_mse,
    ))(x)
    assert float(jnp.sqrt(jnp.mean(loss))) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("x_var_frac", [0.0, 0.75])
def test_distillation_is_the_printed_algorithm(x64, x_var_frac):
    """z_s is aDDIM of the teacher with x_var = eta mean (x_T - x)^2, and the loss is that of the literal chain."""
    teacher = gaussian_oracle(schedule.cosine, 0.25, 0.1)
    student, x, residuals = Recorder(lambda z, t: jnp.tanh(z)), X.astype(jnp.float64), []

    def keeping(diff, lvl_t):
        residuals.append(diff)
        return distance.v_mse(diff, lvl_t)

    _, metrics = msc.consistency_loss(
        student, teacher, cosine, x, KEY,
        student_steps=4, teacher_steps=20.0, x_var_frac=x_var_frac, distance=keeping,
    )
    (z_s, s), (z_t, t) = student.calls
    lvl_t, lvl_s, lvl_step = cosine(t), cosine(s), cosine(metrics["segment"] / 4)
    x_teacher = teacher(z_t, t)
    x_var = x_var_frac * jnp.mean(jnp.square(x_teacher - x), axis=(1, 2, 3))
    np.testing.assert_allclose(z_s, steps.addim(x_teacher, x_var, z_t, lvl_t, lvl_s), rtol=0, atol=1e-6)
    literal = literal_target(
        jnp.tanh(z_s), x_teacher, x_var[:, None, None, None], z_t, lvl_t, lvl_s, lvl_step
    )
    np.testing.assert_allclose(residuals[0], jnp.tanh(z_t) - literal, rtol=0, atol=1e-5)


def test_guided_teacher():
    """The step uses the guided x_hat, the variance the conditional output."""
    x_hat, x_cond = 1.5 * X, X + 0.2
    student = Recorder(lambda z, t: z)
    msc.consistency_loss(
        student, lambda z, t: Guided(x_hat, x_cond), schedule.cosine, X, KEY, student_steps=2, teacher_steps=8.0
    )
    (z_s, s), (z_t, t) = student.calls
    x_var = jnp.full(len(X), 0.75 * 0.04)
    expected = steps.addim(x_hat, x_var, z_t, schedule.cosine(t), schedule.cosine(s))
    np.testing.assert_allclose(z_s, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule_", [cosine, karras])
@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_other_solver_and_self_teacher(x64, schedule_, solver):
    """z_s is the solver's, x_ref the self-teacher's, and the loss that of the literal chain; both VP and VE."""
    teacher = gaussian_oracle(schedule_, 0.25, 0.1)
    student, self_teacher = Recorder(lambda z, t: jnp.tanh(z)), Recorder(lambda z, t: jnp.sin(z))
    residuals, x = [], X.astype(jnp.float64)

    def keeping(diff, lvl_t):
        residuals.append(diff)
        return distance.v_mse(diff, lvl_t)

    _, metrics = msc.consistency_loss(
        student, teacher, schedule_, x, KEY, student_steps=4, teacher_steps=20.0, self_teacher=self_teacher,
        solver=getattr(solvers, solver), distance=keeping,
    )
    ((z_t, t),), ((z_s, s),) = student.calls, self_teacher.calls
    lvl_t, lvl_s, lvl_step = schedule_(t), schedule_(s), schedule_(metrics["segment"] / 4)
    expected = steps.ddim(teacher(z_t, t), z_t, lvl_t, lvl_s)
    if solver == "heun":
        expected = steps.heun(teacher, z_t, t, s, lvl_t, lvl_s)
    np.testing.assert_allclose(z_s, expected, rtol=1e-6, atol=1e-6)
    x_ref = jnp.sin(z_s)
    z_ref = steps.ddim(x_ref, expected, lvl_s, lvl_step)
    z_ref = jnp.where((s == metrics["segment"] / 4)[:, None, None, None], expected, z_ref)
    literal = jnp.tanh(z_t) - steps.inv_ddim(z_ref, z_t, lvl_t, lvl_step)
    np.testing.assert_allclose(residuals[0], literal, rtol=1e-5, atol=1e-5)


def test_heun_teacher_converges_faster(x64):
    """The exact student's residual under Heun is an order smaller in 1 / T than under DDIM, and T halves it by that."""
    x = 0.5 * jax.random.normal(jax.random.key(3), (1024, 4, 4, 1))

    @functools.partial(jax.jit, static_argnames="solver")
    def residual(total, solver):
        loss, _ = msc.consistency_loss(
            exact_student(4), gaussian_oracle(trigonometric, 0.25), trigonometric, x, KEY,
            student_steps=4, teacher_steps=total, solver=getattr(solvers, solver), distance=distance.v_mse,
        )
        return jnp.sqrt(jnp.mean(loss))

    orders = {}
    for solver in ("ddim", "heun"):
        coarse, fine = residual(64.0, solver), residual(128.0, solver)
        orders[solver] = float(jnp.log2(coarse / fine))
    assert orders["heun"] > orders["ddim"] + 0.7


# --------------------------------------------------------------------------------------------------- gradients and jit


def test_gradient_does_not_reach_the_self_teacher():
    """A self-teacher of the student's own parameter gets none, as if it were constant."""

    def loss(theta, other):
        return jnp.mean(msc.consistency_loss(
            lambda z, t: theta * z, None, schedule.cosine, X, KEY, student_steps=2, teacher_steps=12.0,
            self_teacher=lambda z, t: other * z,
        )[0])

    shared = jax.grad(lambda theta: loss(theta, theta))(0.8)
    np.testing.assert_allclose(shared, jax.grad(loss)(0.8, 0.8), rtol=1e-6)


@pytest.mark.parametrize("student_steps", [1, 4])
def test_gradient_of_as_many_steps_as_the_teacher_is_that_of_diffusion(student_steps):
    """S = N, squared: the gradient of (SNR + 1) mean (f(z_t, t) - x)^2."""
    student = Recorder(lambda z, t: 0.8 * z)
    options = {"student_steps": student_steps, "teacher_steps": float(student_steps), "distance": distance.v_mse}
    msc.consistency_loss(student, None, schedule.cosine, X, KEY, **options)
    z_t, t = student.calls[1]
    lvl_t = schedule.cosine(t)
    expected = jax.grad(lambda theta: jnp.mean(jnp.square((theta * z_t - X) / lvl_t.sigma)))(0.8)
    actual = jax.grad(lambda theta: jnp.mean(
        msc.consistency_loss(lambda z, t: theta * z, None, schedule.cosine, X, KEY, **options)[0]
    ))(0.8)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["training", "distillation"])
def test_gradient_flows_through_x_hat_only(x64, kind):
    """f(z, t) = theta z: dL / dtheta = mean 2 diff z_t / sigma_t^2, as if target and teacher were constants."""
    x, residuals = X.astype(jnp.float64), []

    def loss(theta, student, keep):
        def kept(diff, lvl_t):
            if keep:
                residuals.append((diff, lvl_t))
            return distance.v_mse(diff, lvl_t)

        teacher = None if kind == "training" else lambda z, t: 0.5 * theta * z
        per_example, _ = msc.consistency_loss(
            student, teacher, schedule.cosine, x, KEY, student_steps=2, teacher_steps=12.0, distance=kept
        )
        return jnp.mean(per_example)

    student = Recorder(lambda z, t: 0.8 * z)
    loss(0.8, student, True)
    z_t, (diff, lvl_t) = student.calls[1][0], residuals[0]
    expected = jnp.mean(2 * diff * z_t / lvl_t.sigma**2)
    actual = jax.grad(lambda theta: loss(theta, lambda z, t: theta * z, False))(0.8)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_teacher_steps_change_without_compiling_again():
    """N(i) is traced: one compilation for all N, and the values of the constants."""
    traces = []

    def loss(teacher_steps):
        traces.append(None)
        return msc.consistency_loss(
            gaussian_oracle(schedule.cosine, 0.25), None, schedule.cosine, X, KEY,
            student_steps=4, teacher_steps=teacher_steps, distance=distance.v_mse,
        )[0]

    compiled = jax.jit(loss)
    losses = [compiled(jnp.float32(n)) for n in (64.0, 135.3, 1280.0)]
    assert len(traces) == 1
    np.testing.assert_allclose(losses[1], loss(135.3), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("student_steps", [1, 5])
def test_metrics_are_per_example(student_steps):
    """One loss, log-SNR and segment per example; the log-SNR lies inside the segment."""
    loss, metrics = msc.consistency_loss(
        gaussian_oracle(schedule.cosine, 0.25), None, schedule.cosine, X, KEY,
        student_steps=student_steps, teacher_steps=40.0,
    )
    assert loss.shape == metrics["logsnr"].shape == metrics["segment"].shape == (64,)
    assert set(np.unique(metrics["segment"])) == set(range(student_steps))
    start, end = (schedule.cosine_logsnr((metrics["segment"] + i) / student_steps) for i in (0, 1))
    assert np.all(metrics["logsnr"] < start) and np.all(metrics["logsnr"] >= end - 1e-4)


def test_loss_does_not_see_batch_mates():
    """Other images in the batch, and other variances of the teacher on them, change nothing."""
    teacher = gaussian_oracle(schedule.cosine, 0.25, 0.1)

    def loss(x):
        return msc.consistency_loss(
            lambda z, t: jnp.tanh(z), teacher, schedule.cosine, x, KEY, student_steps=2, teacher_steps=8.0
        )[0]

    np.testing.assert_allclose(loss(X.at[32:].mul(-30.0))[:32], loss(X)[:32], rtol=1e-5, atol=1e-6)
