"""Text to image, 512x512, guidance alone is distilled.

Command:   python -m mscm.main --config=configs/t2i512_cd256.py --workdir=DIR --config.data.path=DATA
           python -m mscm.main --config=configs/t2i512_cd256.py:high --workdir=DIR --config.data.path=DATA
Hardware:  256 TPU v5e chips (the paper's)
Cost:      about 12 hours at 0.71 steps/s (the paper's rate), after the teacher (configs/t2i512_teacher.py), which is
           trained first unless config.teacher.workdir names one
Expected:  FID of 30,000 images 8.2 and CLIP score .300; high: 13.9 and .312 (the paper's,
           arXiv:2403.06807v3 Table 6, on its own data; not reproduced here)
"""

from configs import t2i512


def get_config(variant=""):
    return t2i512.student(student_steps=256, variant=variant)
