"""A trained sampler as one file of StableHLO, with the parameters inside, that JAX runs without this package.

    sampler = jax.export.deserialize(bytearray(open("FILE", "rb").read()))
    images = sampler.call(seed, indices, labels)          # of a model of captions: (seed, indices, tokens, mask)

Images are those of `mscm.evaluation.generate`, before they become whole numbers: image i of a seed depends on the seed,
on i and on its own label or caption. The number of images is free in each call.

The file is one program for `PLATFORMS`. Attention is therefore `xla` in it, whatever `config.model.attention` says, and
nothing else depends on the device: to rounding the images are the same.
"""

import hashlib
import importlib.util
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from mscm import evaluation
from mscm.checkpoint import num_bytes
from mscm.config import ConfigError
from mscm.experiment import Experiment
from mscm.sampling import SamplerSpec
from mscm.types import Condition, Images, Params, Text

PLATFORMS = ("cpu", "cuda", "tpu")
MAX_BYTES = 2**31 - 2**24  # of parameters: flatbuffers and XLA's constants end at 2 GiB, and the program needs some


def check(experiment: Experiment) -> None:
    """Refuses what cannot become a file, before a parameter is read.

    Raises:
      ConfigError: no package flatbuffers, or more parameters than a file can hold.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError(
            "got no package flatbuffers, expected it, because jax.export writes its files with it: "
            "pip install -e .[export]"
        )
    size = num_bytes(experiment.abstract_params())
    if size > MAX_BYTES:
        raise ConfigError(
            f"{experiment.name}: got {size} bytes of parameters, expected at most {MAX_BYTES}, which is what one file "
            "of jax.export can hold; sample it with mscm.sample"
        )


def serialised(experiment: Experiment, params: Params, spec: SamplerSpec) -> bytes:
    """The file: (seed uint32, indices int32 "b", *condition) -> float32 images "b h w c", data in [-1, 1].

    `condition`: labels int32 "b", or tokens "b n" (uint8; of an embedding float16 "b n k") and mask bool "b n".
    """
    sample = evaluation.sampling_function(experiment.for_any_device(), spec)
    params = jax.tree.map(jnp.asarray, jax.device_get(params))  # whole, on one device

    def program(seed: jax.Array, indices: jax.Array, *condition: jax.Array) -> Images:
        return sample(params, jax.random.key(seed), indices, _condition(condition))

    (rows,) = jax.export.symbolic_shape("b")
    inputs = [
        jax.ShapeDtypeStruct((rows, *shape[1:]) if shape else (), dtype)
        for shape, dtype in _inputs(experiment).values()
    ]
    return bytes(jax.export.export(jax.jit(program), platforms=PLATFORMS)(*inputs).serialize())


def describe(
    experiment: Experiment, spec: SamplerSpec, *, step: int, average: str, run: str, content: bytes
) -> dict[str, Any]:
    """What a user should know of the file, as JSON; `step`, `average` and `run` are those of the parameters.

    `run` is the hash that scores.jsonl has too.
    """
    data = experiment.data
    return {
        "name": experiment.name,
        "step": step,
        "ema": average,
        "sampler": spec.sampler,
        "num_steps": spec.num_steps,
        "nfe": evaluation.num_evaluations(experiment, spec),
        "resolution": data.resolution,
        "channels": data.channels,
        "data_range": [-1.0, 1.0],
        "num_classes": data.num_classes if data.text is None else None,
        "text_encoder": None if data.text is None else data.text.encoder,
        "inputs": {
            name: {"shape": list(shape), "dtype": np.dtype(dtype).name}
            for name, (shape, dtype) in _inputs(experiment).items()
        },
        "platforms": list(PLATFORMS),
        "jax": jax.__version__,
        "parameter_bytes": num_bytes(experiment.abstract_params()),
        "run": run,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _inputs(experiment: Experiment) -> dict[str, tuple[tuple[Any, ...], Any]]:
    """Shape, with "b" for the images, and type of each argument, in order."""
    inputs = {"seed": ((), jnp.uint32), "indices": (("b",), jnp.int32)}
    text = experiment.data.text
    if text is None:
        return inputs | {"labels": (("b",), jnp.int32)}
    shape, dtype = text.of_tokens
    return inputs | {"tokens": (("b", *shape), dtype), "mask": (("b", text.length), jnp.bool_)}


def _condition(arrays: tuple[jax.Array, ...]) -> Condition:
    return Text(*arrays) if len(arrays) == 2 else arrays[0]
