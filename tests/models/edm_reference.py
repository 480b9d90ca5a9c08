"""EDM's networks, preconditioning and sampler once more, from the published architecture: images are `b c h w`.

Independent of the package: one function a layer, on NumPy arrays in float64 or on PyTorch tensors, with weights by the
names of EDM's `state_dict()`. What a weight is asked for the first time it is drawn at random, so that the evaluation
itself says which tensors a network has.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

SONG = {
    "model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16],
    "embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard", "decoder_type": "standard",
    "resample_filter": [1, 1],
}
ADM = {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [32, 16, 8]}


class Weights(dict):
    """Tensors by name as NumPy arrays, drawn where they are missing."""

    def __init__(self, seed: int):
        super().__init__()
        self._rng = np.random.RandomState(seed)

    def ask(self, name: str, *shape: int, mean: float = 0.0, scale: float | None = None) -> np.ndarray:
        if name not in self:
            scale = 1 / math.sqrt(math.prod(shape[1:])) if scale is None else scale
            self[name] = (mean + scale * self._rng.standard_normal(shape)).astype(np.float32)
        assert self[name].shape == shape, (name, self[name].shape, shape)
        return self[name]


class NumPy:
    """The operations of a network on arrays in float64."""

    @staticmethod
    def tensor(array: Any) -> np.ndarray:
        return np.asarray(array, np.float64)

    @staticmethod
    def cat(parts: list) -> np.ndarray:
        return np.concatenate(parts, axis=1)

    @staticmethod
    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    @staticmethod
    def conv(x: np.ndarray, w: np.ndarray, padding: int) -> np.ndarray:
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(2, 3))
        return np.einsum("bihwkl,oikl->bohw", windows, w, optimize=True)

    @staticmethod
    def down(x: np.ndarray, f: np.ndarray, padding: int) -> np.ndarray:
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        windows = np.lib.stride_tricks.sliding_window_view(x, f.shape, axis=(2, 3))[:, :, ::2, ::2]
        return np.einsum("bchwkl,kl->bchw", windows, f)

    @staticmethod
    def up(x: np.ndarray, f: np.ndarray, padding: int) -> np.ndarray:
        b, c, h, w = x.shape
        out = np.zeros((b, c, 2 * h - 2 + len(f), 2 * w - 2 + len(f)))
        for i in range(h):
            for j in range(w):
                out[:, :, 2 * i : 2 * i + len(f), 2 * j : 2 * j + len(f)] += x[:, :, i, j, None, None] * f
        return out[:, :, padding : out.shape[2] - padding, padding : out.shape[3] - padding]

    @staticmethod
    def group_norm(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
        parts = x.reshape(x.shape[0], groups, -1)
        parts = (parts - parts.mean(-1, keepdims=True)) / np.sqrt(parts.var(-1, keepdims=True) + eps)
        return parts.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]

    @staticmethod
    def softmax(x: np.ndarray) -> np.ndarray:
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    einsum = staticmethod(np.einsum)


def torch_operations(torch: Any) -> Any:
    """The same by PyTorch, in float32."""
    functional = torch.nn.functional

    class Torch:
        silu, einsum = functional.silu, torch.einsum

        @staticmethod
        def tensor(array):
            return torch.as_tensor(np.asarray(array, np.float32))

        @staticmethod
        def cat(parts):
            return torch.cat(parts, dim=1)

        @staticmethod
        def conv(x, w, padding):
            return functional.conv2d(x, w, padding=padding)

        @staticmethod
        def down(x, f, padding):
            f = f.expand(x.shape[1], 1, *f.shape)
            return functional.conv2d(x, f, stride=2, padding=padding, groups=x.shape[1])

        @staticmethod
        def up(x, f, padding):
            f = f.expand(x.shape[1], 1, *f.shape)
            return functional.conv_transpose2d(x, f, stride=2, padding=padding, groups=x.shape[1])

        @staticmethod
        def group_norm(x, groups, weight, bias, eps):
            return functional.group_norm(x, groups, weight, bias, eps)

        @staticmethod
        def softmax(x):
            return x.softmax(-1)

    return Torch


class Network:
    """F of EDM: SongUNet or DhariwalUNet, made with the arguments that EDMPrecond is made with."""

    def __init__(self, weights: Weights, ops: Any, **arguments: Any):
        self.is_adm = arguments["model_type"] == "DhariwalUNet"
        self.a = (ADM if self.is_adm else SONG) | arguments
        self.weights, self.ops = weights, ops
        self.eps = 1e-5 if self.is_adm else 1e-6

    def ask(self, name: str, *shape: int, **how: float) -> Any:
        return self.ops.tensor(self.weights.ask(f"model.{name}", *shape, **how))

    def linear(self, name: str, x: Any, out: int, *, bias: bool = True) -> Any:
        y = x @ self.ask(f"{name}.weight", out, x.shape[1]).T
        return y + self.ask(f"{name}.bias", out, scale=0.1) if bias else y

    def conv(self, name: str, x: Any, out: int, kernel: int, padding: int | None = None) -> Any:
        w = self.ask(f"{name}.weight", out, x.shape[1], kernel, kernel)
        y = self.ops.conv(x, w, kernel // 2 if padding is None else padding)
        return y + self.ask(f"{name}.bias", out, scale=0.1)[None, :, None, None]

    def norm(self, name: str, x: Any) -> Any:
        c = x.shape[1]
        weight, bias = self.ask(f"{name}.weight", c, mean=1.0, scale=0.2), self.ask(f"{name}.bias", c, scale=0.2)
        return self.ops.group_norm(x, min(32, c // 4), weight, bias, self.eps)

    def filter(self, name: str) -> Any:
        """The filter in two dimensions, which the file holds beside each layer that resamples."""
        f = np.array(self.a.get("resample_filter", [1, 1]), np.float32)
        f = np.outer(f, f) / f.sum() ** 2
        self.weights[f"model.{name}.resample_filter"] = f[None, None]
        return self.ops.tensor(f)

    def resampled(self, name: str, x: Any, how: str | None) -> Any:
        if how is None:
            return x
        f = self.filter(name)
        padding = (len(f) - 1) // 2
        return self.ops.down(x, f, padding) if how == "down" else self.ops.up(x, 4 * f, padding)

    def block(self, name: str, x: Any, emb: Any, out: int, how: str | None = None, heads: int = 0) -> Any:
        before, scale = x, 1.0 if self.is_adm else math.sqrt(0.5)
        x = self.resampled(f"{name}.conv0", self.ops.silu(self.norm(f"{name}.norm0", x)), how)
        x = self.conv(f"{name}.conv0", x, out, 3)
        if self.is_adm:
            affine = self.linear(f"{name}.affine", emb, 2 * out)[:, :, None, None]
            x = affine[:, out:] + self.norm(f"{name}.norm1", x) * (affine[:, :out] + 1)
        else:
            x = self.norm(f"{name}.norm1", x + self.linear(f"{name}.affine", emb, out)[:, :, None, None])
        x = self.conv(f"{name}.conv1", self.ops.silu(x), out, 3)
        if before.shape[1] != out or how is not None:
            projected = before.shape[1] != out or not self.is_adm
            before = self.resampled(f"{name}.skip", before, how)
            before = self.conv(f"{name}.skip", before, out, 1) if projected else before
        x = scale * (x + before)
        if heads:
            b, c, h, w = x.shape
            qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x), 3 * c, 1)
            qkv = qkv.reshape(b * heads, c // heads, 3, h * w)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
            logits = self.ops.einsum("ncq,nck->nqk", q, k) / math.sqrt(c // heads)
            y = self.ops.einsum("nqk,nck->ncq", self.ops.softmax(logits), v).reshape(b, c, h, w)
            x = scale * (x + self.conv(f"{name}.proj", y, c, 1))
        return x

    def embedding(self, c_noise: Any, labels: Any) -> Any:
        """`labels`: one row of zeros and ones an image."""
        ops, base = self.ops, self.a["model_channels"]
        features = base * self.a.get("channel_mult_noise", 1)
        half = np.arange(features // 2)
        if self.a.get("embedding_type") == "fourier":
            frequencies = 2 * math.pi * self.ask("map_noise.freqs", features // 2, scale=16.0)
        else:
            frequencies = ops.tensor(1e-4 ** (half / (len(half) - (0 if self.is_adm else 1))))
        angles = ops.tensor(c_noise)[:, None] * frequencies[None, :]
        sin_cos = [ops.tensor(np.sin(np.asarray(angles))), ops.tensor(np.cos(np.asarray(angles)))]
        emb = ops.cat(sin_cos[::-1] if self.is_adm else sin_cos)
        classes = self.a["label_dim"]
        if self.a.get("augment_dim"):  # it is not asked
            self.ask("map_augment.weight", features, self.a["augment_dim"])
        if self.is_adm:
            emb = self.linear("map_layer1", ops.silu(self.linear("map_layer0", emb, 4 * base)), 4 * base)
            if classes:
                emb = emb + self.linear("map_label", ops.tensor(labels), 4 * base, bias=False)
            return ops.silu(emb)
        if classes:
            emb = emb + self.linear("map_label", ops.tensor(labels) * math.sqrt(classes), features)
        emb = ops.silu(self.linear("map_layer0", emb, 4 * base))
        return ops.silu(self.linear("map_layer1", emb, 4 * base))

    def __call__(self, x: Any, c_noise: np.ndarray, labels: np.ndarray | None) -> Any:
        a, base, ops = self.a, self.a["model_channels"], self.ops
        emb, levels = self.embedding(c_noise, labels), list(enumerate(a["channel_mult"]))

        def heads(width: int) -> int:
            return width // 64 if self.is_adm else 1

        aux, skips = x, []
        for level, mult in levels:
            side = a["img_resolution"] >> level
            name, attends = f"enc.{side}x{side}", side in a["attn_resolutions"]
            if level == 0:
                x = self.conv(f"{name}_conv", x, base * mult if self.is_adm else base, 3)
            else:
                x = self.block(f"{name}_down", x, emb, x.shape[1], "down")
                if a.get("encoder_type") == "residual":
                    aux = self.conv(f"{name}_aux_residual", aux, x.shape[1], 3, padding=2)
                    # The bias comes after the filter, which does not change a constant.
                    aux = (x + ops.down(aux, self.filter(f"{name}_aux_residual"), 0)) / math.sqrt(2)
                    x = aux
            skips.append(x)
            for i in range(a["num_blocks"]):
                x = self.block(f"{name}_block{i}", x, emb, base * mult, heads=attends * heads(base * mult))
                skips.append(x)
        for level, mult in levels[::-1]:
            side = a["img_resolution"] >> level
            name, attends, width = f"dec.{side}x{side}", side in a["attn_resolutions"], base * mult
            if level == len(levels) - 1:
                x = self.block(f"{name}_in0", x, emb, x.shape[1], heads=heads(x.shape[1]))
                x = self.block(f"{name}_in1", x, emb, x.shape[1])
            else:
                x = self.block(f"{name}_up", x, emb, x.shape[1], "up")
            for i in range(a["num_blocks"] + 1):
                x = ops.cat([x, skips.pop()])
                has = attends and (self.is_adm or i == a["num_blocks"])
                x = self.block(f"{name}_block{i}", x, emb, width, heads=has * heads(width))
        first, last = ("out_norm", "out_conv") if self.is_adm else (f"{name}_aux_norm", f"{name}_aux_conv")
        return self.conv(last, ops.silu(self.norm(first, x)), a["img_channels"], 3)


def denoised(network: Network, x: Any, sigma: np.ndarray, labels: np.ndarray | None) -> Any:
    """D(x; sigma) of EDM, arXiv:2206.00364, Table 1, with sigma_data = 1/2; `sigma` one an image."""
    ops, sigma = network.ops, np.asarray(sigma, np.float64)
    c_skip, c_out, c_in = (
        ops.tensor(c)[:, None, None, None]
        for c in (0.25 / (sigma**2 + 0.25), 0.5 * sigma / np.sqrt(sigma**2 + 0.25), 1 / np.sqrt(sigma**2 + 0.25))
    )
    return c_skip * x + c_out * network(c_in * x, np.log(sigma) / 4, labels)


def heun_states(denoise: Callable[[Any, np.ndarray], Any], noise: Any, num_steps: int) -> list[Any]:
    """The states of Algorithm 1 of arXiv:2206.00364 after each step, on the levels from 80 to 0.002, rho = 7, and 0."""
    ramp = np.arange(num_steps) / (num_steps - 1)
    sigmas = [*(80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, 0.0]
    x, states, b = sigmas[0] * noise, [], len(noise)
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - denoise(x, np.full(b, now))) / now
        euler = x + (then - now) * slope
        if then > 0:
            slope = 0.5 * (slope + (euler - denoise(euler, np.full(b, then))) / then)
        x = x + (then - now) * slope
        states.append(x)
    return states
