"""CIFAR-10, TRACT of EDM's published network, 1 step.

Command:   python -m mscm.main --config=configs/edm_cifar10_tract1.py --workdir=DIR --config.teacher.workdir=TEACHER
Hardware:  one GPU
Cost:      187,500 steps of 512 images; the time is not measured yet
Expected:  fd_classifier not measured yet; for uncond-ve, the paper's teacher, a Frechet distance with Inception of 3.78
           in its numbers (arXiv:2303.04248; not reproduced here)

TEACHER is the work directory of the import (configs/edm_cifar10_teacher.py); variants as there. What is distilled from
EDM's networks is under their licence, CC BY-NC-SA 4.0.
"""

from configs import edm


def get_config(variant=""):
    return edm.cifar10_tract(variant=variant)
