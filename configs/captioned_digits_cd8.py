"""Captioned digits 16x16, distillation of the guided teacher, 8 steps.

Command:   python -m mscm.main --config=configs/captioned_digits_cd8.py --workdir=DIR
Hardware:  two CPU cores
Cost:      2,400 steps of 32 images, 2.8 steps/s on one core; the teacher is trained first unless
           config.teacher.workdir names one
Expected:  caption_accuracy of the table of docs/howto/text.md
"""

from configs import captioned_digits


def get_config():
    return captioned_digits.student(student_steps=8)
