"""Checks on this machine that the metrics give what is known.

  python -m mscm.metrics.selfcheck
  python -m mscm.metrics.selfcheck --network=inception

Distances between Gaussians whose distance is a formula, real images against themselves, and, with --network, that the
converted weights give here what they gave where they were converted. Prints what it compared; ends with status 1 where
something is not as expected.
"""

import sys

from absl import flags

from mscm import cli

NETWORK = flags.DEFINE_string("network", None, "Check the weights of this network too: inception, dinov2 or lpips.")
WEIGHTS = flags.DEFINE_string("weights", None, "Their file. Default: where mscm.metrics.convert writes it.")
DIM = 256  # of the Gaussians


def main() -> None:
    """Compares, prints, ends."""
    from mscm.config import ConfigError  # here and not above: --help must not wait for jax
    from mscm.metrics import weights
    from mscm.report import table

    if WEIGHTS.value is not None and not NETWORK.value:
        raise ConfigError(f"--weights: got {WEIGHTS.value}, expected it with --network only: whose weights are they?")
    of_weights = []
    if NETWORK.value:  # first, because it may be refused
        if NETWORK.value not in weights.NETWORKS:
            raise ConfigError(f"--network: got {NETWORK.value!r}, expected one of {', '.join(weights.NETWORKS)}")
        try:
            of_weights = _weights(NETWORK.value, WEIGHTS.value or weights.default_path(NETWORK.value))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    checks = [*_gaussians(), *_real_images(), *of_weights]
    failed = [what for what, got, expected, tolerance in checks if not abs(got - expected) <= tolerance]
    rows = [
        [what, f"{got:.6g}", f"{expected:.6g}", f"{tolerance:.1g}", "no" if what in failed else "yes"]
        for what, got, expected, tolerance in checks
    ]
    print(table.format_table(["check", "got", "expected", "within", "as expected"], rows), flush=True)
    if failed:
        print(f"error: {len(failed)} of {len(checks)} checks failed", file=sys.stderr)
        sys.exit(1)


def _gaussians() -> list[tuple[str, float, float, float]]:
    """Frechet distances that are formulas: what, got, expected, tolerance."""
    import numpy as np

    from mscm.metrics import moments
    from mscm.metrics.frechet import frechet_distance

    rng = np.random.RandomState(0)
    basis, _ = np.linalg.qr(rng.standard_normal((DIM, DIM)))
    variances = [rng.uniform(0.1, 2.0, DIM) for _ in range(2)]
    a, b = (moments.Moments(1000, np.zeros(DIM), (basis * v) @ basis.T) for v in variances)
    shifted = a._replace(mean=np.full(DIM, 0.5))
    of_commuting = float(np.square(np.sqrt(variances[0]) - np.sqrt(variances[1])).sum())
    rows = rng.standard_normal((5000, DIM)) * np.sqrt(variances[0]) + 100.0
    streamed = moments.empty(DIM)
    for part in np.array_split(rows, 37):
        streamed = moments.add(streamed, part)
    return [
        ("Frechet distance to itself", frechet_distance(a, a), 0.0, 1e-6 * DIM),
        ("of a Gaussian shifted by 0.5 in 256 dimensions", frechet_distance(a, shifted), 0.25 * DIM, 1e-6 * DIM),
        ("of Gaussians with the same axes", frechet_distance(a, b), of_commuting, 1e-6 * DIM),
        ("37 batches against one", frechet_distance(streamed, moments.from_features(rows)), 0.0, 1e-6 * DIM),
    ]


def _real_images() -> list[tuple[str, float, float, float]]:
    """Handwritten digits against themselves, in features that need no weights: a random projection."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mscm.data import sources
    from mscm.metrics import reference_statistics, statistics
    from mscm.metrics.features import FeatureNetwork, Outputs

    matrix = np.random.RandomState(0).standard_normal((64, 32)).astype(np.float32)

    def forward(matrix: jax.Array, images: jax.Array) -> Outputs:
        rows = images.reshape(len(images), -1).astype(jnp.float32) / 255.0 @ matrix
        return Outputs(rows, probabilities=jnp.full((len(rows), 10), 0.1))

    network = FeatureNetwork("projection", "none", matrix, forward, batch_size=256)
    source = sources.open_source("digits", split="all")
    computed = reference_statistics.compute(source, network, batch_size=100).statistics
    again = reference_statistics.compute(source, network, batch_size=299).statistics
    scores = statistics.compare(computed, again, network="projection")
    return [
        ("real images against themselves: Frechet distance", scores["fd_projection"], 0.0, 1e-5),
        ("precision", scores["precision"], 1.0, 0.0),
        ("recall", scores["recall"], 1.0, 0.0),
        ("class score of equal predictions", scores["class_score"], 1.0, 1e-6),
    ]


def _weights(name: str, path: str) -> list[tuple[str, float, float, float]]:
    """Largest relative difference of each output from what it was where the file was made."""
    import numpy as np

    from mscm.metrics import weights

    outputs = weights.load(name, path)(weights.probe_images())._asdict()
    stored = weights.probe(name, path)
    return [
        (f"{name}: {part} as where it was converted", float(np.abs(outputs[part] - rows).max() / np.abs(rows).max()),
         0.0, 1e-3)
        for part, rows in stored.items()
    ]


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=())
