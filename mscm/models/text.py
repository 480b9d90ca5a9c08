"""Captions in a network: from tokens to the vectors that an image attends to, and to one vector for the whole.

    bytes       UTF-8, read by transformer blocks that are trained with the network
    embeddings  what a frozen encoder has made of a caption: projected, nothing else

Before the tokens stands one more, learned: it is all that there is of the null caption, so that no attention is over
nothing.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mscm.models import layers
from mscm.models.layers import Context, Embedding
from mscm.types import Text

KINDS = ("bytes", "embeddings")
_NUM_BYTES = 256


@dataclasses.dataclass(frozen=True)
class TextStage:
    """What reads captions.

    Raises:
      ValueError: an unknown kind, or sizes that no text has.
    """

    kind: str  # one of KINDS
    length: int  # tokens of a caption, at most
    width: int  # of the vectors that are attended to
    num_blocks: int  # that read bytes

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"got text of kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        if min(self.length, self.width) < 1:
            raise ValueError(f"got texts of {self.length} tokens and width {self.width}, expected at least 1 of each")
        if (self.num_blocks > 0) != (self.kind == "bytes"):
            expected = "at least 1" if self.kind == "bytes" else "0: their encoder has read them"
            raise ValueError(f"got {self.num_blocks} blocks that read {self.kind}, expected {expected}")


class TextEncoder(nn.Module):
    """Vectors of a caption's tokens, and one of all of them to add to the embedding of the noise level.

    The latter in float32, as that embedding is.

    Raises:
      ValueError: tokens of another kind or length, or a width that the heads do not divide.
    """

    stage: TextStage
    emb_dim: int
    head_dim: int
    mlp_ratio: int
    dtype: Any
    train: bool

    @nn.compact
    def __call__(self, text: Text) -> tuple[Context, Embedding]:
        self._check(text)
        stage, dtype = self.stage, self.dtype
        if stage.kind == "bytes":
            init = nn.with_logical_partitioning(nn.linear.default_embed_init, (None, "embed"))
            x = nn.Embed(_NUM_BYTES, stage.width, dtype=dtype, embedding_init=init, name="bytes")(text.tokens)
            # As large as the bytes': where they stand tells words apart.
            x += self._vectors("position", stage.length, stage.width**-0.5).astype(dtype)
        else:
            x = layers.dense(stage.width, ("embed", "conv_out"), dtype=dtype, name="embeddings")(text.tokens)
        b = x.shape[0]
        start = jnp.broadcast_to(self._vectors("start", 1, 1.0).astype(dtype), (b, 1, stage.width))
        x = jnp.concatenate([start, x], axis=1)
        mask = jnp.concatenate([jnp.ones((b, 1), bool), text.mask], axis=1)
        for i in range(stage.num_blocks):
            block = layers.TransformerBlock(
                stage.width, self.head_dim, self.mlp_ratio, 0.0, self.train, dtype, name=f"block_{i}"
            )
            x = block(x, None, mask=mask)
        x = layers.rms_norm("embed", dtype=dtype, name="norm")(x)
        # Over the root of their number: in a mean, what one word of a long caption says would be lost.
        weights = mask / jnp.sqrt(jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.float32))
        whole = jnp.einsum("bnc,bn->bc", x.astype(jnp.float32), weights)
        pooled = layers.dense(self.emb_dim, ("embed", "cond"), dtype=jnp.float32, name="pooled")(whole)
        return Context(x, mask), pooled

    def _vectors(self, name: str, count: int, scale: float) -> layers.Tokens:
        init: nn.initializers.Initializer = nn.with_logical_partitioning(nn.initializers.normal(scale), (None, "embed"))
        return self.param(name, init, (count, self.stage.width))[None]

    def _check(self, text: Text) -> None:
        stage, is_bytes = self.stage, jnp.issubdtype(text.tokens.dtype, jnp.integer)
        if is_bytes != (stage.kind == "bytes") or text.mask.shape[1] != stage.length:
            raise ValueError(
                f"got {text.mask.shape[1]} tokens of type {text.tokens.dtype}, expected {stage.length} "
                f"{'bytes' if stage.kind == 'bytes' else 'embeddings'}"
            )
        if stage.kind == "bytes" and stage.width % self.head_dim:
            raise ValueError(
                f"got a text of width {stage.width}, expected a multiple of head_dim={self.head_dim}: change one of "
                "the two"
            )
