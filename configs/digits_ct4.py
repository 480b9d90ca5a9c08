"""Digits 8x8, consistency training, 4 steps.

Command:   python -m mscm.main --config=configs/digits_ct4.py --workdir=DIR
Hardware:  two CPU cores
Cost:      4 to 5 minutes, half of them the teacher (--config.teacher.workdir=DIR reuses one)
Expected:  fd_classifier of the README, section Results
"""

from configs import digits


def get_config():
    return digits.student(student_steps=4, distil=False)
