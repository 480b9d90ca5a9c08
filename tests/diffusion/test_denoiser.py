"""From a network to a denoiser: prediction types, precision, guidance, clipping and the Gaussian oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.diffusion import denoiser, prediction, schedule
from mscm.types import Level

X = jax.random.uniform(jax.random.key(0), (3, 4, 4, 1), minval=-1.0)
Z = jax.random.normal(jax.random.key(1), (3, 4, 4, 1))
T = jnp.array([0.2, 0.5, 0.8])
LABELS = jnp.array([4, 0, 7])
NULL = jnp.full_like(LABELS, 10)


def network_that_knows_x(name):
    """A network whose output, of type `name`, stands for X at the level it is told by its log-SNR."""

    def network(z_t, logsnr, labels):
        alpha, sigma = lvl = schedule.level_from_logsnr(logsnr)
        if name == "edm":  # its input is scaled, and x_hat is affine in its output
            z_t = z_t / prediction.c_in(lvl)
            skip, with_one = (prediction.x_from_edm(jnp.full_like(z_t, value), z_t, lvl) for value in (0.0, 1.0))
            return (X - skip) / (with_one - skip)
        eps = (z_t - alpha * X) / sigma
        return {"x": X, "eps": eps, "v": alpha * eps - sigma * X}[name]

    return network


@pytest.mark.parametrize("name", denoiser.PREDICTIONS)
def test_denoiser_of_each_prediction_type(name):
    """The denoiser undoes the parametrisation, and the network's log-SNR is that of the schedule."""
    denoise = denoiser.make_denoiser(network_that_knows_x(name), schedule.cosine, denoiser.PREDICTIONS[name])
    np.testing.assert_allclose(denoise(Z, T), X, rtol=0, atol=5e-6)


def test_a_consistency_model_is_the_identity_where_its_schedule_begins():
    """At t = 0 the answer is the input, whatever the network says; at t = 1 it is not."""
    predicted = denoiser.consistency_prediction(schedule.karras)
    denoise = denoiser.make_denoiser(lambda z_t, logsnr, labels: 7 * jnp.ones_like(z_t), schedule.karras, predicted)
    np.testing.assert_allclose(denoise(Z, jnp.zeros(3)), Z, rtol=1e-6)
    assert np.abs(denoise(Z, jnp.ones(3)) - Z).min() > 0.1


def test_low_precision_stops_at_the_network():
    """A bfloat16 output becomes float32 before it meets the levels, and the network receives float32."""

    def network(z_t, logsnr, labels):
        assert z_t.dtype == jnp.float32 and logsnr.shape == (3,) and logsnr.dtype == jnp.float32
        return jnp.full(z_t.shape, 0.5, jnp.bfloat16)  # 0.5 is exact in both

    actual = denoiser.make_denoiser(network, schedule.cosine, denoiser.PREDICTIONS["v"])(Z, T)
    alpha, sigma = schedule.cosine(T)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, alpha * Z - sigma * 0.5, rtol=0, atol=1e-6)


def labelled_network(calls):
    def network(z_t, logsnr, labels):
        calls.append(labels)
        return z_t * (1 + labels.astype(jnp.float32))[:, None, None, None]

    return network


def test_labels_reach_the_network():
    """Without guidance the labels are passed on as they are, one call."""
    calls = []
    network = labelled_network(calls)
    denoise = denoiser.make_denoiser(network, schedule.cosine, denoiser.PREDICTIONS["x"], condition=LABELS)
    np.testing.assert_allclose(denoise(Z, T), Z * (1 + LABELS)[:, None, None, None], rtol=1e-6)
    assert len(calls) == 1


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_guidance_extrapolates_in_one_forward_pass(guidance):
    """x = (1 + g) x_cond - g x_null; x_cond does not depend on g; both halves share one call."""
    calls = []
    teacher = denoiser.make_guided(
        labelled_network(calls), schedule.cosine, denoiser.PREDICTIONS["x"],
        condition=LABELS, null=NULL, guidance=guidance,
    )
    x_hat, x_cond = teacher(Z, T)
    conditional = Z * (1 + LABELS)[:, None, None, None]
    np.testing.assert_allclose(x_cond, conditional, rtol=1e-6)
    np.testing.assert_allclose(x_hat, (1 + guidance) * conditional - guidance * 11 * Z, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1
    np.testing.assert_array_equal(calls[0], [4, 0, 7, 10, 10, 10])


def test_guided_times_belong_to_their_images():
    """Both halves of the doubled batch are denoised at their own times."""
    teacher = denoiser.make_guided(
        lambda z, logsnr, labels: jnp.ones_like(z) * logsnr[:, None, None, None],
        schedule.cosine, denoiser.PREDICTIONS["x"], condition=LABELS, null=NULL, guidance=2.0,
    )
    x_hat, x_cond = teacher(Z, T)
    expected = jnp.ones_like(Z) * schedule.cosine(T).logsnr
    np.testing.assert_allclose(x_cond, expected, rtol=1e-6)
    np.testing.assert_allclose(x_hat, expected, rtol=1e-5)


def test_guidance_within_an_interval_of_times():
    """Inside, both ends included, as without an interval; outside exactly the conditional output, for each image."""
    network = labelled_network([])
    make = functools.partial(
        denoiser.make_guided, network, schedule.cosine, denoiser.PREDICTIONS["x"],
        condition=LABELS, null=NULL, guidance=1.5,
    )
    guided = make()(Z, T)
    for interval, inside in (
        ((0.0, 1.0), [True] * 3), ((0.2, 0.5), [True, True, False]), ((0.6, 1.0), [False, False, True]),
        ((0.3, 0.4), [False] * 3), ((0.81, 1.0), [False] * 3),
    ):
        interval = tuple(float(np.float32(time)) for time in interval)
        x_hat, x_cond = make(interval=interval)(Z, T)
        np.testing.assert_array_equal(x_cond, guided.x_cond)
        expected = np.where(np.reshape(inside, (3, 1, 1, 1)), guided.x_hat, guided.x_cond)
        np.testing.assert_allclose(x_hat, expected, rtol=1e-5, atol=1e-5)
        outside = ~np.array(inside)
        np.testing.assert_array_equal(x_hat[outside], x_cond[outside])


@pytest.mark.parametrize("interval", [None, (0.0, 1.0)])
def test_guidance_of_nothing_is_the_conditional_output(interval):
    """g = 0, bit for bit, one operation at a time: a compiled branch may round the two outputs each in its own way."""
    teacher = denoiser.make_guided(
        labelled_network([]), schedule.cosine, denoiser.PREDICTIONS["v"],
        condition=LABELS, null=NULL, guidance=0.0, interval=interval,
    )
    with jax.disable_jit():
        x_hat, x_cond = teacher(Z, T)
    np.testing.assert_array_equal(x_hat, x_cond)


def test_outside_of_the_interval_the_network_sees_each_image_once():
    """Half the work: no forward of the null class is computed."""
    sizes = []

    def network(z_t, logsnr, labels):
        jax.debug.callback(lambda z: sizes.append(len(z)), z_t)
        return z_t

    teacher = jax.jit(denoiser.make_guided(
        network, schedule.cosine, denoiser.PREDICTIONS["x"],
        condition=LABELS, null=NULL, guidance=1.5, interval=(0.25, 0.75),
    ))
    for time in (0.2, 0.5, 0.8):
        teacher(Z, jnp.full(3, time))
        jax.effects_barrier()
    assert sizes == [3, 6, 3]


def test_clipped_stays_in_the_range_of_the_data():
    """x_hat is cut at the bounds and unchanged inside."""
    inside = 0.9 * X
    np.testing.assert_array_equal(denoiser.clipped(lambda z, t: inside)(Z, T), inside)
    np.testing.assert_array_equal(denoiser.clipped(lambda z, t: 100 * jnp.sign(X))(Z, T), jnp.sign(X))
    np.testing.assert_array_equal(denoiser.clipped(lambda z, t: Z, low=-0.5, high=0.25)(Z, T), jnp.clip(Z, -0.5, 0.25))


def test_dynamic_clipping_has_a_bound_for_each_image():
    """s = max(1, quantile of |x|): one image by hand, the range of the data, and images that do not see each other."""
    x = np.zeros((3, 4, 4, 1), np.float32)
    x[0].flat[:] = np.linspace(-3, 3, 16)
    x[1].flat[:] = np.linspace(-0.9, 0.9, 16)
    x[2].flat[:] = np.linspace(0, 30, 16)

    def clip(x, **kwargs):
        return np.asarray(denoiser.dynamically_clipped(lambda z, t: jnp.asarray(x), **kwargs)(Z[: len(x)], T[: len(x)]))

    bound = np.quantile(np.abs(x[0]), 0.8)
    assert 1 < bound < 3
    clipped = clip(x, quantile=0.8)
    np.testing.assert_allclose(clipped[0], np.clip(x[0], -bound, bound) / bound, rtol=1e-6)
    np.testing.assert_array_equal(clipped[1], x[1])
    np.testing.assert_array_equal(clip(x[:1], quantile=0.8)[0], clipped[0])
    assert np.abs(clip(x)).max() == 1
    # Imagen's 99.5 %: with 1,000 scalars five of them are beyond the bound.
    spread = jnp.linspace(0, 10, 1000).reshape(1, 10, 10, 10)
    bounded = denoiser.dynamically_clipped(lambda z, t: spread)(spread, T[:1])
    assert np.sum(np.asarray(bounded) == 1) == 5


@pytest.mark.parametrize("policy", [denoiser.clipped, denoiser.dynamically_clipped])
def test_clipping_twice_is_clipping_once(policy):
    """What is in the range of the data stays."""
    once = policy(lambda z, t: 5 * z)
    np.testing.assert_array_equal(policy(once)(Z, T), once(Z, T))
    assert np.abs(once(Z, T)).max() <= 1


def test_gaussian_oracle_is_the_posterior_mean(x64):
    """E[x | z] by precisions: (mean / v + alpha z / sigma^2) / (1 / v + alpha^2 / sigma^2)."""
    t, z = T.astype(jnp.float64), Z.astype(jnp.float64)
    lvl = schedule.cosine(t)
    actual = denoiser.gaussian_oracle(schedule.cosine, 0.25, 0.3)(z, t)
    expected = (0.3 / 0.25 + lvl.alpha * z / lvl.sigma**2) / (1 / 0.25 + lvl.snr)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_gaussian_oracle_with_one_variance_per_scalar():
    """Variance 0 gives the mean, infinite variance gives z / alpha, in one image."""
    variance = jnp.zeros((4, 4, 1)).at[:2].set(1e12)
    lvl = schedule.cosine(T)
    actual = denoiser.gaussian_oracle(lambda t: Level(*lvl), variance)(Z, T)
    np.testing.assert_allclose(actual[:, :2], (Z / lvl.alpha)[:, :2], rtol=1e-5)
    np.testing.assert_array_equal(actual[:, 2:], 0)


MIXTURE = dict(means=(-0.7, 0.1, 0.8), variances=(0.01, 0.09, 0.04), weights=(0.2, 0.5, 0.3))


@pytest.mark.parametrize("t", [0.02, 0.3, 0.6, 0.95])
def test_mixture_oracle_is_the_posterior_mean(t):
    """Against the quotient of two integrals over x, by the trapezoidal rule, in and beyond the range of the data."""
    (alpha,), (sigma,) = (np.ravel(np.asarray(part, np.float64)) for part in schedule.cosine(jnp.array([t])))
    z = np.linspace(-1.5, 1.5, 13)
    x = np.linspace(-3.0, 3.0, 60_001)
    log_prior = [
        np.log(w / np.sqrt(v)) - 0.5 * (x - m) ** 2 / v
        for m, v, w in zip(*(MIXTURE[key] for key in ("means", "variances", "weights")), strict=True)
    ]
    log_joint = np.logaddexp.reduce(log_prior) - 0.5 * ((z[:, None] - alpha * x) / sigma) ** 2
    joint = np.exp(log_joint - log_joint.max(axis=1, keepdims=True))
    expected = np.sum(joint * x, axis=1) / np.sum(joint, axis=1)
    oracle = denoiser.mixture_oracle(schedule.cosine, **MIXTURE)
    actual = oracle(jnp.asarray(z, jnp.float32)[:, None, None, None], jnp.full(13, t))
    np.testing.assert_allclose(np.ravel(actual), expected, rtol=0, atol=2e-5)


def test_mixture_of_one_is_the_gaussian():
    """Also for each scalar of an image by itself, and at levels that are not variance preserving."""
    for levels in (schedule.cosine, schedule.karras):
        mixture = denoiser.mixture_oracle(levels, means=(0.3,), variances=(0.25,), weights=(1.0,))
        np.testing.assert_allclose(mixture(Z, T), denoiser.gaussian_oracle(levels, 0.25, 0.3)(Z, T), rtol=0, atol=1e-6)


def test_mixture_oracle_far_from_all_components():
    """Where every density is 0 in float32, the nearest component answers."""
    oracle = denoiser.mixture_oracle(schedule.cosine, means=(-0.5, 0.5), variances=(0.01, 0.01), weights=(0.5, 0.5))
    t, z = jnp.array([1e-3, 1e-3]), jnp.array([-40.0, 40.0])[:, None, None, None]
    nearest = denoiser.gaussian_oracle(schedule.cosine, 0.01, 0.5)
    expected = jnp.concatenate([-nearest(-z[:1], t[:1]), nearest(z[1:], t[1:])])
    np.testing.assert_allclose(oracle(z, t), expected, rtol=1e-5)
