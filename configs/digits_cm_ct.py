"""Digits 8x8, a consistency model trained on the data alone (CM), one step or more by re-noising.

Command:   python -m mscm.main --config=configs/digits_cm_ct.py --workdir=DIR
Hardware:  two CPU cores
Cost:      about two minutes; it needs no teacher
Expected:  fd_classifier of the README, section Results
"""

from configs import digits


def get_config():
    return digits.consistency_training()
