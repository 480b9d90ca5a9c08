"""Captioned digits 16x16, the diffusion model."""

from configs import captioned_digits


def get_config():
    return captioned_digits.teacher()
