"""The whole path to a FID against an independent implementation of it, on real images with random weights.

  python -m benchmarks.fid_parity --source=cifar10.zip --num_images=2000

From the repository's root, because the other implementation is in the tests; needs .[benchmark] and .[dev]. Random
weights are written in the form of pytorch-fid's file and converted by mscm.metrics.convert, mscm.metrics.reference
makes the statistics of images of the split train, mscm.eval scores images of the split test against them; PyTorch and
SciPy compute the same from the same images. With the real network's weights these commands give FIDs; these here are
none.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from absl import app, flags
from PIL import Image

from mscm.data import folders, loose
from mscm.report.table import format_table
from tests.metrics import torch_reference

SOURCE = flags.DEFINE_string("source", None, "Zip, tar or folder of 32 x 32 images: SPLIT/CLASS/NAME.", required=True)
NUM_IMAGES = flags.DEFINE_integer("num_images", 2000, "Images of each split, in turn from all classes.", lower_bound=20)


def main(_: list[str]) -> None:
    """Both ways, and the table."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for split in ("train", "test"):
            _copy(split, root / "images")
        network = torch_reference.random_network(0)
        torch.save(network.state_dict(), root / "random.pth")
        config = (
            "--config=configs/cifar10_cd4.py",
            f"--config.data.path={root / 'images'}",
            "--config.eval.network=inception",
            f"--config.eval.weights={root / 'inception.npz'}",
        )
        _command("metrics.convert", f"--source={root / 'random.pth'}", f"--output={root / 'inception.npz'}")
        _command("metrics.reference", *config, f"--output={root / 'reference.npz'}")
        scored = (f"--workdir={root / 'run'}", f"--config.eval.reference={root / 'reference.npz'}")
        _command("eval", *config, *scored, f"--images={root / 'images' / 'test'}")
        (ours,) = [json.loads(line) for line in (root / "run" / "eval" / "images.jsonl").read_text().splitlines()]
        features = {}
        for split in ("train", "test"):
            images = loose.open_images(root / "images" / split, resolution=32, channels=3)
            features[split] = torch_reference.features(network, np.concatenate(list(images.batches(len(images)))))
    theirs = _scores(features["train"], features["test"])
    rows = [
        [metric, f"{ours[metric]:.6g}", f"{value:.6g}", f"{abs(ours[metric] - value) / abs(value):.1e}"]
        for metric, value in theirs.items()
    ]
    print(format_table(["metric, random weights", "mscm", "PyTorch and SciPy", "relative difference"], rows))


def _copy(split: str, directory: Path) -> None:
    """Writes the first images of each class as PNG, in folders as the source has them."""
    files = folders.open_files(SOURCE.value, split=split)
    each = -(-NUM_IMAGES.value // len(files.class_names))
    for label, class_name in enumerate(files.class_names):
        folder = directory / split / class_name
        folder.mkdir(parents=True)
        chosen = [i for i, entry in enumerate(files.entries) if entry.label == label][:each]
        for i in chosen:
            path = folder / Path(files.entries[i].name).name
            path.write_bytes(files.read(i))
            with Image.open(path) as image:
                assert image.size == (32, 32), image.size


def _command(name: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", f"mscm.{name}", *words], check=True, env=os.environ)


def _scores(real: dict[str, np.ndarray], fake: dict[str, np.ndarray]) -> dict[str, float]:
    def frechet(key: str) -> float:
        a, b = (np.asarray(side[key], np.float64) for side in (real, fake))
        return torch_reference.frechet(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))

    precision, recall = torch_reference.precision_recall(real["pool3"], fake["pool3"])
    return {
        "fid": frechet("pool3"),
        "sfid": frechet("spatial"),
        "inception_score": torch_reference.inception_score(fake["logits_unbiased"]),
        "precision": precision,
        "recall": recall,
    }


if __name__ == "__main__":
    app.run(main)
