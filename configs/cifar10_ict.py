"""CIFAR-10, improved consistency training (iCT), one step or two.

Command:   python -m mscm.main --config=configs/cifar10_ict.py --workdir=DIR --config.data.path=cifar10.zip
           python -m mscm.main --config=configs/cifar10_ict.py:small --workdir=DIR --config.data.path=cifar10.zip
Hardware:  one GPU or more; small: two CPU cores
Cost:      400,000 steps of 1,024 images; the time is not measured yet
Expected:  fd_classifier not measured yet; the paper's network (NCSN++, twice as deep) has a Frechet distance of 2.51
           with Inception in one step and 2.24 in two (arXiv:2310.14189; not reproduced here: this is our U-ViT)
"""

from configs import cifar10


def get_config(variant=""):
    return cifar10.improved_consistency_training(variant=variant)
