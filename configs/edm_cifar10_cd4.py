"""CIFAR-10, consistency distillation of EDM's published network, 4 steps.

Command:   python -m mscm.main --config=configs/edm_cifar10_cd4.py --workdir=DIR --config.teacher.workdir=TEACHER
           python -m mscm.main --config=configs/edm_cifar10_cd4.py:cond-ve --workdir=DIR \
               --config.teacher.workdir=TEACHER
Hardware:  one GPU
Cost:      100,000 steps of 512 images; the time is not measured yet
Expected:  fd_classifier not measured yet

TEACHER is the work directory of the import (configs/edm_cifar10_teacher.py); variants as there. What is distilled from
EDM's networks is under their licence, CC BY-NC-SA 4.0.
"""

from configs import edm


def get_config(variant=""):
    return edm.cifar10_student(student_steps=4, variant=variant)
