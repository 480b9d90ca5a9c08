"""Digits 8x8, progressive distillation from 64 steps to 1: students of 32, 16, 8, 4 and 2 steps on the way.

Command:   python -m mscm.main --config=configs/digits_pd.py --workdir=DIR
Hardware:  two CPU cores
Cost:      six phases of 800 steps, about half a minute each, after the teacher
Expected:  fd_classifier of the README, section Results
"""

from configs import digits


def get_config():
    return digits.progressive()
