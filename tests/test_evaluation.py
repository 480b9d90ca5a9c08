"""Sampling for evaluation: image i is image i whatever the batch, and a student takes its own steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from mscm import evaluation
from mscm.config import ConfigError
from mscm.evaluation import SamplerSpec
from mscm.experiment import build


@pytest.fixture(scope="module")
def model():
    """A small diffusion model and parameters at random."""
    config = digits.teacher()
    config.model.middle.update(dict(width=32, num_blocks=1))
    config.model.update(dict(emb_dim=16, head_dim=16))
    experiment = build(config)
    # The last layer of a new network is 0, and with it every output.
    params = jax.tree.map(lambda p: p + 0.02, jax.jit(experiment.init_params)(jax.random.key(0)))
    return experiment, params


def _images(model, *, batch_size, num_images=7, seed=0, labels=None):
    experiment, params = model
    batches = evaluation.generate(
        experiment,
        params,
        SamplerSpec("addim", 2),
        num_images=num_images,
        batch_size=batch_size,
        seed=seed,
        labels=labels,
    )
    return np.concatenate(list(batches))


def test_images_do_not_depend_on_the_batch_size(model):
    """The same seven images in batches of 7 and of 4, of which the last is cut, to one grey level of rounding."""
    whole, parts = _images(model, batch_size=7), _images(model, batch_size=4)
    assert whole.shape == parts.shape == (7, 8, 8, 1) and whole.dtype == np.uint8
    assert np.abs(whole.astype(int) - parts).max() <= 1
    assert whole.std() > 1
    assert np.abs(_images(model, batch_size=4, num_images=3).astype(int) - whole[:3]).max() <= 1


def test_another_seed_gives_other_images(model):
    """The noise comes from the seed."""
    assert not np.array_equal(_images(model, batch_size=4), _images(model, batch_size=4, seed=1))


def test_noise_and_labels_are_common_to_all_models(monkeypatch, model):
    """Any model is given the same key, indices and labels 0, 1, ..., 9, 0, ... in turn; given labels are kept."""
    seen = []

    def make(experiment, spec):
        def sample(params, key, indices, labels):
            seen.append((indices, labels))
            assert key == jax.random.key(0)
            return jnp.zeros((len(indices), 8, 8, 1))

        return sample

    monkeypatch.setattr(evaluation, "make_sample_fn", make)
    for batch_size in (20, 8):
        assert len(_images(model, batch_size=batch_size, num_images=20)) == 20
    whole, parts = seen[0], [np.concatenate(arrays)[:20] for arrays in zip(*seen[1:], strict=True)]
    for indices, labels in (whole, parts):
        np.testing.assert_array_equal(indices, np.arange(20))
        np.testing.assert_array_equal(labels, np.arange(20) % 10)
    seen.clear()
    _images(model, batch_size=2, num_images=3, labels=np.array([5, 3, 8]))
    assert np.concatenate([labels for _, labels in seen])[:3].tolist() == [5, 3, 8]


def test_a_student_takes_its_own_steps():
    """Other numbers of steps and other samplers are refused with the number that is possible, unless forced."""
    student = build(digits.student(student_steps=4, distil=True))
    assert evaluation.default_samplers(student) == [SamplerSpec("ddim", 4)]
    evaluation.check_sampler(student, SamplerSpec("ddim", 4))
    for spec in (SamplerSpec("ddim", 3), SamplerSpec("addim", 4)):
        with pytest.raises(ConfigError, match=f"got {spec} for 'digits_cd4', expected ddim with 4 steps"):
            evaluation.check_sampler(student, spec)
        evaluation.check_sampler(student, spec, force=True)
    with pytest.raises(ConfigError, match="num_steps: got 0, expected at least 1"):
        evaluation.check_sampler(student, SamplerSpec("ddim", 0), force=True)


def test_a_diffusion_model_takes_any_number_of_steps(model):
    """aDDIM with the config's numbers of steps by default, and whatever else is asked for."""
    experiment, _ = model
    assert [spec.num_steps for spec in evaluation.default_samplers(experiment)] == [1, 2, 4, 8, 64, 256]
    evaluation.check_sampler(experiment, SamplerSpec("ddim", 3))
    assert (str(SamplerSpec("ddim", 1)), str(SamplerSpec("addim", 2))) == ("ddim 1 step", "addim 2 steps")
