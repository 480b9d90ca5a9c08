"""Teachers from elsewhere: published weights as a checkpoint of ours, with their licence beside it.

EDM's networks (arXiv:2206.00364), as `edm-cifar10-32x32-cond-vp.pkl` and its siblings hold them: pickles of PyTorch
modules that bring their source code along, which is neither run nor looked at (`mscm/torch_files.py`). What such a file
says of its network is compared with the config field by field, and every parameter with the config's by name and shape.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from mscm import atomic
from mscm.arrays import read_npz
from mscm.checkpoint import Checkpoints, is_there, reading
from mscm.config import ConfigError
from mscm.experiment import Experiment
from mscm.models import unet
from mscm.torch_files import read_pickled_module, read_torch_file

Tensors = Mapping[str, np.ndarray]

EDM_LICENCE = (
    "The network is from EDM (Karras, Aittala, Aila, Laine; arXiv:2206.00364), copyright NVIDIA Corporation and "
    "affiliates, under the licence CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/): name the "
    "authors, do not use it commercially, and share what is made from it, such as a distilled student, under the same "
    "licence."
)

# What the constructors of EDM's modules take where a file says nothing.
_DEFAULTS = {
    "EDMPrecond": {"label_dim": 0, "sigma_data": 0.5, "model_type": "DhariwalUNet", "channel_mult_emb": 4},
    "SongUNet": {
        "model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16],
        "embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard",
        "decoder_type": "standard", "resample_filter": [1, 1],
    },
    "DhariwalUNet": {
        "model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [32, 16, 8],
    },
}
# Arguments that a trained network's answer does not depend on.
_OF_TRAINING = {"use_fp16", "sigma_min", "sigma_max", "dropout", "label_dropout", "augment_dim"}
# The config's keys for the arguments; those of other names are decided by config.model.name.
_KEYS = {
    "img_resolution": "data.resolution", "img_channels": "data.channels",
    "label_dim": "data.num_classes if config.model.conditional", "model_channels": "model.channels",
    "channel_mult": "model.channel_mult", "num_blocks": "model.num_blocks",
    "attn_resolutions": "model.attention_resolutions", "sigma_data": "prediction",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


class Weights(NamedTuple):
    """What a file gives: parameters as the experiment's network has them, and what is known of them."""

    params: dict[str, Any]
    notes: tuple[str, ...]  # sentences for who imports them


class Origin(NamedTuple):
    """A place that networks come from."""

    read: Callable[[Experiment, str], Weights]
    licence: str


def import_teacher(experiment: Experiment, origin: str, path: str, workdir: str) -> tuple[str, ...]:
    """Writes a work directory with a checkpoint of the weights in a file; returns what should be said of them.

    It has averaged parameters alone: enough to sample, to score, and to start students from.

    Raises:
      ConfigError: no such origin or file, a file of another network, or a directory that has checkpoints.
    """
    if origin not in ORIGINS:
        raise ConfigError(f"--from: got origin {origin!r}, expected one of {', '.join(ORIGINS)}, as in edm:FILE.pkl")
    if is_there(workdir):
        with reading(workdir) as checkpoints:
            if checkpoints.steps() or checkpoints.damaged:
                raise ConfigError(f"--workdir: got {workdir!r}, which has checkpoints, expected another directory")
    source = ORIGINS[origin]
    try:
        weights = source.read(experiment, path)
        sha256 = _sha256(path)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"--from: {path}: {reason}") from error
    imported = {"from": origin, "file": os.path.basename(path), "sha256": sha256, "licence": source.licence}
    atomic.write_text(os.path.join(workdir, "LICENCE"), f"{source.licence}\n\n{json.dumps(imported, indent=2)}\n")
    atomic.write_text(os.path.join(workdir, "config.json"), json.dumps(experiment.config, indent=2) + "\n")
    with Checkpoints(workdir, keep=1) as checkpoints:  # last: who finds it finds all
        step = experiment.train.num_steps  # who watches the directory knows that no other comes
        checkpoints.save_ema(step, weights.params, experiment.facts() | {"imported": imported})
    return (f"SHA-256 {sha256[:12]}...", *weights.notes, source.licence)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_edm(experiment: Experiment, path: str) -> Weights:
    """The parameters in a file of EDM's: FILE.pkl, or its `state_dict()` as FILE.npz, FILE.pt or FILE.pth.

    Raises:
      ValueError: the file is damaged or of another network.
      ConfigError: the config is not of a network that EDM has.
    """
    config = experiment.config
    if not isinstance(experiment.model, unet.UNet) or experiment.student_steps is not None:
        raise ConfigError(
            f"--config: got {experiment.name!r}, expected a diffusion model of {', '.join(unet.ARCHITECTURES)}, such "
            "as configs/edm_cifar10_teacher.py"
        )
    for key, got, expected in (
        ("prediction", config["prediction"], "edm"),
        ("model.logsnr_input", config["model"]["logsnr_input"], "log_sigma"),
    ):
        if got != expected:
            raise ConfigError(f"config.{key}: got {got!r}, expected {expected!r}, as EDM's networks were trained")
    notes: tuple[str, ...] = ()
    if path.endswith(".pkl"):
        module = read_pickled_module(path, "ema")
        _check_arguments(experiment, module.class_name, module.arguments)
        tensors = module.tensors
    else:
        tensors = read_npz(path) if path.endswith(".npz") else read_torch_file(path)
        notes = ("The file holds tensors alone: that they are of EDM's preconditioning is not checked.",)
    return Weights(_params(experiment, {name.removeprefix("model."): t for name, t in tensors.items()}), notes)


ORIGINS = {"edm": Origin(read_edm, EDM_LICENCE)}


def _check_arguments(experiment: Experiment, class_name: str, arguments: dict[str, Any]) -> None:
    """Raises ValueError where a file's network is made otherwise than the experiment's."""
    if class_name != "EDMPrecond":
        raise ValueError(
            f"got a network with the preconditioning {class_name!r}, expected 'EDMPrecond': take a file whose name "
            "begins with edm-, not with baseline-"
        )
    given: dict[str, Any] = _DEFAULTS["EDMPrecond"] | arguments
    of_type = next((values for name, values in _DEFAULTS.items() if name == given["model_type"]), {})
    given = of_type | given
    given = {name: value for name, value in given.items() if name not in _OF_TRAINING}
    ours = _arguments(experiment)
    differing = [
        f"{name}: got {given.get(name, 'nothing')!r}, expected {ours.get(name, 'nothing')!r} "
        f"(config.{_KEYS.get(name, 'model.name')})"
        for name in sorted(given.keys() | ours.keys())
        if _comparable(name, given.get(name)) != _comparable(name, ours.get(name))
    ]
    if differing:
        raise ValueError(
            f"got another network than that of {experiment.name!r}: {'; '.join(differing)}; take the config of the file"
        )


def _comparable(name: str, value: Any) -> Any:
    # As texts: a file may hold what cannot be sorted.
    return sorted(map(repr, value)) if name == "attn_resolutions" and isinstance(value, list) else value


def _arguments(experiment: Experiment) -> dict[str, Any]:
    """How EDM's code would make the experiment's network."""
    model, data = experiment.model, experiment.data
    architecture = unet.ARCHITECTURES[model.architecture]
    common = {
        "img_resolution": data.resolution,
        "img_channels": data.channels,
        "label_dim": model.num_classes or 0,
        "sigma_data": 0.5,
        "model_type": "DhariwalUNet" if architecture.is_adm else "SongUNet",
        "model_channels": model.channels,
        "channel_mult": list(model.channel_mult),
        "channel_mult_emb": 4,
        "num_blocks": model.num_blocks,
        "attn_resolutions": list(model.attention_resolutions),
    }
    if architecture.is_adm:
        return common
    return common | {
        "embedding_type": "fourier" if architecture.fourier else "positional",
        "channel_mult_noise": architecture.noise_mult,
        "encoder_type": "residual" if architecture.has_aux else "standard",
        "decoder_type": "standard",
        "resample_filter": list(architecture.resample_filter),
    }


def _params(experiment: Experiment, tensors: Tensors) -> dict[str, Any]:
    """The experiment's parameters from tensors by EDM's names.

    Raises:
      ValueError: one is missing, of another shape, not finite, or nobody's.
    """
    model, side = experiment.model, experiment.data.resolution
    architecture = unet.ARCHITECTURES[model.architecture]
    left, params = dict(tensors), {}
    # The augmentations that a picture has undergone: of one that has not, zeros, through a layer without a bias.
    left.pop("map_augment.weight", None)
    filters = {name: left.pop(name) for name in tuple(left) if name.endswith(".resample_filter")}
    taps = np.array(architecture.resample_filter, np.float64)
    taps = np.outer(taps, taps) / taps.sum() ** 2
    for name, of_filter in filters.items():
        if of_filter.shape[-2:] != taps.shape or not np.allclose(of_filter, taps, atol=1e-3):  # it may be of 16 bits
            raise ValueError(f"got other weights in {name} than {experiment.config['model']['name']!r} resamples with")
    for path, shape in experiment.facts()["parameters"].items():
        name = _torch_name(path, side, is_adm=architecture.is_adm)
        value = left.pop(name, None)
        if value is None:
            raise ValueError(f"got no tensor {name!r}, expected one of shape {shape}; take the config of the file")
        if value.dtype.kind != "f" or not np.isfinite(value).all():
            raise ValueError(f"got {name!r} of {value.dtype} or not finite, expected finite floating-point numbers")
        ours = _transposed(value.astype(np.float32), path, is_adm=architecture.is_adm)
        if list(ours.shape) != shape:
            raise ValueError(
                f"got {name!r} of shape {list(value.shape)}, expected one that becomes {shape} in {experiment.name!r}; "
                "take the config of the file"
            )
        params[tuple(path.split("/"))] = np.ascontiguousarray(ours)
    if left:
        raise ValueError(
            f"got {len(left)} tensors that {experiment.name!r} has not, such as {min(left)!r}, expected none; take the "
            "config of the file"
        )
    return unflatten_dict(params)


def _torch_name(path: str, side: int, *, is_adm: bool) -> str:
    """EDM's name of a parameter of `unet.UNet`."""
    module, *rest = path.split("/")
    if module == "map_noise_freqs":
        return "map_noise.freqs"
    if module.startswith("out_") and not is_adm:
        module = module.replace("out_", f"dec_{side}x{side}_aux_")
    if module.startswith(("enc_", "dec_")):
        module = module.replace("_", ".", 1)
    return ".".join([module, *rest[:-1], _LEAVES[rest[-1]]])


def _transposed(value: np.ndarray, path: str, *, is_adm: bool) -> np.ndarray:
    """A tensor of PyTorch (outputs first) with the axes that Flax has, outputs last."""
    if "/qkv/" in path:
        # Query, key and value of a channel are neighbours there; here those of a head are.
        width = len(value) // 3
        heads = width // unet.HEAD_DIM if is_adm else 1
        value = value.reshape(heads, width // heads, 3, -1).swapaxes(1, 2).reshape(value.shape)
    if not path.endswith("/kernel"):
        return value
    if value.ndim == 4 and value.shape[2:] == (1, 1):
        value = value[:, :, 0, 0]
    return value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
