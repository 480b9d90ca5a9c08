"""Independent reference of the FID Inception network and of the metrics on its features: a helper module of tests.

Written from the description of the network and of the metrics alone, in PyTorch, NumPy and SciPy, by explicit formulas
and without a look at `mscm.metrics`. A number of `mscm` is compared with a number from here, so nothing here may import
mscm or jax, and nothing here aims at speed. The module imports without torch; only its network then is unusable, and a
test of the network starts with `pytest.importorskip("torch")`.

    network = random_network(0).double()  # float64, to tell a bug from rounding
    got = features(network, images)  # uint8 n h w c -> {"pool3", "spatial", "logits", "logits_unbiased"}
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import scipy.linalg
import scipy.special

try:
    import torch
    from torch.nn import Module
    from torch.nn import functional as F
except ImportError:
    torch, Module = None, object

SIZE = 299
NUM_FEATURES = 2048
NUM_LOGITS = 1008
# The spatial features of sFID are these many first channels of a 17 x 17 map.
NUM_SPATIAL_CHANNELS = 7
# Keeps the second moment of a ReLU's output through one layer of `random_network`: 1 / (1/2 - 1/(2 pi)) of variance.
KERNEL_GAIN = 1.71

Size = int | tuple[int, int]


# Images


def tf1_resize(images: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Bilinear resize of TensorFlow 1: uint8 `n h w c` to float64 `n size size c`, still 0 to 255.

    Output i reads the input at i * (in / out): corners not aligned, no half-pixel centres, no antialias.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"got {images.dtype} of shape {images.shape}, expected uint8 of shape n h w c")
    _, height, width, _ = images.shape
    lower, upper, part = _neighbours(height, size)
    rows = images[:, lower] * (1 - part[:, None, None]) + images[:, upper] * part[:, None, None]
    lower, upper, part = _neighbours(width, size)
    return rows[:, :, lower] * (1 - part[:, None]) + rows[:, :, upper] * part[:, None]


def _neighbours(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper input index of each output index, and the weight of the upper; the floor is exact."""
    position = np.arange(size_out) * size_in
    lower = position // size_out
    return lower, np.minimum(lower + 1, size_in - 1), (position - lower * size_out) / size_out


# Network: parameter names are those of torchvision's inception_v3, hence of pytorch-fid's weights file.


class ConvBatchNormRelu(Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel: Size, *, stride: int = 1, pad: Size = 0):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels_in, channels_out, kernel, stride, pad, bias=False)
        self.bn = torch.nn.BatchNorm2d(channels_out, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


# Kernel sizes and the padding that keeps the map's size.
_3x3 = {"kernel": 3, "pad": 1}
_5x5 = {"kernel": 5, "pad": 2}
_1x3, _3x1 = {"kernel": (1, 3), "pad": (0, 1)}, {"kernel": (3, 1), "pad": (1, 0)}
_1x7, _7x1 = {"kernel": (1, 7), "pad": (0, 3)}, {"kernel": (7, 1), "pad": (3, 0)}


def _average_pool(x: torch.Tensor) -> torch.Tensor:
    """Mean over the pixels of the 3 x 3 window that lie inside the map."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Block35(Module):
    """Mixed_5b to 5d, at 35 x 35."""

    def __init__(self, channels: int, pool_channels: int):
        super().__init__()
        self.branch1x1 = ConvBatchNormRelu(channels, 64, 1)
        self.branch5x5_1 = ConvBatchNormRelu(channels, 48, 1)
        self.branch5x5_2 = ConvBatchNormRelu(48, 64, **_5x5)
        self.branch3x3dbl_1 = ConvBatchNormRelu(channels, 64, 1)
        self.branch3x3dbl_2 = ConvBatchNormRelu(64, 96, **_3x3)
        self.branch3x3dbl_3 = ConvBatchNormRelu(96, 96, **_3x3)
        self.branch_pool = ConvBatchNormRelu(channels, pool_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.branch1x1(x)
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([one, five, double, self.branch_pool(_average_pool(x))], 1)


class Reduction17(Module):
    """Mixed_6a: 35 x 35 to 17 x 17."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3 = ConvBatchNormRelu(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBatchNormRelu(channels, 64, 1)
        self.branch3x3dbl_2 = ConvBatchNormRelu(64, 96, **_3x3)
        self.branch3x3dbl_3 = ConvBatchNormRelu(96, 96, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class Block17(Module):
    """Mixed_6b to 6e, at 17 x 17."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.branch1x1 = ConvBatchNormRelu(channels, 192, 1)
        self.branch7x7_1 = ConvBatchNormRelu(channels, inner, 1)
        self.branch7x7_2 = ConvBatchNormRelu(inner, inner, **_1x7)
        self.branch7x7_3 = ConvBatchNormRelu(inner, 192, **_7x1)
        self.branch7x7dbl_1 = ConvBatchNormRelu(channels, inner, 1)
        self.branch7x7dbl_2 = ConvBatchNormRelu(inner, inner, **_7x1)
        self.branch7x7dbl_3 = ConvBatchNormRelu(inner, inner, **_1x7)
        self.branch7x7dbl_4 = ConvBatchNormRelu(inner, inner, **_7x1)
        self.branch7x7dbl_5 = ConvBatchNormRelu(inner, 192, **_1x7)
        self.branch_pool = ConvBatchNormRelu(channels, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average_pool(x))], 1)


class Reduction8(Module):
    """Mixed_7a: 17 x 17 to 8 x 8."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3_1 = ConvBatchNormRelu(channels, 192, 1)
        self.branch3x3_2 = ConvBatchNormRelu(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBatchNormRelu(channels, 192, 1)
        self.branch7x7x3_2 = ConvBatchNormRelu(192, 192, **_1x7)
        self.branch7x7x3_3 = ConvBatchNormRelu(192, 192, **_7x1)
        self.branch7x7x3_4 = ConvBatchNormRelu(192, 192, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class Block8(Module):
    """Mixed_7b and 7c, at 8 x 8."""

    def __init__(self, channels: int, pool: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvBatchNormRelu(channels, 320, 1)
        self.branch3x3_1 = ConvBatchNormRelu(channels, 384, 1)
        self.branch3x3_2a = ConvBatchNormRelu(384, 384, **_1x3)
        self.branch3x3_2b = ConvBatchNormRelu(384, 384, **_3x1)
        self.branch3x3dbl_1 = ConvBatchNormRelu(channels, 448, 1)
        self.branch3x3dbl_2 = ConvBatchNormRelu(448, 384, **_3x3)
        self.branch3x3dbl_3a = ConvBatchNormRelu(384, 384, **_1x3)
        self.branch3x3dbl_3b = ConvBatchNormRelu(384, 384, **_3x1)
        self.branch_pool = ConvBatchNormRelu(channels, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3_1(x)
        three = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        double = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *three, *double, self.branch_pool(self.pool(x))], 1)


def _max_pool(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class FidInception(Module):
    """Inception network of FID, of 2015-12-05: 94 convolutions, 1008 logits, no auxiliary head.

    Unlike torchvision's inception_v3, its average pools leave the padding out, Mixed_7c's pool is a max pool, and
    the logits are more.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBatchNormRelu(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBatchNormRelu(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBatchNormRelu(32, 64, **_3x3)
        self.Conv2d_3b_1x1 = ConvBatchNormRelu(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBatchNormRelu(80, 192, 3)
        self.Mixed_5b = Block35(192, 32)
        self.Mixed_5c = Block35(256, 64)
        self.Mixed_5d = Block35(288, 64)
        self.Mixed_6a = Reduction17(288)
        self.Mixed_6b = Block17(768, 128)
        self.Mixed_6c = Block17(768, 160)
        self.Mixed_6d = Block17(768, 160)
        self.Mixed_6e = Block17(768, 192)
        self.Mixed_7a = Reduction8(768)
        self.Mixed_7b = Block8(1280, _average_pool)
        self.Mixed_7c = Block8(2048, _max_pool)
        self.fc = torch.nn.Linear(NUM_FEATURES, NUM_LOGITS)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From (pixels - 128) / 128, `n 3 299 299`: pool3 `n 2048`, spatial `n 2023`, logits with bias `n 1008`."""
        if x.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"got shape {tuple(x.shape)}, expected n 3 {SIZE} {SIZE}")
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :NUM_SPATIAL_CHANNELS]
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pool3 = x.mean((2, 3))
        # TensorFlow's order, row by row and channels last.
        return pool3, spatial.permute(0, 2, 3, 1).flatten(1), self.fc(pool3)

    def unbiased_logits(self, pool3: torch.Tensor) -> torch.Tensor:
        """Logits without the bias, from which OpenAI's evaluator computes the Inception score."""
        return pool3 @ self.fc.weight.T


def random_network(seed: int) -> FidInception:
    """Network in eval mode, float32, whose every parameter is random and matters, at a sane scale at every depth.

    The sum of every output channel's kernel is zero. Otherwise what all images have in common, the positive mean of
    a ReLU, grows with the depth over what tells them apart.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor, mean: float, std: float) -> torch.Tensor:
        return mean + std * torch.randn(like.shape, generator=generator)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    # The layers' own initial values would advance the caller's generator.
    with torch.random.fork_rng(devices=[]):
        network = FidInception().eval()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):
                kernel = normal(layer.weight, 0, KERNEL_GAIN / layer.weight[0].numel() ** 0.5)
                layer.weight.copy_(kernel - kernel.mean((1, 2, 3), keepdim=True))
            elif isinstance(layer, torch.nn.BatchNorm2d):
                layer.weight.copy_(uniform(layer.weight, 0.6, 1.4))
                layer.bias.copy_(normal(layer.bias, 0, 0.3))
                layer.running_mean.copy_(normal(layer.running_mean, 0, 0.3))
                layer.running_var.copy_(uniform(layer.running_var, 0.5, 2))
        network.fc.weight.copy_(normal(network.fc.weight, 0, 2 / NUM_FEATURES**0.5))
        network.fc.bias.copy_(normal(network.fc.bias, 0, 1))
    return network


def features(network: FidInception, images: np.ndarray, batch_size: int = 16) -> dict[str, np.ndarray]:
    """Features of uint8 images `n h w c`, grey (c = 1) or RGB, of any size, in the network's dtype.

    Keys: `pool3` `n 2048`, `spatial` `n 2023`, `logits` and `logits_unbiased` `n 1008`.
    """
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    batches = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            pixels = (tf1_resize(images[start : start + batch_size]) - 128) / 128
            x = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(network.fc.weight.dtype)
            pool3, spatial, logits = network(x)
            batches.append((pool3, spatial, logits, network.unbiased_logits(pool3)))
    names = ("pool3", "spatial", "logits", "logits_unbiased")
    return {name: torch.cat(parts).numpy() for name, parts in zip(names, zip(*batches, strict=True), strict=True)}


# Metrics, all in float64


def frechet(mu1: np.ndarray, s1: np.ndarray, mu2: np.ndarray, s2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians, by the general square root of the covariances' product."""
    mu1, s1, mu2, s2 = (np.asarray(a, np.float64) for a in (mu1, s1, mu2, s2))
    root = _square_root(s1 @ s2)
    if not np.isfinite(root).all():
        jitter = 1e-6 * np.eye(len(s1))
        root = _square_root((s1 + jitter) @ (s2 + jitter))
    if np.abs(np.diagonal(root).imag).max() >= 1e-3:
        raise ValueError(f"the square root's diagonal has imaginary part {np.abs(np.diagonal(root).imag).max()}")
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real)


def _square_root(product: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        # Of a singular matrix, which may have no root; a product of two covariances has one.
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)
        return scipy.linalg.sqrtm(product)


def inception_score(logits_unbiased: np.ndarray, split_size: int = 5000) -> float:
    """Mean over the splits of exp(mean KL(p(y|x) || p(y))); the last split may be shorter."""
    log_p = scipy.special.log_softmax(np.asarray(logits_unbiased, np.float64), axis=1)
    scores = []
    for start in range(0, len(log_p), split_size):
        part = log_p[start : start + split_size]
        log_marginal = scipy.special.logsumexp(part, axis=0) - np.log(len(part))
        scores.append(np.exp(np.mean(np.sum(np.exp(part) * (part - log_marginal), axis=1))))
    return float(np.mean(scores))


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall, by every distance; a ball is closed and reaches the k-th neighbour but itself."""
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    across = _squared_distances(real, fake)
    precision = np.mean(np.any(across <= _squared_radii(real, k)[:, None], axis=0))
    recall = np.mean(np.any(across <= _squared_radii(fake, k)[None, :], axis=1))
    return float(precision), float(recall)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """From each row of x to each of y, from differences: nothing cancels, and equal rows are at exactly zero."""
    return np.stack([np.sum((row - y) ** 2, axis=1) for row in x])


def _squared_radii(x: np.ndarray, k: int) -> np.ndarray:
    squared = _squared_distances(x, x)
    np.fill_diagonal(squared, np.inf)
    return np.sort(squared, axis=1)[:, k - 1]


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 over all the rows given (KID without subsets)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    (m, d), n = x.shape, len(y)
    within_x, within_y, across = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within_x = (within_x.sum() - np.trace(within_x)) / (m * (m - 1))
    within_y = (within_y.sum() - np.trace(within_y)) / (n * (n - 1))
    return float(within_x + within_y - 2 * across.mean())
