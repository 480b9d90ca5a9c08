"""Reference statistics: what scores are measured against, in a file that says what it was made from.

A score means something only against a named reference: the data set, its split, how its images were resized, how many
there are, and the network that looked at them. The file carries these facts, and `differences` names those that do not
agree with what is being scored.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mscm.arrays import names_in_npz, read_npz
from mscm.metrics import files, statistics
from mscm.metrics.classifier import LabelledImages
from mscm.metrics.features import FeatureNetwork
from mscm.metrics.gathering import Gathering, over
from mscm.metrics.moments import Moments, checked
from mscm.metrics.statistics import Statistics

_KIND = "mscm reference 1"
_PYTORCH_FID = "of pytorch-fid's form, whose resize and scaling are others: slightly another distance"
_COMPARED = ("name", "split", "transform", "resolution", "channels")


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Statistics and the facts about them; a fact of an imported file that nobody knows is None."""

    statistics: Statistics
    data: Mapping[str, Any]  # name, split, transform, resolution, channels, count, fingerprint
    network: Mapping[str, str]  # name, fingerprint
    imported_from: str | None = None
    remark: str | None = None  # what a reader of its scores should know

    def __str__(self) -> str:
        name, split, count = (self.data[key] for key in ("name", "split", "count"))
        imported = f", from {self.imported_from}" if self.imported_from else ""
        return f"{name}/{split}, {count} images{imported}" + (f" ({self.remark})" if self.remark else "")


def describe(source: LabelledImages) -> dict[str, Any]:
    """The facts about a data set that a reference carries."""
    facts = {key: getattr(source, key) for key in _COMPARED}
    return facts | {"count": len(source), "fingerprint": source.fingerprint}


def compute(
    source: LabelledImages,
    network: FeatureNetwork,
    *,
    indices: np.ndarray | None = None,
    batch_size: int,
    num_kept: int = statistics.NUM_KEPT,
    gathering: Gathering | None = None,
    load: Callable[[np.ndarray], np.ndarray] | None = None,
    watch: Callable[[int], None] = lambda num_images: None,
) -> Reference:
    """Statistics of all images of a data set, or of those at `indices`, in their order.

    Args:
      gathering: goes on with this one, which then decides `num_kept`.
      load: images at indices; None: the source's.
      watch: is told the number of images of each batch when it is done.
    """
    indices = np.arange(len(source)) if indices is None else indices
    gathering = gathering or Gathering(len(indices), num_kept=num_kept)
    load = load or (lambda batch: source.load(batch)["image"])
    starts = range(gathering.count, len(indices), batch_size)
    over((load(indices[start : start + batch_size]) for start in starts), network, gathering, watch=watch)
    facts = describe(source) | {"count": len(indices)}
    return Reference(gathering.statistics(), facts, {"name": network.name, "fingerprint": network.fingerprint})


def save(path: str | os.PathLike, reference: Reference) -> None:
    """Writes a reference to one file."""
    card = {key: getattr(reference, key) for key in ("data", "network", "imported_from", "remark")}
    files.save(path, reference.statistics.to_arrays(), {"kind": _KIND} | card)


def load(path: str | os.PathLike) -> Reference:
    """The reference in a file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged or something else.
    """
    try:
        arrays, card = files.load(path)
    except ValueError as error:
        if not names_in_npz(path) >= {"mu", "sigma"}:
            raise
        raise ValueError(
            f"{os.fspath(path)}: got an .npz of ADM's or pytorch-fid's form, expected one of mscm.metrics.reference; "
            f"make it with python -m mscm.metrics.reference --import={os.fspath(path)} --count=NUMBER_OF_ITS_IMAGES"
        ) from error
    if card.get("kind") != _KIND:
        raise ValueError(
            f"{os.fspath(path)}: got a file of kind {card.get('kind')!r}, expected {_KIND!r}; make it with "
            "python -m mscm.metrics.reference"
        )
    try:
        _check_card(card)
        gathered = Statistics.from_arrays(arrays)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}; make it again") from error
    return Reference(gathered, card["data"], card["network"], card["imported_from"], card.get("remark"))


def _check_card(card: Mapping[str, Any]) -> None:
    facts = {"data": {*_COMPARED, "count", "fingerprint"}, "network": {"name", "fingerprint"}}
    for part, keys in facts.items():
        found = card.get(part)
        if not isinstance(found, dict) or not found.keys() >= keys:
            raise ValueError(f"got a card without {', '.join(sorted(keys))} in {part!r}, expected them")
    if "imported_from" not in card:
        raise ValueError("got a card without 'imported_from', expected it")


def import_npz(
    path: str | os.PathLike, data: Mapping[str, Any], network: FeatureNetwork, *, num_kept: int = statistics.NUM_KEPT
) -> Reference:
    """A reference from an .npz of ADM's evaluation (mu, sigma, mu_s, sigma_s, arr_0) or of pytorch-fid (mu, sigma).

    Args:
      data: the facts that the file does not hold, `count` among them.
      network: the one whose features it is believed to hold; it also computes those of the images in arr_0.

    Raises:
      ValueError: it is no such file, or not of the size of the network's features.
    """
    try:
        arrays = read_npz(path, ("mu", "sigma", "mu_s", "sigma_s", "arr_0"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)}: got a file that cannot be read ({error}), expected an .npz") from error
    if not {"mu", "sigma"} <= arrays.keys():
        raise ValueError(f"{os.fspath(path)}: got no mu and sigma, expected an .npz of ADM's or pytorch-fid's form")

    def moments(mean: str, cov: str) -> Moments:
        try:
            return checked(data["count"], arrays[mean], arrays[cov])
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {mean} and {cov}: {error}") from error

    shape = (data["resolution"], data["resolution"], data["channels"])
    kept = None
    if "arr_0" in arrays:  # in random order, as ADM's are
        images = arrays["arr_0"]
        if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
            raise ValueError(
                f"{os.fspath(path)}: got {images.dtype} images of shape {images.shape} in arr_0, expected uint8 of "
                f"shape (n, {', '.join(map(str, shape))}) as the config has"
            )
        kept = np.asarray(network(images[:num_kept]).features)
    spatial = moments("mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= arrays.keys() else None
    gathered = Statistics(moments("mu", "sigma"), spatial, None, kept)
    try:
        check_size(gathered, network, shape)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    described = {"name": network.name, "fingerprint": network.fingerprint}
    # ADM's files have more, and are of TensorFlow's resize, as the network here is.
    remark = _PYTORCH_FID if network.name == "inception" and arrays.keys() == {"mu", "sigma"} else None
    return Reference(gathered, data, described, os.path.basename(os.fspath(path)), remark)


def check_size(gathered: Statistics, network: FeatureNetwork, shape: tuple[int, int, int]) -> None:
    """Raises ValueError where statistics are of another number of features than a network has of images of `shape`."""
    expected = jax.eval_shape(network.forward, network.params, jax.ShapeDtypeStruct((1, *shape), np.uint8))
    for got, rows in ((gathered.features, expected.features), (gathered.spatial, expected.spatial)):
        if got is not None and rows is not None and len(got.mean) != rows.shape[1]:
            raise ValueError(f"got {len(got.mean)} features, expected {rows.shape[1]} as {network.name} has")


def differences(reference: Reference, data: Mapping[str, Any], network: FeatureNetwork | None) -> list[str]:
    """Sentences about what is not the same on the two sides; what an imported file does not know is no difference.

    Args:
      data: what is known of the facts about the scored images, as `describe` gives them.
      network: None where it is not known yet.
    """
    found = [
        f"{key} {reference.data[key]!r} in the reference, {data[key]!r} in what is scored"
        for key in _COMPARED
        if key in data and reference.data[key] != data[key]
        if not (reference.imported_from and reference.data[key] is None)
    ]
    theirs = reference.network
    ours = theirs if network is None else {"name": network.name, "fingerprint": network.fingerprint}
    if theirs != ours:
        found.append(f"network {label(**theirs)} in the reference, {label(**ours)} in what is scored")
    return found


def label(name: str, fingerprint: str) -> str:
    """A network as a person reads it: its name, the start of its weights' hash, and its precision if not float32."""
    sha256, dash, precision = fingerprint.partition("-")
    return f"{name} {sha256[:12]}{dash}{precision}"
