"""Digits 8x8, guided distillation: a diffusion model with the weight of guidance as an input.

Command:   python -m mscm.main --config=configs/digits_guided.py --workdir=DIR
Hardware:  two CPU cores
Cost:      about two minutes after the teacher (configs/digits_guidable.py)
Expected:  fd_classifier 1.79 with 256 steps of aDDIM, 5.51 with 4, at the weight 0 (one seed)
"""

from configs import digits


def get_config():
    return digits.guided()
