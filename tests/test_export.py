"""A sampler as one file: the images of `mscm.sample`, from a program that knows nothing of this package."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest

from mscm import evaluation
from mscm.checkpoint import Checkpoints
from mscm.config import load_config, run_hash
from mscm.data import transforms
from mscm.experiment import build
from mscm.sampling import SamplerSpec
from tests import commands

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "docs" / "howto" / "export.md"  # which has a program that needs JAX alone
SEED = 2**31 - 1  # the largest that mscm.sample takes
WORDS = ["a seven left of a two", "an eight above a one", "a zero below a nine"]

_DIGITS = """
from configs import digits


def get_config():
    config = digits.{call}
    config.model.middle.update(dict(width=32, num_blocks=1))
    config.model.update(dict(head_dim=16, emb_dim=16))
    if config.objective.name == "diffusion":
        config.objective.label_dropout = 0.1
    else:
        config.teacher.config = "{folder}/teacher.py"
    return config
"""
_CAPTIONED = """
from configs import captioned_digits


def get_config():
    config = captioned_digits.teacher()
    config.model.update(dict(patch_size=4, emb_dim=16, head_dim=16))
    config.model.middle.update(dict(width=32, num_blocks=1))
    config.model.text.update(dict(width=16, num_blocks=1))
    return config
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a config of each model and a work directory with a checkpoint of random parameters."""
    folder = tmp_path_factory.mktemp("models")
    calls = {"teacher": "teacher()", "student": "student(student_steps=2, distil=True)"}
    for name, call in calls.items():
        (folder / f"{name}.py").write_text(_DIGITS.format(call=call, folder=folder))
    (folder / "captioned.py").write_text(_CAPTIONED)
    for name in (*calls, "captioned"):
        experiment = build(load_config(str(folder / f"{name}.py")))
        rng = np.random.default_rng(1)
        params = jax.tree.map(
            lambda a, rng=rng: rng.normal(scale=0.2, size=a.shape).astype(a.dtype), experiment.abstract_params()
        )
        with Checkpoints(folder / name, keep=1) as checkpoints:
            checkpoints.save_ema(8, params, experiment.facts())
    return folder


def export(models, name: str, output: Path, *words: str) -> None:
    flags = (f"--config={models / name}.py", f"--workdir={models / name}", f"--output={output}")
    assert commands.run("export", *flags, *words) == 0


def bytes_of(caption: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """As docs/howto/export.md says it."""
    letters = caption.encode()[:length]
    tokens = np.zeros(length, np.uint8)
    tokens[: len(letters)] = list(letters)
    return tokens, np.arange(length) < len(letters)


@pytest.mark.parametrize(
    ("name", "sampler", "num_steps"),
    [
        ("student", "ddim", 2),
        ("teacher", "ddim:guidance=1.5,guidance_low=0", 3),
        ("teacher", "ancestral:clip=dynamic", 3),
        ("captioned", "ddim:guidance=0.5", 2),
    ],
)
def test_the_file_gives_the_images_of_the_sampler(models, tmp_path, name, sampler, num_steps):
    """Any images of a seed in any batch, to 1e-5; as whole numbers those of mscm.sample."""
    spec = (f"--sampler={sampler}", f"--num_steps={num_steps}")
    export(models, name, tmp_path / "file", *spec)
    content = (tmp_path / "file").read_bytes()
    program = jax.export.deserialize(bytearray(content))

    experiment = build(load_config(f"{models / name}.py"))
    params = evaluation.read_ema(experiment, str(models / name))
    expected_of = evaluation.make_sample_fn(experiment, SamplerSpec(sampler, num_steps))
    for indices in (np.arange(6, dtype=np.int32), np.array([4, 1, 1000], np.int32)):
        if name == "captioned":
            rows = [bytes_of(WORDS[i % 3], experiment.data.text.length) for i in indices]
            condition = tuple(np.stack(arrays) for arrays in zip(*rows, strict=True))
            shown = evaluation.Shown.of_captions(experiment.data.text, [WORDS[i % 3] for i in indices])
            of_sampler = shown.conditions(np.arange(len(indices)))
        else:
            condition = (of_sampler := indices % 10,)
        images = program.call(np.uint32(SEED), indices, *condition)
        expected = expected_of(params, jax.random.key(SEED), indices, of_sampler)
        assert np.std(expected) > 0.1
        np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5)
        if len(indices) == 6:
            first = transforms.to_uint8(images)
    words = [f"--prompt={text}" for text in WORDS] if name == "captioned" else []
    flags = (f"--config={models / name}.py", f"--workdir={models / name}", *spec)
    assert commands.run("sample", *flags, f"--seed={SEED}", "--num_images=6", f"--output={tmp_path}/x.npz", *words) == 0
    with np.load(tmp_path / "x.npz") as file:
        difference = np.abs(file["images"].astype(int) - first)
    assert difference.max() <= 1 and difference.mean() < 0.01  # a grey level, where rounding decides

    card = json.loads((tmp_path / "file.json").read_text())
    assert (card["sampler"], card["num_steps"], card["step"], card["run"]) == (
        sampler, num_steps, 8, run_hash(experiment.config)
    )  # fmt: skip
    assert card["nfe"] == evaluation.num_evaluations(experiment, SamplerSpec(sampler, num_steps))
    assert card["sha256"] == hashlib.sha256(content).hexdigest() and card["bytes"] == len(content)
    assert card["parameter_bytes"] < len(content) < card["parameter_bytes"] + 400_000
    for aval, said in zip(program.in_avals, card["inputs"].values(), strict=True):
        assert [str(size) for size in aval.shape] == [str(size) for size in said["shape"]]
        assert aval.dtype.name == said["dtype"]
    assert list(program.platforms) == card["platforms"] == ["cpu", "cuda", "tpu"]


def test_the_program_of_the_page_needs_nothing_of_ours(models, tmp_path):
    """Executed where neither this package nor a library of networks can be imported."""
    (program,) = re.findall(r"```python\n(import jax.export\n.*?)```", PROGRAM.read_text(), re.DOTALL)
    assert len([line for line in program.splitlines() if line]) <= 10
    export(models, "student", tmp_path / "digits_cd4.stablehlo")
    without = "import sys\nfor name in ('mscm', 'flax', 'optax', 'orbax', 'ml_collections'): sys.modules[name] = None\n"
    ended = subprocess.run([sys.executable, "-c", without + program], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    flags = (f"--config={models / 'student.py'}", f"--workdir={models / 'student'}", f"--output={tmp_path / 'x.npz'}")
    assert commands.run("sample", *flags, "--num_images=20") == 0
    with np.load(tmp_path / "images.npz") as got, np.load(tmp_path / "x.npz") as expected:
        assert got["images"].shape == (20, 8, 8, 1)
        assert np.abs(got["images"].astype(int) - expected["images"]).max() <= 1


def test_what_it_needs_is_said(models, tmp_path, capfd, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == "flatbuffers" else found(name, *of)
    )
    flags = (f"--config={models / 'teacher.py'}", f"--workdir={models / 'teacher'}", f"--output={tmp_path / 'x'}")
    assert "got no package flatbuffers, expected it" in commands.refusal(capfd, "export", *flags)
    assert not (tmp_path / "x").exists()
