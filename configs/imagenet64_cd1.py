"""ImageNet 64x64, consistency distillation, 1 step.

Command:   python -m mscm.main --config=configs/imagenet64_cd1.py --workdir=DIR --config.data.path=DATA
           python -m mscm.main --config=configs/imagenet64_cd1.py:large --workdir=DIR --config.data.path=DATA
Hardware:  64 TPU v5e chips; large: 256 (the paper's)
Cost:      about 22 hours at 2.5 steps/s; large: about 22 hours at 2.5 steps/s (the paper's rates), after the teacher
           (configs/imagenet64_teacher.py), which is trained first unless config.teacher.workdir names one
Expected:  FID 4.3; large: 3.2 (the paper's, arXiv:2403.06807v3 Table 1; not reproduced here)
"""

from configs import imagenet


def get_config(variant=""):
    return imagenet.student(resolution=64, student_steps=1, distil=True, variant=variant)
