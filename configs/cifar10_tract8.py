"""CIFAR-10, TRACT, 8 steps.

Command:   python -m mscm.main --config=configs/cifar10_tract8.py --workdir=DIR --config.data.path=cifar10.zip
           python -m mscm.main --config=configs/cifar10_tract8.py:small --workdir=DIR --config.data.path=cifar10.zip
Hardware:  one GPU; small: two CPU cores
Cost:      two phases of 50,000 steps of 512 images, after the teacher; the time is not measured yet
Expected:  fd_classifier not measured yet; no published result in as many steps is known to us
"""

from configs import cifar10


def get_config(variant=""):
    return cifar10.tract(student_steps=8, variant=variant)
