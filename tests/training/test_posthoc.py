"""Reconstruction of power-function averages: closed forms, and a whole trajectory averaged directly."""

import numpy as np
import pytest

from mscm.training import ema, posthoc
from mscm.training.posthoc import Profile


def weights(profile: Profile, count: int) -> np.ndarray:
    """Of the parameters after each of the first `count` steps: the integral of the profile over that step."""
    edges = np.minimum(np.arange(count + 1), profile.step) / profile.step
    return np.diff(edges ** (profile.gamma + 1))


@pytest.mark.parametrize("a, b", [((0.0, 5.0), (0.0, 5.0)), ((2.0, 3.0), (7.5, 9.0)), ((6.9, 8.0), (16.0, 2.0))])
def test_dot_is_the_integral_of_the_product(a, b):
    """Against the midpoint rule, in both orders."""
    tau = (np.arange(400_000) + 0.5) / 400_000 * 9

    def values(gamma, step):
        return np.where(tau <= step, (gamma + 1) * (tau / step) ** gamma / step, 0)

    expected = np.sum(values(*a) * values(*b)) * 9 / len(tau)
    np.testing.assert_allclose(posthoc.dot(Profile(*a), Profile(*b)), expected, rtol=1e-4)
    np.testing.assert_allclose(posthoc.dot(Profile(*b), Profile(*a)), expected, rtol=1e-4)


def kept(steps, sigma_rels=(0.05, 0.1)):
    return [Profile(ema.gamma_of(sigma_rel), step) for step in steps for sigma_rel in sigma_rels]


def test_a_profile_that_is_kept_is_found_exactly():
    """Its coefficient is one, all others nothing; also that of an earlier step."""
    profiles = kept(range(100, 3300, 100))
    for i in (0, 17, len(profiles) - 1):
        found = posthoc.solve(profiles, profiles[i])
        np.testing.assert_allclose(found.coefficients, np.eye(len(profiles))[i], atol=1e-6)
        assert found.error < 1e-6


def test_the_nearest_is_nearer_than_its_neighbours():
    """The distance grows in every direction in which the sum of the coefficients stays one; the error is it."""
    profiles, wanted = kept((30, 60, 90)), Profile(4.0, 90)
    found = posthoc.solve(profiles, wanted)

    def distance(x):
        profiles_ = [wanted, *profiles]
        gram = np.array([[posthoc.dot(a, b) for b in profiles_] for a in profiles_])
        x = np.append(-1, x)
        return np.sqrt(x @ gram @ x / gram[0, 0])

    np.testing.assert_allclose(distance(found.coefficients), found.error, rtol=1e-6)
    assert np.sum(found.coefficients) == pytest.approx(1, abs=1e-12)
    directions = np.eye(6) - np.roll(np.eye(6), 1, axis=0)
    for direction in (*directions, *-directions):
        assert distance(found.coefficients + 1e-3 * direction) > found.error


@pytest.mark.parametrize(
    ("sigma_rel", "most"), [(0.03, 0.003), (0.06, 0.0003), (0.08, 0.0002), (0.15, 0.0005), (0.25, 0.02)]
)
def test_it_is_the_average_of_the_whole_trajectory(sigma_rel, most):
    """Parameters that wander and jitter, 3200 steps, 16 snapshots: the error is a fraction `most` of their spread."""
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(3200, 50)), axis=0) / np.sqrt(3200) + 0.1 * rng.normal(size=(3200, 50))
    profiles, wanted = kept(range(200, 3201, 200)), Profile(ema.gamma_of(sigma_rel), 3200)
    snapshots = np.stack([weights(profile, 3200) @ walk for profile in profiles])
    found = posthoc.solve(profiles, wanted)
    difference = found.coefficients @ snapshots - weights(wanted, 3200) @ walk
    assert found.error < 0.1
    assert np.sqrt(np.mean(difference**2)) < most * np.std(walk)
    # What the nearest kept average would be in its place.
    nearest = min(snapshots[-2:], key=lambda of: np.sum((of - weights(wanted, 3200) @ walk) ** 2))
    assert np.mean(difference**2) < 0.01 * np.mean((nearest - weights(wanted, 3200) @ walk) ** 2)


def test_a_shorter_average_than_all_that_were_kept_is_far():
    """Which the error says: no sum of long profiles is a short one."""
    profiles = kept(range(200, 3201, 200), sigma_rels=(0.1,))
    errors = [posthoc.solve(profiles, Profile(ema.gamma_of(of), 3200)).error for of in (0.02, 0.05, 0.1)]
    assert errors[0] > 0.4 > errors[1] > 0.01 > errors[2]


def test_nothing_is_made_of_nothing():
    with pytest.raises(ValueError, match="got no profiles"):
        posthoc.solve([], Profile(1.0, 1.0))
