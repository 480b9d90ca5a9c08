"""What a file of a sampler holds, beside its images: those are in test_export."""

import jax
import pytest

from configs import captioned_digits, digits, edm
from mscm import exporting
from mscm.checkpoint import num_bytes
from mscm.config import ConfigError
from mscm.experiment import build
from mscm.models import attention
from mscm.sampling import SamplerSpec


def tiny_uvit():
    config = digits.teacher()
    config.model.middle.update(dict(width=32, num_blocks=1))
    config.model.update(dict(emb_dim=16, head_dim=16))
    return config


def tiny_unet():
    config = edm.cifar10_teacher(variant="")
    config.model.update(dict(channels=32, channel_mult=(1, 1), num_blocks=1, attention_resolutions=(16,)))
    return config


@pytest.mark.parametrize("make_config", [tiny_uvit, tiny_unet])
def test_attention_is_the_same_on_all_devices(make_config, monkeypatch):
    """A kernel of the machine that writes the file would not run on another."""
    config = make_config()
    config.model.attention = "one_by_one"
    experiment = build(config)
    monkeypatch.setattr(attention, "_one_by_one", None)  # called, it is an error
    params = jax.jit(experiment.init_params)(jax.random.key(0))
    content = exporting.serialised(experiment, params, SamplerSpec("ddim", 2))
    assert jax.export.deserialize(bytearray(content)).nr_devices == 1


def test_inputs_are_those_of_the_model():
    """Labels, or the tokens of captions as the encoder makes them."""
    config = captioned_digits.teacher()
    spec = SamplerSpec("ddim", 1)
    card = exporting.describe(build(config), spec, step=1, average="main", run="r", content=b"")
    length = config.data.text.length
    assert card["num_classes"] is None and card["text_encoder"] == "bytes"
    assert card["inputs"] == {
        "seed": {"shape": [], "dtype": "uint32"},
        "indices": {"shape": ["b"], "dtype": "int32"},
        "tokens": {"shape": ["b", length], "dtype": "uint8"},
        "mask": {"shape": ["b", length], "dtype": "bool"},
    }
    card = exporting.describe(build(digits.teacher()), spec, step=1, average="main", run="r", content=b"")
    assert list(card["inputs"]) == ["seed", "indices", "labels"] and card["num_classes"] == 10


def test_two_gib_are_the_limit(monkeypatch):
    """Of the parameters as they are: float32."""
    experiment = build(digits.teacher())
    size = num_bytes(experiment.abstract_params())
    assert size == 4 * sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_params()))
    monkeypatch.setattr(exporting, "MAX_BYTES", size)
    exporting.check(experiment)
    monkeypatch.setattr(exporting, "MAX_BYTES", size - 1)
    with pytest.raises(ConfigError, match=f"digits_teacher: got {size} bytes of parameters, expected at most"):
        exporting.check(experiment)
