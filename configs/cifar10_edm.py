"""CIFAR-10, EDM's diffusion model, the teacher of TRACT's variant for it.

Command:   python -m mscm.main --config=configs/cifar10_edm.py --workdir=DIR --config.data.path=cifar10.zip
           python -m mscm.main --config=configs/cifar10_edm.py:small --workdir=DIR --config.data.path=cifar10.zip
Hardware:  one GPU; small: two CPU cores
Cost:      100,000 steps of 512 images; the time is not measured yet
Expected:  fd_classifier not measured yet; the paper's network has a Frechet distance with Inception of 1.79
           in 18 steps of Heun (arXiv:2206.00364; not reproduced here: this is our U-ViT)
"""

from configs import cifar10


def get_config(variant=""):
    return cifar10.edm(variant=variant)
