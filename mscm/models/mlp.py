"""A multilayer perceptron on flattened images, for data of a few scalars; called as the U-ViT is."""

import flax.linen as nn
import jax.numpy as jnp

from mscm.models import layers
from mscm.models.placement import place
from mscm.models.uvit import Output
from mscm.types import Images, Labels, Times


class MLP(nn.Module):
    """Residual blocks with FiLM on their hidden layer: raw network output, float32, exactly 0 at initialisation.

    Without norms: of one scalar a norm would keep the sign alone. `init` returns parameters boxed with logical axis
    names. Of a fixed resolution.
    """

    out_channels: int
    width: int
    num_blocks: int
    emb_dim: int
    num_classes: int | None = None  # label `num_classes` is the null class of classifier-free guidance
    mlp_ratio: int = 4
    logsnr_input: str = "linear"  # one of layers.LOGSNR_INPUTS
    guidance_input: bool = False  # whether the guidance weight is an input, as in guided distillation

    @nn.compact
    def __call__(
        self, z: Images, logsnr: Times, labels: Labels | None = None, guidance: Times | None = None, *, train: bool
    ) -> Output:
        """Raw output (x, eps or v is the caller's reading) for z at log-SNR `logsnr`; `train` changes nothing.

        Raises:
            ValueError: as `layers.ConditionEmbedding` and `layers.check_guidance`.
        """
        del train
        layers.check_guidance(guidance, self.guidance_input)
        condition = layers.ConditionEmbedding(self.emb_dim, self.num_classes, self.logsnr_input, name="condition")
        emb = nn.swish(place(condition(logsnr, labels, guidance), "batch", None))
        b, h, w, _ = z.shape
        x = _dense(self.width, ("conv_in", "embed"), "in")(z.reshape(b, -1))
        hidden = self.mlp_ratio * self.width
        for i in range(self.num_blocks):
            y = _dense(hidden, ("embed", "mlp"), f"block_{i}_in")(nn.swish(x))
            scale, shift = jnp.split(_dense(2 * hidden, ("cond", "mlp"), f"block_{i}_film")(emb), 2, axis=-1)
            y = nn.swish(place(y * (1.0 + scale) + shift, "batch", "mlp"))
            x = place(x + _dense(self.width, ("mlp", "embed"), f"block_{i}_out")(y), "batch", None)
        x = _dense(h * w * self.out_channels, ("embed", "conv_out"), "out", zero=True)(nn.swish(x))
        return x.reshape(b, h, w, self.out_channels)


def _dense(features: int, axes: tuple[str, str], name: str, *, zero: bool = False) -> nn.Dense:
    return layers.dense(features, axes, dtype=jnp.float32, name=name, zero=zero)
