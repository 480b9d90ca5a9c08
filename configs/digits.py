"""Family: the 1,797 real 8x8 digits inside scikit-learn; minutes on two CPU cores, nothing to download."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def _base() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,
            data=dict(
                name='digits',
                split='all',
                path=placeholder(str),
                resolution=8,
                channels=1,
                num_classes=10,
                flip=False,
                num_workers=0,
            ),
            model=dict(
                name='uvit',
                stages=dict(),  # 8x8 pixels in 2x2 patches are 16 tokens: there is nothing to pool
                middle=dict(width=96, num_blocks=2, dropout=0.0),
                emb_dim=64,
                head_dim=32,
                mlp_ratio=4,
                patch_size=2,
                logsnr_input='linear',
                dtype='float32',
                scan_blocks=False,
                remat=placeholder(str),
            ),
            # Less noise than a plain cosine has: 8x8 pixels average over nothing. Without the shift nearly all of a
            # student's error is in its last segment; with it the segments are about equally hard.
            schedule=dict(name='cosine', logsnr_min=-15.0, logsnr_max=15.0, shift=2.0),
            prediction='v',
            optimizer=dict(
                learning_rate=4e-3,
                warmup_steps=100,
                decay='cosine',
                b1=0.9,
                b2=0.99,
                eps=1e-12,
                weight_decay=0.0,
                clip_norm=1.0,
            ),
            ema=dict(decay=0.999, warmup=True),
            train=dict(
                num_steps=3200,
                batch_size=32,
                steps_per_dispatch=10,
                log_every_steps=200,
                save_every_steps=800,
                keep_checkpoints=3,
            ),
            eval=dict(
                num_images=1797,
                batch_size=599,  # three equal batches of the 1,797 images
                seed=0,
                teacher_steps=(1, 2, 4, 8, 64, 256),
            ),
        )
    )


def teacher() -> ConfigDict:
    """The diffusion model that the students start from."""
    config = _base()
    config.name = 'digits_teacher'
    config.objective = dict(name='diffusion', loss='v_mse', multiscale=placeholder(tuple), label_dropout=0.0)
    config.teacher = None
    return config


def student(*, student_steps: int, distil: bool) -> ConfigDict:
    """A multistep consistency model: distilled (`distil=True`, CD) or trained on the data alone (CT)."""
    config = _base()
    config.name = f'digits_{"cd" if distil else "ct"}{student_steps}'
    config.objective = dict(
        name='multistep_consistency',
        distil=distil,
        student_steps=student_steps,
        # The paper's schedule in small: most of the run anneals, the rest trains at the finest grid.
        teacher_steps=dict(start=16.0, end=256.0, anneal_steps=1800),
        x_var_frac=0.75,
        distance='pseudo_huber',
        huber_epsilon=1e-4,
        multiscale=placeholder(tuple),
    )
    config.teacher = dict(config='configs/digits_teacher.py', workdir=placeholder(str), guidance=0.0)
    config.optimizer.learning_rate = 2e-3
    config.train.num_steps = 2400
    return config
