"""Inception features: images per second of mscm and of PyTorch, the same weights and images, turn by turn.

  python -m benchmarks.inception_features

From the repository's root, because the other network is in the tests; needs .[benchmark] and .[dev]. Both resize
32 x 32 images to 299 and give pool3, spatial features and logits in float32; the PyTorch network is in evaluation mode,
with PyTorch's own order of axes, as pytorch-fid runs it, and with channels last, which is faster on a CPU. Checked
first: mscm's features are those of the independent implementation, and with pytorch-fid's resize (half pixels) in place
of TensorFlow's those of what is timed.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from mscm.metrics import inception
from mscm.report.table import format_table
from tests.metrics import torch_reference

BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images at a time.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each; the table has medians.", lower_bound=1)


def main(_: list[str]) -> None:
    """Checks, measures, prints."""
    reference = torch_reference.random_network(0)
    params = inception.from_torch({name: tensor.numpy() for name, tensor in reference.state_dict().items()})
    network = inception.network(params, fingerprint="random")
    network = dataclasses.replace(network, batch_size=BATCH_SIZE.value)
    images = np.random.RandomState(0).randint(0, 256, (BATCH_SIZE.value, 32, 32, 3)).astype(np.uint8)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def with_torch(model: torch.nn.Module, memory_format: torch.memory_format) -> Callable[[], list[np.ndarray]]:
        model = model.to(device, memory_format=memory_format)

        def run() -> list[np.ndarray]:
            with torch.inference_mode():
                x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
                x = torch.nn.functional.interpolate(x, (inception.SIZE,) * 2, mode="bilinear", align_corners=False)
                x = x.contiguous(memory_format=memory_format)
                return [part.cpu().numpy() for part in model((x - 128.0) / 128.0)]

        return run

    runs = {
        "mscm": lambda: network(images),
        "PyTorch": with_torch(torch_reference.random_network(0), torch.contiguous_format),
        "PyTorch, channels last": with_torch(torch_reference.random_network(0), torch.channels_last),
    }
    _assert_equal(network(images).features[:2], torch_reference.features(reference, images[:2])["pool3"])
    with mock.patch.object(inception, "resize", _half_pixels):
        at_half_pixels = inception.network(params, fingerprint="random")(images).features
    for name in ("PyTorch", "PyTorch, channels last"):
        _assert_equal(at_half_pixels, runs[name]()[0])
    seconds = {name: [] for name in runs}
    for turn in range(ROUNDS.value + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - started)
    print(f"{jax.devices()[0].device_kind}, {device}, batch {BATCH_SIZE.value}, medians of {ROUNDS.value}")
    rows = [
        [
            name,
            f"{BATCH_SIZE.value / statistics.median(times):.1f}",
            f"{statistics.median(t / ours for t, ours in zip(times, seconds['mscm'], strict=True)):.2f}",
        ]
        for name, times in seconds.items()
    ]
    print(format_table(["library", "images/s", "mscm is so many times as fast"], rows))


def _assert_equal(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def _half_pixels(images: jax.Array) -> jax.Array:
    """To 299 x 299 as PyTorch does."""
    size = (len(images), inception.SIZE, inception.SIZE, 3)
    return jax.image.resize(images.astype(jnp.float32), size, "bilinear", precision=jax.lax.Precision.HIGHEST)


if __name__ == "__main__":
    app.run(main)
