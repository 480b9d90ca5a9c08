"""Captioned digits 16x16, 4 steps."""

from configs import captioned_digits


def get_config():
    return captioned_digits.student(student_steps=4)
