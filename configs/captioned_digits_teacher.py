"""Captioned digits 16x16, the diffusion model, to be guided.

Command:   python -m mscm.main --config=configs/captioned_digits_teacher.py --workdir=DIR
Hardware:  two CPU cores
Cost:      6,000 steps of 32 images, about 8 steps/s; scored at 256 steps with guidance, which is another 10 minutes
Expected:  caption_accuracy of the table of docs/howto/text.md
"""

from configs import captioned_digits


def get_config():
    return captioned_digits.teacher()
