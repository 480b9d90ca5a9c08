"""Text to image, 512x512, consistency distillation, 4 steps.

Command:   python -m mscm.main --config=configs/t2i512_cd4.py --workdir=DIR --config.data.path=DATA
           python -m mscm.main --config=configs/t2i512_cd4.py:high --workdir=DIR --config.data.path=DATA
Hardware:  256 TPU v5e chips (the paper's)
Cost:      about 12 hours at 0.71 steps/s (the paper's rate), after the teacher (configs/t2i512_teacher.py), which is
           trained first unless config.teacher.workdir names one
Expected:  FID of 30,000 images 8.7 and CLIP score .298; high: 12.4 and .311 (the paper's,
           arXiv:2403.06807v3 Table 6, on its own data; not reproduced here)
"""

from configs import t2i512


def get_config(variant=""):
    return t2i512.student(student_steps=4, variant=variant)
