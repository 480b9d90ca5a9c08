"""Family: text to image at 512 pixels, with the numbers of the paper (arXiv:2403.06807v3) for the third of its results.

Captions are read once by a frozen T5 XXL, when the data is prepared. The network's levels are the paper's widths behind
patches of 4 x 4 pixels: without any it would need 2.7 times the peak of the paper's chips at the paper's rate. The
variant '' has the guidance weight 0.5, 'high' 3. The rest is simple diffusion's, arXiv:2301.11093.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base

_GUIDANCE = {"": 0.5, "high": 3.0}
_SAMPLER = "ancestral:variance=large,clip=static"  # simple diffusion's, for text to image
_SCALES = (512, 256, 128, 64, 32)


def _base() -> ConfigDict:
    def level(width: int, num_blocks: int, dropout: float = 0.0) -> dict:
        return dict(width=width, num_blocks=num_blocks, dropout=dropout)

    return base.with_shared(
        # A path must be given: a directory made by python -m mscm.prepare, with captions.
        data=dict(
            name="t2i512",
            resolution=512,
            channels=3,
            num_classes=1,
            flip=False,  # captions know left from right
            text=dict(encoder="t5-v1_1-xxl", length=128, features=4096),
        ),
        model=dict(
            stages=dict(
                stage_0=dict(kind="residual", **level(128, 3)),
                stage_1=dict(kind="residual", **level(256, 3)),
                stage_2=dict(kind="residual", **level(1024, 3)),
                stage_3=dict(kind="transformer", **level(2048, 3)),
            ),
            middle=level(4096, 16, dropout=0.1),
            text=dict(width=2048, num_blocks=0),
            emb_dim=1024,
            head_dim=128,
            patch_size=4,
            dtype="bfloat16",
            scan_blocks=True,
            remat="dots",
        ),
        schedule=dict(name="interpolated", resolution=512, noise_low=32, noise_high=512),
        optimizer=dict(learning_rate=1e-4, warmup_steps=10_000, decay="constant"),
        ema=dict(decay=0.9999, warmup=False),
        train=dict(
            num_steps=30_000, batch_size=2048, steps_per_dispatch=1, log_every_steps=100, save_every_steps=1000
        ),
        mesh=dict(fsdp=32),
        eval=dict(
            num_images=30_000,
            batch_size=256,
            labels="captions",
            alignment="clip",
            alignment_weights=placeholder(str),  # a directory such as that of openai/clip-vit-base-patch32
            teacher_samplers=(_SAMPLER,),
            teacher_steps=(256,),
            network="inception",
            at_end=False,
        ),
    )


def teacher() -> ConfigDict:
    """The diffusion model that the students start from; it can be guided."""
    config = base.teacher(_base(), family="t2i512", multiscale=_SCALES)
    config.objective.label_dropout = 0.1
    config.eval.teacher_samplers = tuple(f"{_SAMPLER},guidance={weight}" for weight in _GUIDANCE.values())
    config.train.num_steps = 700_000
    return config


def student(*, student_steps: int, variant: str) -> ConfigDict:
    """CD of the guided teacher with `student_steps` steps; with 256 of them only its guidance is distilled."""
    if variant not in _GUIDANCE:
        choices = ", ".join(repr(name) for name in _GUIDANCE)
        raise ValueError(f"unknown variant of the text-to-image configs: got {variant!r}, expected one of {choices}")
    config = base.student(
        _base(),
        family="t2i512",
        student_steps=student_steps,
        distil=True,
        teacher_steps=dict(start=256.0, end=256.0, anneal_steps=0),
        multiscale=_SCALES,
    )
    config.name = f"t2i512_cd{student_steps}" + (f"_{variant}" if variant else "")
    config.objective.huber_epsilon = 1.0
    config.teacher.guidance = _GUIDANCE[variant]
    return config
