"""What the config switches on reaches the loss: guidance, dropped labels, flipped images, the mesh."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from mscm import methods
from mscm.config import ConfigError, load_config
from mscm.diffusion import denoiser as denoisers
from mscm.evaluation import SamplerSpec, check_sampler, make_sample_fn, num_evaluations
from mscm.experiment import build
from mscm.models import layers
from mscm.objectives.multistep_consistency import consistency_loss
from mscm.types import Guided

ROOT = Path(__file__).resolve().parents[1]
BATCH = 256


def _small(config):
    config.model.middle.update(dict(width=32, num_blocks=1))
    config.model.update(dict(emb_dim=16, head_dim=16))
    return config


def _batch():
    """Images that are white on the left and black on the right, of all classes."""
    image = np.zeros((BATCH, 8, 8, 1), np.uint8)
    image[:, :, :4] = 255
    return {"image": jnp.asarray(image), "label": jnp.arange(BATCH, dtype=jnp.int32) % 10}


@pytest.fixture
def calls(monkeypatch):
    """What the network is asked in a loss: (z_t, log-SNR, labels); it answers with zeros."""
    asked = []

    def make(model, params, *, guidance=None, dropout_key=None):
        def network(z_t, logsnr, labels):
            asked.append(tuple(np.asarray(array) for array in (z_t, logsnr, labels)))
            return jnp.zeros_like(z_t)

        return network

    monkeypatch.setattr(methods, "network", make)
    return asked


def _loss(config):
    return build(config).loss_fn({}, {}, methods.Frozen(), _batch(), jax.random.key(0), jnp.int32(0))


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_labels_are_dropped_at_the_rate_of_the_config(calls, rate):
    """A dropped label is the null class; the others are untouched."""
    config = digits.teacher()
    config.objective.label_dropout = rate
    _loss(config)
    ((_, _, labels),) = calls
    dropped = labels == 10
    assert abs(dropped.mean() - rate) < (0.1 if rate else 1e-9)  # 256 draws: 0.1 is 3.7 standard deviations
    np.testing.assert_array_equal(labels[~dropped], np.asarray(_batch()["label"])[~dropped])


@pytest.mark.parametrize("family", [digits.teacher, lambda: digits.student(student_steps=2, distil=False)])
@pytest.mark.parametrize("flip", [False, True])
def test_images_are_flipped_where_the_config_says(calls, family, flip):
    """Half of them, seen through the noise where there is little."""
    config = family()
    config.data.flip = flip
    _loss(config)
    z_t, logsnr, _ = calls[0]
    clear = logsnr > 2
    left_minus_right = (z_t[:, :, :4] - z_t[:, :, 4:]).mean(axis=(1, 2, 3))[clear]
    assert clear.sum() > 60 and np.abs(left_minus_right).min() > 0.5
    mirrored = (left_minus_right < 0).mean()
    assert 0.25 < mirrored < 0.75 if flip else mirrored == 0


@pytest.fixture
def guided(tmp_path):
    """Config of a student whose teacher was trained with dropped labels, with guidance 1.5."""
    (tmp_path / "teacher.py").write_text(
        "from configs import digits\n"
        "def get_config():\n"
        "    config = digits.teacher()\n"
        "    config.objective.label_dropout = 0.1\n"
        "    config.model.middle.update(dict(width=32, num_blocks=1))\n"
        "    config.model.update(dict(emb_dim=16, head_dim=16))\n"
        "    return config\n"
    )
    config = _small(digits.student(student_steps=2, distil=True))
    config.teacher.config = str(tmp_path / "teacher.py")
    config.teacher.guidance = 1.5
    return config


def test_guidance_reaches_the_teacher_and_its_samples(guided):
    """The teacher answers 2.5 conditional - 1.5 null in the loss and where it is scored, and says so in its name."""
    experiment = build(guided)
    teacher = experiment.teacher.experiment
    assert teacher.name == "digits_teacher, guidance 1.5"
    key = jax.random.key(3)
    params = jax.jit(experiment.init_params)(key)
    # The last layer of a new network is 0, and with it every output.
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), params)
    batch = {name: array[:8] for name, array in _batch().items()}
    labels = jnp.asarray(batch["label"])

    def plain(labels):
        def network(z_t, logsnr, labels):
            return experiment.model.apply({"params": params}, z_t, logsnr, labels, train=False)

        return denoisers.make_denoiser(network, experiment.schedule, experiment.prediction, condition=labels)

    z_t, t = jax.random.normal(key, (8, 8, 8, 1)), jnp.linspace(0.1, 0.9, 8)
    x_cond, x_null = plain(labels)(z_t, t), plain(jnp.full_like(labels, 10))(z_t, t)
    expected = 2.5 * x_cond - 1.5 * x_null
    assert np.abs(expected - x_cond).max() > 1e-3
    np.testing.assert_allclose(teacher.denoiser(params, labels)(z_t, t), expected, atol=1e-4)

    loss, _ = experiment.loss_fn(params, {}, methods.Frozen(params), batch, key, jnp.int32(0))
    k_loss = jax.random.split(key, 3)[2]
    x = jnp.asarray(batch["image"]) / 127.5 - 1
    by_hand, _ = consistency_loss(
        plain(labels),
        denoisers.make_guided(
            lambda *inputs: experiment.model.apply({"params": params}, *inputs, train=False),
            experiment.schedule, experiment.prediction, condition=labels, null=jnp.full_like(labels, 10), guidance=1.5,
        ),
        experiment.schedule, x, k_loss, student_steps=2, teacher_steps=16.0,
    )
    np.testing.assert_allclose(loss, by_hand, rtol=1e-4)


@pytest.fixture(scope="module")
def guided_student(tmp_path_factory):
    """A 2-step student of a model with the weight of guidance as an input, and parameters that are nowhere zero."""
    folder = tmp_path_factory.mktemp("guided")
    for name, family, before in (
        ("teacher", "guidable()", None),
        ("guided", "guided()", "teacher"),
        ("student", "guided_student(student_steps=2)", "guided"),
    ):
        (folder / f"{name}.py").write_text(
            "from configs import digits\n"
            "def get_config():\n"
            f"    config = digits.{family}\n"
            "    config.model.middle.update(dict(width=32, num_blocks=1))\n"
            "    config.model.update(dict(emb_dim=16, head_dim=16))\n"
            + (f"    config.teacher.config = {str(folder / f'{before}.py')!r}\n" if before else "")
            + "    return config\n"
        )
    experiment = build(load_config(str(folder / "student.py")))
    key = jax.random.key(3)
    params = jax.jit(experiment.init_params)(key)
    return experiment, jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), params)


def test_a_guided_student_is_sampled_with_the_weight_of_its_sampler(guided_student):
    """The weight is an input: one evaluation a step, and 0 where the sampler says nothing."""
    experiment, params = guided_student
    z_t, t, labels = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.linspace(0.2, 0.9, 4), jnp.arange(4)

    def by_hand(weight):
        def network(z_t, logsnr, labels):
            weights = jnp.full(labels.shape, weight)
            return experiment.model.apply({"params": params}, z_t, logsnr, labels, weights, train=False)

        return denoisers.make_denoiser(network, experiment.schedule, experiment.prediction, condition=labels)(z_t, t)

    for text, weight in (("ddim", 0.0), ("ddim:guidance=2", 2.0)):
        spec = SamplerSpec(text, 2)
        check_sampler(experiment, spec)
        assert num_evaluations(experiment, spec) == 2
        actual = experiment.for_sampler(spec).denoiser(params, labels)(z_t, t)
        np.testing.assert_allclose(actual, by_hand(weight), rtol=1e-4, atol=1e-4)
    assert np.abs(by_hand(2.0) - by_hand(0.0)).max() > 1e-3
    for text, sentence in (("ddim:guidance=5", "got 5.0, expected one weight from 0 to 4"),
                           ("ddim:guidance=2,guidance_low=0", "got 2.0 at some times")):
        with pytest.raises(ConfigError, match=sentence):
            check_sampler(experiment, SamplerSpec(text, 2))


def test_one_weight_is_drawn_for_student_and_teacher(guided_student, monkeypatch):
    """Each example's weight is an input of the loss's calls of student, its reference and teacher.

    A fourth is the teacher's with weights of 0, from which x_var is.
    """
    experiment, params = guided_student
    seen = []
    apply = type(experiment.model).apply

    def spy(model, variables, z_t, logsnr, labels, guidance, **options):
        seen.append(np.asarray(guidance))
        return jnp.zeros_like(z_t)

    monkeypatch.setattr(type(experiment.model), "apply", spy)
    experiment.loss_fn(params, {}, methods.Frozen(params), _batch(), jax.random.key(0), jnp.int32(0))
    monkeypatch.setattr(type(experiment.model), "apply", apply)
    assert len(seen) == 4
    *same, none = sorted(seen, key=np.max, reverse=True)
    for weights in same:
        np.testing.assert_array_equal(weights, seen[0])
    np.testing.assert_array_equal(none, np.zeros(BATCH))
    assert 0 <= seen[0].min() < 0.2 and 3.8 < seen[0].max() <= 4 and len(np.unique(seen[0])) == BATCH


@pytest.mark.parametrize("weights", [None, (0.0, 0.5, 2.0, 4.0)])
def test_a_teacher_with_weights_answers_beside_the_conditional_output(guided_student, weights):
    """At the weight of each example, or at its own, 2 here; x_var is of the output without guidance."""
    experiment, params = guided_student
    teacher = experiment.teacher.experiment
    labels, z_t, t = jnp.arange(4), jax.random.normal(jax.random.key(5), (4, 8, 8, 1)), jnp.linspace(0.2, 0.9, 4)
    of_weight = {w: teacher.guided(w).denoiser(params, labels)(z_t, t) for w in (0.0, 0.5, 2.0, 4.0)}
    if weights is None:
        answered = teacher.guided(2.0).answer(params, labels)(z_t, t)
        expected = of_weight[2.0]
    else:
        answered = teacher.answer(params, labels, jnp.array(weights))(z_t, t)
        expected = jnp.stack([of_weight[w][i] for i, w in enumerate(weights)])
    assert isinstance(answered, Guided)
    np.testing.assert_allclose(answered.x_hat, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answered.x_cond, of_weight[0.0], rtol=1e-4, atol=1e-5)
    assert np.abs(expected - of_weight[0.0]).max() > 1e-3


def test_a_guided_model_begins_as_its_teacher_and_asks_for_both_outputs(guided_student, monkeypatch):
    """With the teacher's weights it is the conditional model; the loss asks for the label's answer and the null's."""
    experiment, _ = guided_student
    guided = experiment.teacher.experiment
    key = jax.random.key(1)
    teacher_params = jax.jit(guided.teacher.experiment.init_params)(key)
    teacher_params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), teacher_params)
    params = guided.from_teacher(teacher_params, key)
    labels, z_t, t = jnp.arange(4), jax.random.normal(key, (4, 8, 8, 1)), jnp.linspace(0.2, 0.9, 4)
    conditional = guided.teacher.experiment.denoiser(teacher_params, labels)(z_t, t)
    np.testing.assert_allclose(guided.denoiser(params, labels)(z_t, t), conditional, rtol=1e-4, atol=1e-4)
    assert guided.adds_guidance and not experiment.adds_guidance

    asked = []

    def spy(model, variables, z_t, logsnr, labels, *weights, **options):
        asked.append((np.asarray(labels), len(weights)))
        # What each network says of v: the target is then known.
        return jnp.full_like(z_t, {0: 3.0, 1: 0.0}[len(weights)] if labels[0] != 10 else 1.0)

    monkeypatch.setattr(type(guided.model), "apply", spy)
    loss, metrics = guided.loss_fn(params, {}, methods.Frozen(teacher_params), _batch(), key, jnp.int32(0))
    label = np.asarray(_batch()["label"])
    (conditional, none), (null, nothing), (student, one) = asked
    np.testing.assert_array_equal([student, conditional, null], [label, label, np.full(BATCH, 10)])
    assert (one, none, nothing) == (1, 0, 0)
    # v differs from the target's, 3 + w (3 - 1), by as much everywhere: x by sigma of it, weighed by max(SNR, 1).
    snr = np.exp(np.asarray(metrics["logsnr"]))
    expected = (3 + 2 * np.asarray(metrics["guidance"])) ** 2 / (1 + snr) * np.maximum(snr, 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-3)


def test_guidance_that_nobody_would_ask_for_is_refused(guided):
    """Consistency training asks no teacher."""
    guided.objective.distil = False
    with pytest.raises(ConfigError, match="config.teacher.guidance: expected 0.0, because objective.distil = False"):
        build(guided)


def test_a_guided_teacher_of_a_model_that_takes_the_weight_is_refused():
    """Its loss guides: the guidance would count twice."""
    config = digits.guided()
    config.teacher.guidance = 1.0
    with pytest.raises(ConfigError, match="config.teacher.guidance: got 1.0, expected 0.0 because the weight is an in"):
        build(config)


def test_training_and_sampling_are_traced_where_the_mesh_is_known(monkeypatch):
    """Otherwise `attention='auto'` would know no devices and never be a kernel."""
    meshes = []

    def attend(q, k, v, *, implementation, mask):
        if implementation == "auto":  # initialisation says 'xla'
            meshes.append(jax.sharding.get_abstract_mesh())
        return v

    experiment = build(digits.student(student_steps=2, distil=True))
    state, params = experiment.abstract_state(), experiment.teacher.experiment.abstract_params()
    monkeypatch.setattr(layers, "attend", attend)
    batch = {
        "image": jax.ShapeDtypeStruct((10, 32, 8, 8, 1), jnp.uint8),
        "label": jax.ShapeDtypeStruct((10, 32), jnp.int32),
    }
    jax.eval_shape(experiment.train_steps(), state, methods.Frozen(params), batch, jax.random.key(0))
    assert len(meshes) >= 3  # the student, its reference and the teacher
    indices = jax.ShapeDtypeStruct((4,), jnp.int32)
    jax.eval_shape(make_sample_fn(experiment, SamplerSpec("ddim", 2)), params, jax.random.key(0), indices, indices)
    assert len(meshes) >= 4
    assert {mesh.axis_names for mesh in meshes} == {("data", "fsdp", "tensor")}


@pytest.mark.parametrize("fsdp, expected", [(1, (1, 1, 1)), (8, (1, 1, 1))])
def test_evaluation_takes_the_devices_that_are_there(fsdp, expected):
    """A mesh of eight does not fit one, and neither does its teacher's; training on it is refused."""
    config = digits.student(student_steps=2, distil=True)
    config.mesh.fsdp = fsdp
    experiment = build(config)
    scored = experiment.for_evaluation()
    for model in (scored, scored.teacher.experiment):
        assert tuple(model.mesh.shape.values()) == expected
    assert scored.facts() == experiment.facts()  # its checkpoints are the same
    if fsdp == 8:
        with pytest.raises(ConfigError, match="expected sizes whose product"):
            experiment.mesh  # noqa: B018


def test_evaluation_needs_no_batch_that_divides():
    """Of 32 images on five devices there is no training; each device has a part of what is sampled."""
    program = """
from configs import digits
from mscm.config import ConfigError, load_config
from mscm.experiment import build

config = digits.teacher()
experiment = build(config)
try:
    experiment.mesh
except ConfigError as error:
    print(error)
print(tuple(experiment.for_evaluation().mesh.shape.values()))
config.mesh.update(dict(data=-1, fsdp=2))
print(tuple(build(config).for_evaluation().mesh.shape.values()))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=5"}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    refused, *meshes = result.stdout.splitlines()
    assert "train.batch_size: got 32" in refused and meshes == ["(5, 1, 1)"] * 2


@pytest.mark.parametrize(
    ("later_solver", "phase_steps", "corrects"),
    [("ddim", (64, 32), True), ("ddim", (64, 32, 16), False), ("same", (64, 32, 16), True)],
)
def test_only_steps_of_a_diffusion_model_are_corrected(later_solver, phase_steps, corrects, monkeypatch):
    """aDDIM in the first phase of progressive distillation; after it DDIM, or what the config says."""
    used = []

    def spy(student, teacher, schedule, x, key, *, solver, **options):
        used.append(solver)
        return jnp.zeros(BATCH), {}

    monkeypatch.setattr(methods, "progressive_loss", spy)
    config = digits.progressive()
    config.objective.update(dict(later_solver=later_solver, phase_steps=phase_steps))
    experiment = build(config)
    monkeypatch.setattr(type(experiment), "answer", lambda *_: None)
    experiment.loss_fn({}, {}, methods.Frozen(), _batch(), jax.random.key(0), jnp.int32(0))
    x = z_t = jnp.ones((BATCH, 8, 8, 1))
    t, s = jnp.full(BATCH, 0.5), jnp.full(BATCH, 0.25)
    _, x_var = used[0](lambda z, t: 0.5 * z, x, z_t, t, s, experiment.schedule(t), experiment.schedule(s))
    np.testing.assert_allclose(x_var, 0.75 * 0.25 * corrects, rtol=1e-6)


@pytest.mark.parametrize(("family", "loss"), [
    (lambda: digits.tract(student_steps=4), "tract_loss"), (digits.consistency_training, "consistency_model_loss"),
])
def test_the_target_network_is_what_the_loss_compares_with(family, loss, monkeypatch):
    """The student answers with the parameters, TRACT's self-teacher and the reference of CM with the target's."""
    asked = []

    def network(model, params, *, guidance=None, dropout_key=None):
        return lambda z_t, logsnr, labels: jnp.full_like(z_t, params)

    def spy(student, *others, **options):
        asked.append((student, options["reference"] if "reference" in options else others[1]))
        return jnp.zeros(BATCH), {"logsnr": jnp.zeros(BATCH)}

    monkeypatch.setattr(methods, "network", network)
    monkeypatch.setattr(methods, loss, spy)
    experiment = build(family())
    monkeypatch.setattr(type(experiment), "answer", lambda *_: None)
    experiment.loss_fn(2.0, 5.0, methods.Frozen(), _batch(), jax.random.key(0), jnp.int32(0))
    ((student, reference),) = asked
    z_t, t = jnp.zeros((BATCH, 8, 8, 1)), jnp.full(BATCH, 0.5)
    np.testing.assert_allclose(reference(z_t, t) / student(z_t, t), 2.5, rtol=1e-5)
