"""The training step, on a quadratic whose gradient is known, and the objectives that `experiment` gives it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
from mscm import methods
from mscm.checkpoint import Checkpoints
from mscm.config import load_config
from mscm.experiment import build
from mscm.training import ema
from mscm.training.step import LOGSNR_EDGES, band_names, init_state, make_train_steps, summarize
from mscm.training_loop import initial_state

ROOT_KEY = jax.random.key(3)


def _loss_fn(params, target, frozen, batch, key, step):
    noise = jax.random.normal(key, batch["x"].shape)
    loss = jnp.mean(jnp.square(params["w"][None] * batch["x"] - batch["x"] - frozen["shift"] - noise), axis=1)
    return loss, {"logsnr": batch["x"][:, 0], "noise": jnp.mean(noise), "step": step.astype(jnp.float32)}


def _steps(loss_fn=_loss_fn, **options):
    optimizer = optax.adam(1e-2)
    rate = optax.linear_schedule(0.0, 1.0, 10)
    return optimizer, make_train_steps(
        loss_fn, optimizer, rate, update_ema=ema.exponential(decay=0.9, warmup=True), num_segments=None, **options
    )


def _state(optimizer):
    return init_state({"w": jnp.linspace(0.0, 1.0, 4)}, optimizer)


def test_several_steps_in_one_dispatch_are_the_same_steps():
    """Three steps in one dispatch, and three dispatches of one step: the same state and sums, to 1e-6."""
    optimizer, steps = _steps()
    batches = {"x": jax.random.normal(jax.random.key(0), (3, 5, 4))}
    frozen = {"shift": jnp.ones(())}
    together, averages = steps(_state(optimizer), frozen, batches, ROOT_KEY)
    state, parts = _state(optimizer), []
    for i in range(3):
        state, part = steps(state, frozen, {"x": batches["x"][i : i + 1]}, ROOT_KEY)
        parts.append(part)
    assert together.step == state.step == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), together, state)
    summed = jax.tree.map(lambda *sums: sum(sums), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), averages, summed)
    assert averages["loss"].count == 15 and averages["learning_rate"].count == 3
    np.testing.assert_allclose(averages["learning_rate"].compute(), 0.1, rtol=1e-6)


def test_randomness_depends_on_the_number_of_the_step_only():
    """The noise of step n is that of fold_in(root, n), however the state got there."""
    optimizer, steps = _steps()
    frozen, batch = {"shift": jnp.zeros(())}, {"x": jnp.ones((1, 5, 4))}
    expected = jnp.mean(jax.random.normal(jax.random.fold_in(ROOT_KEY, 7), (5, 4)))
    for params in (jnp.zeros(4), jnp.ones(4)):
        state = init_state({"w": params}, optimizer)._replace(step=jnp.int32(7))
        _, averages = steps(state, frozen, batch, ROOT_KEY)
        np.testing.assert_allclose(averages["noise"].compute(), expected, rtol=1e-5)
        assert averages["step"].compute() == 7


def test_microbatches_are_one_batch():
    """Parts of a batch, each under a key of its own: where the loss draws nothing, the whole batch's step and sums."""

    def loss_fn(params, target, frozen, batch, key, step):
        loss = jnp.mean(jnp.square(params["w"][None] * batch["x"] - 1.0), axis=1)
        return loss, {"logsnr": batch["x"][:, 0], "draw": jax.random.uniform(key), "step": step.astype(jnp.float32)}

    batches = {"x": jax.random.normal(jax.random.key(0), (2, 6, 4))}
    results = []
    for num_microbatches in (1, 3):
        optimizer, steps = _steps(loss_fn, num_microbatches=num_microbatches)
        results.append(steps(_state(optimizer), {}, batches, ROOT_KEY))
    (whole, averages), (parts, sums) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), parts, whole)
    assert sums.keys() == averages.keys()
    draws = [averages.pop("draw"), sums.pop("draw")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), sums, averages)
    keys = [jax.random.fold_in(ROOT_KEY, i) for i in range(2)]
    expected = np.mean([[jax.random.uniform(jax.random.fold_in(key, j)) for j in range(3)] for key in keys])
    np.testing.assert_allclose(draws[1].compute(), expected, rtol=1e-6)
    np.testing.assert_allclose(draws[0].compute(), np.mean([jax.random.uniform(key) for key in keys]), rtol=1e-6)


def test_the_average_follows_with_the_decay_of_its_step():
    """After one step: 0.1 of the first parameters and 0.9 of the new ones."""
    optimizer, steps = _steps()
    first = np.linspace(0.0, 1.0, 4, dtype=np.float32)
    state, _ = steps(_state(optimizer), {"shift": jnp.zeros(())}, {"x": jnp.ones((1, 5, 4))}, ROOT_KEY)
    np.testing.assert_allclose(state.ema["w"], 0.1 * first + 0.9 * np.asarray(state.params["w"]), rtol=1e-5)


def test_the_target_network_follows_with_a_decay_of_its_own():
    """It is handed to the loss, moves after the parameters, and gets no gradient; without a decay there is none."""

    def loss_fn(params, target, frozen, batch, key, step):
        loss = jnp.sum(jnp.square(params["w"] - target["w"] - 1.0)) * jnp.ones(batch["x"].shape[0])
        return loss, {"logsnr": batch["x"][:, 0], "target": target["w"][1]}

    optimizer = optax.sgd(0.25)  # the gradient is 2 (w - target - 1), so a step goes half of the way
    steps = make_train_steps(
        loss_fn,
        optimizer,
        optax.linear_schedule(0.0, 1.0, 10),  # of the metric only
        update_ema=ema.exponential(decay=0.0, warmup=False),
        num_segments=None,
        target_decay=lambda step: 0.9 - 0.4 * step,
    )
    state = init_state({"w": jnp.array([2.0, 3.0])}, optimizer, has_target=True)
    state, averages = steps(state, {}, {"x": jnp.ones((2, 5, 4))}, ROOT_KEY)
    params, target = np.array([2.0, 3.0]), np.array([2.0, 3.0])
    seen = []
    for decay in (0.9, 0.5):
        seen.append(target[1])
        params = params - 0.5 * (params - target - 1.0)
        target = decay * target + (1 - decay) * params
    np.testing.assert_allclose(state.params["w"], params, rtol=1e-5)
    np.testing.assert_allclose(state.target["w"], target, rtol=1e-5)
    np.testing.assert_allclose(averages["target"].compute(), np.mean(seen), rtol=1e-5)
    assert _state(optimizer).target == {}


def test_parts_recombine_to_the_loss():
    """Bands of log-SNR, and segments: sums and counts add up to those of the whole batch."""
    loss = jnp.arange(1.0, 9.0)
    metrics = {
        "logsnr": jnp.array([-20.0, *LOGSNR_EDGES, 1.0, 20.0]),
        "segment": jnp.array([0, 1, 2, 0, 1, 2, 0, 0]),
        "scalar": jnp.float32(2.5),
    }
    averages = summarize(loss, metrics, num_segments=4)
    np.testing.assert_allclose(averages["loss"].compute(), 4.5)
    for prefix, names in (("loss_logsnr/", band_names()), ("loss_segment/", ["0", "1", "2", "3"])):
        parts = [averages[prefix + name] for name in names]
        assert sum(int(part.count) for part in parts) == 8
        np.testing.assert_allclose(sum(float(part.total) for part in parts), float(loss.sum()))
    # An edge belongs to the band above it.
    assert averages["loss_logsnr/below_-6"].count == 1 and averages["loss_logsnr/-6_to_-3"].count == 1
    assert averages["loss_segment/3"].count == 0
    assert averages["scalar"].compute() == 2.5


def _tiny(config, dropout=0.0):
    config.model.middle.update(dict(width=32, num_blocks=1, dropout=dropout))
    config.model.update(dict(emb_dim=16, head_dim=16))
    return config


@pytest.fixture
def student():
    """The experiment of a small student that drops out half of its units."""
    config = _tiny(digits.student(student_steps=2, distil=True), 0.5)
    return build(config, load=lambda file, _: _tiny(load_config(file), 0.5))


def test_dropout_is_the_same_in_both_calls_of_the_student(student, monkeypatch):
    """One key for f(z_t, t) and f(z_s, s): at one point the two calls agree; under another key they do not."""
    outputs, alone = [], student.teacher.experiment

    def loss(student, teacher, schedule, x, key, **_):
        t = jnp.full(x.shape[0], 0.5)
        outputs.append((student(x, t), student(x, t), teacher(x, t), teacher(x, t)))
        return jnp.zeros(x.shape[0]), {}

    monkeypatch.setattr(methods, "consistency_loss", loss)
    # The last layer of a new network is 0, and with it every output.
    params = jax.tree.map(lambda p: p + 0.1, jax.jit(student.init_params)(jax.random.key(0)))
    batch = {"image": jnp.zeros((2, 8, 8, 1), jnp.uint8), "label": jnp.zeros(2, jnp.int32)}
    for seed in (0, 1):
        student.loss_fn(params, {}, methods.Frozen(params), batch, jax.random.key(seed), jnp.int32(0))
    (first, second, teacher, teacher_again), (other, *_, teacher_other, _) = outputs
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first, other)
    # The teacher does not drop out at all.
    np.testing.assert_array_equal(teacher, teacher_again)
    np.testing.assert_array_equal(teacher, teacher_other)
    expected = alone.denoiser(params, batch["label"])(-jnp.ones((2, 8, 8, 1)), jnp.full(2, 0.5))
    np.testing.assert_allclose(teacher, expected, rtol=1e-5, atol=1e-5)


def test_a_student_starts_with_its_teachers_weights(student, tmp_path):
    """Parameters and average before the first step are the teacher's, in memory of their own."""
    teacher = jax.jit(student.teacher.experiment.init_params)(jax.random.key(1))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state = initial_state(student, checkpoints, teacher)
    for mine in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, mine, teacher)
        pointers = zip(jax.tree.leaves(mine), jax.tree.leaves(teacher), strict=True)
        assert all(a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer() for a, b in pointers)
    assert state.step == 0


def test_a_bad_step_changes_nothing_but_its_number():
    """Of three steps in a dispatch the second is of NaN: state and measurements are those of the other two."""
    optimizer, steps = _steps(skips_bad_steps=True)
    batches, frozen = {"x": jax.random.normal(jax.random.key(0), (3, 5, 4))}, {"shift": jnp.ones(())}
    bad = {"x": batches["x"].at[1].set(jnp.nan)}
    state, averages = steps(_state(optimizer), frozen, bad, ROOT_KEY)
    assert averages["skipped_steps"].total.tolist() == [0, 1, 0]
    assert averages["loss"].count == 10 and averages["gradient_norm"].count == 2
    expected, first = steps(_state(optimizer), frozen, {"x": batches["x"][:1]}, ROOT_KEY)
    expected, last = steps(expected._replace(step=jnp.int32(2)), frozen, {"x": batches["x"][2:]}, ROOT_KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, expected)
    np.testing.assert_allclose(averages["loss"].total, first["loss"].total + last["loss"].total, rtol=1e-6)
    _, plain = _steps()
    for got, number in ((plain(_state(optimizer), frozen, batches, ROOT_KEY)[0], 3), (state, 3)):
        assert got.step == number and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


def test_further_averages_are_updated_with_the_parameters():
    """Each by its own function, of the parameters after the step; a step that is skipped changes none of them."""
    further = {"sum": lambda average, params, step: jax.tree.map(lambda a, p: a + (step + 1) * p, average, params)}
    optimizer, steps = _steps(further=further, skips_bad_steps=True)
    state = init_state({"w": jnp.linspace(0.0, 1.0, 4)}, optimizer, further=further)
    frozen, expected = {"shift": jnp.zeros(())}, jnp.linspace(0.0, 1.0, 4)
    for i, scale in enumerate((1.0, jnp.nan, 1.0)):
        state, _ = steps(state, frozen, {"x": scale * jnp.ones((1, 5, 4))}, ROOT_KEY)
        expected = expected + (0 if jnp.isnan(scale) else i + 1) * state.params["w"]
        np.testing.assert_allclose(state.further["sum"]["w"], expected, rtol=1e-6)
