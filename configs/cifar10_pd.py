"""CIFAR-10, progressive distillation from 1,024 steps to 1; small: from 64.

Command:   python -m mscm.main --config=configs/cifar10_pd.py --workdir=DIR --config.data.path=cifar10.zip
           python -m mscm.main --config=configs/cifar10_pd.py:small --workdir=DIR --config.data.path=cifar10.zip
Hardware:  one GPU; small: two CPU cores
Cost:      ten phases of 10,000 steps of 512 images, the last two twice as long, after the teacher;
           the time is not measured yet
Expected:  fd_classifier not measured yet; the paper's network has a Frechet distance with Inception of 9.12, 4.51,
           3.00, 2.57 in 1, 2, 4, 8 steps (arXiv:2202.00512; not reproduced here: this is our U-ViT)
"""

from configs import cifar10


def get_config(variant=""):
    return cifar10.progressive(variant=variant)
