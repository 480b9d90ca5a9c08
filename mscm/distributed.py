"""Several processes, one program: start-up, who writes, and an error that ends all of them.

Each process of a run executes the same command. They find each other through a coordinator, process 0, whose address
is what `--distributed` names or what the platform tells.
"""

import atexit
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax._src.distributed import global_state  # the only way to the coordinator's key-value store
from jax.experimental import multihost_utils

from mscm import lease
from mscm.config import ConfigError

_KEY = "mscm/error"
_POLL_SECONDS = 1.0
_BARRIER_MILLISECONDS = 24 * 3600 * 1000  # a process that fails ends the others, so that none waits in vain
_barriers, _agreements = itertools.count(), itertools.count()


def start(where: str) -> None:
    """Joins the other processes; returns when all are there.

    Args:
      where: `auto` (TPU pod, SLURM, Kubernetes and Open MPI say it), or HOST:PORT,PROCESSES,INDEX.

    Raises:
      ConfigError: neither, or the platform says nothing.
    """
    if where == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ConfigError(
                f"--distributed: got 'auto', and the platform does not say who is there ({error}); "
                "expected HOST:PORT,PROCESSES,INDEX"
            ) from error
    else:
        address, count, index = _parse(where)
        jax.distributed.initialize(address, count, index)
    if not is_main():
        logging.set_verbosity(logging.WARNING)
    _listen()


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def barrier() -> None:
    """Waits until all processes are here; they call it in the same order."""
    if jax.process_count() > 1:
        global_state.client.wait_at_barrier(f"mscm/barrier/{next(_barriers)}", _BARRIER_MILLISECONDS)


def agree(value: Any) -> Any:
    """The main process's `value`, which JSON can hold, in all of them; they call it in the same order."""
    if jax.process_count() == 1:
        return value
    key = f"mscm/agreed/{next(_agreements)}"
    if is_main():
        global_state.client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(global_state.client.blocking_key_value_get(key, _BARRIER_MILLISECONDS))


def everyone(yes: bool) -> bool:
    """Whether all processes say yes; they call it in the same order."""
    if jax.process_count() == 1:
        return yes
    vote = f"mscm/vote/{next(_agreements)}"
    global_state.client.key_value_set(f"{vote}/{jax.process_index()}", json.dumps(yes))
    voters = range(jax.process_count())
    return all([
        json.loads(global_state.client.blocking_key_value_get(f"{vote}/{i}", _BARRIER_MILLISECONDS)) for i in voters
    ])


def gathered(load: Callable[[np.ndarray], np.ndarray], indices: np.ndarray) -> np.ndarray:
    """`load(indices)`, of which each process loads its share, whole in all of them; they call it in the same order."""
    count = jax.process_count()
    if count == 1:
        return load(indices)
    shares = np.resize(indices, (count, -(-len(indices) // count)))  # of equal size: begins again to fill the last
    rows = multihost_utils.process_allgather(load(shares[jax.process_index()]))
    return rows.reshape(-1, *rows.shape[2:])[: len(indices)]


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The block runs in the main process, and when that is done in the others: they find what it has written."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


@contextlib.contextmanager
def holding(path: str | os.PathLike, what: str, *, wait: bool = False) -> Iterator[Callable[[], None]]:
    """`lease.holding` by the main process for all; gives what raises LeaseError when another has taken over."""
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(lease.holding(path, what, wait=wait)) if is_main() else None
        barrier()  # one that is refused has not been overtaken by the others
        yield held.check if held else lambda: None  # the others write nothing


def end_all(sentence: str, status: int) -> None:
    """Tells the other processes why this one ends, and ends it, all with `status`; alone, it does nothing."""
    if global_state.client is None or jax.process_count() == 1:
        return
    message = f"process {jax.process_index()} of {jax.process_count()}: {' '.join(sentence.split())}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
        global_state.client.key_value_set(_KEY, f"{status} {message}")
        time.sleep(3 * _POLL_SECONDS)  # the others read it from process 0, which may be this one
    os._exit(status)  # not sys.exit, which would wait for the others at a barrier


def _parse(where: str) -> tuple[str, int, int]:
    parts = where.split(",")
    numbers = [int(part) for part in parts[1:] if part.isdecimal()]
    port = parts[0].rpartition(":")[2]
    has_port = ":" in parts[0] and port.isdecimal() and 0 < int(port) < 2**16
    if len(parts) != 3 or len(numbers) != 2 or not has_port or not numbers[1] < numbers[0]:
        raise ConfigError(
            f"--distributed: got {where!r}, expected auto, or HOST:PORT,PROCESSES,INDEX such as 10.0.0.1:1234,2,0 with "
            "an index below the number of processes"
        )
    return parts[0], numbers[0], numbers[1]


def _listen() -> None:
    """Ends this process when another one says why it ends."""
    stop, client = threading.Event(), global_state.client

    def wait() -> None:
        while not stop.is_set():
            try:
                message = client.blocking_key_value_get(_KEY, int(1000 * _POLL_SECONDS))
            except jax.errors.JaxRuntimeError:  # nobody has said anything
                continue
            status, message = message.split(" ", 1)
            print(f"error: {message}", file=sys.stderr, flush=True)
            os._exit(int(status))

    thread = threading.Thread(target=wait, daemon=True)

    def end() -> None:
        stop.set()
        thread.join()

    atexit.register(end)  # before jax takes the client away
    thread.start()
