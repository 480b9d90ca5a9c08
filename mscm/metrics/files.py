"""Arrays with a card in one npz file: weights of feature networks, statistics, evaluations under way.

Read without unpickling anything, and checked: the card holds a SHA-256 of the arrays.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from mscm import atomic
from mscm.arrays import read_npz

Arrays = Mapping[str, np.ndarray]

_CARD, _SHA256 = "card", "sha256"


def fingerprint(arrays: Arrays) -> str:
    """SHA-256 of the arrays: names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        digest.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def flat(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of nested mappings by their path, as a file keeps them."""
    return {name: np.asarray(value) for name, value in traverse_util.flatten_dict(tree, sep="/").items()}


def tree(arrays: Arrays) -> dict[str, Any]:
    """The inverse of `flat`."""
    return traverse_util.unflatten_dict(dict(arrays), sep="/")


def save(path: str | os.PathLike, arrays: Arrays, card: Mapping[str, Any]) -> None:
    """Writes a file whole: a reader sees the old one or the new one."""
    text = np.array(json.dumps({**card, _SHA256: fingerprint(arrays)}, indent=1))
    members: dict[str, Any] = {_CARD: text, **arrays}  # Any: one called allow_pickle would be an option of savez
    with atomic.writing(path) as file:
        np.savez(file, **members)


def load(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the card.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or was not written by `save`.
    """
    try:
        arrays = read_npz(path)
        card = json.loads(str(arrays.pop(_CARD)))
        sha256, found = str(card.pop(_SHA256)), fingerprint(arrays)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # the last four: another card
        raise ValueError(
            f"{os.fspath(path)}: got a file that cannot be read ({error}), expected one written by mscm; make it again"
        ) from error
    if found != sha256:
        raise ValueError(
            f"{os.fspath(path)}: got arrays of SHA-256 {found[:12]}..., expected {sha256[:12]}... as its "
            "card says; make it again"
        )
    return arrays, card
