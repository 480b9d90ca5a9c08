"""Captions from the config to the images: what guidance is, what a loss sees, what a command shows."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import captioned_digits
from mscm import evaluation, methods
from mscm.config import ConfigError, load_config
from mscm.data import captions
from mscm.diffusion import denoiser as denoisers
from mscm.experiment import build
from mscm.objectives.multistep_consistency import consistency_loss
from mscm.types import Guided, Text
from tests import commands

WORDS = ["a seven left of a two", "an eight above a one", "a zero below a nine", "a three right of a six"]
KEY = jax.random.key(0)
CONFIG = """
from configs import captioned_digits


def get_config():
    config = captioned_digits.{call}
    config.model.update(dict(patch_size=4, emb_dim=16, head_dim=16))
    config.model.middle.update(dict(width=32, num_blocks=1))
    config.model.text.update(dict(width=16, num_blocks=1))
    config.optimizer.warmup_steps = 2
    config.train.update(
        dict(num_steps=8, batch_size=8, steps_per_dispatch=2, log_every_steps=2, save_every_steps=4)
    )
    config.eval.update(dict(num_images=20, batch_size=20, teacher_steps=(2,), network="pixels"))
    if config.teacher is not None:
        config.teacher.config = "{folder}/teacher.py"
    return config
"""


def config_files(folder):
    """Of a small teacher and a student with two steps."""
    for name, call in (("teacher", "teacher()"), ("student", "student(student_steps=2)")):
        (folder / f"{name}.py").write_text(CONFIG.format(call=call, folder=folder))
    return folder / "teacher.py", folder / "student.py"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """An experiment, and parameters that are nowhere zero."""
    _, file = config_files(tmp_path_factory.mktemp("configs"))
    experiment = build(load_config(str(file)))
    # The last layer of a new network is 0, and with it every output.
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(KEY, p.shape), jax.jit(experiment.init_params)(KEY)
    )
    return experiment, params


@pytest.fixture(scope="module")
def noisy():
    return jax.random.normal(KEY, (4, 16, 16, 1)), jnp.array([0.2, 0.5, 0.7, 0.95])


def text_of(experiment, words=WORDS):
    return Text(*map(jnp.asarray, captions.encode(words, experiment.data.text)))


def plain(experiment, params, condition):
    """The network without guidance."""
    network = methods.network(experiment.model, params)
    return denoisers.make_denoiser(network, experiment.schedule, experiment.prediction, condition=condition)


def test_guidance_zero_is_the_conditional_model(student, noisy):
    experiment, params = student
    teacher = dataclasses.replace(experiment.teacher.experiment, guidance=0.0)
    text = text_of(experiment)
    np.testing.assert_array_equal(teacher.denoiser(params, text)(*noisy), plain(teacher, params, text)(*noisy))


def test_both_forwards_in_one_batch_are_two_forwards(student, noisy):
    """The guided output is (1 + g) conditional - g null, beside the conditional one, from which x_var is."""
    experiment, params = student
    teacher = experiment.teacher.experiment
    text, null = text_of(experiment), text_of(experiment, [""] * 4)
    answered = teacher.answer(params, text)(*noisy)
    assert isinstance(answered, Guided) and teacher.guidance == captioned_digits.GUIDANCE
    x_cond, x_null = (plain(teacher, params, condition)(*noisy) for condition in (text, null))
    assert np.abs(x_cond - x_null).max() > 1e-3
    np.testing.assert_allclose(answered.x_cond, x_cond, atol=1e-5)
    g = teacher.guidance
    np.testing.assert_allclose(answered.x_hat, (1 + g) * x_cond - g * x_null, atol=1e-4)


def test_the_loss_is_the_papers_with_a_guided_teacher(student):
    """By hand from two forwards; with x_var of the guided output it would be another."""
    experiment, params = student
    teacher, source = experiment.teacher.experiment, experiment.data.open()
    batch = {name: jnp.asarray(rows) for name, rows in source.load(np.arange(4)).items()}
    text = Text(batch["tokens"], batch["mask"])
    loss, _ = experiment.loss_fn(params, {}, methods.Frozen(params), batch, KEY, jnp.int32(0))

    def by_hand(x_var_of_guided):
        def answer(z_t, t):
            x_cond, x_null = (
                plain(teacher, params, condition)(z_t, t)
                for condition in (text, teacher.data.null_condition(4))
            )
            x_hat = x_cond + teacher.guidance * (x_cond - x_null)
            return Guided(x_hat, x_hat if x_var_of_guided else x_cond)

        x, k_loss = jnp.asarray(batch["image"]) / 127.5 - 1, jax.random.split(KEY, 5)[2]
        return consistency_loss(
            plain(experiment, params, text), answer, experiment.schedule, x, k_loss, student_steps=2,
            teacher_steps=256.0, huber_epsilon=1.0,
        )[0]

    np.testing.assert_allclose(loss, by_hand(x_var_of_guided=False), rtol=1e-4)
    assert np.abs(loss / by_hand(x_var_of_guided=True) - 1).max() > 1e-3


def test_captions_are_dropped_at_the_rate_of_the_config(student, monkeypatch):
    """A dropped caption is the null caption as a whole; the others are untouched."""
    teacher = student[0].teacher.experiment
    seen = []

    def network(*_, **__):
        return lambda z_t, logsnr, condition: seen.append(condition) or jnp.zeros_like(z_t)

    monkeypatch.setattr(methods, "network", network)
    batch = {name: jnp.asarray(rows) for name, rows in teacher.data.open().load(np.arange(512)).items()}
    teacher.loss_fn({}, {}, methods.Frozen(), batch, KEY, jnp.int32(0))
    (text,) = seen
    dropped = ~text.mask.any(axis=1)
    assert abs(dropped.mean() - 0.1) < 0.04  # 512 draws: 3 standard deviations
    np.testing.assert_array_equal(text.tokens[~dropped], batch["tokens"][~dropped])
    np.testing.assert_array_equal(text.mask[~dropped], batch["mask"][~dropped])
    assert not np.any(text.tokens[dropped])


def test_an_evaluation_takes_captions_of_the_data_in_turn(student):
    """All of them once, in an order of the seed, and then again; as tokens and as words."""
    experiment, _ = student
    count = len(experiment.data.open())
    indices = np.array([0, 1, count - 1, count, count + 1])
    tokens, mask = evaluation.conditions_of_images(experiment, 3)(indices)
    words = evaluation.captions_in_turn(experiment, indices, 3)
    assert [bytes(row[there]).decode() for row, there in zip(tokens, mask, strict=True)] == words
    assert words[0] == words[3] and words[1] == words[4]
    assert words != evaluation.captions_in_turn(experiment, indices, 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The files of a teacher and a student, and a work directory of both, trained for eight steps."""
    root = tmp_path_factory.mktemp("trained")
    files = config_files(root)
    code = commands.run("main", f"--config={files[1]}", f"--workdir={root / 'run'}", "--config.train.num_steps=8")
    assert code == 0
    return *files, root / "run"


def test_a_training_ends_with_scores_of_captions(trained):
    rows = json.loads((trained[2] / "report" / "scores.json").read_text())
    scored = [row for row in rows if row["nfe"]]
    # The guided teacher is asked twice a step.
    assert [row["nfe"] for row in scored] == [2, 4]
    assert all(0 <= row["caption_accuracy"] <= 1 and row["labels"] == "captions" for row in scored)
    assert (trained[2] / "report" / "samples.png").exists()


def test_samples_of_prompts(trained, tmp_path, capfd):
    """One prompt for all images, or several in turn; an image depends on its caption and on nothing else."""
    _, file, workdir = trained
    (tmp_path / "prompts.txt").write_text("a two above a two\n\nan eight below a one\n")
    common = ("sample", f"--config={file}", f"--workdir={workdir}", "--num_images=4")

    def images(*words):
        output = tmp_path / "out.npz"
        assert commands.run(*common, f"--output={output}", *words) == 0
        with np.load(output) as found:
            return found["images"], found["captions"].tolist()

    several, said = images("--prompt=a one left of a four", f"--prompt_file={tmp_path / 'prompts.txt'}")
    assert said == ["a one left of a four", "a two above a two", "an eight below a one", "a one left of a four"]
    one, said = images("--prompt=a one left of a four")
    assert said == ["a one left of a four"] * 4
    same = [np.array_equal(a, b) for a, b in zip(several, one, strict=True)]
    assert same == [True, False, False, True]
    _, said = images()
    assert len(set(said)) == 4  # of the data

    grid = tmp_path / "grid.png"
    assert commands.run(*common, f"--output={grid}", "--teacher", "--prompt=a one left of a four") == 0
    with Image.open(grid) as image:
        width, height = image.size
    assert width > 2 * 4 * 96 and height > 96 + 20  # two panels, captions beneath


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--labels=1"], "--labels: got it for 'captioned_digits_cd2', expected none: its images have captions"),
        (["--prompt_file=nowhere"], "--prompt_file: got 'nowhere' .*, expected a text with a caption a line"),
        (["--prompt=a", "--text_encoder=nowhere"], "--text_encoder: got 'nowhere', expected a directory with a T5's"),
        (["--prompt_file={empty}"], "--prompt_file: got .* without any text, expected a caption a line"),
        (["--prompt=a", "--prompt=b", "--num_images=1"], "--num_images: got 1 for 2 captions, expected an image for"),
        (["--teacher", "--output=x.npz"], "--teacher: got 'captioned_digits_cd2' and 'x.npz', expected a student and"),
    ],
)
def test_what_cannot_be_shown_is_a_sentence(trained, tmp_path, capfd, words, sentence):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    words = [word.format(empty=empty) for word in words]
    line = commands.refusal(capfd, "sample", f"--config={trained[1]}", f"--workdir={trained[2]}", *words)
    assert re.search(sentence, line), line


def test_prompts_are_for_captions(capfd):
    line = commands.refusal(capfd, "sample", "--config=configs/digits_cd4.py", "--workdir=x", "--prompt=a one")
    assert "--prompt: got it for 'digits_cd4', expected none: its images have labels" in line


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"eval.labels": "balanced"}, "config.eval.labels: got 'balanced' for a model of captions, expected captions"),
        ({"data.text.length": 0}, "config.data.text.length: got 0, expected a whole number of at least 1"),
        ({"data.text.encoder": "t5"}, "config.data.text: got no key 'features'"),
        ({"model.text.num_blocks": 0}, "got 0 blocks that read bytes, expected at least 1"),
        ({"model.text.width": 33}, "got a text of width 33, expected a multiple of head_dim=32"),
        ({"eval.alignment": "words"}, "config.eval.alignment: got 'words', expected one of none, digits, clip"),
    ],
)
def test_settings_of_text_that_cannot_be(changes, sentence):
    config = captioned_digits.teacher()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=sentence):
        build(config)


def test_a_data_set_without_captions_is_refused():
    config = captioned_digits.teacher()
    config.data.update(dict(name="digits", split="all", resolution=8, num_classes=10))
    with pytest.raises(ConfigError, match="config.data.text: got 'digits', whose images have no captions"):
        build(config).data.open()


def test_scores_of_images_read_no_tokens(student, tmp_path, monkeypatch):
    """An encoder's are a megabyte each: neither a reference nor the training of a classifier asks for them."""
    experiment, _ = student
    monkeypatch.setattr(captions.WithTokens, "texts", None)
    with evaluation.computed_reference(
        experiment, evaluation.make_network(experiment, str(tmp_path)), str(tmp_path / "partial.npz")
    ) as reference:
        assert reference.data["count"] == 16384

    def load_or_train(source, directory):
        assert source.load(np.arange(2)).keys() == {"image", "label"}
        raise InterruptedError

    monkeypatch.setattr(evaluation.classifiers, "load_or_train", load_or_train)
    of_classifier = dataclasses.replace(experiment, eval=dataclasses.replace(experiment.eval, network="classifier"))
    with pytest.raises(InterruptedError):
        evaluation.make_network(of_classifier, str(tmp_path))
