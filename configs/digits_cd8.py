"""Digits 8x8, consistency distillation, 8 steps.

Command:   python -m mscm.main --config=configs/digits_cd8.py --workdir=DIR
Hardware:  two CPU cores
Cost:      4 to 5 minutes, half of them the teacher (--config.teacher.workdir=DIR reuses one)
Expected:  fd_classifier of the README, section Results
"""

from configs import digits


def get_config():
    return digits.student(student_steps=8, distil=True)
