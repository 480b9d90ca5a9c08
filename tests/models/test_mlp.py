"""The MLP: it is called as the U-ViT is, and every input reaches its output."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.models.mlp import MLP

NET = MLP(out_channels=2, width=8, num_blocks=2, emb_dim=8, num_classes=3, mlp_ratio=2)
Z = jax.random.normal(jax.random.key(1), (4, 2, 3, 1))
LOGSNR = jnp.array([-6.0, -1.0, 2.0, 7.0])
LABELS = jnp.array([0, 1, 2, 3])  # 3 is the null class


@pytest.fixture(scope="module")
def boxed():
    return NET.init(jax.random.key(0), Z, LOGSNR, LABELS, train=False)


@pytest.fixture(scope="module")
def params(boxed):
    """Parameters that are nowhere zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(0.4 * rng.standard_normal(p.shape), jnp.float32), nn.meta.unbox(boxed))


def test_a_new_network_answers_zero(boxed):
    output = NET.apply(nn.meta.unbox(boxed), Z, LOGSNR, LABELS, train=True)
    assert output.shape == (4, 2, 3, 2) and output.dtype == jnp.float32
    np.testing.assert_array_equal(output, 0)


def test_an_example_depends_on_all_of_its_own_inputs_and_on_no_other(params):
    """Each scalar of z, its place, the level and the label of an example change all of its outputs and no other's."""
    plain = NET.apply(params, Z, LOGSNR, LABELS, train=False)
    changed = [(Z.at[1, i, j].add(0.5), LOGSNR, LABELS) for i in range(2) for j in range(3)]
    changed += [(Z.at[1].set(Z[1, :, ::-1]), LOGSNR, LABELS)]
    changed += [(Z, LOGSNR.at[1].add(1.0), LABELS), (Z, LOGSNR, LABELS.at[1].set(3))]
    for inputs in changed:
        difference = np.abs(NET.apply(params, *inputs, train=False) - plain)
        assert (difference[1] > 1e-5).all() and difference[[0, 2, 3]].max() < 1e-5


def test_every_parameter_is_used_and_every_kernel_has_named_axes(params, boxed):
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(NET.apply(p, Z, LOGSNR, LABELS, train=False))))(params)
    assert all((leaf != 0).all() for leaf in jax.tree.leaves(gradient))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))
    assert all(isinstance(leaf, nn.LogicallyPartitioned) and None not in leaf.names for leaf in leaves)


@pytest.mark.parametrize(
    ("changes", "labels", "sentence"),
    [
        (dict(emb_dim=7), LABELS, "got emb_dim=7, expected an even number from 4"),
        (dict(logsnr_input="log"), LABELS, "got logsnr_input 'log', expected one of linear, inv_cos"),
        ({}, None, "got no labels, expected one per example in .0, 3. because num_classes=3"),
        (dict(num_classes=None), LABELS, "got labels, expected None because num_classes=None"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: NET.copy(**changes).init(jax.random.key(0), Z, LOGSNR, labels, train=False))
