"""ImageNet 64x64, improved consistency training (iCT), one step or two.

Command:   python -m mscm.main --config=configs/imagenet64_ict.py --workdir=DIR --config.data.path=DATA
           python -m mscm.main --config=configs/imagenet64_ict.py:large --workdir=DIR --config.data.path=DATA
Hardware:  64 TPU v5e chips; large: 256
Cost:      800,000 steps of 4,096 images; the time is not measured yet
Expected:  FID 3.25 in one step, 2.77 in two (the paper's with another network, ADM, twice as deep:
           arXiv:2310.14189; not reproduced here)
"""

from configs import imagenet


def get_config(variant=""):
    return imagenet.improved_consistency_training(resolution=64, variant=variant)
