"""CIFAR-10, EDM's published networks DDPM++ (vp) and NCSN++ (ve), with and without classes.

Command:   python -m mscm.import_teacher --from=edm:edm-cifar10-32x32-cond-vp.pkl \
               --config=configs/edm_cifar10_teacher.py --workdir=DIR
           python -m mscm.import_teacher --from=edm:edm-cifar10-32x32-uncond-ve.pkl \
               --config=configs/edm_cifar10_teacher.py:uncond-ve --workdir=DIR
           python -m mscm.sample --config=configs/edm_cifar10_teacher.py --workdir=DIR
           (from nothing: python -m mscm.main --config=configs/edm_cifar10_teacher.py --workdir=DIR)
Hardware:  one GPU
Cost:      of the import, seconds; of a training, 390,000 steps of 512 images, not measured
Expected:  fd_classifier not measured; a Frechet distance with Inception of 1.79 (cond-vp), in the paper's numbers, with
           18 steps of Heun (arXiv:2206.00364; not reproduced here: the files are not on our machines)
"""

from configs import edm


def get_config(variant=""):
    return edm.cifar10_teacher(variant=variant)
