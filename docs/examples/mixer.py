"""MLP-Mixer (arXiv:2105.01601) with the noise level and the label as scales and shifts: a network without attention.

Patches are tokens. A block mixes the tokens of each channel by one MLP, then the channels of each token by another.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mscm.config import ConfigError, Section
from mscm.experiment import MODELS, DataSpec
from mscm.models import layers
from mscm.models.placement import place
from mscm.types import Images, Labels, Times

Output = Float[Array, "b h w c_out"]


class Mixer(nn.Module):
    """Raw network output, float32, exactly 0 at initialisation; of a fixed resolution."""

    out_channels: int
    num_classes: int  # label `num_classes` is the null class of classifier-free guidance
    patch_size: int
    width: int
    num_blocks: int
    emb_dim: int
    logsnr_input: str  # one of layers.LOGSNR_INPUTS
    guidance_input: bool = False  # every network has this field: whether the weight of guidance is an input

    @nn.compact
    def __call__(
        self, z: Images, logsnr: Times, labels: Labels | None = None, guidance: Times | None = None, *, train: bool
    ) -> Output:
        """Raw output (x, eps or v is the caller's reading) for z at log-SNR `logsnr`."""
        del train  # nothing drops out
        layers.check_guidance(guidance, self.guidance_input)
        embed = layers.ConditionEmbedding(self.emb_dim, self.num_classes, self.logsnr_input, name="condition")
        emb = nn.swish(embed(logsnr, labels, guidance))
        patches = layers.space_to_depth(z, self.patch_size)
        b, h, w, c = patches.shape
        x = self._dense(self.width, "patches", ("conv_in", "embed"))(patches.reshape(b, h * w, c))
        for i in range(self.num_blocks):
            x = self._block(x, emb, f"block_{i}")
        x = layers.layer_norm("embed", dtype=jnp.float32, name="norm_out")(x)
        x = self._dense(c // z.shape[-1] * self.out_channels, "out", ("embed", "conv_out"), zero=True)(x)
        return layers.depth_to_space(x.reshape(b, h, w, -1), self.patch_size)

    def _block(self, x: layers.Tokens, emb: layers.Embedding, name: str) -> layers.Tokens:
        film = self._dense(2 * self.width, f"{name}_film", ("cond", "mlp"))(emb)
        scale, shift = jnp.split(film[:, None, :], 2, axis=-1)
        y = layers.layer_norm("embed", dtype=jnp.float32, name=f"{name}_norm_tokens")(x) * (1 + scale) + shift
        y = self._mlp(y.swapaxes(1, 2), f"{name}_tokens", "tokens").swapaxes(1, 2)
        x = place(x + y, "batch", None, None)
        y = layers.layer_norm("embed", dtype=jnp.float32, name=f"{name}_norm_channels")(x)
        return place(x + self._mlp(y, f"{name}_channels", "embed"), "batch", None, None)

    def _mlp(self, x: layers.Tokens, name: str, axis: str) -> layers.Tokens:
        """On the last axis, whose logical name `axis` is; what has no rule in training/partition.py is not cut."""
        size = x.shape[-1]
        y = nn.gelu(self._dense(4 * size, f"{name}_in", (axis, "mlp"))(x))
        return self._dense(size, f"{name}_out", ("mlp", axis))(y)

    def _dense(self, features: int, name: str, axes: tuple[str, str], *, zero: bool = False) -> nn.Dense:
        return layers.dense(features, axes, dtype=jnp.float32, name=name, zero=zero)


def build(section: Section, data: DataSpec) -> Mixer:
    """What `config.model` says."""
    if data.text is not None:
        raise ConfigError("config.data.text: got one, expected none: config.model 'mixer' reads no captions")
    return Mixer(
        out_channels=data.channels,
        num_classes=data.num_classes,
        logsnr_input=section.choose("logsnr_input", tuple(layers.LOGSNR_INPUTS)),
        guidance_input=bool(section.take("guidance_input")),
        **{key: section.number(key, minimum=1) for key in ("patch_size", "width", "num_blocks", "emb_dim")},
    )


MODELS["mixer"] = build
