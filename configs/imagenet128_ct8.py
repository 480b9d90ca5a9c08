"""ImageNet 128x128, consistency training, 8 steps.

Command:   python -m mscm.main --config=configs/imagenet128_ct8.py --workdir=DIR --config.data.path=DATA
           python -m mscm.main --config=configs/imagenet128_ct8.py:large --workdir=DIR --config.data.path=DATA
Hardware:  64 TPU v5e chips; large: 256 (the paper's)
Cost:      about 25 hours at 2.2 steps/s; large: about 25 hours at 2.2 steps/s (the paper's rates), after the teacher
           (configs/imagenet128_teacher.py), which is trained first unless config.teacher.workdir names one
Expected:  FID 3.3; large: 2.2 (the paper's, arXiv:2403.06807v3 Table 1; not reproduced here)
"""

from configs import imagenet


def get_config(variant=""):
    return imagenet.student(resolution=128, student_steps=8, distil=False, variant=variant)
