"""The flag of the commands that may run as several processes."""

from absl import flags

DISTRIBUTED = flags.DEFINE_string(
    "distributed", None, "One of several processes: auto (TPU pod, SLURM, Kubernetes), or HOST:PORT,PROCESSES,INDEX."
)


def start() -> None:
    """Finds the others, where the flag says that there are some.

    Raises:
      ConfigError: as `distributed.start`.
    """
    from mscm import distributed  # here and not above: --help must not wait for jax

    if DISTRIBUTED.value:
        distributed.start(DISTRIBUTED.value)
