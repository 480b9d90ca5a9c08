"""CIFAR-10, TRACT, 1 step.

Command:   python -m mscm.main --config=configs/cifar10_tract1.py --workdir=DIR --config.data.path=cifar10.zip
           python -m mscm.main --config=configs/cifar10_tract1.py:small --workdir=DIR --config.data.path=cifar10.zip
Hardware:  one GPU; small: two CPU cores
Cost:      two phases of 50,000 steps of 512 images, after the teacher; the time is not measured yet
Expected:  fd_classifier not measured yet; the paper's network has a Frechet distance with Inception of 5.02
           (arXiv:2303.04248; not reproduced here: this is our U-ViT)
"""

from configs import cifar10


def get_config(variant=""):
    return cifar10.tract(student_steps=1, variant=variant)
