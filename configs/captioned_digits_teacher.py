"""Captioned digits 16x16, the diffusion model, to be guided.

Command:   python -m mscm.main --config=configs/captioned_digits_teacher.py --workdir=DIR
Hardware:  two CPU cores
Cost:      6 to 12 minutes, and the scores of 256 steps
Expected:  caption_accuracy 0.24, 0.32 with guidance (one seed, 500 images, 32 steps): it needs longer training
"""

from configs import captioned_digits


def get_config():
    return captioned_digits.teacher()
