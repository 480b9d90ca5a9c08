"""All that the metrics need of a set of images, gathered in one pass over it, and the metrics.

    accumulator = Accumulator(len(images))
    for batch in batches:  # in order, of any sizes
        accumulator.add(network(batch))
    compare(accumulator.statistics(), reference, network="inception")  # {"fid": ..., "kid": ..., ...}
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Float64

from mscm.metrics import frechet, kernel, moments, neighbours
from mscm.metrics.features import Outputs, rows_of
from mscm.metrics.moments import Moments

SPLIT_SIZE = 5_000  # images of which each gives one Inception score; the score is their mean
NUM_KEPT = 10_000  # images whose features are kept, for precision, recall and the kernel distance


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What remains of a set of images."""

    features: Moments
    spatial: Moments | None  # None: the network has none, or an imported file
    class_sums: Float64[np.ndarray, "splits sums"] | None  # by split: images, sum of p log p, sum of p by class
    kept: Float32[np.ndarray, "n d"] | None  # features of some of the images, drawn at random
    alignment: Float64[np.ndarray, ""] | None = None  # with the captions, summed over the images

    def to_arrays(self) -> dict[str, np.ndarray]:
        """By name, as a file keeps them."""
        arrays = {"class_sums": self.class_sums, "kept": self.kept, "alignment": self.alignment}
        for name, part in (("features", self.features), ("spatial", self.spatial)):
            if part is not None:
                arrays |= {f"{name}/{key}": np.asarray(value) for key, value in part._asdict().items()}
        return {name: array for name, array in arrays.items() if array is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Statistics":
        """The inverse of `to_arrays`.

        Raises:
          ValueError: an array is missing, or is no part of statistics.
        """

        def part(name: str) -> Moments:
            count, mean, cov = (arrays.get(f"{name}/{key}") for key in Moments._fields)
            if count is None or mean is None or cov is None or count.shape != () or count.dtype.kind not in "iu":
                raise ValueError(f"got no count, mean and covariance of {name}, expected them")
            return moments.checked(int(count), mean, cov)

        features = part("features")
        kept = arrays.get("kept")
        if kept is not None and (kept.dtype != np.float32 or kept.shape != (len(kept), len(features.mean))):
            raise ValueError(
                f"got kept features of {kept.dtype} and shape {kept.shape}, expected float32 of shape "
                f"(n, {len(features.mean)})"
            )
        spatial = part("spatial") if "spatial/count" in arrays else None
        return cls(features, spatial, arrays.get("class_sums"), kept, arrays.get("alignment"))


class Accumulator:
    """Adds up `num_images` images batch by batch, in their order; what it holds does not depend on the batches' sizes
    beyond rounding."""

    def __init__(self, num_images: int, *, num_kept: int = NUM_KEPT):
        self._num_images = num_images
        # At random, because the images may be ordered by class. RandomState: NumPy froze its stream.
        self._chosen = np.sort(np.random.RandomState(0).permutation(num_images)[:num_kept])
        self.count = 0
        self._statistics: Statistics | None = None

    def add(self, outputs: Outputs) -> None:
        """The next images."""
        features = rows_of(outputs.features, "features")
        rows, start = len(features), self.count
        if start + rows > self._num_images:
            raise ValueError(f"got {start + rows} images, expected {self._num_images}")
        if self._statistics is None:
            self._statistics = self._empty(outputs)
        now = self._statistics
        first, last = np.searchsorted(self._chosen, (start, start + rows))
        if now.kept is not None:
            now.kept[first:last] = features[self._chosen[first:last] - start]
        if now.class_sums is not None:
            _add_classes(now.class_sums, rows_of(outputs.probabilities, "probabilities"), start)
        self._statistics = dataclasses.replace(
            now,
            features=moments.add(now.features, features),
            spatial=None if now.spatial is None else moments.add(now.spatial, rows_of(outputs.spatial, "spatial rows")),
            alignment=None
            if now.alignment is None
            else np.asarray(now.alignment + rows_of(outputs.alignment, "scores of captions").sum()),
        )
        self.count += rows

    def _empty(self, outputs: Outputs) -> Statistics:
        splits = -(-self._num_images // SPLIT_SIZE)
        return Statistics(
            moments.empty(outputs.features.shape[1]),
            None if outputs.spatial is None else moments.empty(outputs.spatial.shape[1]),
            None if outputs.probabilities is None else np.zeros((splits, outputs.probabilities.shape[1] + 2)),
            np.zeros((len(self._chosen), outputs.features.shape[1]), np.float32),
            None if outputs.alignment is None else np.zeros(()),
        )

    def statistics(self) -> Statistics:
        """Of all images.

        Raises:
          ValueError: they have not all been added.
        """
        if self._statistics is None or self.count != self._num_images:
            raise ValueError(f"got {self.count} images, expected {self._num_images}")
        return self._statistics

    def to_arrays(self) -> dict[str, np.ndarray]:
        """State, from which `from_arrays` goes on to the same bits; not before the first `add`."""
        if self._statistics is None:
            raise ValueError("got no image, expected at least one before there is a state")
        state = {"num_images": self._num_images, "count": self.count, **self._statistics.to_arrays()}
        return {name: np.array(value) for name, value in state.items()}  # copies: `add` writes into its own

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Accumulator":
        """The accumulator whose state it is."""
        result = cls(int(arrays["num_images"]), num_kept=len(arrays["kept"]))
        result.count = int(arrays["count"])
        result._statistics = Statistics.from_arrays({name: np.array(value) for name, value in arrays.items()})
        return result


def _add_classes(sums: np.ndarray, probabilities: np.ndarray, start: int) -> None:
    p = np.asarray(probabilities, np.float64)
    p_log_p = (p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(axis=1)  # 0 log 0 = 0
    rows = np.concatenate([np.ones((len(p), 1)), p_log_p[:, None], p], axis=1)
    for split in range(start // SPLIT_SIZE, -(-(start + len(p)) // SPLIT_SIZE)):
        sums[split] += rows[max(split * SPLIT_SIZE - start, 0) : (split + 1) * SPLIT_SIZE - start].sum(axis=0)


def inception_score(class_sums: Float64[np.ndarray, "splits sums"]) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))).

    Salimans et al., arXiv:1606.03498, with splits of `SPLIT_SIZE` images in their order.
    """
    counts, p_log_p, p = class_sums[:, 0], class_sums[:, 1], class_sums[:, 2:]
    mean = p / counts[:, None]
    entropies = (mean * np.log(np.maximum(mean, np.finfo(np.float64).tiny))).sum(axis=1)
    scores = np.exp(p_log_p / counts - entropies)
    return float(scores.mean()), float(scores.std())


def compare(samples: Statistics, reference: Statistics, *, network: str) -> dict[str, float]:
    """All metrics that the two sides have what they need for, by name.

    FID, sFID, KID and the Inception score are called so only in Inception's features; in those of another network they
    are `fd_NETWORK`, `fd_spatial_NETWORK`, `kd_NETWORK` and `class_score`.
    """
    fd, fd_spatial, kd, class_score = names(network)
    scores = {fd: frechet.frechet_distance(samples.features, reference.features)}
    if samples.spatial is not None and reference.spatial is not None:
        scores[fd_spatial] = frechet.frechet_distance(samples.spatial, reference.spatial)
    if samples.class_sums is not None:
        scores[class_score], scores[f"{class_score}_std"] = inception_score(samples.class_sums)
    if samples.kept is not None and reference.kept is not None:
        # The classifier's features are few and large: the cube of their product is noise with them.
        if network != "classifier":
            scores[kd], scores[f"{kd}_std"] = kernel.kernel_distance(reference.kept, samples.kept)
        scores["precision"], scores["recall"] = neighbours.precision_recall(reference.kept, samples.kept)
    return scores


def names(network: str) -> tuple[str, str, str, str]:
    """What distance, spatial distance, kernel distance and class score are called in the features of a network."""
    if network == "inception":
        return "fid", "sfid", "kid", "inception_score"
    return f"fd_{network}", f"fd_spatial_{network}", f"kd_{network}", "class_score"
