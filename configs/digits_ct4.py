"""Digits 8x8, consistency training, 4 steps.

Command:   python -m mscm.main --config=configs/digits_ct4.py --workdir=DIR
Hardware:  two CPU cores
Cost:      minutes; trains the teacher (configs/digits_teacher.py) first unless config.teacher.workdir names one
Expected:  fd_classifier of the README's table, row CT, column 4
"""

from configs import digits


def get_config():
    return digits.student(student_steps=4, distil=False)
