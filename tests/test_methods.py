"""A distance in the features of a network: its parameters come from a file into the step, beside the teacher's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from configs import digits
from mscm import methods, planning, training_loop
from mscm.checkpoint import reading
from mscm.config import ConfigError
from mscm.cost import flops
from mscm.experiment import build
from mscm.metrics import files, lpips


@pytest.fixture
def config(tmp_path):
    """A small consistency model under LPIPS, without a teacher, of two steps; the features are narrow."""
    rng, make = np.random.default_rng(0), functools.partial(lpips.random_params, widths=(4, 6, 8, 8, 8))
    shapes = jax.eval_shape(make, jax.random.key(0))
    flat = files.flat(jax.tree.map(lambda leaf: 0.2 * np.abs(rng.standard_normal(leaf.shape, np.float32)), shapes))
    card = {"kind": "mscm weights 1", "network": "lpips", "weights_sha256": files.fingerprint(flat)}
    files.save(tmp_path / "lpips.npz", flat, card)
    config = digits.consistency_training()
    config.model.middle.update(dict(width=32, num_blocks=1))
    config.model.update(dict(emb_dim=16, head_dim=16))
    config.optimizer.warmup_steps = 0
    config.train.update(dict(num_steps=2, batch_size=4, steps_per_dispatch=1, log_every_steps=1, save_every_steps=2))
    config.objective.distance = ConfigDict(dict(name="lpips", weights=str(tmp_path / "lpips.npz"), resize=24))
    return config


def test_the_distance_of_a_consistency_model_is_lpips(config, monkeypatch):
    """In the features of the file, with the config's size, pooling and precision; of f and f_ref in this order."""
    config.objective.distance.update(dict(pooling="average", precision="bfloat16"))
    calls = []

    def distance(*args, **options):
        calls.append((args, options))
        return jnp.zeros(4)

    def loss(*args, distance, **_):
        return distance(jnp.zeros((4, 8, 8, 1)), jnp.ones((4, 8, 8, 1))), {}

    monkeypatch.setattr(lpips, "distance", distance)
    monkeypatch.setattr(methods, "consistency_model_loss", loss)
    experiment = build(config)
    frozen = experiment.frozen({})
    assert frozen.teacher == {} and all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(frozen.features))
    arrays, _ = files.load(config.objective.distance.weights)
    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), files.tree(arrays))
    jax.tree.map(np.testing.assert_array_equal, frozen.features, params)
    batch = {"image": jnp.zeros((4, 8, 8, 1), jnp.uint8), "label": jnp.zeros(4, jnp.int32)}
    experiment.loss_fn({}, {}, frozen, batch, jax.random.key(0), jnp.int32(0))
    (((features, a, b), options),) = calls
    assert features is frozen.features and options == dict(resize=24, pooling="average")
    assert not np.any(a) and np.all(b)


def test_training_under_it(config, tmp_path):
    """Two steps: a finite loss (another would end them), a gradient."""
    experiment = build(config)
    source = training_loop.check(experiment, str(tmp_path))
    training_loop.train(experiment, str(tmp_path), source, {}, check_ours=lambda: None)
    with reading(str(tmp_path)) as checkpoints:
        assert checkpoints.latest() == 2
        state = checkpoints.restore(experiment.abstract_state())
    assert any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1)


def test_a_missing_file_is_a_sentence_before_anything_is_trained(config, tmp_path, monkeypatch):
    config.objective.distance.weights = str(tmp_path / "absent.npz")
    monkeypatch.setattr(training_loop, "train", None)
    sentence = "config.objective.distance.weights: .*absent.npz: got no weights of the network 'lpips'; get vgg16-3"
    with pytest.raises(ConfigError, match=sentence):
        training_loop.run(build(config), str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with config.unlocked():
        config.objective.distance.weights = None
    with pytest.raises(ConfigError, match="distance.weights: .*cache/mscm/lpips.npz: got no weights"):
        build(config).read_features()


def test_features_are_an_argument_of_the_step_and_a_plan_needs_no_file(config, tmp_path):
    """Of the published shapes, whole on every device; nothing of their size is a constant of the program."""
    config.objective.distance.weights = str(tmp_path / "absent.npz")
    experiment = build(config)
    inputs = planning.abstract_inputs(experiment)
    features = jax.tree.leaves(inputs[1].features)
    assert sum(leaf.size for leaf in features) == 14_716_160
    assert all(leaf.sharding.spec == PartitionSpec() for leaf in features)
    traced = experiment.train_steps().trace(*inputs)
    assert max((np.size(constant) for constant in traced.jaxpr.consts), default=0) < 1000
    _, step = planning.model_flops(experiment)
    assert flops.count(traced.jaxpr) == pytest.approx(step, rel=0.01)
    with config.unlocked():
        config.objective.distance = dict(name="l2")
    _, without = planning.model_flops(build(config))
    # Two images through VGG16, and back to one: at each pixel 2 x 9 x in x out operations in a convolution.
    sides = {"1": 24, "2": 12, "3": 6, "4": 3, "5": 1}
    vgg = sum(2 * np.prod(shape) * sides[name[4]] ** 2 for name, _, shape in lpips.convolutions())
    assert step - without == pytest.approx(3 * 4 * vgg, rel=0.01)


def test_random_features_are_as_the_plan_says(config):
    experiment = build(config)
    got = jax.eval_shape(lambda key: experiment.random_frozen(key), jax.random.key(0))
    expected = experiment.placed_frozen()
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a}, {b}"), got, expected)
    assert experiment.frozen({})._fields == expected._fields == ("teacher", "features")
