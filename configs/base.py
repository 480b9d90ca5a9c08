"""What every family of configs shares: the schema, the values that none of them changes, teacher and student.

A family file says the rest: `base.with_shared(data=dict(...), ...)` merges its sections over the ones here.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def with_shared(**sections) -> ConfigDict:
    """The sections of a family over the values that all share; a section may have keys of its own."""
    config = ConfigDict(
        dict(
            seed=0,
            data=dict(split="train", path=placeholder(str), num_workers=0, num_threads=2),
            model=dict(
                name="uvit",
                mlp_ratio=4,
                patch_size=1,
                logsnr_input="linear",
                remat=placeholder(str),
                attention="auto",  # or xla, one_by_one, splash (TPU), cudnn (GPU)
            ),
            schedule=dict(logsnr_min=-15.0, logsnr_max=15.0),
            prediction="v",
            # simple diffusion's Adam, arXiv:2301.11093.
            optimizer=dict(b1=0.9, b2=0.99, eps=1e-12, weight_decay=0.0, clip_norm=1.0),
            train=dict(keep_checkpoints=3, num_microbatches=1),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            eval=dict(
                seeds=(0,),
                labels="balanced",  # or uniform: drawn at random
                teacher_samplers=("addim",),
                teacher_steps=(1, 2, 4, 8, 64, 256),
                network="classifier",  # or pixels; inception, dinov2: their weights are files, see mscm.metrics.convert
                precision="float32",
                weights=placeholder(str),
                reference=placeholder(str),  # a file of mscm.metrics.reference; by default computed from the data
                reference_split=placeholder(str),
                num_kept=10_000,
                at_end=True,
            ),
        )
    )
    config.update(sections)
    return config


def teacher(
    config: ConfigDict, *, family: str, variant: str = "", multiscale: tuple[int, ...] | None = None
) -> ConfigDict:
    """The config of a diffusion model, from which the students of the family start."""
    config.name = _join(family, "teacher", variant)
    config.objective = dict(
        name="diffusion", loss="v_mse", multiscale=multiscale or placeholder(tuple), label_dropout=0.0
    )
    config.teacher = None
    return config


def student(
    config: ConfigDict,
    *,
    family: str,
    student_steps: int,
    distil: bool,
    teacher_steps: dict[str, int | float],
    variant: str = "",
    multiscale: tuple[int, ...] | None = None,
) -> ConfigDict:
    """A multistep consistency model: distilled (`distil=True`, CD) or trained on the data alone (CT)."""
    config.name = _join(family, f'{"cd" if distil else "ct"}{student_steps}', variant)
    config.objective = dict(
        name="multistep_consistency",
        distil=distil,
        student_steps=student_steps,
        teacher_steps=teacher_steps,
        x_var_frac=0.75,
        distance="pseudo_huber",
        huber_epsilon=1e-4,
        multiscale=multiscale or placeholder(tuple),
    )
    teacher_file = f"configs/{family}_teacher.py"
    config.teacher = dict(
        config=f"{teacher_file}:{variant}" if variant else teacher_file, workdir=placeholder(str), guidance=0.0
    )
    return config


def _join(*parts: str) -> str:
    return "_".join(part for part in parts if part)
