"""Weights of feature networks: converted once from the files that people have, then read from one safe file.

A converted file holds arrays and a card (`mscm.metrics.files`): reading it executes nothing, and its SHA-256 is checked
and recorded with every score.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mscm.metrics import dinov2, files, inception, lpips
from mscm.metrics.features import FeatureNetwork
from mscm.torch_files import read_torch_file

_KIND = "mscm weights 1"
_PROBE = "probe/"  # outputs at the time of conversion
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt)$")  # PyTorch's convention for published files


class Network(NamedTuple):
    """A feature network whose weights come in a file."""

    from_torch: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]
    make: Callable[..., FeatureNetwork]  # (params, *, fingerprint)
    where: str  # people get its file
    sources: str = "FILE"  # how the command says them


NETWORKS = {
    "inception": Network(
        inception.from_torch,
        inception.network,
        "pt_inception-2015-12-05-6726825d.pth of the pytorch-fid project (its release fid_weights), or NVIDIA's "
        "TorchScript file inception-2015-12-05.pt of StyleGAN2-ADA's metrics",
    ),
    "dinov2": Network(
        dinov2.from_torch, dinov2.network, "dinov2_vitl14_pretrain.pth of the DINOv2 project (its ViT-L/14 backbone)"
    ),
    "lpips": Network(
        lpips.from_torch,
        lpips.network,
        "vgg16-397923af.pth of torchvision (VGG16 of ImageNet) and vgg.pth of the LPIPS project (PerceptualSimilarity, "
        "lpips/weights/v0.1)",
        "vgg16-397923af.pth,vgg.pth",
    ),
}
SCORING = ("inception", "dinov2")  # whose rows are few enough numbers for means and covariances


def default_path(network: str) -> str:
    """Where a converted file lies unless another place is named."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(home, "mscm", f"{network}.npz")


def convert(
    network: str, source: str | os.PathLike | Sequence[str | os.PathLike], output: str | os.PathLike
) -> dict[str, Any]:
    """Converts a file of PyTorch's, or several that belong together, without executing what may be in them.

    Returns the card.

    Raises:
      ValueError: one is no such file, damaged, or of another network.
    """
    sources = [epath.Path(path) for path in ([source] if isinstance(source, str | os.PathLike) else source)]
    tensors: dict[str, np.ndarray] = {}
    digests: list[str] = []
    for path in sources:
        digest, found = _read_source(path)
        if twice := tensors.keys() & found.keys():
            raise ValueError(f"{path}: got {min(twice)} a second time, expected files of different tensors")
        tensors |= found
        digests.append(digest)
    try:
        params = NETWORKS[network].from_torch(tensors)
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, sources))}: {error}") from error
    flat = files.flat(params)
    card = {"kind": _KIND, "network": network, "source": ", ".join(path.name for path in sources)}
    card |= {"source_sha256": ", ".join(digests), "weights_sha256": files.fingerprint(flat)}
    probe = NETWORKS[network].make(params, fingerprint=card["weights_sha256"])(probe_images())
    outputs = {f"{_PROBE}{name}": rows for name, rows in probe._asdict().items() if rows is not None}
    files.save(output, {**flat, **outputs}, card)
    return card


def _read_source(source: epath.Path) -> tuple[str, dict[str, np.ndarray]]:
    """SHA-256 of a file of PyTorch's, and its tensors."""
    try:
        sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{source}: expected a file of weights: {error.strerror or error}") from error
    promised = _HASH_IN_NAME.search(source.name)
    if promised and not sha256.startswith(promised[1]):
        raise ValueError(
            f"{source}: got SHA-256 {sha256[:12]}..., expected {promised[1]}... as its name says: the file is damaged; "
            "get it again"
        )
    try:
        return sha256, read_torch_file(source)
    except (ValueError, OSError) as error:
        raise ValueError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from error


def load(network: str, path: str | os.PathLike, *, dtype: str = "float32") -> FeatureNetwork:
    """The network with the weights of a converted file, computing in `dtype` (float32, bfloat16).

    Raises:
      ValueError: there is no such file, or it holds something else.
    """
    arrays, card = _read(network, path)
    flat = {name: value for name, value in arrays.items() if not name.startswith(_PROBE)}
    try:
        _check_arrays(network, flat)
        if card.get("weights_sha256") != files.fingerprint(flat):
            raise ValueError("got a card with the SHA-256 of other weights")
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}; make it again with python -m mscm.metrics.convert") from error
    params = jax.tree.map(lambda array: jnp.asarray(array, dtype), files.tree(flat))
    suffix = "" if dtype == "float32" else f"-{dtype}"
    return NETWORKS[network].make(params, fingerprint=card["weights_sha256"] + suffix)


def _check_arrays(network: str, flat: Mapping[str, np.ndarray]) -> None:
    """Refuses before the first image what the network cannot compute with.

    Raises:
      ValueError: the arrays are not finite, or not those of the network.
    """
    odd = [name for name, array in flat.items() if array.dtype.kind != "f" or not np.isfinite(array).all()]
    if odd:
        raise ValueError(f"got {odd[0]} of {flat[odd[0]].dtype} or not finite, expected finite floating-point numbers")
    try:
        made = NETWORKS[network].make(files.tree(flat), fingerprint="")
        jax.eval_shape(made.forward, made.params, jax.ShapeDtypeStruct(probe_images().shape, np.uint8))
    except Exception as error:  # what a missing or misshapen array raises where it is used
        raise ValueError(f"got arrays of other shapes or names than {network!r} has ({error!s:.200})") from error


def probe(network: str, path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Outputs for `probe_images` when the file was made: another machine is to get the same, to rounding."""
    arrays, _ = _read(network, path)
    return {name.removeprefix(_PROBE): value for name, value in arrays.items() if name.startswith(_PROBE)}


def probe_images() -> np.ndarray:
    """Two images that are the same for everybody."""
    return np.random.RandomState(0).randint(0, 256, (2, 32, 32, 3)).astype(np.uint8)


def _read(network: str, path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        arrays, card = files.load(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"{os.fspath(path)}: got no weights of the network {network!r}; get {NETWORKS[network].where}, and convert "
            f"it once: python -m mscm.metrics.convert --network={network} "
            f"--source={NETWORKS[network].sources}"
        ) from error
    got = (card.get("kind"), card.get("network"))
    if got != (_KIND, network):
        raise ValueError(
            f"{os.fspath(path)}: got a file of {' '.join(map(str, got))}, expected weights of {network!r} ({_KIND}); "
            "make it with python -m mscm.metrics.convert"
        )
    return arrays, card
