"""Sampling for evaluation: image i is image i whatever the batch, and a student takes its own steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from mscm import evaluation
from mscm.config import ConfigError
from mscm.experiment import build
from mscm.sampling import Plan, SamplerSpec


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


def test_too_few_images_to_compare_with_are_refused_before_training(model, monkeypatch):
    experiment, _ = model
    monkeypatch.setattr(evaluation, "_reference_source", lambda _: range(7))
    with pytest.raises(ConfigError, match="got 7 images to compare with, expected at least 8; add some, or --conf"):
        evaluation.check(experiment, experiment.data.open())


def _images(model, *, batch_size, num_images=7, seed=0, labels=None, sampler="addim"):
    experiment, params = model
    batches = evaluation.generate(
        experiment,
        params,
        SamplerSpec(sampler, 2),
        num_images=num_images,
        batch_size=batch_size,
        seed=seed,
        conditions=evaluation.conditions_in_turn(experiment) if labels is None else lambda indices: labels[indices],
    )
    return np.concatenate(list(batches))


@pytest.mark.parametrize("sampler", ["addim", "ancestral:variance=large"])
def test_images_do_not_depend_on_the_batch_size(model, sampler):
    """The same seven images in batches of 7 and of 4, of which the last is cut, to one grey level of rounding."""
    whole, parts = (_images(model, batch_size=batch_size, sampler=sampler) for batch_size in (7, 4))
    assert whole.shape == parts.shape == (7, 8, 8, 1) and whole.dtype == np.uint8
    assert np.abs(whole.astype(int) - parts).max() <= 1
    assert whole.std() > 1
    few = _images(model, batch_size=4, num_images=3, sampler=sampler)
    assert np.abs(few.astype(int) - whole[:3]).max() <= 1


def test_the_noise_of_the_steps_is_not_that_of_the_start(model, monkeypatch):
    """Image i starts from fold_in(key, i), and each image has a key of its own for its steps."""
    experiment, params = model

    def sample_of(sampler, draw):
        plan = Plan(lambda denoiser, schedule, z_1, keys: draw(z_1, keys), np.zeros(0, np.float32))
        monkeypatch.setattr(SamplerSpec, "plan", lambda spec, schedule: plan)
        spec = SamplerSpec(sampler, 1000)
        return evaluation.make_sample_fn(experiment, spec)(params, jax.random.key(4), np.arange(3), np.arange(3))

    def from_keys(z_1, keys):
        return jax.vmap(lambda key: jax.random.normal(key, z_1.shape[1:]))(keys)

    start, steps = sample_of("ddim", lambda z_1, keys: z_1), sample_of("addim", from_keys)
    by_hand = [jax.random.normal(jax.random.fold_in(jax.random.key(4), i), (8, 8, 1)) for i in range(3)]
    np.testing.assert_array_equal(start, by_hand)
    both = np.concatenate([start, steps]).reshape(6, 64)
    assert np.abs(np.corrcoef(both) - np.eye(6)).max() < 0.6  # 64 numbers each: 4.8 standard deviations


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


def test_a_consistency_model_has_one_step_by_default(model):
    """Where a sampler is asked for; else the last that it is scored with. A diffusion model has the most."""
    student = build(digits.consistency_distillation())
    assert evaluation.chosen_sampler(student, None, None, force=False).num_steps == 8
    assert evaluation.chosen_sampler(student, "ddim", None, force=False) == SamplerSpec("ddim", 1)
    assert evaluation.chosen_sampler(student, "consistency:sigmas=1.0", None, force=False).num_steps == 2
    assert evaluation.chosen_sampler(model[0], "heun", None, force=False) == SamplerSpec("heun", 256)


def test_a_student_may_clip_and_one_of_a_single_segment_is_a_consistency_model():
    """Clipping changes no time; a consistency model may also be noised anew."""
    for student_steps in (1, 2):
        student = build(digits.student(student_steps=student_steps, distil=True))
        evaluation.check_sampler(student, SamplerSpec("ddim:clip=dynamic", student_steps))
        renoised = SamplerSpec("consistency:sigmas=0.8,clip=static", 2)
        if student_steps == 1:
            evaluation.check_sampler(student, renoised)
        for spec in (SamplerSpec("ddim:grid=karras", student_steps), SamplerSpec("ddim:eta=1", student_steps)):
            with pytest.raises(ConfigError, match=f"expected ddim with {student_steps} steps"):
                evaluation.check_sampler(student, spec)
    with pytest.raises(ConfigError, match="got consistency:sigmas=0.8,clip=static 2 steps for 'digits_cd2'"):
        evaluation.check_sampler(student, renoised)
    with pytest.raises(ConfigError, match="guidance: got 1.0, expected 0.0 because 'digits_cd2' was trained with"):
        evaluation.check_sampler(student, SamplerSpec("ddim:guidance=1", 2), force=True)


def test_a_diffusion_model_is_no_consistency_model(model):
    """Its x_hat is a mean; forced, it is sampled all the same."""
    experiment, _ = model
    with pytest.raises(ConfigError, match="got consistency 1 step for 'digits_teacher', expected another sampler"):
        evaluation.check_sampler(experiment, SamplerSpec("consistency", 1))
    evaluation.check_sampler(experiment, SamplerSpec("consistency", 1), force=True)
    with pytest.raises(ConfigError, match="expected a range that meets that of the schedule"):
        evaluation.check_sampler(experiment, SamplerSpec("ddim:grid=karras,sigma_min=7e3,sigma_max=8e3", 1), force=True)


def test_guidance_of_a_sampler():
    """That of the experiment, for one sampler and within its interval; the NFE counts both forwards."""
    config = digits.teacher()
    config.model.middle.update(dict(width=32, num_blocks=1))
    config.model.update(dict(emb_dim=16, head_dim=16))
    config.objective.label_dropout = 0.1
    plain = build(config)
    key = jax.random.key(3)
    params = jax.jit(plain.init_params)(key)
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), params)
    guided = plain.guided(1.5)

    def images(experiment, text):
        spec = SamplerSpec(text, 2)
        return evaluation.make_sample_fn(experiment, spec)(params, key, np.arange(4), np.arange(4))

    of_sampler = images(plain, "ddim:guidance=1.5")
    np.testing.assert_allclose(of_sampler, images(guided, "ddim"), rtol=0, atol=1e-4)
    assert np.abs(of_sampler - images(plain, "ddim")).max() > 1e-3
    # t = 1 has a log-SNR of -13, t = 1/2 one of 2.
    nowhere, everywhere = ("ddim:guidance=1.5,guidance_low=4,guidance_high=5", "ddim:guidance=1.5,guidance_low=-14")
    np.testing.assert_allclose(images(plain, nowhere), images(plain, "ddim"), rtol=0, atol=1e-5)
    np.testing.assert_allclose(images(plain, everywhere), of_sampler, rtol=0, atol=1e-5)
    counts = [
        evaluation.num_evaluations(plain, SamplerSpec(text, 2))
        for text in ("ddim", nowhere, everywhere, "ddim:guidance=1.5", "ddim:guidance=1.5,guidance_low=0")
    ]
    assert counts == [2, 2, 4, 4, 3]
    assert evaluation.num_evaluations(guided, SamplerSpec("heun", 2)) == 6
    with pytest.raises(ConfigError, match="guidance: got 1.5, expected 0.0 because 'digits_teacher' is guided already"):
        evaluation.check_sampler(guided, SamplerSpec("ddim:guidance=1.5", 2))


def test_a_diffusion_model_takes_any_number_of_steps(model):
    """aDDIM with the config's numbers of steps by default, and whatever else is asked for."""
    experiment, _ = model
    assert [spec.num_steps for spec in evaluation.default_samplers(experiment)] == [1, 2, 4, 8, 64, 256]
    for text in ("ddim", "heun:grid=karras,s_churn=40", "ancestral:variance=0.2,clip=static"):
        evaluation.check_sampler(experiment, SamplerSpec(text, 3))
