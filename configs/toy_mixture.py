"""A mixture of two Gaussians in one dimension: the paper's Figure 1, with everything known in closed form.

Command:   python -m mscm.main --config=configs/toy_mixture.py:teacher --workdir=DIR/teacher
           python -m mscm.main --config=configs/toy_mixture.py:cd4 --workdir=DIR/cd4 \
               --config.teacher.workdir=DIR/teacher
Hardware:  two CPU cores
Cost:      40 to 50 seconds each, beside another run: start-up, compiling, 5 s of training, the scores
Expected:  fd_pixels, the Frechet distance of the values themselves, below 1e-3 for every student (0.24 for one step
           of the teacher); the figures of docs/howto/compare.md

Variants: teacher, cd1, cd2, cd4 (distilled, 1, 2 and 4 steps), ct1, ct2, ct4 (trained on the data).
"""

from ml_collections import ConfigDict

from configs import base

_STUDENTS = tuple(f"{kind}{steps}" for kind in ("cd", "ct") for steps in (1, 2, 4))


def _base() -> ConfigDict:
    config = base.with_shared(
        data=dict(name="mixture", resolution=1, channels=1, num_classes=1, flip=False),
        schedule=dict(name="cosine", shift=0.0),
        optimizer=dict(learning_rate=2e-3, warmup_steps=100, decay="cosine"),
        ema=dict(decay=0.995, warmup=True),
        train=dict(
            num_steps=1500, batch_size=256, steps_per_dispatch=100, log_every_steps=500, save_every_steps=1500
        ),
        eval=dict(
            num_images=4096, batch_size=4096, network="pixels", num_kept=2000,
            teacher_samplers=("ddim",), teacher_steps=(1, 2, 4, 64),
        ),
    )
    config.model = dict(
        name="mlp", width=32, num_blocks=3, mlp_ratio=2, emb_dim=32, logsnr_input="inv_cos", guidance_input=False
    )
    return config


def get_config(variant: str = "teacher") -> ConfigDict:
    if variant == "teacher":
        return base.teacher(_base(), family="toy_mixture")
    if variant not in _STUDENTS:
        raise ValueError(
            f"unknown variant of the toy: got {variant!r}, expected one of teacher, {', '.join(_STUDENTS)}"
        )
    config = base.student(
        _base(),
        family="toy_mixture",
        student_steps=int(variant[2:]),
        distil=variant.startswith("cd"),
        teacher_steps=dict(start=16.0, end=256.0, anneal_steps=1200),
    )
    # aDDIM takes the error of x_hat to be orthogonal to the noise, which one dimension has no room for.
    config.objective.x_var_frac = 0.0
    config.teacher.config = "configs/toy_mixture.py:teacher"
    return config
