"""Digits 8x8, the diffusion model that the digits students start from.

Command:   python -m mscm.main --config=configs/digits_teacher.py --workdir=DIR
Hardware:  two CPU cores
Cost:      minutes
Expected:  fd_classifier of the README's table, the teacher's row
"""

from configs import digits


def get_config():
    return digits.teacher()
