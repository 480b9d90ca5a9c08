"""The optimiser: learning rate, clipping, weight decay."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mscm.training import optimizer as optimizers


def test_cosine_with_warm_up():
    """0 at 0, linear to the peak at the end of the warm-up, half of it halfway after, 0 at the end."""
    rate = optimizers.make_learning_rate(learning_rate=2.0, warmup_steps=10, decay="cosine", num_steps=110)
    for step, expected in ((0, 0.0), (5, 1.0), (10, 2.0), (60, 1.0), (110, 0.0), (200, 0.0)):
        np.testing.assert_allclose(rate(jnp.int32(step)), expected, atol=1e-6)


@pytest.mark.parametrize("decay", optimizers.DECAYS)
def test_no_warm_up_starts_at_the_peak(decay):
    """With warmup_steps = 0 the first step has the full rate."""
    rate = optimizers.make_learning_rate(learning_rate=0.5, warmup_steps=0, decay=decay, num_steps=8)
    assert float(rate(jnp.int32(0))) == 0.5
    assert float(rate(jnp.int32(8))) == (0.5 if decay == "constant" else 0.0)


def test_linear_decay_ends_at_zero():
    """As within a phase of progressive distillation: half the peak halfway, 0 at the end."""
    rate = optimizers.make_learning_rate(learning_rate=2.0, warmup_steps=0, decay="linear", num_steps=100)
    for step, expected in ((0, 2.0), (50, 1.0), (75, 0.5), (100, 0.0)):
        np.testing.assert_allclose(rate(jnp.int32(step)), expected, atol=1e-6)


def test_radam_begins_without_a_second_moment():
    """With b2 = 0.999 its variance is intractable for five steps, in which it is momentum alone; Adam's is not."""
    gradient = {"a": jnp.array([3.0])}
    steps = {}
    for name in optimizers.RULES:
        optimizer = optimizers.make_optimizer(
            optax.constant_schedule(0.1), name=name, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=None
        )
        updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
        steps[name] = float(updates["a"][0])
    np.testing.assert_allclose([steps["adam"], steps["radam"]], [-0.1, -0.3], rtol=1e-5)


def test_refusals_are_sentences():
    """An unknown decay names the choices, a warm-up longer than the training both numbers."""
    with pytest.raises(ValueError, match="optimizer.decay: got 'exponential', expected one of constant, cosine, lin"):
        optimizers.make_learning_rate(learning_rate=1.0, warmup_steps=0, decay="exponential", num_steps=8)
    with pytest.raises(ValueError, match="optimizer.warmup_steps: got 9, expected 0 to train.num_steps = 8"):
        optimizers.make_learning_rate(learning_rate=1.0, warmup_steps=9, decay="cosine", num_steps=8)
    with pytest.raises(ValueError, match="optimizer.name: got 'sgd', expected one of adam, radam"):
        optimizers.make_optimizer(
            optax.constant_schedule(0.1), name="sgd", b1=0.9, b2=0.9, eps=0.0, weight_decay=0.0, clip_norm=None
        )


def _optimizer(*, weight_decay=0.0, clip_norm=1.0, eps=1.0):
    rate = optax.constant_schedule(0.1)
    return optimizers.make_optimizer(
        rate, name="adam", b1=0.0, b2=0.0, eps=eps, weight_decay=weight_decay, clip_norm=clip_norm
    )


@pytest.mark.parametrize(("clip_norm", "scale"), [(None, 1.0), (1.0, 0.2), (10.0, 1.0)])
def test_gradients_are_clipped_by_the_norm_of_all_of_them(clip_norm, scale):
    """With b1 = b2 = 0 a step is -rate g / (|g| + eps) of g, or of g clip / norm where the norm, here 5, is larger."""
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([-4.0])}
    optimizer = _optimizer(clip_norm=clip_norm)
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    for name, value in gradient.items():
        clipped = scale * value
        np.testing.assert_allclose(updates[name], -0.1 * clipped / (jnp.abs(clipped) + 1.0), rtol=1e-5)


def test_weight_decay_is_decoupled():
    """Without a gradient a step is -rate * weight_decay * parameter; without weight decay it is none."""
    params, zero = {"a": jnp.array([2.0])}, {"a": jnp.zeros(1)}
    for weight_decay in (0.0, 0.5):
        optimizer = _optimizer(weight_decay=weight_decay)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
        np.testing.assert_allclose(updates["a"], -0.1 * weight_decay * 2.0, rtol=1e-6)
