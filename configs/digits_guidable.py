"""Digits 8x8, the diffusion model with dropped labels that guidance needs.

Command:   python -m mscm.main --config=configs/digits_guidable.py --workdir=DIR
Hardware:  two CPU cores
Cost:      as digits_teacher
Expected:  fd_classifier of the README, section Results
"""

from configs import digits


def get_config():
    return digits.guidable()
