"""A run of the digits with a tiny network and eight steps, for tests of what happens to runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mscm import lease, training_loop
from mscm.config import load_config
from mscm.experiment import build

CONFIG = """
from configs import digits


def get_config():
    config = digits.teacher()
    config.model.middle.update(dict(width=16, num_blocks=1))
    config.model.update(dict(head_dim=16, emb_dim=16))
    config.optimizer.warmup_steps = 2
    config.train.update(
        dict(num_steps=8, batch_size=8, steps_per_dispatch=2, log_every_steps=2, save_every_steps=4)
    )
    config.eval.update(dict(num_images=20, batch_size=20, teacher_steps=(1,), at_end=False))
    return config
"""


def hurry(patch: pytest.MonkeyPatch) -> None:
    """In this process: no pause after a lease is taken, and no pictures at the end."""
    patch.setattr(lease, "_SETTLE_SECONDS", 0.0)
    patch.setattr(training_loop, "finish", lambda *_: None)


def train(root: Path) -> SimpleNamespace:
    """A config file, its experiment, and the work directory of a run of it that nothing interrupted."""
    file = root / "config.py"
    file.write_text(CONFIG)
    experiment = build(load_config(str(file)))
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        training_loop.run(experiment, str(root / "run"))
    return SimpleNamespace(file=str(file), experiment=experiment, workdir=root / "run")
