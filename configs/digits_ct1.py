"""Digits 8x8, consistency training, 1 step.

Command:   python -m mscm.main --config=configs/digits_ct1.py --workdir=DIR
Hardware:  two CPU cores
Cost:      4 to 5 minutes, half of them the teacher (--config.teacher.workdir=DIR reuses one)
Expected:  fd_classifier of the README, section Results
"""

from configs import digits


def get_config():
    return digits.student(student_steps=1, distil=False)
