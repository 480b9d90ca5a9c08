"""Digits 8x8, guided distillation: a diffusion model with the weight of guidance as an input.

Command:   python -m mscm.main --config=configs/digits_guided.py --workdir=DIR
Hardware:  two CPU cores
Cost:      about two minutes after the teacher (configs/digits_guidable.py)
Expected:  fd_classifier of the README, section Results
"""

from configs import digits


def get_config():
    return digits.guided()
