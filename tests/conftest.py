"""Settings of the whole test suite, made before jax and mscm are imported; child processes inherit the environment."""

import os
import platform
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

# The suite is for the CPU, also on a machine with an accelerator. One device: eight virtual ones slow small tests down.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the suite's time, and a second run finds it done. The cache is per user, so that nobody loads
# another's code, and per host, because code compiled for one CPU may not run on another that shares the home directory.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mscm" / f"jax-tests-{platform.node()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # most are small, and of several processes
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Thousands of small programs that run a few times: optimising them would take half of the suite's time, as would the
# newer code generator of fusions. Tests of numbers hold at any level, and what runs long is no test.
# Of the three only the last is an extra option: as a flag of its own, newer versions of jaxlib do not start with it.
_QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)
os.environ.setdefault("XLA_FLAGS", " ".join(_QUICK))

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Shapes in signatures are checked in tests only; the hook sees nothing that was imported before it. It stays installed.
install_import_hook("mscm", "beartype.beartype")

# "b" times "b 1 1 1" must be a mistake, not a "b 1 1 b".
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: at the end one worker would be busy with them and the others idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def x64():
    """Gives the test float64, for identities that float32 cannot tell from a bug."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def run_together():
    """Runs commands at the same time; WHERE in their words becomes who they are, as `--distributed` takes it."""

    def run(*commands: Sequence[str], **env: str) -> list[tuple[int, str, str]]:
        """Exit code, output and errors of each."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        root = Path(__file__).resolve().parents[1]
        env = os.environ | {"PYTHONPATH": str(root)} | env
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = []
        try:
            for i, command in enumerate(commands):
                words = [word.replace("WHERE", f"{address},{len(commands)},{i}") for word in command]
                processes.append(subprocess.Popen(words, cwd=root, env=env, **pipes))
            outputs = [process.communicate(timeout=900) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]

    return run
