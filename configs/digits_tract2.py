"""Digits 8x8, TRACT, 2 steps.

Command:   python -m mscm.main --config=configs/digits_tract2.py --workdir=DIR
Hardware:  two CPU cores
Cost:      two phases of 1,200 steps, about a minute each, after the teacher
Expected:  fd_classifier of the README, section Results
"""

from configs import digits


def get_config():
    return digits.tract(student_steps=2)
