"""Whether images show what captions say."""

import pytest

from mscm.data import captioned_digits, sources
from mscm.metrics import alignment, gathering
from mscm.metrics.classifier import train_classifier
from mscm.metrics.features import pixels
from mscm.metrics.gathering import Gathering


@pytest.fixture(scope="module")
def of_digits():
    return alignment.of_digits(train_classifier(sources.open_source("digits", split="all")), captioned_digits.parts)


@pytest.fixture(scope="module")
def some():
    source = sources.open_source("captioned_digits", split="train")
    return source.images[:300], [text for (text,) in source.captions[:300]]


def test_real_images_show_it_and_others_do_not(of_digits, some):
    images, captions = some
    assert of_digits.score(images, captions).mean() > 0.98  # the classifier has seen these digits
    others = [*captions[1:], captions[0]]

    def shown(text):
        return sorted(captioned_digits.parts(text), key=str)

    right = [shown(text) == shown(other) for text, other in zip(captions, others, strict=True)]
    shifted = of_digits.score(images, others)
    assert shifted.mean() < 0.03 and shifted[right].all()


def test_both_parts_must_be_right(of_digits, some):
    images, captions = some
    half = []
    for text in captions:
        first, second = captioned_digits.parts(text)
        relation = next(how for how in ("left of", "right of", "above", "below") if how in text)
        half.append(captioned_digits.caption(first.digit, (second.digit + 1) % 10, relation))
    assert of_digits.score(images, half).mean() < 0.02


def test_scores_beside_a_network_go_on_where_a_pass_stopped(of_digits, some, tmp_path):
    """In batches of any size, and cut in two."""
    images, captions = some
    captions = [*captions[:200], *captions[:100]]  # of the last hundred nearly all are wrong
    expected = of_digits.score(images, captions)

    def over(batches, start, partial=None):
        gathered = Gathering(300, num_kept=10, partial=partial)
        network = of_digits.beside(pixels((16, 16, 1)), captions[start:])
        gathering.over(iter(batches), network, gathered)
        return gathered

    whole = over([images], 0).statistics()
    assert whole.alignment == expected.sum() and 150 < expected.sum() < 250
    partial = gathering.Partial(tmp_path / "partial.npz", key="x")
    over([images[:70], images[70:130]], 0, partial).save()
    assert over([images[130:]], 130, partial).statistics().alignment == whole.alignment
