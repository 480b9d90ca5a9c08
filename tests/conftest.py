"""Settings of the whole test suite, made before jax and mscm are imported; child processes inherit the environment."""

import os
import platform
from pathlib import Path

# The suite is for the CPU, also on a machine with an accelerator. One device: eight virtual ones slow small tests down.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the suite's time, and a second run finds it done. The cache is per user, so that nobody loads
# another's code, and per host, because code compiled for one CPU may not run on another that shares the home directory.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mscm" / f"jax-tests-{platform.node()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Shapes in signatures are checked in tests only; the hook sees nothing that was imported before it. It stays installed.
install_import_hook("mscm", "beartype.beartype")

# "b" times "b 1 1 1" must be a mistake, not a "b 1 1 b".
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Gives the test float64, for identities that float32 cannot tell from a bug."""
    with jax.enable_x64(True):
        yield
