"""Makes a teacher of a published network: a work directory that sampling, scoring and students take like any other.

  python -m mscm.import_teacher --from=edm:edm-cifar10-32x32-cond-vp.pkl --config=configs/edm_cifar10_teacher.py \\
      --workdir=DIR
  python -m mscm.main --config=configs/edm_cifar10_cd4.py --workdir=STUDENT --config.teacher.workdir=DIR

Nothing is downloaded, and nothing that stands in the file is run. What it says of its network must be what the config
says. The licence of the weights is printed, written to DIR/LICENCE and recorded in the checkpoint.
"""

from absl import flags

from mscm import cli, remote, run_flags

flags.adopt_module_key_flags(run_flags)  # so that --help lists them

FROM = flags.DEFINE_string(
    "from", None, "edm:FILE, where FILE is EDM's .pkl, or its state_dict() in a .pt, .pth or .npz."
)


def main() -> None:
    """Builds, checks, converts, writes."""
    from mscm import teachers  # here and not above: --help must not wait for jax
    from mscm.config import ConfigError
    from mscm.experiment import build

    origin, colon, path = cli.given(FROM).partition(":")
    if not colon or not path:
        raise ConfigError(f"--from: got {FROM.value!r}, expected ORIGIN:FILE, such as edm:FILE.pkl")
    if remote.is_url(path):
        raise ConfigError(f"--from: got {path!r}, expected a file on this machine: nothing is downloaded")
    workdir = cli.output_of(run_flags.WORKDIR, "folder")
    experiment = build(run_flags.CONFIG.value)
    notes = teachers.import_teacher(experiment, origin, path, workdir)
    print(f"{experiment.name} from {path}: {workdir}\n" + "\n".join(notes), flush=True)


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=("from", *run_flags.REQUIRED))
