"""Digits 8x8, TRACT of EDM's model, 1 step.

Command:   python -m mscm.main --config=configs/digits_tract_edm1.py --workdir=DIR
Hardware:  two CPU cores
Cost:      about three minutes, after the teacher (configs/digits_edm.py)
Expected:  fd_classifier 19.4 in one step (one seed)
"""

from configs import digits


def get_config():
    return digits.tract_of_edm(student_steps=1)
