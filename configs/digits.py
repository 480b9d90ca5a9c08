"""Family: the 1,797 real 8x8 digits inside scikit-learn; minutes on two CPU cores, nothing to download."""

from ml_collections import ConfigDict

from configs import base

# Re-noising of consistency models: the noise at j / S of the family's schedule, S = 2, 4, 8.
_SAMPLERS = (
    "consistency",
    "consistency:sigmas=0.368",
    "consistency:sigmas=0.887/0.368/0.152",
    "consistency:sigmas=1.845/0.887/0.55/0.368/0.246/0.152/0.073",
)


def _base() -> ConfigDict:
    return base.with_shared(
        data=dict(name="digits", split="all", resolution=8, channels=1, num_classes=10, flip=False),
        model=dict(
            stages=dict(),  # 8x8 pixels in 2x2 patches are 16 tokens: there is nothing to pool
            middle=dict(width=96, num_blocks=2, dropout=0.0),
            emb_dim=64,
            head_dim=32,
            patch_size=2,
            dtype="float32",
            scan_blocks=False,
        ),
        # Less noise than a plain cosine has: 8x8 pixels average over nothing. Without the shift nearly all of a
        # student's error is in its last segment; with it the segments are about equally hard.
        schedule=dict(name="cosine", shift=2.0),
        optimizer=dict(learning_rate=4e-3, warmup_steps=100, decay="cosine"),
        ema=dict(decay=0.999, warmup=True),
        train=dict(
            num_steps=3200, batch_size=32, steps_per_dispatch=10, log_every_steps=200, save_every_steps=800
        ),
        eval=dict(num_images=1797, batch_size=599),  # three equal batches of the 1,797 images
    )


def teacher() -> ConfigDict:
    """The diffusion model that the students start from."""
    return base.teacher(_base(), family="digits")


def averaged() -> ConfigDict:
    """The same with averages of all lengths."""
    config = base.teacher(_base(), family="digits", run="averaged")
    return base.with_power_averages(config, snapshot_every_steps=200)


def guidable() -> ConfigDict:
    """The same with dropped labels, for guidance."""
    config = base.teacher(_base(), family="digits", run="guidable")
    config.objective.label_dropout = 0.1
    return config


def _student() -> ConfigDict:
    config = _base()
    config.optimizer.learning_rate = 2e-3
    config.train.num_steps = 2400
    return config


def student(*, student_steps: int, distil: bool) -> ConfigDict:
    """CD or CT with `student_steps` steps."""
    # The paper's schedule in small: most of the run anneals, the rest trains at the finest grid.
    teacher_steps = dict(start=16.0, end=256.0, anneal_steps=1800)
    return base.student(
        _student(), family="digits", student_steps=student_steps, distil=distil, teacher_steps=teacher_steps
    )


def progressive() -> ConfigDict:
    """PD from 64 steps down to 1 in six phases."""
    config = _student()
    config.train.update(dict(num_steps=800, save_every_steps=400))
    return base.progressive(config, family="digits", phase_steps=(64, 32, 16, 8, 4, 2, 1))


def tract(*, student_steps: int) -> ConfigDict:
    """TRACT in two phases."""
    config = _student()
    config.train.update(dict(num_steps=1200, save_every_steps=400))
    return base.tract(config, family="digits", phase_steps=(256, 16, student_steps), run=f"tract{student_steps}")


def edm() -> ConfigDict:
    """EDM's diffusion model, with as many levels as its variant of TRACT has."""
    config = base.edm(_base(), family="digits", num_steps=40)
    config.optimizer.learning_rate = 2e-3
    config.eval.teacher_steps = (2, 4, 8, 32)
    return config


def tract_of_edm(*, student_steps: int) -> ConfigDict:
    """TRACT of EDM's model in one phase."""
    config = _student()
    return base.tract_of_edm(
        config, family="digits", teacher_steps=40, student_steps=student_steps, run=f"tract_edm{student_steps}"
    )


def consistency_distillation() -> ConfigDict:
    """CM by distillation, on the family's schedule: 18 noise levels as on CIFAR-10."""
    return base.consistency_distillation(_student(), family="digits", run="cm_cd", points=18, samplers=_SAMPLERS)


def consistency_training() -> ConfigDict:
    """CM on the data alone, on EDM's noise levels and without a teacher's weights."""
    # Few levels and no average of the target network: 3,200 steps are short for what follows slowly.
    config = base.consistency_training(
        _base(), family="digits", run="cm_ct", start=2, end=20, start_decay=0.0, samplers=_SAMPLERS
    )
    config.optimizer.learning_rate = 1e-3
    return config


def improved_consistency_training() -> ConfigDict:
    """iCT on EDM's noise levels, without a teacher's weights."""
    config = base.improved_consistency_training(
        _base(), family="digits", run="ict", start=10, end=1280, samplers=_SAMPLERS
    )
    config.optimizer.learning_rate = 1e-3
    return config


def guided() -> ConfigDict:
    """Stage 1 of guided distillation."""
    return base.guided(_student(), family="digits")


def guided_student(*, student_steps: int) -> ConfigDict:
    """CD of a teacher whose weight of guidance is an input: so is the student's."""
    config = student(student_steps=student_steps, distil=True)
    config.name = f"digits_guided_cd{student_steps}"
    config.model.guidance_input = True
    config.teacher.config = "configs/digits_guided.py"
    return config
