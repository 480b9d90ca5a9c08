"""Family: the 1,797 real 8x8 digits inside scikit-learn; minutes on two CPU cores, nothing to download."""

from ml_collections import ConfigDict

from configs import base


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


def student(*, student_steps: int, distil: bool) -> ConfigDict:
    """CD or CT with `student_steps` steps."""
    config = _base()
    config.optimizer.learning_rate = 2e-3
    config.train.num_steps = 2400
    # The paper's schedule in small: most of the run anneals, the rest trains at the finest grid.
    teacher_steps = dict(start=16.0, end=256.0, anneal_steps=1800)
    return base.student(
        config, family="digits", student_steps=student_steps, distil=distil, teacher_steps=teacher_steps
    )
