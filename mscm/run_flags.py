"""Flags of the commands that work on a run: which config, and where."""

from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/digits_cd4.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, logs, scores, pictures.")
REQUIRED = ("config", "workdir")
