"""ImageNet 64x64, EDM's published network ADM, with classes.

Command:   python -m mscm.import_teacher --from=edm:edm-imagenet-64x64-cond-adm.pkl \
               --config=configs/edm_imagenet64_teacher.py --workdir=DIR
           python -m mscm.sample --config=configs/edm_imagenet64_teacher.py --workdir=DIR \
               --sampler=heun:grid=karras,s_churn=40,s_min=0.05,s_max=50,s_noise=1.003
           (from nothing: python -m mscm.main --config=configs/edm_imagenet64_teacher.py --workdir=DIR \
               --config.data.path=DATA)
Hardware:  one GPU for samples; 64 TPU v5e chips to train it
Cost:      of the import, a minute; of a training, 610,000 steps of 4,096 images, not measured
Expected:  FID 1.36 with that sampler in 256 steps (the paper's, arXiv:2206.00364; not reproduced here: the file is not
           on our machines)
"""

from configs import edm


def get_config():
    return edm.imagenet64_teacher()
