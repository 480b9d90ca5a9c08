"""CIFAR-10, the diffusion model that the CIFAR-10 students start from.

Command:   python -m mscm.main --config=configs/cifar10_teacher.py --workdir=DIR --config.data.path=cifar10.zip
           python -m mscm.main --config=configs/cifar10_teacher.py:small --workdir=DIR --config.data.path=cifar10.zip
Hardware:  one GPU; small: two CPU cores
Cost:      100,000 steps of 512 images; the time is not measured yet
Expected:  fd_classifier not measured yet; the papers have no CIFAR-10 result
"""

from configs import cifar10


def get_config(variant=""):
    return cifar10.teacher(variant=variant)
