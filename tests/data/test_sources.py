"""Sources: what digits are, and that the halves are a stratified partition."""

import inspect

import numpy as np
import pytest

from mscm.data import sources


def test_digits_are_the_1797_real_ones():
    from sklearn.datasets import load_digits

    source = sources.open_source('digits', split='all')
    assert isinstance(source, sources.Source)
    assert (len(source), source.num_classes, source.resolution, source.channels) == (1797, 10, 8, 1)
    assert source.class_names == tuple('0123456789')
    np.testing.assert_array_equal(np.round(source.images[..., 0] / 255 * 16), load_digits().images)
    assert source.images.min() == 0 and source.images.max() == 255
    batch = source.load(np.array([3, 1, 4, 1]))
    assert batch['image'].dtype == np.uint8 and batch['label'].dtype == np.int32
    np.testing.assert_array_equal(batch['image'], source.images[[3, 1, 4, 1]])
    np.testing.assert_array_equal(batch['label'], source.labels[[3, 1, 4, 1]])


def test_load_does_not_lend_its_memory():
    source = sources.open_source('digits', split='all')
    source.load(np.arange(2))['image'][:] = 7
    assert not (source.images[:2] == 7).all()


def test_halves_partition_the_set_and_are_stratified():
    everything, a, b = (sources.open_source('digits', split=split) for split in ('all', 'half_a', 'half_b'))
    rows = lambda s: sorted(image.tobytes() + bytes([label]) for image, label in zip(s.images, s.labels, strict=True))  # noqa: E731
    assert sorted(rows(a) + rows(b)) == rows(everything)
    assert abs(len(a) - len(b)) == 1
    assert np.abs(np.bincount(a.labels) - np.bincount(b.labels)).max() <= 1
    first, second = sources.stratified_halves(everything.labels)
    assert not set(first) & set(second)


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match="got 'digit', expected one of digits; did you mean 'digits'?"):
        sources.open_source('digit', split='all')
    with pytest.raises(ValueError, match=r"got 'zzz', expected one of digits\.$"):
        sources.open_source('zzz', split='all')
    with pytest.raises(ValueError, match="expected one of all, half_a, half_b; did you mean 'half_a'"):
        sources.open_source('digits', split='half_aa')


@pytest.mark.parametrize(
    'images, labels, message',
    [
        (np.zeros((2, 4, 5, 1), np.uint8), np.zeros(2, np.int32), 'expected square uint8'),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int32), 'one class index per image'),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 2], np.int32), 'labels from 0 to 2, expected 0 to 1'),
    ],
)
def test_array_source_refuses(images, labels, message):
    check = inspect.unwrap(sources.ArraySource.__post_init__)
    broken = object.__new__(sources.ArraySource)
    broken.__dict__.update(name='x', split='all', images=images, labels=labels, class_names=('a', 'b'))
    with pytest.raises(ValueError, match=message):
        check(broken)
