"""Converts the weights of a feature network, once, from the file that people have to one that is safe to read.

  python -m mscm.metrics.convert --network=inception --source=pt_inception-2015-12-05-6726825d.pth
  python -m mscm.metrics.convert --network=lpips --source=vgg16-397923af.pth,vgg.pth

Reads files of PyTorch's (pytorch-fid's weights, NVIDIA's TorchScript inception-2015-12-05.pt, DINOv2's weights; for
LPIPS torchvision's VGG16 and the project's own) without PyTorch and without executing what may be in them. Writes
arrays with a SHA-256, which is checked whenever they are read and recorded with every score. Nothing is downloaded.
"""

from absl import flags

from mscm import cli

NETWORK = flags.DEFINE_string("network", "inception", "inception, dinov2 or lpips.")
SOURCE = flags.DEFINE_list("source", None, "The file, or files with commas between them.")
OUTPUT = flags.DEFINE_string("output", None, "File to write. Default: ~/.cache/mscm/NETWORK.npz.")


def main() -> None:
    """Converts, and says what it read and wrote."""
    from mscm.config import ConfigError  # here and not above: --help must not wait for jax
    from mscm.metrics import weights

    if NETWORK.value not in weights.NETWORKS:
        raise ConfigError(f"--network: got {NETWORK.value!r}, expected one of {', '.join(weights.NETWORKS)}")
    output = weights.default_path(NETWORK.value) if OUTPUT.value is None else cli.output_of(OUTPUT)
    try:
        card = weights.convert(NETWORK.value, cli.given(SOURCE), output)
    except ValueError as error:
        raise ConfigError(f"--source: {error}") from error
    except OSError as error:
        raise ConfigError(f"--output: {output}: {error.strerror or error}") from error
    parts = zip(*(card[key].split(", ") for key in ("source", "source_sha256")), strict=True)
    read = ", ".join(f"{name} (SHA-256 {digest[:12]}...)" for name, digest in parts)
    print(f"{card['network']} from {read}: {output}, weights {card['weights_sha256'][:12]}...")


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=("source",))
