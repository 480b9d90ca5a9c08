"""The U-ViT of Multistep Consistency Models: convolutions where pixels are many, transformers where they are few.

Blocks of simple diffusion (arXiv:2301.11093) in the configurations of arXiv:2403.06807v3. From the outside in:

    z -> space-to-depth -> 3x3 conv -> [stage -> average pool -> 1x1] per stage -> middle
      -> [1x1 -> nearest x2 -> skips -> stage] per stage, mirrored -> norm, swish, 3x3 conv -> depth-to-space

Skips are summed and scaled by 1/sqrt(2), never concatenated (the published parameter counts decide this). In a residual
stage every block's output is a skip, consumed last first by the up path's blocks. A transformer stage has no skip
inside; its level has one: the down stage's output is added to what comes up from below. The papers do not say whether
it exists and parameter counts cannot tell; without it the down path's work at that level could reach the output only
through the coarser level.
"""

import dataclasses
import math
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mscm.models import attention, layers
from mscm.models.layers import Context, Embedding, Resized
from mscm.models.placement import place
from mscm.models.text import TextEncoder, TextStage
from mscm.types import Condition, Images, Text, Times

Output = Float[Array, "b h w c_out"]

KINDS = ("residual", "transformer")
POSITION_SCALE = 0.01  # simple diffusion's

_Module = TypeVar("_Module", bound=nn.Module)

# What the backward pass may keep of a block's inside; the rest is computed again. None as a policy keeps nothing.
REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blocks of one kind at one resolution: a row's entry in the paper's table of networks, such as `3 Tr 512`.

    Raises:
        ValueError: unknown kind, no blocks, width below 1 or dropout outside [0, 1).
    """

    kind: str  # one of KINDS
    width: int
    num_blocks: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"got stage kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.width < 1 or self.num_blocks < 1:
            raise ValueError(f"got a stage of {self.num_blocks} blocks of width {self.width}, expected at least 1 of "
                             "each: leave a stage out of `stages` to have none")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"got stage dropout {self.dropout}, expected a rate in [0, 1); 0.0 switches it off")


class ResidualStage(nn.Module):
    """Residual blocks in a row; returns the last output and every block's output, the skips of the up path.

    Unrolled: scanning would store each skip a second time, as the carry that the backward pass needs.
    """

    stage: Stage
    remat_policy: str | None
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Images, emb: Embedding, skips: list[Images] | None = None) -> tuple[Images, list[Images]]:
        make_block = remat(layers.ResidualBlock, self.remat_policy, scanned=False)
        outputs = []
        for i in range(self.stage.num_blocks):
            block = make_block(self.stage.width, self.stage.dropout, self.train, self.dtype, name=f"block_{i}")
            x = block(x, emb) if skips is None else block(x, emb, skips[-1 - i])
            outputs.append(x)
        return x, outputs


class TransformerStage(nn.Module):
    """Learned position embedding, then transformer blocks in a row, which attend to a context where there is one.

    With `scan` the blocks are one scanned body, `blocks`, whose parameters have a leading axis `layers`, so that
    compile time does not depend on depth; without it they are `block_0`, `block_1`, ... The function is the same.
    """

    stage: Stage
    head_dim: int
    mlp_ratio: int
    scan: bool
    remat_policy: str | None
    train: bool
    dtype: Any
    attention: str = "auto"
    position_scale: float = POSITION_SCALE

    @nn.compact
    def __call__(self, x: Images, emb: Embedding, context: Context | None = None) -> Images:
        b, h, w, c = x.shape
        init: nn.initializers.Initializer = nn.with_logical_partitioning(
            nn.initializers.normal(self.position_scale), (None, None, "embed")
        )
        x = x + self.param("position", init, (h, w, c)).astype(x.dtype)[None]
        x = x.reshape(b, h * w, c)
        make_block = remat(layers.TransformerBlock, self.remat_policy, scanned=self.scan)
        fields = (c, self.head_dim, self.mlp_ratio, self.stage.dropout, self.train, self.dtype, self.attention)
        if self.scan:
            x, _ = nn.scan(
                lambda block, x, _: (block(x, emb, context), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.stage.num_blocks,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(make_block(*fields, name="blocks"), x, None)
        else:
            for i in range(self.stage.num_blocks):
                x = make_block(*fields, name=f"block_{i}")(x, emb, context)
        return x.reshape(b, h, w, c)


class UViT(nn.Module):
    """The U-ViT: raw network output, float32, exactly 0 at initialisation.

    Multistep Consistency Models, arXiv:2403.06807v3, and simple diffusion, arXiv:2301.11093.

    `init` returns parameters boxed with logical axis names; unbox them with `nn.meta.unbox`. Parameters are float32.
    The resolution is fixed by `init`, through the position embeddings.
    """

    out_channels: int
    stages: tuple[Stage, ...]  # outermost first; each halves the resolution
    middle: Stage  # a transformer
    emb_dim: int = 1024
    num_classes: int | None = None  # label `num_classes` is the null class of classifier-free guidance
    text: TextStage | None = None  # what reads captions, where the condition is one and not a label
    head_dim: int = 128  # heads = width / 128 fills a TPU's lanes; the paper's widths are all multiples
    mlp_ratio: int = 4
    patch_size: int = 1
    logsnr_input: str = "linear"  # one of layers.LOGSNR_INPUTS
    fourier_scale: float | None = None  # of random time features; None: sinusoids
    guidance_input: bool = False  # whether the guidance weight is an input, as in guided distillation
    dtype: Any = jnp.float32  # of the computation; the embedding and the output layer stay in float32
    scan_blocks: bool = True  # False runs small networks faster on a CPU
    remat_policy: str | None = None  # one of REMAT_POLICIES; None keeps all activations
    attention: str = "auto"  # one of attention.IMPLEMENTATIONS
    # Standard deviation of position embeddings at first. What they are added to is about 1, and nearly all noise where
    # a condition says most: a short training learns to place what it says many times faster from 1 than from 0.01.
    position_scale: float = POSITION_SCALE

    @nn.compact
    def __call__(
        self,
        z: Images,
        logsnr: Times,
        condition: Condition | None = None,
        guidance: Times | None = None,
        *,
        train: bool,
    ) -> Output:
        """Raw output (x, eps or v is the caller's reading) for z at log-SNR `logsnr`.

        `condition`: labels where there are classes, a text where that is read, else None.
        `guidance`: the weight w of (1 + w) conditional - w unconditional that a guided student stands for.
        Consumes the `dropout` key when `train` and a stage has dropout; the same key gives the same masks.

        Raises:
            ValueError: resolution, widths, names or labels that do not fit the fields; the sentence says which.
        """
        self._check(z, condition)
        layers.check_guidance(guidance, self.guidance_input)
        labels = None if isinstance(condition, Text) else condition
        embed = layers.ConditionEmbedding(
            self.emb_dim, self.num_classes, self.logsnr_input, self.fourier_scale, name="condition"
        )
        emb, context = embed(logsnr, labels, guidance), None
        if self.text is not None and isinstance(condition, Text):
            context, pooled = TextEncoder(
                self.text, self.emb_dim, self.head_dim, self.mlp_ratio, self.dtype, train, name="text"
            )(condition)
            context, emb = context._replace(tokens=place(context.tokens, "batch", None, None)), emb + pooled
        emb = place(emb.astype(self.dtype), "batch", None)
        levels = (*self.stages, self.middle)

        x = layers.space_to_depth(z, self.patch_size) if self.patch_size > 1 else z
        x = layers.conv3x3(levels[0].width, dtype=self.dtype, name="conv_in")(x)
        skips: list[list[Images]] = []  # of each stage; of one of transformer blocks, its output alone
        for i, stage in enumerate(self.stages):
            if stage.kind == "residual":
                x, outputs = self._residual(stage, f"down_{i}", train)(x, emb)
            else:
                x = self._transformer(stage, f"down_{i}", train)(x, emb, context)
                outputs = [x]
            skips.append(outputs)
            x = self._resize(layers.average_pool(x), levels[i + 1].width, f"down_{i}_out")
        x = self._transformer(self.middle, "middle", train)(x, emb, context)
        for i, stage in reversed(list(enumerate(self.stages))):
            x = layers.upsample(self._resize(x, stage.width, f"up_{i}_in"))
            if stage.kind == "residual":
                x, _ = self._residual(stage, f"up_{i}", train)(x, emb, skips[i])
            else:
                (skip,) = skips[i]
                x = self._transformer(stage, f"up_{i}", train)((x + skip) * math.sqrt(0.5), emb, context)

        # float32 from here: rounding the output to bfloat16 would exceed the losses' differences between two steps.
        x = nn.swish(layers.layer_norm("conv_in", dtype=jnp.float32, name="norm_out")(x))
        channels = self.out_channels * self.patch_size**2
        x = layers.conv3x3(channels, dtype=jnp.float32, name="conv_out", zero=True)(x)
        return layers.depth_to_space(x, self.patch_size) if self.patch_size > 1 else x

    def _resize(self, x: Images, width: int, name: str) -> Resized:
        x = layers.dense(width, ("conv_in", "conv_out"), dtype=self.dtype, name=name)(x)
        return place(x, "batch", None, None, None)

    def _residual(self, stage: Stage, name: str, train: bool) -> ResidualStage:
        return ResidualStage(stage, self.remat_policy, train, self.dtype, name=name)

    def _transformer(self, stage: Stage, name: str, train: bool) -> TransformerStage:
        return TransformerStage(stage, self.head_dim, self.mlp_ratio, self.scan_blocks, self.remat_policy, train,
                                self.dtype, self.attention, self.position_scale, name=name)

    def _check(self, z: Images, condition: Condition | None) -> None:
        if isinstance(condition, Text) != (self.text is not None):
            got, expected = ("a text", "none") if self.text is None else ("no text", "one")
            raise ValueError(f"got {got}, expected {expected} because text={self.text}")
        num_stages, patch_size, head_dim = len(self.stages), self.patch_size, self.head_dim
        if self.middle.kind != "transformer":
            raise ValueError(f"got a middle of kind {self.middle.kind!r}, expected 'transformer': a residual stage "
                             "goes into `stages`")
        for stage in (*self.stages, self.middle):
            if stage.kind == "transformer" and stage.width % head_dim:
                raise ValueError(f"got transformer width {stage.width}, expected a multiple of head_dim={head_dim}: "
                                 "change one of the two")
        divisor = patch_size * 2**num_stages
        if z.shape[1] % divisor or z.shape[2] % divisor:
            raise ValueError(f"got images of {z.shape[1]} x {z.shape[2]} pixels, expected multiples of {divisor} = "
                             f"patch_size {patch_size} * 2 ** {num_stages} stages: use fewer stages, a smaller patch "
                             "or another resolution")
        for i, stage in enumerate((*self.stages, self.middle)):
            if stage.kind == "transformer":
                num_tokens = math.prod(side // (patch_size * 2**i) for side in z.shape[1:3])
                attention.check(self.attention, num_tokens=num_tokens, head_dim=head_dim, dtype=self.dtype)


def remat(block: type[_Module], policy: str | None, *, scanned: bool) -> type[_Module]:
    """A block that keeps of its inside what one of REMAT_POLICIES says; all of it where there is none.

    Raises:
      ValueError: there is no such policy.
    """
    if policy is None:
        return block
    if policy not in REMAT_POLICIES:
        raise ValueError(f"got remat_policy {policy!r}, expected None or one of {', '.join(REMAT_POLICIES)}")
    # Inside a scan nothing can be merged with the forward pass anyway, and the barrier against it would cost time.
    return nn.remat(block, policy=REMAT_POLICIES[policy], prevent_cse=not scanned)
