"""The commands beside the metrics, each in a process of its own: what they print, and one sentence for a mistake."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mscm import failures
from mscm.metrics import dinov2, files, reference_statistics, weights
from tests import commands
from tests.commands import refusal

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "--config=configs/digits_cd4.py"


def command(name, *flags, code=0):
    """What `python -m mscm.metrics.NAME` prints, of a failure with its sentence."""
    words = [sys.executable, "-m", f"mscm.metrics.{name}", *map(str, flags)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def small_dinov2(tmp_path_factory):
    """A converted file of a network of two blocks."""
    path = tmp_path_factory.mktemp("weights") / "dinov2.npz"
    flat = files.flat(dinov2.random_params(0))
    sha256 = files.fingerprint(flat)
    rows = dinov2.network(dinov2.random_params(0), fingerprint=sha256)(weights.probe_images()).features
    card = {"kind": "mscm weights 1", "network": "dinov2", "weights_sha256": sha256}
    files.save(path, {**flat, "probe/features": rows}, card)
    return path


@pytest.mark.parametrize("name", ["convert", "reference", "selfcheck"])
def test_help(name):
    words = [sys.executable, "-m", f"mscm.metrics.{name}", "--help"]
    assert f"python -m mscm.metrics.{name}" in subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout


def test_selfcheck_finds_what_is_known(small_dinov2):
    """Also of weights; where their outputs are not those of the conversion, it says so and fails."""
    printed = command("selfcheck", "--network=dinov2", f"--weights={small_dinov2}")
    assert printed.count("| yes") == 9 and "| no" not in printed
    arrays, card = files.load(small_dinov2)
    arrays["probe/features"] = arrays["probe/features"] * 1.01
    files.save(small_dinov2.with_name("drifted.npz"), arrays, card)
    said = command("selfcheck", "--network=dinov2", f"--weights={small_dinov2.with_name('drifted.npz')}", code=1)
    assert "1 of 9 checks failed" in said and said.count("| no") == 1


def test_a_reference_is_computed_or_imported(tmp_path, capfd):
    """Of a split of its own; an imported one needs the count that its file does not hold."""
    computed, imported = tmp_path / "computed.npz", tmp_path / "imported.npz"
    printed = command("reference", CONFIG, "--config.eval.reference_split=half_a", f"--output={computed}")
    assert "digits/half_a, 899 images, features of classifier" in printed
    reference = reference_statistics.load(computed)
    assert reference.data["split"] == "half_a" and reference.statistics.features.count == 899
    mean, cov = reference.statistics.features.mean, reference.statistics.features.cov
    np.savez(tmp_path / "theirs.npz", mu=mean, sigma=cov)
    flags = [CONFIG, f"--import={tmp_path / 'theirs.npz'}", f"--output={imported}"]
    assert "--count: got none" in refusal(capfd, "metrics.reference", *flags)
    assert "digits/all, 1797 images, from theirs.npz" in command("reference", *flags, "--count=1797")
    np.testing.assert_array_equal(reference_statistics.load(imported).statistics.features.cov, cov)


def test_what_cannot_be_written_is_named(tmp_path, capfd):
    """The file itself, also where it is another than --output."""
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "x.npz"
    said = refusal(capfd, "metrics.reference", CONFIG, f"--output={output}")
    assert f"error: --output: got '{output}', expected a file to write to" in said
    weights_file = tmp_path / "x.pth"
    weights_file.touch()
    said = refusal(capfd, "metrics.convert", f"--source={weights_file}")
    assert f"error: --source: {weights_file}: got" in said


def test_a_reference_on_a_full_disk_has_the_exit_code_of_one(tmp_path, capfd, monkeypatch):
    def save(path, reference):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(reference_statistics, "save", save)
    code = commands.run("metrics.reference", CONFIG, "--config.eval.network=pixels", f"--output={tmp_path / 'x.npz'}")
    assert code == failures.EX_CANTCREAT and "x.npz: got no room" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "flags", "sentence"),
    [
        ("convert", ["--source=README.md", "--network=inceptoin"], "--network: got 'inceptoin', expected one"),
        ("convert", ["--source=absent.pth"], "--source: absent.pth: expected a file of weights"),
        ("convert", ["--source=README.md", "--output=x.npz"], "--source: README.md: got"),
        ("convert", [], "--source must have a value"),
        ("reference", [CONFIG, "--output=x.npz", "--import=README.md", "--count=9"], "README.md: got a file that"),
        ("reference", [CONFIG, "--output=x.npz", "--config.eval.network=dinov2"], "got no weights of the network"),
        ("reference", [CONFIG, "--output=x.npz", "--config.eval.reference_split=b"], "split of 'digits': got 'b'"),
        ("reference", [CONFIG, "--output=x.npz", "--count=9"], "--count: got 9, expected it with --import only"),
        ("reference", [CONFIG, "--output=x.npz", "--transform=area"], "--transform: got area, expected it with"),
        ("reference", [CONFIG, "--output=abfs://x.npz"], "expected a local path, or one that begins with gs://"),
        ("selfcheck", ["--weights=x.npz"], "expected it with --network only"),
        ("selfcheck", ["--network=dinov2"], "dinov2_vitl14_pretrain.pth of the DINOv2 project"),
        ("selfcheck", ["--network=vgg"], "--network: got 'vgg', expected one of inception, dinov2"),
    ],
)
def test_a_mistake_is_one_sentence(name, flags, sentence, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [flag.replace("x.npz", str(tmp_path / "x.npz")) for flag in flags]
    assert sentence in refusal(capfd, f"metrics.{name}", *flags)
    assert not (tmp_path / "x.npz").exists()
