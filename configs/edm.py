"""Family: EDM's published networks (arXiv:2206.00364) as teachers, and their students.

The networks are imported (python -m mscm.import_teacher) and not trained here; EDM's training is described, as far as
it has a key, for the record. A network of EDM's answers at any sigma / alpha alike, so a student may have another
schedule than its teacher: CD and PD take the cosine schedules of arXiv:2403.06807v3, cut to the noise that the teacher
knows, sigma / alpha from 0.002 to 80; TRACT takes EDM's levels. Students have no dropout, as in arXiv:2303.04248 and
2303.01469.

The variants of CIFAR-10 are named as the files: '' is cond-vp, the best, others are cond-ve, uncond-vp and uncond-ve.
"""

import math

from ml_collections import ConfigDict

from configs import base

_LOGSNR_MIN, _LOGSNR_MAX = -2 * math.log(80.0), -2 * math.log(0.002)
_SAMPLERS = ("heun:grid=karras",)  # EDM's levels whatever the number of steps
_VARIANTS = {"": (True, "ddpmpp"), "cond-ve": (True, "ncsnpp"), "uncond-vp": (False, "ddpmpp"),
             "uncond-ve": (False, "ncsnpp")}


def _cifar10(*, variant: str) -> ConfigDict:
    if variant not in _VARIANTS:
        choices = ", ".join(map(repr, _VARIANTS))
        raise ValueError(f"unknown variant of EDM's CIFAR-10 networks: got {variant!r}, expected one of {choices}")
    conditional, name = _VARIANTS[variant]
    config = base.with_shared(
        data=dict(name="cifar10", resolution=32, channels=3, num_classes=10, flip=True, num_workers=4),
        schedule=dict(name="cosine", shift=0.0, logsnr_min=_LOGSNR_MIN, logsnr_max=_LOGSNR_MAX),
        optimizer=dict(learning_rate=1e-4, warmup_steps=1000, decay="constant"),
        ema=dict(decay=0.9999, warmup=True),
        train=dict(
            num_steps=100_000, batch_size=512, steps_per_dispatch=1, log_every_steps=100, save_every_steps=5000
        ),
        eval=dict(num_images=50_000, batch_size=1000),
    )
    # The heads of DDPM++ and NCSN++ are as wide as a level.
    config.model = _model(
        name, conditional=conditional, channels=128, channel_mult=(2, 2, 2), num_blocks=4, attention_resolutions=(16,)
    )
    return _of_edm(config, teacher_steps=(2, 4, 8, 18))


def _imagenet64() -> ConfigDict:
    config = base.with_shared(
        # A path must be given: a directory made by python -m mscm.prepare --transform=lanczos, as EDM's images are.
        data=dict(name="imagenet64", resolution=64, channels=3, num_classes=1000, flip=True),
        # The shift of the noise end, 2 log(32 / 64), lowers its bound to the noise that the teacher knows.
        schedule=dict(
            name="interpolated", resolution=64, noise_low=32, noise_high=64,
            logsnr_min=_LOGSNR_MIN + 2 * math.log(2.0), logsnr_max=_LOGSNR_MAX,
        ),
        optimizer=dict(learning_rate=1e-4, warmup_steps=10_000, decay="constant"),
        ema=dict(decay=0.9999, warmup=False),
        train=dict(
            num_steps=200_000, batch_size=2048, steps_per_dispatch=1, log_every_steps=100, save_every_steps=5000
        ),
        mesh=dict(fsdp=8),
        eval=dict(num_images=50_000, batch_size=1024, network="inception", at_end=False),
    )
    config.model = _model(
        "adm", conditional=True, channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
        attention_resolutions=(32, 16, 8),
    )
    return _of_edm(config, teacher_steps=(2, 4, 8, 40, 256))


def _model(name: str, **sizes) -> dict:
    """A U-Net that computes in bfloat16 and keeps only the blocks' inputs for the backward pass."""
    return dict(
        name=name, dropout=0.0, dtype="bfloat16", remat="full", logsnr_input="log_sigma", guidance_input=False,
        attention="auto", **sizes,
    )


def _of_edm(config: ConfigDict, *, teacher_steps: tuple[int, ...]) -> ConfigDict:
    config.prediction = "edm"
    config.eval.update(dict(teacher_samplers=_SAMPLERS, teacher_steps=teacher_steps))
    return config


def _teacher(
    config: ConfigDict, *, family: str, num_steps: int, dropout: float, half_life: float, variant: str = ""
) -> ConfigDict:
    """With the warm-up of 10 million images, and an average that has half forgotten after `half_life` images."""
    config.model.dropout = dropout
    config.optimizer.warmup_steps = math.ceil(10e6 / config.train.batch_size)
    config.ema.decay = 0.5 ** (config.train.batch_size / half_life)
    config = base.edm(config, family=family, run="teacher", num_steps=num_steps, variant=variant)
    config.eval.teacher_samplers = _SAMPLERS  # base.edm's is for one number of steps
    return config


def cifar10_teacher(*, variant: str) -> ConfigDict:
    """One of edm-cifar10-32x32-*.pkl, on the levels of its sampler in 18 steps."""
    config = _cifar10(variant=variant)
    config.optimizer.learning_rate = 1e-3
    config.train.num_steps = 390_000
    return _teacher(config, family="edm_cifar10", num_steps=18, dropout=0.13, half_life=0.5e6, variant=variant)


def cifar10_student(*, student_steps: int, variant: str) -> ConfigDict:
    """CD with `student_steps` steps."""
    config = _cifar10(variant=variant)
    return base.student(
        config,
        family="edm_cifar10",
        student_steps=student_steps,
        distil=True,
        teacher_steps=dict(start=64.0, end=1280.0, anneal_steps=config.train.num_steps // 2),
        variant=variant,
    )


def cifar10_progressive(*, variant: str) -> ConfigDict:
    """PD from 1,024 steps down to 1 in ten phases, the last two twice as long."""
    config = _cifar10(variant=variant)
    config.train.num_steps = 20_000
    return base.progressive(
        config,
        family="edm_cifar10",
        phase_steps=tuple(2**n for n in range(10, -1, -1)),
        num_steps_before=8 * (10_000,) + (20_000,),
        variant=variant,
    )


def cifar10_tract(*, variant: str) -> ConfigDict:
    """TRACT of EDM's model, from 40 steps to 1 in one phase; arXiv:2303.04248."""
    config = _cifar10(variant=variant)
    config.optimizer.learning_rate = 1e-3
    config.train.num_steps = 187_500  # 96 million images, the paper's shorter training
    return base.tract_of_edm(
        config, family="edm_cifar10", teacher_steps=40, student_steps=1, run="tract1", variant=variant,
        teacher="teacher",
    )


def imagenet64_teacher() -> ConfigDict:
    """edm-imagenet-64x64-cond-adm.pkl, on the levels of its sampler in 256 steps."""
    config = _imagenet64()
    config.train.update(dict(num_steps=610_000, batch_size=4096))
    return _teacher(config, family="edm_imagenet64", num_steps=256, dropout=0.1, half_life=50e6)


def imagenet64_student(*, student_steps: int) -> ConfigDict:
    """CD with `student_steps` steps."""
    return base.student(
        _imagenet64(),
        family="edm_imagenet64",
        student_steps=student_steps,
        distil=True,
        teacher_steps=dict(start=64.0, end=1280.0, anneal_steps=100_000),
    )
