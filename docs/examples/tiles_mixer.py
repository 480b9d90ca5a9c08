"""Tiles of two photographs, a diffusion model with a mixer as its network.

Command:   python -m mscm.main --config=tiles_mixer.py --workdir=DIR     (in docs/examples)
Hardware:  two CPU cores
"""

import mixer  # noqa: F401  registers the network
import tiles  # noqa: F401  registers the data set

from configs import base


def get_config():
    config = base.with_shared(
        data=dict(name="tiles", resolution=16, channels=3, num_classes=2, flip=True),
        schedule=dict(name="cosine", shift=0.0),
        optimizer=dict(learning_rate=1e-3, warmup_steps=100, decay="cosine"),
        ema=dict(decay=0.999, warmup=True),
        train=dict(
            num_steps=2000, batch_size=32, steps_per_dispatch=10, log_every_steps=100, save_every_steps=500
        ),
        eval=dict(num_images=2080, batch_size=520, teacher_steps=(4, 16)),
    )
    # All that the network reads, and nothing of the U-ViT's.
    config.model = dict(
        name="mixer", patch_size=2, width=64, num_blocks=4, emb_dim=64, logsnr_input="inv_cos", guidance_input=False
    )
    return base.teacher(config, family="tiles_mixer")
