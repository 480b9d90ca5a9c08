"""Makes reference statistics: what the images of a run are measured against.

  python -m mscm.metrics.reference --config=configs/imagenet64_cd8.py --config.data.path=DIR --output=imagenet64.npz
  python -m mscm.metrics.reference --config=configs/imagenet64_cd8.py --import=VIRTUAL_imagenet64.npz \\
      --count=1281167 --output=imagenet64_adm.npz

From the data of a config, under its config.eval (network, reference_split); or from an .npz of ADM's evaluation or of
pytorch-fid, which does not hold the number of its images (--count) nor how they were resized (--transform, where you
know it). The result says data set, split, transform, resolution, count and network, and mscm.eval refuses it for other
images: --config.eval.reference=imagenet64.npz. Killed, it continues where it was.
"""

from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from mscm import cli, failures, process_flags

if TYPE_CHECKING:
    from mscm.metrics.reference_statistics import Reference

flags.adopt_module_key_flags(process_flags)  # so that --help lists it

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/imagenet64_cd8.py.")
OUTPUT = flags.DEFINE_string("output", None, "File to write, .npz.")
IMPORT = flags.DEFINE_string("import", None, "File of ADM's or pytorch-fid's form to take the statistics from.")
COUNT = flags.DEFINE_integer("count", None, "Number of images behind an imported file.", lower_bound=2)
TRANSFORM = flags.DEFINE_string("transform", None, "How the images behind an imported file were resized, if known.")


def main() -> None:
    """Computes or imports, and writes."""
    import os  # here and not above: --help must not wait for jax

    from mscm import evaluation
    from mscm.config import ConfigError
    from mscm.experiment import build
    from mscm.metrics import reference_statistics

    for flag in (COUNT, TRANSFORM):
        if IMPORT.value is None and flag.value is not None:
            raise ConfigError(
                f"--{flag.name}: got {flag.value}, expected it with --import only: the config's data say it themselves"
            )
    if IMPORT.value is not None and COUNT.value is None:
        raise ConfigError("--count: got none, expected the number of images behind the imported file")
    output = cli.output_of(OUTPUT)
    process_flags.start()
    experiment = build(CONFIG.value)
    try:
        network = evaluation.make_network(experiment, os.path.dirname(output))
        if IMPORT.value is None:
            with evaluation.computed_reference(experiment, network, f"{output}.partial.npz") as reference:
                _write(reference, output)
        else:
            unknown = {"transform": TRANSFORM.value, "count": COUNT.value, "fingerprint": None}
            facts = evaluation.reference_facts(experiment) | unknown
            reference = reference_statistics.import_npz(IMPORT.value, facts, network, num_kept=experiment.eval.num_kept)
            _write(reference, output)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:  # of the data, or of what is kept on the way
        if error.errno in (*failures.CANNOT_WRITE, *failures.TRANSIENT):  # the machine's, which has exit codes
            raise
        raise ConfigError(f"{error.filename or output}: {error.strerror or error}") from error


def _write(reference: "Reference", output: str) -> None:
    """By one process, and says so."""
    from mscm import distributed
    from mscm.metrics import reference_statistics

    if not distributed.is_main():
        return
    reference_statistics.save(output, reference)
    network = reference.network
    print(f"{reference}, features of {network['name']} {network['fingerprint'][:12]}: {output}", flush=True)


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=("config", "output"))
