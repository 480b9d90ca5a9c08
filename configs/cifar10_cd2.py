"""CIFAR-10, consistency distillation, 2 steps.

Command:   python -m mscm.main --config=configs/cifar10_cd2.py --workdir=DIR --config.data.path=cifar10.zip
           python -m mscm.main --config=configs/cifar10_cd2.py:small --workdir=DIR --config.data.path=cifar10.zip
Hardware:  one GPU; small: two CPU cores
Cost:      100,000 steps of 512 images, and as many for the teacher; the time is not measured yet
Expected:  fd_classifier not measured yet; the papers have no CIFAR-10 result
"""

from configs import cifar10


def get_config(variant=""):
    return cifar10.student(student_steps=2, distil=True, variant=variant)
