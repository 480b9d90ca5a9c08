"""Digits 8x8, EDM's diffusion model, the teacher of TRACT's variant for it.

Command:   python -m mscm.main --config=configs/digits_edm.py --workdir=DIR
Hardware:  two CPU cores
Cost:      about as digits_teacher
Expected:  fd_classifier 1.41 with 256 steps of aDDIM (one seed)
"""

from configs import digits


def get_config():
    return digits.edm()
