"""Family: class-conditional CIFAR-10 at 32 pixels, sized for hours on one GPU.

The papers of this method have no CIFAR-10 result, so these settings are ours: simple diffusion's U-ViT made small, an
unshifted cosine schedule (32 pixels are its reference), random flips. --config.data.path=PATH reads a folder, an
archive or prepared records instead of TensorFlow Datasets. The variant 'small' is for a look on two CPU cores.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base

# Re-noising of consistency models: the noise at j / S of the family's schedule, S = 2, 4, 8.
_SAMPLERS = (
    "consistency",
    "consistency:sigmas=1.0",
    "consistency:sigmas=2.414/1.0/0.414",
    "consistency:sigmas=5.027/2.414/1.497/1.0/0.668/0.414/0.199",
)


def _base(variant: str) -> ConfigDict:
    if variant not in ("", "small"):
        raise ValueError(f"unknown variant of the CIFAR-10 configs: got {variant!r}, expected one of '', 'small'")
    config = base.with_shared(
        # Worker processes: TFDS hands out PNG files, which take Python's time to decode.
        data=dict(name="cifar10", resolution=32, channels=3, num_classes=10, flip=True, num_workers=4),
        model=dict(
            stages=dict(
                stage_0=dict(kind="residual", width=128, num_blocks=3, dropout=0.0),
                stage_1=dict(kind="residual", width=256, num_blocks=3, dropout=0.1),
            ),
            middle=dict(width=512, num_blocks=8, dropout=0.1),
            emb_dim=512,
            head_dim=64,
            dtype="bfloat16",
            scan_blocks=True,
        ),
        schedule=dict(name="cosine", shift=0.0),
        optimizer=dict(learning_rate=2e-4, warmup_steps=1000, decay="constant"),
        ema=dict(decay=0.9999, warmup=True),
        train=dict(
            num_steps=100_000, batch_size=512, steps_per_dispatch=1, log_every_steps=100, save_every_steps=5000
        ),
        eval=dict(num_images=50_000, batch_size=1000),
    )
    if variant == "small":
        # 4x4 patches and no convolution stages: these would take most of a CPU's time.
        config.model.stages = {}
        config.model.middle.update(dict(width=96, num_blocks=4, dropout=0.0))
        config.model.update(dict(emb_dim=96, head_dim=32, patch_size=4, dtype="float32", scan_blocks=False))
        config.data.num_workers = 0
        config.optimizer.update(dict(learning_rate=2e-3, warmup_steps=100, decay="cosine"))
        config.ema.decay = 0.999
        config.train.update(dict(num_steps=2000, batch_size=32, save_every_steps=500))
        config.eval.update(dict(num_images=1000, batch_size=250, teacher_steps=(4, 32)))
    return config


def teacher(*, variant: str) -> ConfigDict:
    """The diffusion model that the students start from."""
    return base.teacher(_base(variant), family="cifar10", variant=variant)


def student(*, student_steps: int, distil: bool, variant: str) -> ConfigDict:
    """CD or CT with `student_steps` steps."""
    config = _base(variant)
    config.optimizer.learning_rate /= 2
    return base.student(
        config,
        family="cifar10",
        student_steps=student_steps,
        distil=distil,
        teacher_steps=dict(start=64.0, end=1280.0, anneal_steps=config.train.num_steps // 2),
        variant=variant,
    )


def progressive(*, variant: str) -> ConfigDict:
    """PD from 1,024 steps down to 1 in ten phases; small: from 64 in six."""
    config = _base(variant)
    config.optimizer.learning_rate /= 2
    phase_steps = tuple(2**n for n in range(10, -1, -1))
    # As on ImageNet: the last two phases are twice as long.
    config.train.num_steps = 20_000
    num_steps_before: tuple[int, ...] | None = 8 * (10_000,) + (20_000,)
    if variant == "small":
        phase_steps, num_steps_before = phase_steps[4:], None
        config.train.num_steps = 500
    return base.progressive(
        config, family="cifar10", phase_steps=phase_steps, num_steps_before=num_steps_before, variant=variant
    )


def tract(*, student_steps: int, variant: str) -> ConfigDict:
    """TRACT in two phases; the paper's step counts, arXiv:2303.04248."""
    config = _base(variant)
    config.optimizer.learning_rate /= 2
    config.train.num_steps //= 2
    phase_steps = (1024, 32, student_steps)
    return base.tract(config, family="cifar10", phase_steps=phase_steps, run=f"tract{student_steps}", variant=variant)


def edm(*, variant: str) -> ConfigDict:
    """EDM's diffusion model, with as many levels as its variant of TRACT has."""
    config = base.edm(_base(variant), family="cifar10", num_steps=40, variant=variant)
    config.eval.teacher_steps = (2, 4, 8, 20)
    return config


def tract_of_edm(*, variant: str) -> ConfigDict:
    """TRACT of EDM's model, from 40 steps to 1 in one phase; arXiv:2303.04248."""
    config = _base(variant)
    config.optimizer.learning_rate /= 2
    return base.tract_of_edm(
        config, family="cifar10", teacher_steps=40, student_steps=1, run="tract_edm1", variant=variant
    )


def consistency_distillation(*, variant: str) -> ConfigDict:
    """CM by distillation on 18 noise levels, compared by LPIPS as in the paper; small: pixel by pixel."""
    config = _base(variant)
    config.optimizer.learning_rate /= 2
    config = base.consistency_distillation(
        config, family="cifar10", run="cm_cd", points=18, samplers=_SAMPLERS, variant=variant
    )
    if variant == "":
        config = _compared_by_lpips(config)
        config.objective.target_decay.decay = 0.0  # the paper's with LPIPS: the network itself is the target
    return config


def consistency_training(*, variant: str) -> ConfigDict:
    """CM on the data alone, compared by LPIPS as in the paper; small: pixel by pixel."""
    config = base.consistency_training(
        _base(variant),
        family="cifar10",
        run="cm_ct",
        start=2,
        end=150,
        start_decay=0.9,
        samplers=_SAMPLERS,
        variant=variant,
    )
    return _compared_by_lpips(config) if variant == "" else config


def _compared_by_lpips(config: ConfigDict) -> ConfigDict:
    """At 224 pixels, as in arXiv:2303.01469; the weights are a file of mscm.metrics.convert."""
    config.objective.distance = dict(
        name="lpips", weights=placeholder(str), resize=224, precision="bfloat16", pooling="max"
    )
    return config


def improved_consistency_training(*, variant: str) -> ConfigDict:
    """iCT with the paper's settings for CIFAR-10, on this family's network."""
    config = _base(variant)
    config.model.middle.dropout = 0.3
    config = base.improved_consistency_training(
        config,
        family="cifar10",
        run="ict",
        start=10,
        end=1280,
        samplers=("consistency", "consistency:sigmas=0.821"),
        variant=variant,
    )
    config.optimizer.update(dict(learning_rate=1e-4, warmup_steps=0, decay="constant"))
    config.ema.update(dict(decay=0.99993, warmup=False))
    config.train.update(dict(num_steps=400_000, batch_size=1024))
    if variant == "small":
        config.model.middle.dropout = 0.0
        config.optimizer.update(dict(learning_rate=1e-3, decay="cosine"))
        config.ema.update(dict(decay=0.999, warmup=True))
        config.train.update(dict(num_steps=4000, batch_size=32))
    return config
