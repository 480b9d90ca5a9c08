"""Digits 8x8, consistency distillation of the guided model, 4 steps and any weight of guidance.

Command:   python -m mscm.main --config=configs/digits_guided_cd4.py --workdir=DIR
Hardware:  two CPU cores
Cost:      as digits_cd4, after the guided model and its teacher
Expected:  fd_classifier 2.36 at the weight 0 (one seed)
"""

from configs import digits


def get_config():
    return digits.guided_student(student_steps=4)
