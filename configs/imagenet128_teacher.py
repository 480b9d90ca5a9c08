"""ImageNet 128x128, the diffusion model that the ImageNet 128 students start from.

Command:   python -m mscm.main --config=configs/imagenet128_teacher.py --workdir=DIR --config.data.path=DATA
           python -m mscm.main --config=configs/imagenet128_teacher.py:large --workdir=DIR --config.data.path=DATA
Hardware:  64 TPU v5e chips; large: 256 (the paper's for the students; it gives none for the teacher)
Cost:      about 49 hours; large: about 46 hours (estimates: the students' rates in the paper, scaled by the count of
           network evaluations in a step)
Expected:  FID 2.2; large: 2.2 with aDDIM in 512 steps (the paper's, arXiv:2403.06807v3 Table 1; not reproduced here),
           with classifier-free guidance of a weight that the paper does not give: --sampler=addim:guidance=...
"""

from configs import imagenet


def get_config(variant=""):
    return imagenet.teacher(resolution=128, variant=variant)
