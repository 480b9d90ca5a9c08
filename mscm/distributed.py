"""Several processes, one program: start-up, who writes, and an error or a death that ends all of them.

Each process of a run executes the same command. They find each other through a coordinator, process 0, whose address
is what `--distributed` names or what the platform tells.
"""

import atexit
import contextlib
import itertools
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax._src.distributed import global_state  # the only way to the coordinator's key-value store
from jax.experimental import multihost_utils

from mscm import lease, processes
from mscm.config import ConfigError

_KEY = "mscm/error"
_ALIVE = "mscm/alive"
_POLL_SECONDS, _LAST = 1.0, 5  # that many polls later the main process ends, after the others
_ending = threading.Lock()  # of the thread that has something to say: one word, one status
# A process of which the main one has not heard for so long is dead. Less than the 100 s after which JAX ends those that
# are left with a stack trace, more than a machine stands still while it is moved. Where the main one is dead, it is JAX
# that ends the others: at once, or after its 100 s where the machine is gone too.
SILENT_SECONDS = 60.0
_DONE = "done"
_BARRIER_MILLISECONDS = 24 * 3600 * 1000  # a process that fails ends the others, so that none waits in vain
_barriers, _agreements = itertools.count(), itertools.count()


def start(where: str) -> None:
    """Joins the other processes; returns when all are there.

    Args:
      where: `auto` (TPU pod, SLURM, Kubernetes and Open MPI say it), or HOST:PORT,PROCESSES,INDEX.

    Raises:
      ConfigError: neither, the platform says nothing, or the port is not free.
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
        if index == 0:
            _refuse_taken_port(where, int(address.rpartition(":")[2]))
        jax.distributed.initialize(address, count, index)
    if not is_main():
        logging.set_verbosity(logging.WARNING)
    _listen()


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def hardware() -> str:
    """The devices of all processes, and where this one runs."""
    devices = jax.devices()
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return (
        f"{len(devices)} x {devices[0].device_kind}{processes}, {os.cpu_count()} CPU cores, {platform.node()}, "
        f"jax {jax.__version__}"
    )


def _client() -> Any:
    """The connection of JAX to the other processes."""
    if global_state.client is None:
        raise RuntimeError("got no connection to other processes, expected jax.distributed to have been started")
    return global_state.client


def _heeding_signals(wait: Callable[..., Any], *words: Any) -> Any:
    """What `wait` gives, called in another thread: a signal is not handled while the main one waits in C++."""
    return processes.in_thread(wait, *words).result()


def barrier() -> None:
    """Waits until all processes are here; they call it in the same order."""
    if jax.process_count() > 1:
        _heeding_signals(_client().wait_at_barrier, f"mscm/barrier/{next(_barriers)}", _BARRIER_MILLISECONDS)


def _said(key: str) -> Any:
    """What a process has said or will say."""
    return json.loads(_heeding_signals(_client().blocking_key_value_get, key, _BARRIER_MILLISECONDS))


def agree(value: Any) -> Any:
    """The main process's `value`, which JSON can hold, in all of them; they call it in the same order."""
    if jax.process_count() == 1:
        return value
    key = f"mscm/agreed/{next(_agreements)}"
    if is_main():
        _client().key_value_set(key, json.dumps(value))
        return value
    return _said(key)


def everyone(yes: bool) -> bool:
    """Whether all processes say yes; they call it in the same order."""
    if jax.process_count() == 1:
        return yes
    vote = f"mscm/vote/{next(_agreements)}"
    _client().key_value_set(f"{vote}/{jax.process_index()}", json.dumps(yes))
    return all([_said(f"{vote}/{i}") for i in range(jax.process_count())])


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
    if threading.current_thread() is threading.main_thread():  # a second signal must not cut short what takes seconds
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    with _ending:
        print(f"error: {message}", file=sys.stderr, flush=True)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
            _client().key_value_set(_KEY, f"{status} {message}")
            _leave(status)
    time.sleep(_LAST * _POLL_SECONDS)  # what the other says ends this one
    os._exit(status)


def _leave(status: int) -> NoReturn:
    """Ends this process when the others know why: the main one last, from which they hear it.

    JAX aborts a process whose main one is gone.
    """
    time.sleep((_LAST if is_main() else 1) * _POLL_SECONDS)
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


def _refuse_taken_port(where: str, port: int) -> None:
    """The coordinator would listen to it on all addresses, and where it cannot, JAX dies of a segmentation fault."""
    dual = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if dual else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that a run has just left is free
        if dual:
            trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"--distributed: got {where!r}, whose port cannot be listened to ({error.strerror}), expected a free "
                "one: name another port in all processes, or end what uses this one"
            ) from error


class Watch:
    """Which of the other processes has shown no sign of life for `SILENT_SECONDS`."""

    def __init__(self, others: Iterable[int]):
        # The last sign of each, and since when it has been that.
        self._heard: dict[int, tuple[str | None, float]] = dict.fromkeys(others, (None, _now()))

    def silent(self, signs: Mapping[int, str]) -> int | None:
        """One of them, given what each has last said; those that are done need not say more."""
        now = _now()
        for i, (sign, _) in self._heard.items():
            if signs.get(i) != sign:
                self._heard[i] = signs.get(i), now
        late = (i for i, (sign, since) in self._heard.items() if sign != _DONE and now - since >= SILENT_SECONDS)
        return next(late, None)


_now = time.monotonic


def _listen() -> None:
    """Ends this process when another one says why it ends; the main one, when another is not heard of any more."""
    stop, client = threading.Event(), _client()
    watch = Watch(range(1, jax.process_count()))
    own = f"{_ALIVE}/{jax.process_index()}"

    def wait() -> None:
        for sign in itertools.count():
            try:
                message = client.blocking_key_value_get(_KEY, int(1000 * _POLL_SECONDS))
            except jax.errors.JaxRuntimeError:  # nobody has said anything
                if stop.is_set():
                    return
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # the main process is gone: JAX says so
                    client.key_value_set(own, str(sign), allow_overwrite=True)
                    if is_main():
                        end_with_the_silent(watch.silent(_signs(client)))
                continue
            status, message = message.split(" ", 1)
            with _ending:
                print(f"error: {message}", file=sys.stderr, flush=True)
                _leave(int(status))

    def end_with_the_silent(other: int | None) -> None:
        if other is not None:
            sentence = f"process {other} was not heard of for {SILENT_SECONDS:.0f} s: it was killed, or its machine"
            end_all(f"{sentence} is gone; run the same command again to continue", 1)

    thread = threading.Thread(target=wait, daemon=True)

    def end() -> None:
        stop.set()
        thread.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(own, _DONE, allow_overwrite=True)

    atexit.register(end)  # before jax takes the client away
    thread.start()


def _signs(client: Any) -> dict[int, str]:
    """What each process has last said, by its index."""
    return {int(key.rpartition("/")[2]): sign for key, sign in client.key_value_dir_get(_ALIVE)}
