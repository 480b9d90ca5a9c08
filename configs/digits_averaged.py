"""Digits 8x8, the diffusion model with power-function averages of its parameters, for --ema of mscm.eval.

Command:   python -m mscm.main --config=configs/digits_averaged.py --workdir=DIR
Hardware:  two CPU cores
Cost:      as digits_teacher, and 43 MB of snapshots
Expected:  fd_classifier of the table of docs/howto/averages.md
"""

from configs import digits


def get_config():
    return digits.averaged()
