"""Family: class-conditional ImageNet at 64 and 128 pixels, with the numbers of the paper (arXiv:2403.06807v3).

What that paper leaves to "follow simple diffusion" (optimiser, EMA, the teacher's length) is from arXiv:2301.11093, its
U-ViT. The variant '' is the paper's small model, 'large' has twice the channels. Heads are 128 channels wide, to fill a
TPU's lanes, which makes 8 of them at width 1024; simple diffusion has 4 at the width of its own middle.
"""

from ml_collections import ConfigDict

from configs import base

_CHANNEL_MULTIPLIER = {"": 1, "large": 2}

# Levels of the U-ViT by their side in pixels, outermost first: kind and channels of the small model. A model starts at
# its own resolution; what follows the last level is the middle.
_LEVELS = {128: ("residual", 128), 64: ("residual", 256), 32: ("transformer", 512)}
_MIDDLE_SIDE = 16
_MIDDLE_CHANNELS = 1024

# Dropout by (resolution, variant): the rate, and the largest side in pixels whose blocks have it.
_DROPOUT = {(64, ""): (0.2, 16), (64, "large"): (0.1, 32), (128, ""): (0.1, 16), (128, "large"): (0.1, 64)}


def _check(*, resolution: int, variant: str) -> None:
    if variant not in _CHANNEL_MULTIPLIER:
        choices = ", ".join(repr(name) for name in _CHANNEL_MULTIPLIER)
        raise ValueError(f"unknown variant of the ImageNet configs: got {variant!r}, expected one of {choices}")
    if (resolution, variant) not in _DROPOUT:
        choices = ", ".join(str(side) for side in sorted({side for side, _ in _DROPOUT}))
        raise ValueError(f"unknown resolution of the ImageNet configs: got {resolution}, expected one of {choices}")


def _model(*, resolution: int, variant: str) -> dict:
    rate, largest_side = _DROPOUT[resolution, variant]

    def level(side: int, channels: int, num_blocks: int) -> dict:
        dropout = rate if side <= largest_side else 0.0
        return dict(width=channels * _CHANNEL_MULTIPLIER[variant], num_blocks=num_blocks, dropout=dropout)

    levels = [(side, kind, channels) for side, (kind, channels) in _LEVELS.items() if side <= resolution]
    return dict(
        stages={f"stage_{i}": dict(kind=kind, **level(side, width, 3)) for i, (side, kind, width) in enumerate(levels)},
        middle=level(_MIDDLE_SIDE, _MIDDLE_CHANNELS, 16),
        emb_dim=1024,
        head_dim=128,
        dtype="bfloat16",
        scan_blocks=True,
        remat="dots",
    )


def _base(*, resolution: int, variant: str) -> ConfigDict:
    _check(resolution=resolution, variant=variant)
    return base.with_shared(
        # A path must be given: a directory made by python -m mscm.prepare.
        data=dict(
            name=f"imagenet{resolution}",
            resolution=resolution,
            channels=3,
            num_classes=1000,
            flip=True,
        ),
        model=_model(resolution=resolution, variant=variant),
        schedule=dict(name="interpolated", resolution=resolution, noise_low=32, noise_high=resolution),
        optimizer=dict(learning_rate=1e-4, warmup_steps=10_000, decay="constant"),
        ema=dict(decay=0.9999, warmup=False),
        train=dict(
            num_steps=200_000, batch_size=2048, steps_per_dispatch=1, log_every_steps=100, save_every_steps=5000
        ),
        # The state of a layer lies on eight chips, which gather it: sixty-four would exchange more than they compute.
        mesh=dict(fsdp=8),
        # 512 is what the paper's Table 1 quotes for the teacher.
        # A pod is for training: python -m mscm.eval scores its checkpoints elsewhere.
        eval=dict(
            num_images=50_000,
            batch_size=1024,
            teacher_steps=(1, 2, 4, 8, 64, 256, 512),
            network="inception",
            at_end=False,
        ),
    )


def _multiscale(resolution: int) -> tuple[int, ...] | None:
    # The paper pools the residual once, by 2x2, above 64 pixels.
    return (resolution, resolution // 2) if resolution > 64 else None


def teacher(*, resolution: int, variant: str) -> ConfigDict:
    """The diffusion model that the students start from."""
    config = _base(resolution=resolution, variant=variant)
    config.train.num_steps = 500_000
    config = base.teacher(
        config, family=f"imagenet{resolution}", variant=variant, multiscale=_multiscale(resolution)
    )
    # The paper samples its diffusion models with guidance at this size only, and says neither weight nor dropout.
    config.objective.label_dropout = 0.1 if resolution == 128 else 0.0
    return config


def student(*, resolution: int, student_steps: int, distil: bool, variant: str) -> ConfigDict:
    """CD or CT with `student_steps` steps."""
    return base.student(
        _base(resolution=resolution, variant=variant),
        family=f"imagenet{resolution}",
        student_steps=student_steps,
        distil=distil,
        teacher_steps=dict(start=64.0, end=1280.0, anneal_steps=100_000),
        variant=variant,
        multiscale=_multiscale(resolution),
    )


def improved_consistency_training(*, resolution: int, variant: str) -> ConfigDict:
    """iCT with the settings of arXiv:2310.14189 for 64 pixels, on this family's network."""
    config = base.improved_consistency_training(
        _base(resolution=resolution, variant=variant),
        family=f"imagenet{resolution}",
        run="ict",
        start=10,
        end=1280,
        samplers=("consistency", "consistency:sigmas=1.526"),
        variant=variant,
    )
    config.optimizer.update(dict(warmup_steps=0))
    config.ema.decay = 0.99997
    config.train.update(dict(num_steps=800_000, batch_size=4096))
    return config


def progressive(*, resolution: int, variant: str) -> ConfigDict:
    """PD of the family's teacher, with the phases of arXiv:2202.00512."""
    config = _base(resolution=resolution, variant=variant)
    config.train.num_steps = 100_000
    return base.progressive(
        config,
        family=f"imagenet{resolution}",
        phase_steps=(1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1),
        num_steps_before=(*(50_000 for _ in range(8)), 100_000),
        variant=variant,
        multiscale=_multiscale(resolution),
    )
