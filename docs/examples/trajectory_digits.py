"""Digits 8x8, distilled from whole trajectories of 16 steps, 1 step: configs/digits_cd1.py with another objective.

Command:   python -m mscm.main --config=trajectory_digits.py --workdir=DIR     (in docs/examples)
Hardware:  two CPU cores
"""

import trajectory  # noqa: F401  registers the objective

from configs import digits


def get_config():
    config = digits.student(student_steps=1, distil=True)
    config.name = "digits_trajectory"
    config.objective = dict(name="trajectory", teacher_steps=16, distance="v_mse", multiscale=None)
    return config
