"""Configurations: one file per run, read by path (`--config=configs/digits_cd4.py`).

`digits.py`, `cifar10.py` and `imagenet.py` hold the literals of a family; every other file names one run, states only
its differences, and is headed by its command, hardware, cost and expected result. The named files import their family
from this package, which Python finds from any directory once mscm is installed, and from the root of a checkout
otherwise.
"""
