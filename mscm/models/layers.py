"""Layers of the U-ViT: one class per block of the pseudo-code of simple diffusion (arXiv:2301.11093).

What that paper leaves open is chosen here:

- `Normalize` is RMSNorm, `NormalizeWithBias` is LayerNorm over the channels of one pixel, query and key are normalised
  by LayerNorm over the head dimension. The key's norm has no bias: it would add one number to all logits of a query,
  which softmax ignores, so its gradient would be zero.
- In a transformer block the MLP comes before the attention.
- Every kernel carries logical axis names: `embed` (width), `mlp` (hidden), `heads` (all heads' channels), `kv`
  (channels of one head), `conv_in`, `conv_out`, `freq` (sinusoids), `cond` (conditioning vector), `classes`, and
  `layers` on scanned blocks. Which mesh axis each one maps to is `training/partition.py`'s business.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mscm.models.attention import attend
from mscm.models.placement import device_kind, place
from mscm.types import Images, Labels, Times

Embedding = Float[Array, "b e"]
Resized = Float[Array, "b h_new w_new c_new"]
Tokens = Float[Array, "b n c"]


def logsnr_linear(logsnr: Times) -> Times:
    """(logsnr + 10) / 20: [-10, 10] becomes [0, 1].

    The U-ViT's 'linear' time input.
    """
    return (logsnr + 10.0) / 20.0


def logsnr_inv_cos(logsnr: Times) -> Times:
    """atan(exp(-clip(logsnr, -20, 20) / 2)) / (pi / 2) in [0, 1]: the time of an unshifted cosine schedule.

    Time input of the progressive distillation code.
    """
    return jnp.arctan(jnp.exp(-0.5 * jnp.clip(logsnr, -20.0, 20.0))) / (0.5 * math.pi)


def logsnr_log_sigma(logsnr: Times) -> Times:
    """log(sigma / alpha) / 4 = -logsnr / 8.

    EDM's c_noise, arXiv:2206.00364.
    """
    return -0.125 * logsnr


LOGSNR_INPUTS = {"linear": logsnr_linear, "inv_cos": logsnr_inv_cos, "log_sigma": logsnr_log_sigma}


def fourier_features(x: Times, num_features: int, scale: float) -> Embedding:
    """Sines and cosines of 2 pi f x at frequencies f ~ N(0, scale^2) that are drawn once and never trained.

    Time features of NCSN++; improved consistency training (arXiv:2310.14189) takes a scale of 0.02 instead of 16, so
    that neighbouring noise levels stay close.
    """
    frequencies = scale * jax.random.normal(jax.random.key(0), (num_features // 2,))
    angles = 2 * math.pi * x[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def sinusoids(x: Times, num_features: int) -> Embedding:
    """Sines and cosines of x at geometric angular frequencies from 1 to 1/10000.

    Transformer position encoding with maximum period 10000, as in the progressive distillation code.
    """
    half = num_features // 2
    frequencies = jnp.exp(jnp.arange(half) * (-math.log(10_000.0) / (half - 1)))
    angles = x[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def space_to_depth(x: Images, patch_size: int) -> Resized:
    """Moves every patch_size x patch_size patch into the channels; `depth_to_space` is its inverse."""
    b, h, w, c = x.shape
    p = patch_size
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // p, w // p, p * p * c)


def depth_to_space(x: Images, patch_size: int) -> Resized:
    """Unfolds the channels into patch_size x patch_size pixels; the inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    p = patch_size
    x = x.reshape(b, h, w, p, p, c // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * p, w * p, c // (p * p))


def average_pool(x: Images) -> Resized:
    """Mean of every 2 x 2 pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def upsample(x: Images) -> Resized:
    """Nearest-neighbour enlargement by 2."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def _kernel_init(
    axes: tuple[str | None, ...], zero: bool, init: nn.initializers.Initializer | None
) -> nn.initializers.Initializer:
    init = init or (nn.initializers.zeros if zero else nn.initializers.lecun_normal())
    return nn.with_logical_partitioning(init, axes)


def _vector_init(init: nn.initializers.Initializer, axis: str) -> nn.initializers.Initializer:
    return nn.with_logical_partitioning(init, (axis,))


def _product(x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
    """A Dense layer's product; on CPUs of x as one matrix, because the kernel's gradient then takes half the time.

    Not elsewhere: on a TPU it would cost copies, a tenth more traffic in `imagenet64_cd8`.
    """
    if device_kind() != "cpu":
        return jax.lax.dot_general(x, kernel, dimensions, **options)
    rows = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def dense(
    features: int,
    axes: tuple[str, str],
    *,
    dtype: Any,
    name: str,
    zero: bool = False,
    init: nn.initializers.Initializer | None = None,
    use_bias: bool = True,
) -> nn.Dense:
    """A Dense layer whose kernel carries the logical axes (input, output); on images it is the 1 x 1 convolution.

    `init` of the kernel; None: zeros with `zero`, else LeCun's.
    """
    return nn.Dense(features, dtype=dtype, kernel_init=_kernel_init(axes, zero, init), dot_general=_product,
                    use_bias=use_bias, bias_init=_vector_init(nn.initializers.zeros, axes[1]), name=name)


def _convolution(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **options: Any
) -> jax.Array:
    """A Conv layer's convolution; on CPUs with gradients that are written as convolutions of images by kernels.

    Those that JAX makes have their axes in another order, which XLA's CPU backend puts right outside of loops only:
    inside, a kernel's gradient takes 30 times as long. `jax.jvp` does not go through them.
    """
    if device_kind() != "cpu":
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    return _convolution_on_cpus(x, kernel, padding[0][0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution_on_cpus(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _convolution_forward(x: jax.Array, kernel: jax.Array, padding: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _convolution_on_cpus(x, kernel, padding), (x, kernel)


def _convolution_backward(padding: int, kept: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    by_x = _convolution_on_cpus(g, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), kernel.shape[0] - 1 - padding)
    # Channels are the images of this convolution, and examples their channels.
    by_kernel = _convolution_on_cpus(jnp.swapaxes(x, 0, 3), jnp.moveaxis(g, 0, 2), padding)
    return by_x, jnp.moveaxis(by_kernel, 0, 2)


_convolution_on_cpus.defvjp(_convolution_forward, _convolution_backward)


def conv3x3(
    features: int,
    *,
    dtype: Any,
    name: str,
    zero: bool = False,
    init: nn.initializers.Initializer | None = None,
    padding: int = 1,
) -> nn.Conv:
    """A 3 x 3 convolution with zeros on `padding` pixels around the image; `init` as of `dense`."""
    axes = (None, None, "conv_in", "conv_out")
    return nn.Conv(features, (3, 3), dtype=dtype, padding=padding, kernel_init=_kernel_init(axes, zero, init),
                   bias_init=_vector_init(nn.initializers.zeros, "conv_out"), conv_general_dilated=_convolution,
                   name=name)


def rms_norm(axis: str, *, dtype: Any, name: str) -> nn.RMSNorm:
    """The paper's `Normalize`: a norm over channels with a learned scale and no bias."""
    return nn.RMSNorm(dtype=dtype, scale_init=_vector_init(nn.initializers.ones, axis), name=name)


def layer_norm(axis: str, *, dtype: Any, name: str, use_bias: bool = True) -> nn.LayerNorm:
    """The paper's `NormalizeWithBias`: a norm over the channels of each pixel with a learned scale and bias."""
    return nn.LayerNorm(dtype=dtype, use_bias=use_bias, scale_init=_vector_init(nn.initializers.ones, axis),
                        bias_init=_vector_init(nn.initializers.zeros, axis), name=name)


def group_norm(channels: int, *, epsilon: float, dtype: Any, name: str) -> nn.GroupNorm:
    """GroupNorm over the pixels and 32 groups of channels, fewer where a group would have less than four."""
    return nn.GroupNorm(min(32, channels // 4), epsilon=epsilon, dtype=dtype, use_fast_variance=False,
                        scale_init=_vector_init(nn.initializers.ones, "conv_in"),
                        bias_init=_vector_init(nn.initializers.zeros, "conv_in"), name=name)


class ConditionEmbedding(nn.Module):
    """Embedding of the noise level, of the label where there are classes, and of the guidance where it is an input.

    Computed in float32 whatever the network computes in: neighbouring teacher steps differ by less than bfloat16's
    resolution, and the cost is one vector per example.

    Raises:
      ValueError: fields or labels that do not fit; the sentence says which, by the names that a model gives them.
    """

    features: int
    num_classes: int | None
    logsnr_input: str
    fourier_scale: float | None = None  # None: sinusoids

    @nn.compact
    def __call__(self, logsnr: Times, labels: Labels | None, guidance: Times | None = None) -> Embedding:
        self._check(labels)
        time = LOGSNR_INPUTS[self.logsnr_input](logsnr.astype(jnp.float32))
        if self.fourier_scale is None:
            emb = sinusoids(1000.0 * time, self.features)
        else:
            emb = fourier_features(time, self.features, self.fourier_scale)
        emb = dense(self.features, ("freq", "mlp"), dtype=jnp.float32, name="time_in")(emb)
        emb = dense(self.features, ("mlp", "cond"), dtype=jnp.float32, name="time_out")(nn.swish(emb))
        if self.num_classes is not None:
            init = nn.with_logical_partitioning(nn.linear.default_embed_init, ("classes", "cond"))
            emb += nn.Embed(self.num_classes + 1, self.features, embedding_init=init, name="classes")(labels)
        if guidance is not None:
            features = guidance_features(guidance, self.features)
            emb += dense(self.features, ("freq", "cond"), dtype=jnp.float32, name="guidance", zero=True)(features)
        return emb

    def _check(self, labels: Labels | None) -> None:
        if self.features < 4 or self.features % 2:
            raise ValueError(f"got emb_dim={self.features}, expected an even number from 4: half of the time features "
                             "are sines, half cosines")
        check_logsnr_input(self.logsnr_input)
        if self.fourier_scale is not None and not self.fourier_scale > 0:
            raise ValueError(f"got fourier_scale={self.fourier_scale}, expected a number above 0, or None for "
                             "sinusoids")
        check_labels_are_given(labels, self.num_classes)
        if labels is not None and self.num_classes is None:
            raise ValueError("got labels, expected None because num_classes=None: set num_classes or drop the labels")


def check_logsnr_input(name: str) -> None:
    """Refuses with a ValueError what is not one of LOGSNR_INPUTS."""
    if name not in LOGSNR_INPUTS:
        raise ValueError(f"got logsnr_input {name!r}, expected one of {', '.join(LOGSNR_INPUTS)}")


def check_labels_are_given(labels: Labels | None, num_classes: int | None) -> None:
    """Refuses with a ValueError that a network of classes is asked without one."""
    if labels is None and num_classes is not None:
        raise ValueError(f"got no labels, expected one per example in [0, {num_classes}] because num_classes="
                         f"{num_classes}: pass {num_classes}, the null class, for unconditional output")


def guidance_features(guidance: Times, num_features: int) -> Embedding:
    """Sinusoids of a weight of guidance, after [0, infinity) has become [0, 1).

    For a layer that is zero at first, so that a teacher's weights are still its function.
    """
    return sinusoids(1000.0 * jnp.arctan(guidance) / (0.5 * math.pi), num_features)


def check_guidance(guidance: Times | None, guidance_input: bool) -> None:
    """Raises ValueError where weights of guidance are given to a network without that input, or the other way round."""
    if (guidance is not None) != guidance_input:
        got = "no guidance" if guidance is None else "a guidance"
        raise ValueError(f"got {got}, expected the opposite because guidance_input={guidance_input}")


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with FiLM between them; a U-Net skip is summed in, scaled by 1/sqrt(2).

    Consumes the `dropout` key when `train` and `dropout > 0`.
    """

    width: int
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Images, emb: Embedding, skip: Images | None = None) -> Images:
        h = layer_norm("conv_in", dtype=self.dtype, name="norm_in")(x)
        if skip is not None:
            h = (h + layer_norm("conv_in", dtype=self.dtype, name="norm_skip")(skip)) * math.sqrt(0.5)
        h = conv3x3(self.width, dtype=self.dtype, name="conv_in")(nn.swish(h))
        film = dense(2 * self.width, ("cond", "conv_out"), dtype=self.dtype, name="film")(emb)
        scale, shift = jnp.split(film[:, None, None, :], 2, axis=-1)
        h = layer_norm("conv_in", dtype=self.dtype, name="norm_film")(h) * (1.0 + scale) + shift
        h = nn.Dropout(self.dropout, deterministic=not self.train)(nn.swish(h))
        h = x + conv3x3(self.width, dtype=self.dtype, name="conv_out", zero=True)(h)
        return place(h, "batch", None, None, None)


class Context(NamedTuple):
    """Vectors that an image attends to beside itself: those of a text."""

    tokens: Float[Array, "b m k"]
    mask: Bool[Array, "b m"]  # which of them are there: at least one


class TransformerBlock(nn.Module):
    """An MLP with FiLM on its hidden layer, then self-attention, then attention to a context; all residual.

    Without a noise level there is no FiLM, without a context no attention to it; a `mask` says which of the tokens
    themselves are there. Consumes the `dropout` key when `train` and `dropout > 0`.
    """

    width: int
    head_dim: int
    mlp_ratio: int
    dropout: float
    train: bool
    dtype: Any
    attention: str = "auto"  # one of attention.IMPLEMENTATIONS

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        emb: Embedding | None,
        context: Context | None = None,
        mask: Bool[Array, "b n"] | None = None,
    ) -> Tokens:
        x = place(x + self._mlp(x, emb), "batch", None, None)
        x = place(x + self._attention(x, mask), "batch", None, None)
        return x if context is None else place(x + self._attention_to(context, x), "batch", None, None)

    def _mlp(self, x: Tokens, emb: Embedding | None) -> Tokens:
        hidden = self.mlp_ratio * self.width
        h = rms_norm("embed", dtype=self.dtype, name="norm_mlp")(x)
        h = place(dense(hidden, ("embed", "mlp"), dtype=self.dtype, name="mlp_in")(h), "batch", None, "mlp")
        h = nn.swish(h)
        if emb is not None:
            film = dense(2 * hidden, ("cond", "mlp"), dtype=self.dtype, name="film")(emb)
            scale, shift = jnp.split(film[:, None, :], 2, axis=-1)
            h = h * (1.0 + scale) + shift
        h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
        return dense(self.width, ("mlp", "embed"), dtype=self.dtype, name="mlp_out", zero=True)(h)

    def _attention(self, x: Tokens, mask: Bool[Array, "b n"] | None) -> Tokens:
        b, n, _ = x.shape
        h = rms_norm("embed", dtype=self.dtype, name="norm_attention")(x)
        # One product for all three, head-major: a tensor-parallel shard then holds q, k and v of whole heads.
        qkv = place(dense(3 * self.width, ("embed", "heads"), dtype=self.dtype, name="qkv")(h), "batch", None, "heads")
        q, k, v = jnp.split(qkv.reshape(b, n, -1, 3 * self.head_dim), 3, axis=-1)
        q, k = self._normalised(q, k, "")
        # Nothing reads what is computed at initialisation, whose one example may be on no mesh or on a whole one.
        implementation = "xla" if self.is_initializing() else self.attention
        h = attend(q, k, v, implementation=implementation, mask=mask).reshape(b, n, self.width)
        return dense(self.width, ("heads", "embed"), dtype=self.dtype, name="attention_out", zero=True)(h)

    def _attention_to(self, context: Context, x: Tokens) -> Tokens:
        b, n, _ = x.shape
        h = rms_norm("embed", dtype=self.dtype, name="norm_cross")(x)
        q = place(dense(self.width, ("embed", "heads"), dtype=self.dtype, name="cross_q")(h), "batch", None, "heads")
        kv = dense(2 * self.width, ("embed", "heads"), dtype=self.dtype, name="cross_kv")(context.tokens)
        kv = place(kv, "batch", None, "heads").reshape(b, -1, self.width // self.head_dim, 2 * self.head_dim)
        k, v = jnp.split(kv, 2, axis=-1)
        q, k = self._normalised(q.reshape(b, n, -1, self.head_dim), k, "cross_")
        h = attend(q, k, v, mask=context.mask).reshape(b, n, self.width)
        return dense(self.width, ("heads", "embed"), dtype=self.dtype, name="cross_out", zero=True)(h)

    def _normalised(self, q: jax.Array, k: jax.Array, prefix: str) -> tuple[jax.Array, jax.Array]:
        q = layer_norm("kv", dtype=self.dtype, name=f"norm_{prefix}q")(q)
        return q, layer_norm("kv", dtype=self.dtype, use_bias=False, name=f"norm_{prefix}k")(k)
