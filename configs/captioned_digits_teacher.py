"""Captioned digits 16x16, the diffusion model, to be guided.

Command:   python -m mscm.main --config=configs/captioned_digits_teacher.py --workdir=DIR
Hardware:  two CPU cores
Cost:      6,000 steps of 32 images; the time is not measured yet with these settings
Expected:  caption_accuracy not measured yet with these settings
"""

from configs import captioned_digits


def get_config():
    return captioned_digits.teacher()
