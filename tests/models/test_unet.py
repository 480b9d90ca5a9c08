"""EDM's networks: their sizes, their layers, and what training needs of them.

Their outputs are compared with independent evaluations where weights are imported: `tests/test_teachers.py`.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.models import unet
from mscm.models.unet import UNet
from mscm.training import partition
from tests.edm_files import TINY, images
from tests.models.edm_reference import Network, NumPy, Weights

ARCHITECTURES = pytest.mark.parametrize("name", TINY)


def make(name: str, **fields) -> UNet:
    """The network of TINY."""
    a = TINY[name]
    given = dict(
        channels=a["model_channels"], channel_mult=tuple(a["channel_mult"]), num_blocks=1, attention_resolutions=(4,)
    )
    return UNet(name, **{"out_channels": 1, "num_classes": 10, **given, **fields})


def init(model: UNet, *, side: int = 8):
    guidance = (jnp.zeros(1),) if model.guidance_input else ()
    images, labels = jnp.zeros((1, side, side, model.out_channels)), jnp.zeros(1, jnp.int32)
    return model.init(jax.random.key(0), images, jnp.zeros(1), labels, *guidance, train=False)


@pytest.fixture(scope="module")
def weights_of():
    """Parameters of the networks of TINY at random, where no layer is zero."""

    @functools.cache
    def weights(name: str):
        shapes = nn.meta.unbox(jax.eval_shape(lambda: init(make(name))))["params"]
        leaves, tree = jax.tree.flatten(shapes)
        rng = np.random.RandomState(0)
        scales = [1 / math.sqrt(math.prod(leaf.shape[:-1]) or 1) for leaf in leaves]
        drawn = [np.float32(s * rng.standard_normal(leaf.shape)) for leaf, s in zip(leaves, scales, strict=True)]
        return jax.tree.unflatten(tree, drawn)

    return weights


class Shapes(NumPy):
    """Operations of which the large ones are not computed."""

    @staticmethod
    def conv(x, w, padding):
        return np.zeros((len(x), len(w), *(side + 2 * padding - w.shape[3] + 1 for side in x.shape[2:])))


class Zeros(Weights):
    """Weights that take no memory."""

    def ask(self, name, *shape, mean=0.0, scale=None):
        return self.setdefault(name, np.broadcast_to(np.float32(mean), shape))


@pytest.mark.parametrize(
    ("name", "count", "arguments"),
    [
        ("ddpmpp", 56, dict(label_dim=0, channel_mult=[2, 2, 2])),
        ("ddpmpp", 56, dict(label_dim=10, channel_mult=[2, 2, 2])),
        ("ncsnpp", 56, dict(label_dim=10, channel_mult=[2, 2, 2])),
        ("adm", 296, dict(label_dim=1000, channel_mult=[1, 2, 3, 4])),
    ],
)
def test_sizes_of_the_published_networks(name, count, arguments):
    """In millions as arXiv:2206.00364 has them, and to the last parameter as the independent evaluation."""
    sizes = dict(
        adm=dict(img_resolution=64, model_channels=192, num_blocks=3, attn_resolutions=[32, 16, 8])
    ).get(name, dict(img_resolution=32, model_channels=128, num_blocks=4, attn_resolutions=[16]))
    arguments = TINY[name] | sizes | arguments | dict(augment_dim=0, img_channels=3)
    side, classes, weights = arguments["img_resolution"], arguments["label_dim"], Zeros(0)
    Network(weights, Shapes, **arguments)(np.zeros((1, 3, side, side)), np.zeros(1), np.zeros((1, classes)))
    model = make(
        name, out_channels=3, channels=arguments["model_channels"], channel_mult=tuple(arguments["channel_mult"]),
        num_blocks=arguments["num_blocks"], attention_resolutions=tuple(arguments["attn_resolutions"]),
        num_classes=classes or None,
    )
    shapes = jax.tree.leaves(nn.meta.unbox(jax.eval_shape(lambda: init(model, side=side))))
    ours = sum(math.prod(leaf.shape) for leaf in shapes)
    assert ours == sum(w.size for key, w in weights.items() if not key.endswith("resample_filter"))
    assert round(ours / 1e6) == count


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_is_a_convolution_and_its_transpose(taps):
    """And down is the adjoint of up, but for the factor that keeps a constant a constant."""
    f = np.outer(taps, taps) / sum(taps) ** 2
    x, padding = images(2, 6, 3), (len(taps) - 1) // 2
    for ours, theirs in (
        (unet.downsample(to_jax(x), taps, padding), NumPy.down(x, f, padding)),
        (unet.downsample(to_jax(x), taps, 0), NumPy.down(x, f, 0)),
        (unet.upsample(to_jax(x), taps), NumPy.up(x, 4 * f, padding)),
    ):
        np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), atol=1e-6)
    inside = unet.upsample(jnp.ones((1, 6, 6, 1)), taps)[:, 2:-2, 2:-2]
    np.testing.assert_allclose(inside, np.ones_like(inside), rtol=1e-6)


def to_jax(x):
    """An image `b c h w` as `b h w c`."""
    return jnp.asarray(np.asarray(x).transpose(0, 2, 3, 1), jnp.float32)


@ARCHITECTURES
def test_a_new_network_answers_nearly_nothing(name):
    """So that training begins with the preconditioned identity; ADM's last layer is exactly zero."""
    params = nn.meta.unbox(jax.jit(lambda: init(make(name)))())
    out = make(name).apply(params, to_jax(images(2, 8)), jnp.zeros(2), jnp.zeros(2, jnp.int32), train=False)
    assert out.dtype == jnp.float32 and float(jnp.max(jnp.abs(out))) < (1e-30 if name == "adm" else 1e-3)


@ARCHITECTURES
def test_labels(name, weights_of):
    """The null class is no class; a network without classes does not look at labels."""
    params, z, logsnr = weights_of(name), to_jax(images(1, 8)), jnp.ones(1)

    def answer(model, params, label):
        return np.asarray(model.apply({"params": params}, z, logsnr, jnp.array([label]), train=False))

    null, one = answer(make(name), params, 10), answer(make(name), params, 1)
    assert np.max(np.abs(null - one)) > 1e-3
    alone = make(name, num_classes=None)
    without = {key: value for key, value in params.items() if key != "map_label"}
    np.testing.assert_array_equal(answer(alone, without, 1), answer(alone, without, 10))
    if name == "adm":  # whose layer of labels has no bias
        np.testing.assert_allclose(answer(alone, without, 1), null, atol=1e-6)


@ARCHITECTURES
def test_gradients_and_dropout(name, weights_of):
    """All but the random frequencies are trained; one key drops the same units."""
    params, z = weights_of(name), to_jax(images(1, 8))
    model = make(name, dropout=0.5)

    def total(params, key):
        out = model.apply({"params": params}, z, jnp.ones(1), jnp.ones(1, jnp.int32), train=True, rngs={"dropout": key})
        return jnp.sum(jnp.square(out))

    gradient = jax.jit(jax.grad(total))
    found = gradient(params, jax.random.key(0))
    still = [jax.tree_util.keystr(p, simple=True) for p, g in jax.tree_util.tree_leaves_with_path(found) if not g.any()]
    assert still == ["map_noise_freqs"] * (name == "ncsnpp")
    again, other = gradient(params, jax.random.key(0)), gradient(params, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, found, again)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True))


def test_guidance_as_an_input_is_nothing_at_first(weights_of):
    """A student of a guided teacher starts as its teacher's function."""
    model, z, label = make("adm", guidance_input=True), to_jax(images(1, 8)), jnp.ones(1, jnp.int32)
    drawn = nn.meta.unbox(jax.jit(lambda: init(model))())["params"]
    params = weights_of("adm") | {"guidance": drawn["guidance"]}
    guided = model.apply({"params": params}, z, jnp.ones(1), label, jnp.full(1, 3.0), train=False)
    plain = make("adm").apply({"params": weights_of("adm")}, z, jnp.ones(1), label, train=False)
    np.testing.assert_array_equal(guided, plain)


@ARCHITECTURES
def test_every_matrix_is_cut_among_devices(name):
    """Along `fsdp`, whatever its layer; queries, keys and values along `tensor` too, which a head takes whole."""
    boxed = jax.eval_shape(lambda: init(make(name)))["params"]
    specs = partition.partition_specs(boxed, dict(data=1, fsdp=2, tensor=2))
    shapes = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed))
    is_spec = lambda node: isinstance(node, jax.sharding.PartitionSpec)  # noqa: E731
    for (path, leaf), spec in zip(shapes, jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
        if leaf.ndim > 1 and 1 not in leaf.shape[-2:]:
            assert "fsdp" in tuple(spec), jax.tree_util.keystr(path)
    assert tuple(specs["dec_4x4_in0"]["qkv"]["kernel"]) == ("fsdp", "tensor")


def test_rematerialised_blocks_are_the_same_function(weights_of):
    params, arguments = weights_of("ddpmpp"), (to_jax(images(1, 8)), jnp.ones(1), jnp.ones(1, jnp.int32))
    outputs = [
        make("ddpmpp", remat_policy=policy).apply({"params": params}, *arguments, train=False)
        for policy in (None, "full")
    ]
    np.testing.assert_allclose(*outputs, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "side", "sentence"),
    [
        (dict(channels=6), 8, "got channels=6, expected a multiple of 4"),
        (dict(channel_mult=()), 8, "got no channel_mult"),
        (dict(channel_mult=(1, 1, 1)), 6, "got images of 6 x 6 pixels, expected squares of a multiple of 4"),
        (dict(dropout=1.0), 8, "got dropout 1.0"),
        (dict(logsnr_input="sigma"), 8, "got logsnr_input 'sigma', expected one of linear"),
        (dict(remat_policy="all"), 8, "got remat_policy 'all', expected None or one of full"),
        (dict(attention="cudnn"), 8, "got attention 'cudnn'"),
    ],
)
def test_fields_that_do_not_fit(fields, side, sentence):
    with pytest.raises(ValueError, match=sentence):
        init(make("ddpmpp", **fields), side=side)
    with pytest.raises(ValueError, match="got architecture 'edm', expected one of ddpmpp, ncsnpp, adm"):
        init(UNet("edm", 1, 16, (1,), 1, ()))


def test_labels_that_are_missing():
    with pytest.raises(ValueError, match="got no labels, expected one per example"):
        make("adm").init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), train=False)
