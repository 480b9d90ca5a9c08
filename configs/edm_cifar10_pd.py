"""CIFAR-10, progressive distillation of EDM's published network, 1,024 steps to 1.

Command:   python -m mscm.main --config=configs/edm_cifar10_pd.py --workdir=DIR --config.teacher.workdir=TEACHER
Hardware:  one GPU
Cost:      ten phases of 10,000 steps, the last two of 20,000, of 512 images; the time is not measured yet
Expected:  fd_classifier not measured yet

TEACHER is the work directory of the import (configs/edm_cifar10_teacher.py); variants as there. What is distilled from
EDM's networks is under their licence, CC BY-NC-SA 4.0.
"""

from configs import edm


def get_config(variant=""):
    return edm.cifar10_progressive(variant=variant)
