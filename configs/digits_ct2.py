"""Digits 8x8, consistency training, 2 steps.

Command:   python -m mscm.main --config=configs/digits_ct2.py --workdir=DIR
Hardware:  two CPU cores
Cost:      minutes; trains the teacher (configs/digits_teacher.py) first unless config.teacher.workdir names one
Expected:  fd_classifier of the README's table, row CT, column 2
"""

from configs import digits


def get_config():
    return digits.student(student_steps=2, distil=False)
