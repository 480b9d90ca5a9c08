"""Family: class-conditional CIFAR-10 at 32 pixels, sized for hours on one GPU.

The papers of this method have no CIFAR-10 result, so these settings are ours: simple diffusion's U-ViT made small, an
unshifted cosine schedule (32 pixels are its reference), random flips. --config.data.path=PATH reads a folder, an
archive or prepared records instead of TensorFlow Datasets.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def _base() -> ConfigDict:
    return ConfigDict(
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


def teacher() -> ConfigDict:
    """The diffusion model that the students start from."""
    config = _base()
    config.name = 'cifar10_teacher'
    config.objective = dict(name='diffusion', loss='v_mse', multiscale=placeholder(tuple), label_dropout=0.0)
    config.teacher = None
    return config


def student(*, student_steps: int, distil: bool) -> ConfigDict:
    """A multistep consistency model: distilled (`distil=True`, CD) or trained on the data alone (CT)."""
    config = _base()
    config.name = f'cifar10_{"cd" if distil else "ct"}{student_steps}'
    config.objective = dict(
        name='multistep_consistency',
        distil=distil,
        student_steps=student_steps,
        teacher_steps=dict(start=64.0, end=1280.0, anneal_steps=50_000),
        x_var_frac=0.75,
        distance='pseudo_huber',
        huber_epsilon=1e-4,
        multiscale=placeholder(tuple),
    )
    config.teacher = dict(config='configs/cifar10_teacher.py', workdir=placeholder(str), guidance=0.0)
    config.optimizer.learning_rate = 1e-4
    return config
