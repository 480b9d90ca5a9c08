"""Digits 8x8, improved consistency training (iCT), one step or more by re-noising.

Command:   python -m mscm.main --config=configs/digits_ict.py --workdir=DIR
Hardware:  two CPU cores
Cost:      about two minutes; it needs no teacher
Expected:  fd_classifier of the README, section Results
"""

from configs import digits


def get_config():
    return digits.improved_consistency_training()
