"""Family: class-conditional CIFAR-10 at 32 pixels, sized for hours on one GPU.

The papers of this method have no CIFAR-10 result, so these settings are ours: simple diffusion's U-ViT made small, an
unshifted cosine schedule (32 pixels are its reference), random flips. --config.data.path=PATH reads a folder, an
archive or prepared records instead of TensorFlow Datasets. The variant 'small' is for a look on two CPU cores.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def _check(variant: str) -> None:
    if variant not in ('', 'small'):
        raise ValueError(f"unknown variant of the CIFAR-10 configs: got {variant!r}, expected one of '', 'small'")


def _base(variant: str) -> ConfigDict:
    _check(variant)
    config = ConfigDict(
        dict(
            seed=0,
            data=dict(
                name='cifar10',
                split='train',
                path=placeholder(str),
                resolution=32,
                channels=3,
                num_classes=10,
                flip=True,
                num_workers=4,
            ),
            model=dict(
                name='uvit',
                stages=dict(
                    stage_0=dict(kind='residual', width=128, num_blocks=3, dropout=0.0),
                    stage_1=dict(kind='residual', width=256, num_blocks=3, dropout=0.1),
                ),
                middle=dict(width=512, num_blocks=8, dropout=0.1),
                emb_dim=512,
                head_dim=64,
                mlp_ratio=4,
                patch_size=1,
                logsnr_input='linear',
                dtype='bfloat16',
                scan_blocks=True,
                remat=placeholder(str),
            ),
            schedule=dict(name='cosine', logsnr_min=-15.0, logsnr_max=15.0, shift=0.0),
            prediction='v',
            optimizer=dict(
                learning_rate=2e-4,
                warmup_steps=1000,
                decay='constant',
                b1=0.9,
                b2=0.99,
                eps=1e-12,
                weight_decay=0.0,
                clip_norm=1.0,
            ),
            ema=dict(decay=0.9999, warmup=True),
            train=dict(
                num_steps=100_000,
                batch_size=512,
                steps_per_dispatch=1,
                log_every_steps=100,
                save_every_steps=5000,
                keep_checkpoints=3,
            ),
            eval=dict(num_images=50_000, batch_size=1000, seed=0, teacher_steps=(1, 2, 4, 8, 64, 256)),
        )
    )
    if variant == 'small':
        # 4x4 patches and no convolution stages: these would take most of a CPU's time.
        config.model.stages = {}
        config.model.middle.update(dict(width=128, num_blocks=4, dropout=0.0))
        config.model.update(dict(emb_dim=128, head_dim=32, patch_size=4, dtype='float32', scan_blocks=False))
        config.data.num_workers = 0
        config.optimizer.update(dict(learning_rate=2e-3, warmup_steps=100, decay='cosine'))
        config.ema.decay = 0.999
        config.train.update(dict(num_steps=2000, batch_size=64, save_every_steps=500))
        config.eval.update(dict(num_images=1000, batch_size=250, teacher_steps=(4, 32)))
    return config


def _name(kind: str, variant: str) -> str:
    return '_'.join(part for part in ('cifar10', kind, variant) if part)


def teacher(*, variant: str) -> ConfigDict:
    """The diffusion model that the students start from."""
    config = _base(variant)
    config.name = _name('teacher', variant)
    config.objective = dict(name='diffusion', loss='v_mse', multiscale=placeholder(tuple), label_dropout=0.0)
    config.teacher = None
    return config


def student(*, student_steps: int, distil: bool, variant: str) -> ConfigDict:
    """A multistep consistency model: distilled (`distil=True`, CD) or trained on the data alone (CT)."""
    config = _base(variant)
    config.name = _name(f'{"cd" if distil else "ct"}{student_steps}', variant)
    config.objective = dict(
        name='multistep_consistency',
        distil=distil,
        student_steps=student_steps,
        teacher_steps=dict(start=64.0, end=1280.0, anneal_steps=config.train.num_steps // 2),
        x_var_frac=0.75,
        distance='pseudo_huber',
        huber_epsilon=1e-4,
        multiscale=placeholder(tuple),
    )
    teacher_file = 'configs/cifar10_teacher.py'
    config.teacher = dict(
        config=f'{teacher_file}:{variant}' if variant else teacher_file, workdir=placeholder(str), guidance=0.0
    )
    config.optimizer.learning_rate /= 2
    return config
