"""What every family of configs shares: the schema, the values that none of them changes, teacher and student.

A family file says the rest: `base.with_shared(data=dict(...), ...)` merges its sections over the ones here.
"""

from ml_collections import ConfigDict, FieldReference
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
                fourier_scale=placeholder(float),  # of random time features, as in NCSN++; by default sinusoids
                guidance_input=False,  # whether the weight of guidance is an input: guided distillation
                remat=placeholder(str),
                attention="auto",  # or xla, one_by_one, splash (TPU), cudnn (GPU)
            ),
            schedule=dict(logsnr_min=-15.0, logsnr_max=15.0),
            prediction="v",
            # simple diffusion's Adam, arXiv:2301.11093.
            optimizer=dict(name="adam", b1=0.9, b2=0.99, eps=1e-12, weight_decay=0.0, clip_norm=1.0),
            train=dict(keep_checkpoints=3, num_microbatches=1, max_bad_steps=0),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            eval=dict(
                seeds=(0,),
                labels="balanced",  # or uniform: drawn at random
                student_samplers=placeholder(tuple),  # of a consistency model; others have one of their own
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
    config: ConfigDict,
    *,
    family: str,
    run: str = "teacher",
    variant: str = "",
    multiscale: tuple[int, ...] | None = None,
) -> ConfigDict:
    """The config of a diffusion model, from which the students of the family start."""
    config.name = _join(family, run, variant)
    config.objective = dict(
        name="diffusion", loss="v_mse", noise=None, multiscale=multiscale or placeholder(tuple), label_dropout=0.0
    )
    config.teacher = None
    return config


def with_power_averages(config: ConfigDict, *, snapshot_every_steps: int) -> ConfigDict:
    """The same with the two power-function averages of EDM2, arXiv:2312.02696, and snapshots, for all other lengths."""
    config.ema.further = dict(short=dict(sigma_rel=0.05), long=dict(sigma_rel=0.1))
    config.ema.snapshot_every_steps = snapshot_every_steps
    return config


def edm(config: ConfigDict, *, family: str, num_steps: int, run: str = "edm", variant: str = "") -> ConfigDict:
    """A diffusion model as EDM's (arXiv:2206.00364): schedule, noise, preconditioning, loss and optimiser.

    `num_steps` of its sampler are those whose levels are at the times j / num_steps.
    """
    config = teacher(config, family=family, run=run, variant=variant)
    config.objective.update(dict(loss="edm_mse", noise=dict(mean=-1.2, std=1.2)))
    config.eval.teacher_samplers = ("heun",)
    config.optimizer.update(dict(b2=0.999, eps=1e-8, clip_norm=placeholder(float)))
    _on_edm_levels(config, "edm", num_steps=num_steps)
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
    return _of_teacher(config, family=family, run=f'{"cd" if distil else "ct"}{student_steps}', variant=variant)


def progressive(
    config: ConfigDict,
    *,
    family: str,
    phase_steps: tuple[int, ...],
    num_steps_before: tuple[int, ...] | None = None,
    variant: str = "",
    multiscale: tuple[int, ...] | None = None,
) -> ConfigDict:
    """Progressive distillation, arXiv:2202.00512; `train.num_steps` is the last phase's, by default also all others'.

    With the aDDIM teacher and the v-loss of the baseline in arXiv:2403.06807v3.
    """
    _without_dropout(config)
    config.objective = dict(
        name="progressive",
        phase_steps=phase_steps,
        num_steps_before=num_steps_before or placeholder(tuple),
        solver=dict(name="addim", x_var_frac=0.75),
        later_solver="ddim",
        distance="v_mse",
        multiscale=multiscale or placeholder(tuple),
    )
    # The rate ends each phase at 0, and nothing is averaged.
    config.optimizer.update(dict(warmup_steps=0, decay="linear"))
    config.ema.update(dict(decay=0.0, warmup=False))
    return _of_teacher(config, family=family, run="pd", variant=variant)


def tract(
    config: ConfigDict,
    *,
    family: str,
    phase_steps: tuple[int, ...],
    run: str,
    variant: str = "",
    multiscale: tuple[int, ...] | None = None,
    teacher: str = "teacher",
) -> ConfigDict:
    """TRACT in phases of `train.num_steps` each; arXiv:2303.04248.

    Each phase starts from the average of the one before, with a new optimiser and a new self-teacher; the authors' code
    changes the teacher only, and goes on with the rest.
    """
    _without_dropout(config)
    config.objective = dict(
        name="tract",
        phase_steps=phase_steps,
        num_steps_before=placeholder(tuple),
        self_teacher_decay=0.5,
        solver=dict(name="clipped_ddim"),
        distance="truncated_snr_mse",
        multiscale=multiscale or placeholder(tuple),
    )
    # Over a phase, however long it is, the average forgets all but a thousandth of where it began, as in the authors'
    # code; the paper says a ten-thousandth.
    config.ema.decay = FieldReference(1e-3) ** (1.0 / config.train.get_ref("num_steps").to_float())
    config.ema.warmup = False
    return _of_teacher(config, family=family, run=run, variant=variant, teacher=teacher)


def tract_of_edm(
    config: ConfigDict,
    *,
    family: str,
    teacher_steps: int,
    student_steps: int,
    run: str,
    variant: str = "",
    teacher: str = "edm",
) -> ConfigDict:
    """TRACT's variant for EDM's models: one phase, of Heun's steps; arXiv:2303.04248."""
    steps = (teacher_steps, student_steps)
    config = tract(config, family=family, phase_steps=steps, run=run, variant=variant, teacher=teacher)
    config.objective.update(dict(solver=dict(name="heun"), distance="edm_mse"))
    config.optimizer.clip_norm = placeholder(float)
    _on_edm_levels(config, "edm", num_steps=teacher_steps)
    return config


def consistency_distillation(
    config: ConfigDict, *, family: str, run: str, points: int, samplers: tuple[str, ...], variant: str = ""
) -> ConfigDict:
    """A consistency model that learns from a teacher, with Euler's steps on `points` noise levels; arXiv:2303.01469.

    Not with Heun's, as the paper on EDM's levels: on a cosine schedule sigma / alpha falls in the first step from a
    thousand to ten, and the slopes at its ends say nothing of what is between.
    """
    _without_dropout(config)
    config.objective = dict(
        name="consistency",
        distil=True,
        solver=dict(name="ddim"),
        grid=dict(name="constant", points=points),
        noise=None,
        weight="one",
        distance=dict(name="l2"),
        target_decay=dict(name="constant", decay=0.95),
    )
    config.eval.student_samplers = samplers
    return _of_teacher(config, family=family, run=run, variant=variant)


def consistency_training(
    config: ConfigDict,
    *,
    family: str,
    run: str,
    start: int,
    end: int,
    start_decay: float,
    samplers: tuple[str, ...],
    variant: str = "",
) -> ConfigDict:
    """A consistency model from data alone, on a grid that grows from `start` to `end` + 1; arXiv:2303.01469.

    On EDM's noise levels, as the next.
    """
    _without_dropout(config)
    config.objective = dict(
        name="consistency",
        distil=False,
        grid=dict(name="cm", start=start, end=end),
        noise=None,
        weight="one",
        distance=dict(name="l2"),
        target_decay=dict(name="cm", start_decay=start_decay),
    )
    _on_edm_levels(config, "consistency")
    return _alone(config, family=family, run=run, variant=variant, samplers=samplers)


def improved_consistency_training(
    config: ConfigDict,
    *,
    family: str,
    run: str,
    start: int,
    end: int,
    samplers: tuple[str, ...],
    variant: str = "",
) -> ConfigDict:
    """The improved techniques of arXiv:2310.14189 (iCT), from data alone, on EDM's noise levels."""
    config.objective = dict(
        name="consistency",
        distil=False,
        grid=dict(name="ict", start=start, end=end),
        noise=dict(mean=-1.1, std=2.0),
        weight="inverse_gap",
        distance=dict(name="pseudo_huber", scale=0.00054),
        target_decay=None,
    )
    _on_edm_levels(config, "consistency")
    config.model.fourier_scale = 0.02
    config.optimizer.update(dict(name="radam", b2=0.999, eps=1e-8, clip_norm=placeholder(float)))
    return _alone(config, family=family, run=run, variant=variant, samplers=samplers)


def guided(config: ConfigDict, *, family: str, variant: str = "") -> ConfigDict:
    """A diffusion model with the weight of guidance as an input, which its teacher's guidance taught it."""
    config.objective = dict(
        name="guided",
        guidance_low=0.0,
        guidance_high=4.0,
        distance="truncated_snr_mse",
        multiscale=placeholder(tuple),
    )
    config.model.guidance_input = True
    return _of_teacher(config, family=family, run="guided", variant=variant, teacher="guidable")


def _without_dropout(config: ConfigDict) -> None:
    """As PD, TRACT and CM train their students: arXiv:2202.00512, 2303.04248, 2303.01469."""
    if "middle" in config.model:  # a U-ViT; the students of EDM's networks have none
        for level in (*config.model.stages.values(), config.model.middle):
            level.dropout = 0.0


def _on_edm_levels(config: ConfigDict, prediction: str, *, num_steps: int | None = None) -> None:
    """Schedule, preconditioning and time input of EDM, arXiv:2206.00364."""
    config.prediction = prediction
    steps = {} if num_steps is None else dict(num_steps=num_steps)
    config.schedule = ConfigDict(dict(name="karras", sigma_min=0.002, sigma_max=80.0, rho=7.0, **steps))
    config.model.logsnr_input = "log_sigma"


def _alone(config: ConfigDict, *, family: str, run: str, variant: str, samplers: tuple[str, ...]) -> ConfigDict:
    """Name and samplers of a consistency model that starts from nothing."""
    config.name = _join(family, run, variant)
    config.eval.student_samplers = samplers
    config.teacher = None
    return config


def _of_teacher(config: ConfigDict, *, family: str, run: str, variant: str, teacher: str = "teacher") -> ConfigDict:
    """Name and teacher of a run."""
    config.name = _join(family, run, variant)
    file = f"configs/{family}_{teacher}.py" + (f":{variant}" if variant else "")
    config.teacher = dict(config=file, workdir=placeholder(str), guidance=0.0)
    return config


def _join(*parts: str) -> str:
    return "_".join(part for part in parts if part)
