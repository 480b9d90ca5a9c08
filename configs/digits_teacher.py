"""Digits 8x8, the diffusion model that the digits students start from.

Command:   python -m mscm.main --config=configs/digits_teacher.py --workdir=DIR
Hardware:  two CPU cores
Cost:      a minute and a half to train, and as much again to score
Expected:  fd_classifier of the README, section Results
"""

from configs import digits


def get_config():
    return digits.teacher()
