"""ImageNet 64x64, progressive distillation from 1024 steps to 1, the baseline of the paper's Table 3.

Command:   python -m mscm.main --config=configs/imagenet64_pd.py --workdir=DIR --config.data.path=DATA
           python -m mscm.main --config=configs/imagenet64_pd.py:large --workdir=DIR --config.data.path=DATA
Hardware:  64 TPU v5e chips; large: 256
Cost:      ten phases of 50,000 steps, the last two twice as long, after the teacher (configs/imagenet64_teacher.py);
           the time is not measured yet
Expected:  FID 10.7, 4.7, 2.4, 1.8 in 1, 2, 4, 8 steps (the paper's, arXiv:2403.06807v3 Table 3; not reproduced here)
"""

from configs import imagenet


def get_config(variant=""):
    return imagenet.progressive(resolution=64, variant=variant)
