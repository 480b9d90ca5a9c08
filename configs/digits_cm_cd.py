"""Digits 8x8, a consistency model distilled from the teacher (CM), one step or more by re-noising.

Command:   python -m mscm.main --config=configs/digits_cm_cd.py --workdir=DIR
Hardware:  two CPU cores
Cost:      about two minutes after the teacher
Expected:  fd_classifier of the README, section Results
"""

from configs import digits


def get_config():
    return digits.consistency_distillation()
