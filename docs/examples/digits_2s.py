"""The teacher of the digits, configs/digits_teacher.py, for commands that should know DPM-Solver++(2S)."""

import dpm_solver_pp_2s  # noqa: F401  registers the sampler

from configs import digits


def get_config():
    return digits.teacher()
