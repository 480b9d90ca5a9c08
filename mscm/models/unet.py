"""The U-Nets of EDM (arXiv:2206.00364): DDPM++ and NCSN++ of arXiv:2011.13456, and ADM of arXiv:2105.05233.

What EDM's published networks are: their weights fit parameter by parameter (`mscm/teachers.py`). From the outside in:

    z -> 3x3 conv -> [blocks] -> [block with down -> blocks] per further level          every output is a skip
      -> two blocks, the first with attention -> [blocks] -> [block with up -> blocks] per level, mirrored
      -> norm, swish, 3x3 conv

Up-path blocks see what comes from below and one skip, last first, concatenated; there is one more of them in a level
than on the way down. A block is

  (1) h = conv(swish(norm(x)))                  resampled before the convolution where the block changes the resolution
  (2) h = conv(dropout(swish(norm(h) (1 + scale) + shift)))      ADM: scale and shift from the embedding
      h = conv(dropout(swish(norm(h + shift))))                  DDPM++, NCSN++
  (3) h = c (h + skip(x)),  with attention  h = c (h + attention(norm(h)));  c = 1 for ADM, else sqrt(1/2)

Resolutions change by a filter in each direction with zeros around the image: [1, 1] is the mean of 2 x 2 pixels and
their repetition, [1, 3, 3, 1] NCSN++'s. NCSN++ also carries the image down beside the blocks and adds it in ("aux").
The parameters' names are those of the published files.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mscm.models import attention, layers
from mscm.models.layers import Embedding, Resized
from mscm.models.placement import place
from mscm.models.uvit import Output, remat
from mscm.types import Images, Labels, Times

_INIT = nn.initializers.variance_scaling
_FOURIER_SCALE = 16.0
HEAD_DIM = 64  # of ADM


class Architecture(NamedTuple):
    """What tells the three apart."""

    resample_filter: tuple[int, ...]
    fourier: bool  # random Fourier features of the noise level, not sinusoids
    noise_mult: int  # features of the noise level: so many times `channels`
    has_aux: bool  # the image goes down beside the blocks
    is_adm: bool
    epsilon: float  # of the norms
    block_scale: float  # c of equation (3)
    init: nn.initializers.Initializer
    init_out: nn.initializers.Initializer  # of what a block, or the network, ends with
    init_qkv: nn.initializers.Initializer


_XAVIER = _INIT(1.0, "fan_avg", "uniform")
_DDPMPP = Architecture(
    resample_filter=(1, 1),
    fourier=False,
    noise_mult=1,
    has_aux=False,
    is_adm=False,
    epsilon=1e-6,
    block_scale=math.sqrt(0.5),
    init=_XAVIER,
    init_out=_INIT(1e-10, "fan_avg", "uniform"),
    init_qkv=_INIT(0.2, "fan_avg", "uniform"),
)
_KAIMING = _INIT(1 / 3, "fan_in", "uniform")
ARCHITECTURES = {
    "ddpmpp": _DDPMPP,
    "ncsnpp": _DDPMPP._replace(resample_filter=(1, 3, 3, 1), fourier=True, noise_mult=2, has_aux=True),
    "adm": _DDPMPP._replace(
        is_adm=True, epsilon=1e-5, block_scale=1.0, init=_KAIMING, init_out=nn.initializers.zeros, init_qkv=_KAIMING
    ),
}


def downsample(x: Images, taps: tuple[int, ...], padding: int) -> Resized:
    """Every second sum of neighbours weighted by `taps`, whose sum counts as 1, along height and width."""
    for axis in (1, 2):
        pads = [(0, 0)] * 4
        pads[axis] = (padding, padding)
        padded = jnp.pad(x, pads)
        length = (padded.shape[axis] - len(taps)) // 2 + 1
        parts = (
            tap / sum(taps) * jax.lax.slice_in_dim(padded, i, i + 2 * length - 1, 2, axis)
            for i, tap in enumerate(taps)
        )
        x = functools.reduce(operator.add, parts)
    return x


def upsample(x: Images, taps: tuple[int, ...]) -> Resized:
    """The transpose of `downsample` times 4: each pixel becomes `taps`, whose sum counts as 2, in both directions."""
    padding = (len(taps) - 1) // 2
    for axis in (1, 2):
        size, pads = 2 * x.shape[axis], [(0, 0, 0)] * 4
        pads[axis] = (len(taps) - 1 - padding, 1 + padding, 1)
        spread = jax.lax.pad(x, jnp.zeros((), x.dtype), pads)  # zeros between the pixels and around them
        parts = (
            2 * tap / sum(taps) * jax.lax.slice_in_dim(spread, i, i + size, 1, axis)
            for i, tap in enumerate(reversed(taps))
        )
        x = functools.reduce(operator.add, parts)
    return x


class Block(nn.Module):
    """A block, equations (1) to (3). Consumes the `dropout` key when `train` and `dropout > 0`."""

    architecture: Architecture
    width: int
    num_heads: int  # 0: without attention
    resample: str | None  # "up", "down" or None
    dropout: float
    train: bool
    dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x: Images, emb: Embedding) -> Resized:
        arch = self.architecture
        h = self._norm(x, "norm0")
        h = layers.conv3x3(self.width, dtype=self.dtype, init=arch.init, name="conv0")(self._resampled(nn.swish(h)))
        shape = ("cond", "conv_out")
        count = 2 if arch.is_adm else 1
        affine = layers.dense(count * self.width, shape, dtype=self.dtype, init=arch.init, name="affine")(emb)
        affine = affine[:, None, None, :]
        if arch.is_adm:
            scale, shift = jnp.split(affine, 2, axis=-1)
            h = self._norm(h, "norm1") * (1.0 + scale) + shift
        else:
            h = self._norm(h + affine, "norm1")
        h = nn.Dropout(self.dropout, deterministic=not self.train)(nn.swish(h))
        h = layers.conv3x3(self.width, dtype=self.dtype, init=arch.init_out, name="conv1")(h)
        h = (h + self._skip(x)) * arch.block_scale
        if self.num_heads:
            h = (h + self._attention(h)) * arch.block_scale
        return place(h, "batch", None, None, None)

    def _norm(self, x: Images, name: str) -> Images:
        return layers.group_norm(x.shape[-1], epsilon=self.architecture.epsilon, dtype=self.dtype, name=name)(x)

    def _resampled(self, x: Images) -> Resized:
        taps = self.architecture.resample_filter
        if self.resample == "down":
            return downsample(x, taps, (len(taps) - 1) // 2)
        return upsample(x, taps) if self.resample == "up" else x

    def _skip(self, x: Images) -> Resized:
        has_projection = x.shape[-1] != self.width or (self.resample is not None and not self.architecture.is_adm)
        x = self._resampled(x)
        if not has_projection:
            return x
        shape = ("conv_in", "conv_out")
        return layers.dense(self.width, shape, dtype=self.dtype, init=self.architecture.init, name="skip")(x)

    def _attention(self, x: Images) -> Images:
        b, h, w, c = x.shape
        arch = self.architecture
        y = self._norm(x, "norm2").reshape(b, h * w, c)
        # Head-major, as in the U-ViT.
        qkv = layers.dense(3 * c, ("embed", "heads"), dtype=self.dtype, init=arch.init_qkv, name="qkv")(y)
        qkv = place(qkv, "batch", None, "heads").reshape(b, h * w, self.num_heads, -1)
        implementation = "xla" if self.is_initializing() else self.attention
        y = attention.attend(*jnp.split(qkv, 3, axis=-1), implementation=implementation).reshape(b, h, w, c)
        return layers.dense(c, ("heads", "embed"), dtype=self.dtype, init=arch.init_out, name="proj")(y)


class UNet(nn.Module):
    """DDPM++, NCSN++ or ADM: raw network output, float32.

    `init` returns parameters boxed with logical axis names. Parameters are float32. NCSN++'s random frequencies are
    among them, because checkpoints hold parameters; no gradient reaches them. Of images of any size that fits; where
    attention is depends on it.
    """

    architecture: str  # one of ARCHITECTURES
    out_channels: int
    channels: int
    channel_mult: tuple[int, ...]  # width of each level, as multiples of `channels`, finest first
    num_blocks: int  # of each level
    attention_resolutions: tuple[int, ...]  # sides in pixels of the levels whose blocks have attention
    dropout: float = 0.0
    num_classes: int | None = None  # label `num_classes` is the null class; None: labels are not looked at
    logsnr_input: str = "log_sigma"  # one of layers.LOGSNR_INPUTS; EDM's weights are for this one
    guidance_input: bool = False  # whether the guidance weight is an input, as in guided distillation
    dtype: Any = jnp.float32  # of the computation; the embedding and the output layer stay in float32
    remat_policy: str | None = None  # one of REMAT_POLICIES, for each block; None keeps all activations
    attention: str = "auto"  # one of attention.IMPLEMENTATIONS

    @nn.compact
    def __call__(
        self, z: Images, logsnr: Times, labels: Labels | None = None, guidance: Times | None = None, *, train: bool
    ) -> Output:
        """Raw output (EDM's F) for z, which the caller has scaled by c_in, at log-SNR `logsnr`.

        Consumes the `dropout` key when `train` and there is dropout; the same key gives the same masks.

        Raises:
            ValueError: resolution, widths, names or labels that do not fit the fields; the sentence says which.
        """
        self._check(z, labels)
        layers.check_guidance(guidance, self.guidance_input)
        arch, levels = ARCHITECTURES[self.architecture], list(enumerate(self.channel_mult))
        side, make_block = z.shape[1], functools.partial(self._block, train=train)
        emb = place(self._embedding(logsnr, labels, guidance).astype(self.dtype), "batch", None)

        first = self.channels * (self.channel_mult[0] if arch.is_adm else 1)
        conv = layers.conv3x3(first, dtype=self.dtype, init=arch.init, name=f"enc_{side}x{side}_conv")
        x, aux = conv(z), z
        skips = [x]
        for level, mult in levels:
            res, has_attention = f"enc_{side >> level}x{side >> level}", side >> level in self.attention_resolutions
            if level > 0:
                x = make_block(x.shape[-1], f"{res}_down", resample="down")(x, emb)
                if arch.has_aux:
                    # The convolution sees one more pixel of zeros, and the filter sees none of its own.
                    wide = layers.conv3x3(
                        x.shape[-1], dtype=self.dtype, init=arch.init, padding=2, name=f"{res}_aux_residual"
                    )
                    x = aux = (x + downsample(wide(aux), arch.resample_filter, 0)) * math.sqrt(0.5)
                skips.append(x)
            for i in range(self.num_blocks):
                x = make_block(mult * self.channels, f"{res}_block{i}", has_attention=has_attention)(x, emb)
                skips.append(x)
        for level, mult in reversed(levels):
            res, has_attention = f"dec_{side >> level}x{side >> level}", side >> level in self.attention_resolutions
            if level == len(levels) - 1:
                x = make_block(x.shape[-1], f"{res}_in0", has_attention=True)(x, emb)
                x = make_block(x.shape[-1], f"{res}_in1")(x, emb)
            else:
                x = make_block(x.shape[-1], f"{res}_up", resample="up")(x, emb)
            for i in range(self.num_blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                attends = has_attention and (arch.is_adm or i == self.num_blocks)
                x = make_block(mult * self.channels, f"{res}_block{i}", has_attention=attends)(x, emb)

        x = layers.group_norm(x.shape[-1], epsilon=arch.epsilon, dtype=jnp.float32, name="out_norm")(x)
        return layers.conv3x3(
            self.out_channels, dtype=jnp.float32, init=arch.init_out, name="out_conv"
        )(nn.swish(x))

    def _embedding(self, logsnr: Times, labels: Labels | None, guidance: Times | None) -> Embedding:
        """Of noise level and label, in float32 whatever the network computes in."""
        arch = ARCHITECTURES[self.architecture]
        num_features, features = arch.noise_mult * self.channels, 4 * self.channels
        noise = layers.LOGSNR_INPUTS[self.logsnr_input](logsnr.astype(jnp.float32))

        def dense(features: int, axes: tuple[str, str], name: str, *, use_bias: bool = True) -> nn.Dense:
            return layers.dense(features, axes, dtype=jnp.float32, init=arch.init, use_bias=use_bias, name=name)

        if arch.fourier:
            init: nn.initializers.Initializer = nn.with_logical_partitioning(
                nn.initializers.normal(_FOURIER_SCALE), ("freq",)
            )
            frequencies = jax.lax.stop_gradient(self.param("map_noise_freqs", init, (num_features // 2,)))
            angles = 2 * math.pi * noise[:, None] * frequencies[None, :]
            emb = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        elif arch.is_adm:
            emb = _cosines_first(noise, num_features)
        else:
            emb = layers.sinusoids(noise, num_features)
        one_hot = None if self.num_classes is None else jax.nn.one_hot(labels, self.num_classes)  # of the null class 0
        if one_hot is not None and not arch.is_adm:
            emb += dense(num_features, ("classes", "freq"), "map_label")(math.sqrt(one_hot.shape[-1]) * one_hot)
        emb = nn.swish(dense(features, ("freq", "mlp"), "map_layer0")(emb))
        emb = dense(features, ("mlp", "cond"), "map_layer1")(emb)
        if one_hot is not None and arch.is_adm:
            emb += dense(features, ("classes", "cond"), "map_label", use_bias=False)(one_hot)
        if guidance is not None:
            weights = layers.guidance_features(guidance, num_features)
            emb += layers.dense(features, ("freq", "cond"), dtype=jnp.float32, zero=True, name="guidance")(weights)
        return nn.swish(emb)

    def _block(
        self, width: int, name: str, *, train: bool, has_attention: bool = False, resample: str | None = None
    ) -> Block:
        heads = self._num_heads(width) if has_attention else 0
        block = remat(Block, self.remat_policy, scanned=False)
        return block(
            ARCHITECTURES[self.architecture], width, heads, resample, self.dropout, train, self.dtype, self.attention,
            name=name,
        )

    def _num_heads(self, width: int) -> int:
        return width // HEAD_DIM if ARCHITECTURES[self.architecture].is_adm else 1

    def _check(self, z: Images, labels: Labels | None) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"got architecture {self.architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
        if self.channels < 4 or self.channels % 4:
            raise ValueError(f"got channels={self.channels}, expected a multiple of 4")
        if not self.channel_mult:
            raise ValueError("got no channel_mult, expected a multiple of `channels` for each level")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"got dropout {self.dropout}, expected a rate in [0, 1); 0.0 switches it off")
        layers.check_logsnr_input(self.logsnr_input)
        layers.check_labels_are_given(labels, self.num_classes)
        divisor = 2 ** (len(self.channel_mult) - 1)
        if z.shape[1] != z.shape[2] or z.shape[1] % divisor:
            raise ValueError(f"got images of {z.shape[1]} x {z.shape[2]} pixels, expected squares of a multiple of "
                             f"{divisor}: {len(self.channel_mult)} levels halve the side {len(self.channel_mult) - 1} "
                             "times")
        for level, mult in enumerate(self.channel_mult):
            side, width = z.shape[1] >> level, mult * self.channels
            is_last = level == len(self.channel_mult) - 1
            if (is_last or side in self.attention_resolutions) and self._num_heads(width):
                head_dim = width // self._num_heads(width)
                attention.check(self.attention, num_tokens=side**2, head_dim=head_dim, dtype=self.dtype)


def _cosines_first(x: Times, num_features: int) -> Embedding:
    """Cosines and sines of x at geometric angular frequencies from 1 to almost 1/10000, as ADM has them."""
    half = num_features // 2
    angles = x[:, None] * jnp.exp(jnp.arange(half) * (-math.log(10_000.0) / half))[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
