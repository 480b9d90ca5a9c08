import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mscm.models import layers
from mscm.models.uvit import ResidualStage, Stage, TransformerStage, UViT
from mscm.training import partition

# Both kinds of stage, skips of both kinds and two blocks in a row, in as little to compile as possible.
TINY = UViT(
    out_channels=3,
    stages=(Stage("residual", 8, 1), Stage("transformer", 16, 1)),
    middle=Stage("transformer", 16, 2),
    emb_dim=16,
    num_classes=3,
    head_dim=8,
    mlp_ratio=2,
    scan_blocks=False,
)
Z = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
LOGSNR = jnp.array([-6.0, -1.0, 2.0, 7.0])
LABELS = jnp.array([0, 1, 2, 3])  # 3 is the null class
CPU = partition.make_mesh(partition.MeshSizes(1, 1, 1), jax.devices("cpu"))


# These networks are compiled once and run twice: LLVM's optimisation would take most of the tests' time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0,
                                                   "xla_llvm_disable_expensive_passes": True})


def init(net, z=Z, labels=LABELS):
    return nn.meta.unbox(net.init(jax.random.key(0), z, LOGSNR, labels, train=False))


def random_params(module, *args, **kwargs):
    """Parameters that are nowhere zero, so that zero-initialised layers hide nothing; numpy's, to compile nothing."""
    shapes = jax.eval_shape(lambda key: nn.meta.unbox(module.init({"params": key, "dropout": key}, *args, **kwargs)),
                            jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, x):
        noise = rng.standard_normal(x.shape, dtype=np.float32)
        if path[-1].key == "kernel":
            return jnp.asarray(noise / np.sqrt(np.prod(x.shape[:-1])))
        return jnp.asarray(0.2 * noise + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def apply(net, params, z=Z, logsnr=LOGSNR, labels=LABELS, *, train=False, key=None):
    rngs = {} if key is None else {"dropout": jax.random.key(key)}
    return jit(lambda p: net.apply(p, z, logsnr, labels, train=train, rngs=rngs))(params)


def with_dropout(net, *, outer, inner, middle):
    first, second = net.stages
    return net.copy(
        stages=(dataclasses.replace(first, dropout=outer), dataclasses.replace(second, dropout=inner)),
        middle=dataclasses.replace(net.middle, dropout=middle),
    )


def stack_blocks(tree):
    """The parameters of an unrolled network in the layout of the scanned one."""
    if not isinstance(tree, dict):
        return tree
    names = sorted((k for k in tree if k.startswith("block_")), key=lambda k: int(k.removeprefix("block_")))
    rest = {k: stack_blocks(v) for k, v in tree.items() if k not in names}
    if "position" not in tree:  # residual stages stay unrolled
        return rest | {k: tree[k] for k in names}
    return rest | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *(tree[k] for k in names))}


@pytest.fixture(scope="module")
def params():
    return random_params(TINY, Z, LOGSNR, LABELS, train=False)


@pytest.fixture(scope="module")
def output(params):
    return apply(TINY, params)


def test_output_is_exactly_zero_at_init():
    net = TINY.copy(stages=(Stage("residual", 8, 1),), middle=Stage("transformer", 8, 1))
    out, _ = jit(lambda key: net.init_with_output(key, Z, LOGSNR, LABELS, train=False))(jax.random.key(0, impl="rbg"))
    assert out.shape == (4, 8, 8, 3)
    assert not np.any(out)


def test_blocks_are_the_identity_at_init():
    key, emb = jax.random.key(0, impl="rbg"), jnp.ones((4, 16))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4, 4, 8)), jnp.float32)
    residual = layers.ResidualBlock(8, 0.0, False, jnp.float32)
    np.testing.assert_array_equal(jit(residual.init_with_output)(key, x, emb, x)[0], x)
    tokens = x.reshape(4, 16, 8)
    transformer = layers.TransformerBlock(8, 4, 2, 0.0, False, jnp.float32)
    np.testing.assert_array_equal(jit(transformer.init_with_output)(key, tokens, emb)[0], tokens)


# The counts of arXiv:2403.06807v3.
@pytest.mark.parametrize(
    ("resolution", "scale", "millions"), [(64, 1, 394), (64, 2, 1230), (128, 1, 397), (128, 2, 1250)]
)
def test_paper_models_have_the_papers_parameter_counts_and_keep_the_resolution(resolution, scale, millions):
    stages = (Stage("residual", 256 * scale, 3), Stage("transformer", 512 * scale, 3))
    if resolution == 128:
        stages = (Stage("residual", 128 * scale, 3), *stages)
    net = UViT(3, stages, Stage("transformer", 1024 * scale, 16, 0.2), num_classes=1000, dtype=jnp.bfloat16,
               remat_policy="full")
    z, logsnr, labels = jnp.zeros((2, resolution, resolution, 3)), jnp.zeros(2), jnp.zeros(2, jnp.int32)
    out, variables = jax.eval_shape(
        lambda key: net.init_with_output(key, z, logsnr, labels, train=False), jax.random.key(0)
    )
    assert (out.shape, out.dtype) == (z.shape, jnp.float32)
    count = sum(x.size for x in jax.tree.leaves(variables))
    assert abs(count / (1e6 * millions) - 1.0) < 0.015
    table = nn.meta.unbox(variables)["params"]["condition"]["classes"]["embedding"]
    assert table.shape == (1001, 1024)


def test_every_parameter_carries_logical_axis_names():
    variables = jax.eval_shape(lambda: TINY.copy(scan_blocks=True).init(jax.random.key(0), Z, LOGSNR, LABELS,
                                                                       train=False))
    boxes = jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
        used = [name for name in box.names if name is not None]
        assert len(set(used)) == len(used)  # flax refuses a name used twice in one array
    middle = variables["params"]["middle"]["blocks"]
    assert middle["mlp_in"]["kernel"].names == ("layers", "embed", "mlp")


def test_gradient_reaches_every_parameter(params):
    gradient = jit(jax.grad(lambda p: jnp.sum(jnp.square(TINY.apply(p, Z, LOGSNR, LABELS, train=False) - Z))))
    grads = jax.tree_util.tree_leaves_with_path(gradient(params))
    # 1e-4 of the typical size: a gradient that is zero in exact arithmetic is about 1e-7 of it in float32.
    typical = np.median([float(jnp.abs(g).max()) for _, g in grads])
    dead = [jax.tree_util.keystr(path) for path, g in grads if not float(jnp.abs(g).max()) > 1e-4 * typical]
    assert not dead


@pytest.fixture(scope="module")
def run_tiny():
    """TINY, compiled once for all its arguments."""
    return jit(lambda *args: TINY.apply(*args, train=False))


def test_image_noise_level_and_label_change_the_output_of_their_own_example_only(run_tiny, params, output):
    other_noise, other_label, other_image = LOGSNR.at[1].add(0.5), LABELS.at[1].set(3), Z.at[1].set(-Z[1])
    for inputs in ((Z, other_noise, LABELS), (Z, LOGSNR, other_label), (other_image, LOGSNR, LABELS)):
        difference = np.abs(run_tiny(params, *inputs) - output).max(axis=(1, 2, 3))
        assert difference[1] > 1e-3
        np.testing.assert_allclose(difference[np.array([0, 2, 3])], 0.0, atol=1e-5)


def test_every_skip_reaches_the_output(run_tiny, params):
    """With every other way cut off, each level's skip still carries the input."""
    for cut in (("up_0_in",), ("up_1_in", "up_0")):  # without up_0, whose own skip enters there, only level 1's is left
        blocked = dict(params["params"])
        for name in cut:
            key = "norm_skip" if name == "up_0" else "kernel"
            blocked[name] = jax.tree_util.tree_map_with_path(
                lambda path, x, key=key: jnp.zeros_like(x) if key in {k.key for k in path} else x, blocked[name])
        outputs = [run_tiny({"params": blocked}, z, LOGSNR, LABELS) for z in (Z, -Z)]
        assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_residual_skips_are_consumed_last_first_and_summed_at_unit_scale():
    stage = dataclasses.replace(TINY.stages[0], num_blocks=3)
    x, emb = jax.random.normal(jax.random.key(3), (1, 4, 4, 8)), jnp.ones((1, 16))
    # Only the first block may look at the skips: then only the last skip can change the stage's output.
    up = ResidualStage(stage, None, False, jnp.float32)
    skips = [jax.random.normal(jax.random.key(i), x.shape) for i in range(3)]
    variables = random_params(up, x, emb, skips)
    for block in ("block_1", "block_2"):
        norm = variables["params"][block]["norm_skip"]
        norm["scale"] = jnp.zeros_like(norm["scale"])
    run = jit(lambda *skips: up.apply(variables, x, emb, list(skips))[0])
    out = run(*skips)
    np.testing.assert_array_equal(run(-skips[0], -skips[1], skips[2]), out)
    assert np.abs(run(skips[0], skips[1], -skips[2]) - out).max() > 1e-3


def test_scan_equals_unrolled(params, output):
    scanned = TINY.copy(scan_blocks=True)
    stacked = {"params": stack_blocks(params["params"])}
    assert jax.tree.structure(stacked) == jax.tree.structure(jax.eval_shape(lambda: init(scanned)))
    np.testing.assert_allclose(apply(scanned, stacked), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["residual", "transformer"])
def test_rematerialisation_changes_neither_values_nor_gradients(kind):
    x, emb = jax.random.normal(jax.random.key(3), (1, 4, 4, 8)), jnp.ones((1, 16))
    stage = Stage(kind, 8, 2, 0.2)

    def make(policy):
        if kind == "residual":
            return ResidualStage(stage, policy, True, jnp.float32)
        return TransformerStage(stage, 8, 2, True, policy, True, jnp.float32)

    def value_and_grad(policy):
        def loss(p):
            out = make(policy).apply(p, x, emb, rngs={"dropout": jax.random.key(5)})
            return jnp.sum(jnp.square(out[0] if kind == "residual" else out))

        return jit(jax.value_and_grad(loss))(variables)

    variables = random_params(make(None), x, emb)
    expected = value_and_grad(None)
    for policy in ("full", "dots"):
        for a, b in zip(jax.tree.leaves(value_and_grad(policy)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * (1.0 + np.abs(b).max()))


def test_positions_begin_at_their_scale_and_nothing_else_does():
    small, large = (flatten_dict(init(TINY.copy(position_scale=scale))["params"]) for scale in (0.01, 1.0))
    for path, leaf in small.items():
        factor = 100.0 if path[-1] == "position" else 1.0
        np.testing.assert_allclose(large[path], factor * leaf, rtol=1e-5)
    assert 0.9 < np.std(large["middle", "position"]) < 1.1


def test_no_dropout_without_a_rate_or_without_train(params, output):
    np.testing.assert_array_equal(apply(TINY, params, train=True), output)  # without a key, too
    everywhere = with_dropout(TINY, outer=0.3, inner=0.3, middle=0.3)
    np.testing.assert_array_equal(apply(everywhere, params, train=False, key=7), output)


@pytest.mark.parametrize(("place", "scan"), [("outer", False), ("inner", False), ("middle", True)])
def test_dropout_acts_in_its_stage_and_the_same_key_gives_the_same_mask(params, place, scan):
    net = with_dropout(TINY, **({"outer": 0.0, "inner": 0.0, "middle": 0.0} | {place: 0.3})).copy(scan_blocks=scan)
    variables = {"params": stack_blocks(params["params"])} if scan else params

    @jit
    def run(p, key):
        return net.apply(p, Z, LOGSNR, LABELS, train=True, rngs={"dropout": key})

    first = run(variables, jax.random.key(7))
    np.testing.assert_array_equal(run(variables, jax.random.key(7)), first)
    assert np.abs(run(variables, jax.random.key(8)) - first).max() > 1e-3
    # A stage without dropout must not notice: silence the one stage that has it and the keys agree again.
    names = {"outer": ("down_0", "up_0"), "inner": ("down_1", "up_1"), "middle": ("middle",)}[place]
    silenced = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x)
        if path[1].key in names and {"mlp_out", "conv_out"} & {k.key for k in path[2:]} else x, variables)
    np.testing.assert_array_equal(run(silenced, jax.random.key(7)), run(silenced, jax.random.key(8)))


def test_scanned_blocks_draw_their_own_masks_and_parameters():
    net = TransformerStage(Stage("transformer", 8, 2, 0.5), 8, 2, True, None, True, jnp.float32)
    x, emb = jax.random.normal(jax.random.key(1), (1, 4, 4, 8)), jnp.zeros((1, 16))

    @jit
    def run(variables, key):
        return net.apply(variables, x, emb, rngs={"dropout": key}) - x

    keys = {name: jax.random.key(0, impl="rbg") for name in ("params", "dropout")}
    variables = nn.meta.unbox(jit(net.init)(keys, x, emb))
    kernel = variables["params"]["blocks"]["mlp_in"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])
    # Each block adds its mask and nothing else: the hidden layer is constant and goes straight to the output.
    blocks = jax.tree.map(jnp.zeros_like, variables["params"]["blocks"])
    blocks["mlp_in"]["bias"] += 1.0
    blocks["mlp_out"]["kernel"] += jnp.eye(16, 8)[None]
    added = run({"params": {"position": jnp.zeros((4, 4, 8)), "blocks": blocks}}, jax.random.key(3))
    # Equal masks give 0 or 2 units everywhere; independent ones give 1 unit half of the time.
    unit = 2.0 * jax.nn.swish(1.0)
    assert 0.3 < np.mean(np.isclose(added, unit, rtol=1e-4)) < 0.7


def test_bfloat16_stays_close_to_float32_with_float32_parameters_and_output(params, output):
    net = TINY.copy(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(lambda: init(net)))} == {jnp.dtype(jnp.float32)}
    out = apply(net, params)
    assert out.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(out - output)) / np.mean(np.square(output)))
    assert 0.0 < error < 0.05


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_depth_to_space_inverts_space_to_depth(patch_size):
    folded = layers.space_to_depth(Z, patch_size)
    assert folded.shape == (4, 8 // patch_size, 8 // patch_size, 3 * patch_size**2)
    np.testing.assert_array_equal(folded[0, 0, 0].reshape(patch_size, patch_size, 3), Z[0, :patch_size, :patch_size])
    np.testing.assert_array_equal(layers.depth_to_space(folded, patch_size), Z)


def test_patches_without_stages_and_without_labels():
    net = UViT(2, (), Stage("transformer", 16, 1), emb_dim=16, head_dim=8, patch_size=2, scan_blocks=False)
    z = Z[..., :1]
    params = random_params(net, z, LOGSNR, train=False)
    assert params["params"]["middle"]["position"].shape == (4, 4, 16)
    out = apply(net, params, z=z, labels=None)
    assert out.shape == (4, 8, 8, 2)
    assert np.all(np.isfinite(out)) and np.any(out)


def test_pooling_and_upsampling():
    np.testing.assert_allclose(layers.average_pool(layers.upsample(Z)), Z, rtol=1e-6)
    pooled = layers.average_pool(Z)
    np.testing.assert_allclose(pooled[1, 2, 3], Z[1, 4:6, 6:8].mean(axis=(0, 1)), rtol=1e-5, atol=1e-6)


def test_time_inputs():
    logsnr = jnp.array([-10.0, 0.0, 10.0])
    np.testing.assert_allclose(layers.logsnr_linear(logsnr), [0.0, 0.5, 1.0])
    # tan(pi t / 2) = sigma / alpha of the cosine schedule, whose logsnr is -2 log tan(pi t / 2).
    t = jnp.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(layers.logsnr_inv_cos(-2.0 * jnp.log(jnp.tan(0.5 * jnp.pi * t))), t, rtol=1e-5)
    features = layers.sinusoids(jnp.array([0.0, 3.0]), 6)
    np.testing.assert_allclose(features[0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    angles = 3.0 * np.array([1.0, 1e-2, 1e-4])
    np.testing.assert_allclose(features[1], [*np.sin(angles), *np.cos(angles)], rtol=1e-5)


def test_fourier_features_are_of_the_scale():
    """Means of 0 and squares of 1/2 where the scale is large, near (0, 1) where it is small; a pair for a frequency."""
    x = jnp.linspace(-2.0, 2.0, 64)
    wide, narrow = (layers.fourier_features(x, 256, scale) for scale in (16.0, 1e-5))
    assert wide.shape == (64, 256)
    np.testing.assert_allclose(jnp.square(wide[:, :128]) + jnp.square(wide[:, 128:]), 1.0, rtol=1e-5)
    assert abs(float(wide.mean())) < 0.03
    np.testing.assert_allclose(narrow[:, :128], 0.0, atol=1e-3)
    # The phase is 2 pi f x, f of standard deviation 16.
    phase = jnp.arctan2(*jnp.split(layers.fourier_features(jnp.array([1e-4]), 4096, 16.0), 2, axis=1))
    np.testing.assert_allclose(jnp.std(phase), 2 * np.pi * 16e-4, rtol=0.06)


def test_guidance_is_an_input_that_begins_without_effect():
    """With the weights of a network without it, and zeros for its own, the function is the same for every weight."""
    net, weights = TINY.copy(guidance_input=True), jnp.array([0.0, 0.5, 2.0, 4.0])
    params = random_params(net, Z, LOGSNR, LABELS, weights, train=False)["params"]
    condition = params["condition"]
    guidance = condition["guidance"]
    without = params | {"condition": {name: leaf for name, leaf in condition.items() if name != "guidance"}}
    plain = apply(TINY, {"params": without})
    for scale, is_same in ((0.0, True), (1.0, False)):
        condition["guidance"] = jax.tree.map(lambda leaf, scale=scale: scale * leaf, guidance)
        output = jit(lambda p: net.apply({"params": p}, Z, LOGSNR, LABELS, weights, train=False))(params)
        assert bool(jnp.allclose(output, plain, rtol=1e-5, atol=1e-5)) == is_same
    fresh = net.init(jax.random.key(0), Z, LOGSNR, LABELS, weights, train=False)["params"]["condition"]["guidance"]
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(nn.meta.unbox(fresh)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"middle": Stage("residual", 16, 1)}, "got a middle of kind 'residual', expected 'transformer'"),
        ({"head_dim": 12}, "got transformer width 16, expected a multiple of head_dim=12"),
        ({"patch_size": 4}, "got images of 8 x 8 pixels, expected multiples of 16"),
        ({"emb_dim": 15}, "got emb_dim=15, expected an even number"),
        ({"logsnr_input": "linaer"}, "got logsnr_input 'linaer', expected one of linear, inv_cos, log_sigma"),
        ({"fourier_scale": 0.0}, "got fourier_scale=0.0, expected a number above 0"),
        ({"guidance_input": True}, "got no guidance, expected the opposite because guidance_input=True"),
        ({"remat_policy": "all"}, "got remat_policy 'all', expected None or one of full, dots"),
        ({"attention": "splash"}, "got attention 'splash' for 16 tokens of float32 with head_dim=8, expected"),
        ({"num_classes": None}, "got labels, expected None because num_classes=None"),
    ],
)
def test_bad_fields_are_refused_in_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: init(TINY.copy(**changes)))


def test_missing_labels_are_refused():
    with pytest.raises(ValueError, match=r"got no labels, expected one per example in \[0, 3\]"):
        jax.eval_shape(lambda: init(TINY, labels=None))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (("attention", 8, 1), "got stage kind 'attention', expected one of residual, transformer"),
        (("residual", 8, 0), "got a stage of 0 blocks of width 8"),
        (("residual", 8, 1, 1.0), "got stage dropout 1.0"),
    ],
)
def test_bad_stages_are_refused_in_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Stage(*fields)


def convolution_and_gradients(x, kernel, g, *, padding):
    """Of a Conv layer on the device of the mesh around it, and of JAX's own function."""
    layer = layers.conv3x3(kernel.shape[-1], dtype=x.dtype, name="conv", padding=padding)
    params = {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1], x.dtype)}
    ours = jax.vjp(lambda x, kernel: layer.apply({"params": params | {"kernel": kernel}}, x), x, kernel)
    dimensions = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    convolve = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding=[(padding, padding)] * 2)
    jaxs = jax.vjp(functools.partial(convolve, dimension_numbers=dimensions), x, kernel)
    return tuple((out, *gradients_of(g)) for out, gradients_of in (ours, jaxs))


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_convolutions_on_cpus_are_jaxs_with_its_gradients(padding, x64):
    rng = np.random.default_rng(0)
    shapes = [(4, 10, 12, 5), (3, 3, 5, 7), (4, 8 + 2 * padding, 10 + 2 * padding, 7)]
    arrays = (jnp.asarray(rng.standard_normal(shape)) for shape in shapes)
    on_cpu = partition.on_mesh(functools.partial(convolution_and_gradients, padding=padding), CPU)
    for ours, jaxs in zip(*on_cpu(*arrays), strict=True):
        np.testing.assert_allclose(ours, jaxs, rtol=1e-12, atol=1e-12)


def test_convolutions_in_loops_are_of_images_by_kernels():
    """XLA's CPU backend takes 30 times as long for those of another order, which it puts right outside of loops."""

    def total(x, kernel, g):
        def add(sums, arrays):
            (_, *gradients), _ = convolution_and_gradients(arrays[0], kernel, arrays[1], padding=1)
            return jax.tree.map(jnp.add, sums, gradients), None

        return jax.lax.scan(add, [jnp.zeros_like(x[0]), jnp.zeros_like(kernel)], (x, g))[0]

    shapes = [(3, 2, 8, 8, 5), (3, 3, 5, 7), (3, 2, 8, 8, 7)]
    text = jit(partition.on_mesh(total, CPU)).lower(*map(jnp.ones, shapes)).compile().as_text()
    orders = re.findall(r" convolution\(.*dim_labels=(\w+->\w+)", text)
    assert len(orders) >= 2 and set(orders) == {"b01f_01io->b01f"}
