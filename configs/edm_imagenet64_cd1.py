"""ImageNet 64x64, consistency distillation of EDM's published network, 1 step.

Command:   python -m mscm.main --config=configs/edm_imagenet64_cd1.py --workdir=DIR --config.teacher.workdir=TEACHER \
               --config.data.path=DATA
Hardware:  64 TPU v5e chips
Cost:      200,000 steps of 2,048 images; the time is not measured yet
Expected:  FID not measured yet; that of the paper's (arXiv:2403.06807v3) own teacher and U-ViT is in
           configs/imagenet64_cd1.py (not reproduced here)

TEACHER is the work directory of the import (configs/edm_imagenet64_teacher.py). What is distilled from EDM's networks
is under their licence, CC BY-NC-SA 4.0.
"""

from configs import edm


def get_config():
    return edm.imagenet64_student(student_steps=1)
