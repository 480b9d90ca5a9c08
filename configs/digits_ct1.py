"""Digits 8x8, consistency training, 1 step.

Command:   python -m mscm.main --config=configs/digits_ct1.py --workdir=DIR
Hardware:  two CPU cores
Cost:      minutes; trains the teacher (configs/digits_teacher.py) first unless config.teacher.workdir names one
Expected:  fd_classifier of the README's table, row CT, column 1
"""

from configs import digits


def get_config():
    return digits.student(student_steps=1, distil=False)
