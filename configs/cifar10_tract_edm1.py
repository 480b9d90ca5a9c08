"""CIFAR-10, TRACT of EDM's model, 1 step.

Command:   python -m mscm.main --config=configs/cifar10_tract_edm1.py --workdir=DIR --config.data.path=cifar10.zip
           python -m mscm.main --config=configs/cifar10_tract_edm1.py:small --workdir=DIR --config.data.path=cifar10.zip
Hardware:  one GPU; small: two CPU cores
Cost:      100,000 steps of 512 images, after the teacher (configs/cifar10_edm.py); the time is not measured yet
Expected:  fd_classifier not measured yet; the paper's network has a Frechet distance with Inception of 3.78
           (arXiv:2303.04248, without classes; not reproduced here: this is our U-ViT, with classes)
"""

from configs import cifar10


def get_config(variant=""):
    return cifar10.tract_of_edm(variant=variant)
