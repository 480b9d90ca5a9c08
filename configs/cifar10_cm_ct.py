"""CIFAR-10, a consistency model trained on the data alone (CM), one step or more by re-noising.

Command:   python -m mscm.main --config=configs/cifar10_cm_ct.py --workdir=DIR --config.data.path=cifar10.zip \
             --config.objective.distance.weights=lpips.npz
           python -m mscm.main --config=configs/cifar10_cm_ct.py:small --workdir=DIR --config.data.path=cifar10.zip
Hardware:  one GPU; small: two CPU cores
Cost:      100,000 steps of 512 images compared at 224 pixels; it needs no teacher; the time is not measured yet
Expected:  fd_classifier not measured yet; the paper's network has a Frechet distance with Inception of 8.70 in one step
           and 5.83 in two (arXiv:2303.01469; not reproduced here: this is our U-ViT)
"""

from configs import cifar10


def get_config(variant=""):
    return cifar10.consistency_training(variant=variant)
