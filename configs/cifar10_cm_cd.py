"""CIFAR-10, a consistency model distilled from the teacher (CM), one step or more by re-noising.

Command:   python -m mscm.main --config=configs/cifar10_cm_cd.py --workdir=DIR --config.data.path=cifar10.zip \
             --config.objective.distance.weights=lpips.npz
           python -m mscm.main --config=configs/cifar10_cm_cd.py:small --workdir=DIR --config.data.path=cifar10.zip
Hardware:  one GPU; small: two CPU cores
Cost:      100,000 steps of 512 images compared at 224 pixels, after the teacher; the time is not measured yet
Expected:  fd_classifier not measured yet; the paper's network has a Frechet distance with Inception of 3.55 in one step
           and 2.93 in two (arXiv:2303.01469; not reproduced here: this is our U-ViT)
"""

from configs import cifar10


def get_config(variant=""):
    return cifar10.consistency_distillation(variant=variant)
