"""Networks of EDM's as teachers: imported, compared with evaluations that know nothing of this package, distilled."""

import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm import evaluation, teachers, training_loop
from mscm.checkpoint import reading
from mscm.config import load_config
from mscm.diffusion import sampler, steps
from mscm.experiment import build
from tests import commands, tiny_run
from tests.edm_files import LEAST, TINY, config_of, images, pickled, random_network
from tests.models.edm_reference import Network, denoised, heun_states, torch_operations

ARCHITECTURES = pytest.mark.parametrize("name", TINY)

@pytest.fixture
def experiment_of(tmp_path, monkeypatch):
    """The experiment of a config that stands in the current directory, which is an empty one."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, run: str = "teacher", **changes):
        (tmp_path / "teacher.py").write_text(config_of(name, **changes))
        return build(load_config(f"teacher.py:{run}"))

    return make


def write(name: str, path: str = "net.pkl", **changes) -> Network:
    """A network at random, and its file."""
    arguments = TINY[name] | changes
    network = random_network(**arguments)
    with open(path, "wb") as file:
        file.write(pickled(network.weights, **arguments))
    return network


def to_jax(x) -> jax.Array:
    return jnp.asarray(np.asarray(x).transpose(0, 2, 3, 1), jnp.float32)


def labels_of(count: int, *, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Labels, the last of which is no class, and EDM's rows for them."""
    labels = np.arange(count) * 3 % classes
    rows = np.eye(classes)[labels]
    labels[-1], rows[-1] = classes, 0
    return labels, rows


@ARCHITECTURES
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_imported_network_is_the_published_one(experiment_of, name, library):
    """Outputs of the network and of the preconditioned denoiser, at EDM's noise levels, to 1e-4."""
    ops = torch_operations(pytest.importorskip("torch")) if library == "torch" else None
    experiment, network = experiment_of(name), write(name)
    if ops is not None:
        network = Network(network.weights, ops, **TINY[name])
    teachers.import_teacher(experiment, "edm", "net.pkl", "t")
    params = evaluation.read_ema(experiment, "t")

    sigma, (labels, rows) = np.array([0.002, 0.05, 0.8, 7.0, 80.0]), labels_of(5)
    scaled = images(5, 8)
    expected = np.asarray(network(network.ops.tensor(scaled), np.log(sigma) / 4, rows)).transpose(0, 2, 3, 1)
    raw = jax.jit(lambda *given: experiment.model.apply({"params": params}, *given, train=False))
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(raw(to_jax(scaled), jnp.float32(-2 * np.log(sigma)), labels), expected, atol=1e-4)

    # On EDM's schedule, where alpha = 1, and on a student's, where alpha^2 + sigma^2 = 1.
    for model in (experiment, experiment_of(name, "cd").teacher.experiment):
        t = jnp.array([0.02, 0.25, 0.5, 0.75, 1.0])
        alpha, sigma = (np.asarray(part, np.float64) for part in model.schedule(t))
        z = images(5, 8) * np.hypot(0.5 * alpha, sigma)
        expected = np.asarray(denoised(network, network.ops.tensor(z / alpha), (sigma / alpha).ravel(), rows))
        x_hat = jax.jit(model.denoiser(params, jnp.asarray(labels)))(to_jax(z), t)
        np.testing.assert_allclose(x_hat, expected.transpose(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_sampling_is_edms_at_every_step(experiment_of, library):
    """18 steps of Heun on EDM's levels from the same noise, to 1e-3 after each of them."""
    ops = torch_operations(pytest.importorskip("torch")) if library == "torch" else None
    experiment, network = experiment_of("ddpmpp"), write("ddpmpp")
    if ops is not None:
        network = Network(network.weights, ops, **TINY["ddpmpp"])
    teachers.import_teacher(experiment, "edm", "net.pkl", "t")
    params = evaluation.read_ema(experiment, "t")
    noise, (labels, rows) = images(2, 8), labels_of(2)
    states = heun_states(lambda x, sigma: denoised(network, x, sigma, rows), network.ops.tensor(noise), 18)

    schedule, denoiser = experiment.schedule, jax.jit(experiment.denoiser(params, jnp.asarray(labels)))
    times = [*sampler.karras_times(schedule, 18), np.float32(0)]
    np.testing.assert_allclose(times, np.arange(18, -1, -1) / 18, atol=1e-6)
    z = 80 * to_jax(noise)
    for t, s, state in zip(times[:-1], times[1:], states, strict=True):
        t, s = (jnp.full((2,), time) for time in (t, s))
        z = steps.heun(denoiser, z, t, s, schedule(t), schedule(s))
        np.testing.assert_allclose(z, np.asarray(state).transpose(0, 2, 3, 1), atol=1e-3)
    # What the command draws: the same, from the noise itself.
    drawn = sampler.heun(denoiser, schedule, to_jax(noise), times=sampler.karras_times(schedule, 18))
    np.testing.assert_allclose(drawn, z, atol=1e-3)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A directory with `teacher.py`, a small file `net.pkl`, and `t`, what the command has made of it."""
    root = tmp_path_factory.mktemp("imported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        (root / "teacher.py").write_text(config_of("ddpmpp", **LEAST))
        write("ddpmpp", **LEAST)
        assert commands.run("import_teacher", "--config=teacher.py", "--from=edm:net.pkl", "--workdir=t") == 0
    return root


def test_the_licence_is_printed_written_and_recorded(imported, capfd, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(imported)
        words = ["--config=teacher.py", "--from=edm:net.pkl", f"--workdir={tmp_path}/again"]
        assert commands.run("import_teacher", *words) == 0
    said = capfd.readouterr().out
    assert "tiny_edm from net.pkl" in said and "CC BY-NC-SA 4.0" in said and "do not use it commercially" in said
    assert "CC BY-NC-SA 4.0" in (imported / "t" / "LICENCE").read_text()
    with reading(imported / "t") as checkpoints:
        recorded = checkpoints.facts()["imported"]
    assert (recorded["from"], recorded["file"]) == ("edm", "net.pkl") and "CC BY-NC-SA 4.0" in recorded["licence"]
    assert f"SHA-256 {recorded['sha256'][:12]}" in said
    assert json.loads((imported / "t" / "config.json").read_text())["name"] == "tiny_edm"


@pytest.mark.parametrize("run", ["cd", "pd", "tract"])
def test_students_of_an_imported_teacher(imported, run, monkeypatch):
    """Distilled as any other teacher's, from its weights, on a schedule of their own; none of its files changes."""
    monkeypatch.chdir(imported)
    tiny_run.hurry(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in (imported / "t").rglob("*") if path.is_file()}
    experiment = build(load_config(f"teacher.py:{run}"))
    first_state, starts = training_loop.first_state, []

    def remembered(*given):
        state = first_state(*given)
        starts.append(jax.device_get(state.params))  # now: training takes the state's memory
        return state

    monkeypatch.setattr(training_loop, "first_state", remembered)
    words = [f"--config=teacher.py:{run}", f"--workdir={run}", "--config.teacher.workdir=t"]
    assert commands.run("main", *words) == 0
    params, teacher = evaluation.read_ema(experiment, run), evaluation.read_ema(build(load_config("teacher.py")), "t")
    jax.tree.map(np.testing.assert_array_equal, starts[0], jax.device_get(teacher))
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), params, teacher)
    assert 0 < max(jax.tree.leaves(moved)) < np.inf
    assert before == {path: path.stat().st_mtime_ns for path in (imported / "t").rglob("*") if path.is_file()}


def test_samples_of_an_imported_teacher(imported, monkeypatch):
    """By the command, with EDM's sampler, which is the config's."""
    monkeypatch.chdir(imported)
    words = ["--config=teacher.py", "--workdir=t", "--output=x.npz", "--num_images=4"]
    assert commands.run("sample", *words) == 0
    assert np.load("x.npz")["images"].shape == (4, 8, 8, 1)


def test_a_state_dict_is_the_same(experiment_of, monkeypatch):
    """As .npz, with or without the name of the preconditioning's module; a note says what is not known of it."""
    experiment, network = experiment_of("ncsnpp"), write("ncsnpp")
    teachers.import_teacher(experiment, "edm", "net.pkl", "t")
    np.savez("a.npz", **network.weights)
    np.savez("b.npz", **{name.removeprefix("model."): value for name, value in network.weights.items()})
    expected = evaluation.read_ema(experiment, "t")
    for name in "ab":
        notes = teachers.import_teacher(experiment, "edm", f"{name}.npz", name)
        assert "preconditioning is not checked" in notes[1]
        jax.tree.map(np.testing.assert_array_equal, evaluation.read_ema(experiment, name), expected)


def test_a_network_without_classes(experiment_of):
    experiment = experiment_of("ddpmpp", label_dim=0)
    network = write("ddpmpp", label_dim=0)
    teachers.import_teacher(experiment, "edm", "net.pkl", "t")
    denoiser = jax.jit(experiment.denoiser(evaluation.read_ema(experiment, "t"), jnp.arange(2)))
    expected = np.asarray(denoised(network, images(2, 8), np.full(2, 80.0), None))
    np.testing.assert_allclose(denoiser(to_jax(images(2, 8)), jnp.ones(2)), expected.transpose(0, 2, 3, 1), atol=1e-4)


def refusal(experiment, path: str = "net.pkl", workdir: str = "t") -> str:
    with pytest.raises(teachers.ConfigError) as error:
        teachers.import_teacher(experiment, "edm", path, workdir)
    assert not os.path.exists(os.path.join(workdir, "checkpoints"))
    return str(error.value)


def test_another_network_is_refused_with_all_that_differs(experiment_of):
    experiment, arguments = experiment_of("ddpmpp"), TINY["ddpmpp"]
    for changes, fields in (
        (dict(channel_mult=[1, 2, 2], num_blocks=2), {
            "channel_mult: got [1, 2, 2], expected [1, 2] (config.model.channel_mult)",
            "num_blocks: got 2, expected 1 (config.model.num_blocks)",
        }),
        (dict(label_dim=0), {
            "label_dim: got 0, expected 10 (config.data.num_classes if config.model.conditional)"
        }),
        (TINY["ncsnpp"], {
            "channel_mult_noise: got 2, expected 1 (config.model.name)",
            "embedding_type: got 'fourier', expected 'positional' (config.model.name)",
            "encoder_type: got 'residual', expected 'standard' (config.model.name)",
            "resample_filter: got [1, 3, 3, 1], expected [1, 1] (config.model.name)",
        }),
        (dict(new_kind="x"), {"new_kind: got 'x', expected 'nothing' (config.model.name)"}),
        (dict(sigma_data=1.0), {"sigma_data: got 1.0, expected 0.5 (config.prediction)"}),
        # What cannot be sorted or be a name.
        (dict(attn_resolutions=["a", 1, None]), {
            "attn_resolutions: got ['a', 1, None], expected [4] (config.model.attention_resolutions)"
        }),
        (dict(model_type=["x"]), {"model_type: got ['x'], expected 'SongUNet' (config.model.name)"}),
    ):
        with open("net.pkl", "wb") as file:
            file.write(pickled({"model.w": np.zeros(1)}, **arguments | changes))
        sentence = refusal(experiment)
        differing = sentence.partition("got another network than that of 'tiny_edm': ")[2].partition("; take the")[0]
        assert set(differing.split("; ")) == fields, sentence
    # Arguments that are not in the file have the values of EDM's code.
    few = {key: value for key, value in arguments.items() if key not in ("num_blocks", "attn_resolutions")}
    with open("net.pkl", "wb") as file:
        file.write(pickled({"model.w": np.zeros(1)}, **few))
    assert "attn_resolutions: got [16], expected [4]" in refusal(experiment)


@pytest.mark.parametrize("class_name", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_other_preconditioning_is_refused(experiment_of, class_name):
    experiment = experiment_of("ddpmpp")
    with open("net.pkl", "wb") as file:
        file.write(pickled({"model.w": np.zeros(1)}, class_name=class_name, **TINY["ddpmpp"]))
    assert f"preconditioning {class_name!r}, expected 'EDMPrecond'" in refusal(experiment)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("ddpmpp", lambda w: w.pop("model.enc.8x8_conv.bias"), "got no tensor 'enc.8x8_conv.bias'"),
        ("ddpmpp", lambda w: w.update({"model.x": np.zeros(1)}), "got 1 tensors .* such as 'x', expected none"),
        ("ddpmpp", lambda w: w["model.map_layer0.bias"].fill(np.nan), "'map_layer0.bias' of float32 or not finite"),
        (
            "ddpmpp",
            lambda w: w.update({"model.map_layer0.bias": np.zeros(63, np.float32)}),
            r"'map_layer0.bias' of shape \[63\], expected one that becomes \[64\]",
        ),
        (
            "ncsnpp",
            lambda w: w["model.enc.4x4_down.conv0.resample_filter"].fill(0.0625),
            "other weights in enc.4x4_down.conv0.resample_filter than 'ncsnpp' resamples with",
        ),
    ],
)
def test_other_tensors_are_refused(experiment_of, name, change, sentence):
    experiment, network = experiment_of(name), random_network(**TINY[name])
    change(network.weights)
    with open("net.pkl", "wb") as file:
        file.write(pickled(network.weights, **TINY[name]))
    assert re.search(sentence, refusal(experiment))
    np.savez("net.npz", **network.weights)
    assert re.search(sentence, refusal(experiment, "net.npz"))


def test_configs_of_something_else_are_refused(experiment_of):
    experiment_of("ddpmpp")
    uvit = build(load_config("configs/digits_edm.py"))
    assert "got 'digits_edm', expected a diffusion model of ddpmpp, ncsnpp, adm" in refusal(uvit)
    student = build(load_config("teacher.py:cd"))
    assert "got 'tiny_cd2', expected a diffusion model" in refusal(student)
    for change, sentence in (
        (dict(prediction="v"), "config.prediction: got 'v', expected 'edm'"),
        ({"model.logsnr_input": "linear"}, "config.model.logsnr_input: got 'linear', expected 'log_sigma'"),
    ):
        config = load_config("teacher.py")
        config.schedule = dict(name="cosine")
        config.update_from_flattened_dict(change)
        assert sentence in refusal(build(config))
    config = load_config("teacher.py")
    config.model.name, config.optimizer.weight_decay = "ncsnpp", 0.1
    with pytest.raises(teachers.ConfigError, match="weight_decay: got 0.1, expected 0.0 with config.model 'ncsnpp'"):
        build(config)


def test_a_work_directory_with_checkpoints_is_refused(imported):
    with pytest.raises(teachers.ConfigError, match="which has checkpoints, expected another directory"):
        experiment = build(load_config(str(imported / "teacher.py")))
        teachers.import_teacher(experiment, "edm", str(imported / "net.pkl"), str(imported / "t"))
