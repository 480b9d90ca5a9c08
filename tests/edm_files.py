"""Small networks of EDM's, configs of them, and their files as `pickle.dump` writes them; without PyTorch."""

import contextlib
import math
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from tests.models.edm_reference import Network, NumPy, Weights, denoised
from tests.test_torch_files import legacy, stored

# Arguments of EDMPrecond for networks of a few thousand parameters, with images of 8 pixels.
_TINY = dict(
    img_resolution=8, img_channels=1, label_dim=10, use_fp16=True, dropout=0.13, augment_dim=9, model_channels=16,
    num_blocks=1, attn_resolutions=[4],
)
TINY = {
    "ddpmpp": dict(_TINY, model_type="SongUNet", embedding_type="positional", encoder_type="standard",
                   decoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1], channel_mult=[1, 2]),
    "ncsnpp": dict(_TINY, model_type="SongUNet", embedding_type="fourier", encoder_type="residual",
                   decoder_type="standard", channel_mult_noise=2, resample_filter=[1, 3, 3, 1], channel_mult=[1, 2]),
    # Two heads at the lower level, and blocks that resample without a projection.
    "adm": dict(_TINY, model_type="DhariwalUNet", model_channels=32, channel_mult=[1, 4]),
}
# The smallest, to train.
LEAST = dict(TINY["ddpmpp"], channel_mult=[1], attn_resolutions=[8])

# A teacher of the networks of TINY on the digits, and what is made of it.
CONFIG = """
from configs import base, digits


def get_config(run="teacher"):
    config = digits._base()
    config.model = dict(
        name={name!r}, conditional={conditional}, channels={channels}, channel_mult={mult}, num_blocks=1,
        attention_resolutions={resolutions}, dropout=0.0, dtype="float32", remat=None, logsnr_input="log_sigma",
        guidance_input=False, attention="auto",
    )
    config.prediction = "edm"
    config.schedule.update(dict(shift=0.0, logsnr_min=-8.764, logsnr_max=12.429))
    config.optimizer.warmup_steps = 0
    config.train.update(dict(num_steps=2, batch_size=2, steps_per_dispatch=1, log_every_steps=1, save_every_steps=2))
    config.eval.update(dict(num_images=20, batch_size=20, network="pixels", at_end=False))
    if run == "teacher":
        config = base.edm(config, family="tiny", num_steps=18)
        config.eval.update(dict(teacher_samplers=("heun:grid=karras",), teacher_steps=(2, 18)))
        return config
    config.eval.update(dict(teacher_samplers=("heun:grid=karras",), teacher_steps=(2, 4)))
    if run == "cd":
        teacher_steps = dict(start=8.0, end=64.0, anneal_steps=2)
        config = base.student(config, family="tiny", student_steps=2, distil=True, teacher_steps=teacher_steps)
    elif run == "pd":
        config = base.progressive(config, family="tiny", phase_steps=(4, 2))
    else:
        config = base.tract_of_edm(config, family="tiny", teacher_steps=8, student_steps=1, run="tract1")
    config.teacher.config = "teacher.py"
    return config
"""


def config_of(name: str, **changes: Any) -> str:
    """A config file for a network of TINY, made with other arguments where some are given."""
    a = TINY[name] | changes
    return CONFIG.format(
        name=name, conditional=a["label_dim"] > 0, channels=a["model_channels"], mult=tuple(a["channel_mult"]),
        resolutions=tuple(a["attn_resolutions"]),
    )


def random_network(seed: int = 0, **arguments: Any) -> Network:
    """A network of EDM's at random; its `weights` are complete."""
    network = Network(Weights(seed), NumPy, **arguments)
    shape = (1, network.a["img_channels"], network.a["img_resolution"], network.a["img_resolution"])
    denoised(network, np.zeros(shape), np.ones(1), np.zeros((1, network.a["label_dim"])))
    return network


class Reduced:
    """Pickled, a call of `function`."""

    def __init__(self, function: Any, *arguments: Any):
        self._reduced = function, arguments

    def __reduce__(self) -> tuple[Any, tuple]:
        return self._reduced


@contextlib.contextmanager
def modules_of_torch() -> Iterator[types.SimpleNamespace]:
    """What the files of EDM name, as empty functions and classes of modules that do not exist otherwise."""
    found = types.SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            ("torch_utils.persistence", "_reconstruct_persistent_obj"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
            ("torch.storage", "_load_from_bytes"),
            ("torch.nn.modules.container", "ModuleDict"),
        ):
            parts = module.split(".")
            for i in range(len(parts)):
                path = ".".join(parts[: i + 1])
                if not isinstance(sys.modules.get(path), _Fake):
                    patch.setitem(sys.modules, path, _Fake(path))
            nothing = types.FunctionType((lambda: None).__code__, {}, name)
            thing = type(name, (), {}) if name == "ModuleDict" else nothing
            thing.__module__, thing.__qualname__ = module, name
            setattr(sys.modules[module], name, thing)
            setattr(found, name, thing)
        yield found


class _Fake(types.ModuleType):
    """A module that is not there."""

    __path__: list[str] = []


def pickled(
    tensors: Mapping[str, np.ndarray], *, class_name: str = "EDMPrecond", protocol: int = 4, **arguments: Any
) -> bytes:
    """A file of a network with these tensors and arguments."""
    with modules_of_torch() as torch:

        def tensor(value: np.ndarray) -> Reduced:
            value = np.ascontiguousarray(value, np.float32)
            blob = legacy(stored("Float", "94", value.size), {"94": value.ravel()})
            strides = tuple(stride // value.itemsize for stride in value.strides)
            storage = Reduced(torch._load_from_bytes, blob)
            return Reduced(torch._rebuild_tensor_v2, storage, 0, value.shape, strides, False, OrderedDict())

        def persistent(name: str, state: dict[str, Any]) -> Reduced:
            meta = dict(type="class", version=6, module_src="import torch\nraise SystemExit\n", class_name=name)
            return Reduced(torch._reconstruct_persistent_obj, dict(meta, state=state))

        def module(tree: Mapping[str, Any], name: str, made_with: Mapping[str, Any]) -> Any:
            state = dict(training=False, _parameters=OrderedDict(bias=None), _buffers=OrderedDict(),
                         _non_persistent_buffers_set=set(), _backward_hooks=OrderedDict(), _is_full_backward_hook=None,
                         _modules=OrderedDict())
            for key, value in tree.items():
                if isinstance(value, Mapping):
                    state["_modules"][key] = module(value, key, {"init": dict(init_weight=np.sqrt(0.2))})
                elif key in ("freqs", "resample_filter"):
                    state["_buffers"][key] = tensor(value)
                else:
                    state["_parameters"][key] = Reduced(torch._rebuild_parameter, tensor(value), False, OrderedDict())
            if name in ("enc", "dec"):
                container = torch.ModuleDict()
                container.__dict__.update(state)
                return container
            made = dict(_init_args=(), _init_kwargs=dict(made_with), skip_scale=np.sqrt(0.5), sigma_max=math.inf)
            return persistent(name, state | made)

        tree: dict[str, Any] = {}
        for path, value in tensors.items():
            *parents, leaf = path.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        network = module(tree, class_name, arguments)
        loss = persistent("EDMLoss", dict(P_mean=-1.2, P_std=1.2, _init_args=(), _init_kwargs={}))
        data = dict(ema=network, loss_fn=loss, augment_pipe=None, dataset_kwargs=dict(path="data.zip", use_labels=True))
        return pickle.dumps(data, protocol)


def images(count: int, size: int, channels: int = 1, seed: int = 1) -> np.ndarray:
    """Noise as images `b c h w`."""
    return np.random.RandomState(seed).standard_normal((count, channels, size, size))
