"""Digits 8x8, consistency training, 8 steps.

Command:   python -m mscm.main --config=configs/digits_ct8.py --workdir=DIR
Hardware:  two CPU cores
Cost:      minutes; trains the teacher (configs/digits_teacher.py) first unless config.teacher.workdir names one
Expected:  fd_classifier of the README's table, row CT, column 8
"""

from configs import digits


def get_config():
    return digits.student(student_steps=8, distil=False)
