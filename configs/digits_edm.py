"""Digits 8x8, EDM's diffusion model, the teacher of TRACT's variant for it.

Command:   python -m mscm.main --config=configs/digits_edm.py --workdir=DIR
Hardware:  two CPU cores
Cost:      about as digits_teacher
Expected:  fd_classifier 1.33 with 32 steps of Heun (NFE 63), 5.18 with 4 (NFE 7), one seed
"""

from configs import digits


def get_config():
    return digits.edm()
