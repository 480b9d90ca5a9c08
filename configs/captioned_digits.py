"""Family: two real digits on 16 x 16 pixels and captions such as "a seven left of a two": text to image in small."""

from ml_collections import ConfigDict

from configs import base

GUIDANCE = 1.0


def _base() -> ConfigDict:
    return base.with_shared(
        data=dict(
            name="captioned_digits",
            resolution=16,
            channels=1,
            num_classes=200,  # for the network of the scores: what is shown is said by the captions
            flip=False,  # what is left would be right
            text=dict(encoder="bytes", length=32),
        ),
        model=dict(
            stages=dict(),  # 16 x 16 pixels in 2 x 2 patches are 64 tokens
            middle=dict(width=96, num_blocks=3, dropout=0.0),
            position_scale=1.0,
            text=dict(width=96, num_blocks=3),
            emb_dim=128,
            head_dim=32,
            patch_size=2,
            dtype="float32",
            scan_blocks=False,
        ),
        # More noise than a plain cosine has: a caption says most where the image says nothing.
        schedule=dict(name="cosine", shift=-1.0),
        optimizer=dict(learning_rate=3e-3, warmup_steps=100, decay="cosine"),
        ema=dict(decay=0.999, warmup=True),
        train=dict(
            num_steps=6000, batch_size=32, steps_per_dispatch=10, log_every_steps=200, save_every_steps=1000
        ),
        eval=dict(num_images=1000, batch_size=500, labels="captions", alignment="digits", teacher_steps=(256,)),
    )


def teacher() -> ConfigDict:
    """The diffusion model that the students start from; it can be guided."""
    config = base.teacher(_base(), family="captioned_digits")
    config.objective.label_dropout = 0.1
    config.eval.teacher_samplers = ("ancestral", f"ancestral:guidance={GUIDANCE}")
    return config


def student(*, student_steps: int) -> ConfigDict:
    """CD of the guided teacher, as for text to image: N = 256 throughout, nearly a squared distance."""
    config = _base()
    config.optimizer.learning_rate = 1e-3
    config.train.num_steps = 2400
    config = base.student(
        config,
        family="captioned_digits",
        student_steps=student_steps,
        distil=True,
        teacher_steps=dict(start=256.0, end=256.0, anneal_steps=0),
    )
    config.objective.huber_epsilon = 1.0
    config.teacher.guidance = GUIDANCE
    return config
