"""ImageNet 64x64, consistency training, 4 steps.

Command:   python -m mscm.main --config=configs/imagenet64_ct4.py --workdir=DIR --config.data.path=DATA
           python -m mscm.main --config=configs/imagenet64_ct4.py:large --workdir=DIR --config.data.path=DATA
Hardware:  64 TPU v5e chips; large: 256 (the paper's)
Cost:      about 21 hours at 2.7 steps/s; large: about 19 hours at 2.9 steps/s (the paper's rates), after the teacher
           (configs/imagenet64_teacher.py), which is trained first unless config.teacher.workdir names one
Expected:  FID 1.8; large: 1.6 (the paper's, arXiv:2403.06807v3 Table 1; not reproduced here)
"""

from configs import imagenet


def get_config(variant=""):
    return imagenet.student(resolution=64, student_steps=4, distil=False, variant=variant)
