"""Captions become tokens: the same bytes back, one caption after the other, and what they say is in the image."""

import contextlib

import numpy as np
import pytest

from mscm.data import captioned_digits, captions, pipeline, sources
from mscm.data.captions import TextSpec, WithTokens

SPEC = TextSpec("bytes", length=8)


def make_source(several=(("a",), ("b", "bb"), ("c", "cc", "ccc"))):
    images = np.arange(len(several), dtype=np.uint8).reshape(-1, 1, 1, 1)
    labels = np.zeros(len(several), np.int32)
    return sources.ArraySource("few", "all", images, labels, ("one",), captions=several)


def words(tokens, mask):
    """The inverse of `encode`."""
    assert not np.any(tokens[~mask])
    return [bytes(row[there]).decode() for row, there in zip(tokens, mask, strict=True)]


def test_bytes_come_back():
    texts = ["a cat", "", "ä", "12345678"]
    tokens, mask = captions.encode(texts, SPEC)
    assert tokens.dtype == np.uint8 and tokens.shape == mask.shape == (4, 8)
    assert words(tokens, mask) == texts
    assert words(*captions.encode(["123456789"], SPEC)) == ["12345678"]


def test_each_epoch_has_the_next_caption():
    """In the pipeline too, whose batches span epochs; beside each caption its own image."""
    source = WithTokens(make_source(), SPEC)
    every = np.arange(3)
    seen = [words(*source.texts(every, np.full(3, epoch))) for epoch in range(4)]
    assert seen == [["a", "b", "c"], ["a", "bb", "cc"], ["a", "b", "ccc"], ["a", "bb", "c"]]
    with contextlib.closing(pipeline.batches(source, batch_size=4, seed=0)) as batches:
        examples = []
        for _ in range(3):
            batch = next(batches)
            assert batch.keys() == {"image", "label", "tokens", "mask"}
            examples += zip(batch["image"].ravel().tolist(), words(batch["tokens"], batch["mask"]), strict=True)
    for position, (image, text) in enumerate(examples):
        assert text == seen[position // 3][image]


def test_a_source_of_tokens_is_the_source():
    whole = make_source()
    source = WithTokens(whole, SPEC)
    assert isinstance(source, sources.Source) and len(source) == 3
    assert (source.name, source.resolution, source.captions) == ("few", 1, whole.captions)
    plain = sources.ArraySource("few", "all", whole.images, whole.labels, ("one",))
    assert len({whole.fingerprint, plain.fingerprint, make_source((("a",), ("b",), ("c",))).fingerprint}) == 3
    assert source.fingerprint == whole.fingerprint


def test_what_has_no_captions_is_refused():
    with pytest.raises(ValueError, match="got 'digits', whose images have no captions, expected a captioned data set"):
        WithTokens(sources.open_source("digits", split="all"), SPEC)
    with pytest.raises(ValueError, match="got the encoder 'bytes' with 4 features, expected None of bytes"):
        TextSpec("bytes", length=8, features=4)


@pytest.fixture(scope="module")
def composed():
    return sources.open_source("captioned_digits", split="train")


def test_a_caption_says_what_is_where(composed):
    """Each part is one of the real digits, of the class that the caption says; the rest is black."""
    digits = sources.open_source("digits", split="all")
    known = {image.tobytes(): label for image, label in zip(digits.images, digits.labels.tolist(), strict=True)}
    for image, (text,) in zip(composed.images[:200], composed.captions[:200], strict=True):
        rest = image.copy()
        for digit, place in captioned_digits.parts(text):
            assert known[image[place].tobytes()] == digit
            rest[place] = 0
        assert not rest.any()


def test_relations_are_where_words_say():
    (_, (rows, columns)), (_, (other_rows, other_columns)) = captioned_digits.parts("a one above an eight")
    assert rows.stop <= other_rows.start and columns == other_columns
    (_, (rows, columns)), (_, (other_rows, other_columns)) = captioned_digits.parts("a one right of a two")
    assert rows == other_rows and other_columns.stop <= columns.start
    for opposite in (("left of", "right of"), ("above", "below")):
        one, other = (captioned_digits.parts(captioned_digits.caption(3, 8, how)) for how in opposite)
        assert [part.digit for part in one] == [3, 8] and one[0].place == other[1].place


def test_classes_are_what_images_show(composed):
    """The parts in one order, whichever the caption names first."""
    for text, label in zip(composed.captions[:100], composed.labels[:100].tolist(), strict=True):
        named = captioned_digits.parts(composed.class_names[label])
        assert sorted(named, key=str) == sorted(captioned_digits.parts(text[0]), key=str)


def test_every_caption_is_there_and_fits(composed):
    """Three of four name the near digit first."""
    said = {text for (text,) in composed.captions}
    assert len(said) == 400 and max(map(len, said)) <= 32
    near_first = [" left of " in text or " above " in text for (text,) in composed.captions]
    assert abs(np.mean(near_first) - 0.75) < 0.0102  # 16,384 draws: 3 standard deviations


@pytest.mark.parametrize("text", ["", "a cat left of a dog", "a one left of a two ", "a one left of two"])
def test_what_is_no_caption_of_digits(text):
    with pytest.raises(ValueError, match="expected a caption such as 'a seven left of a two'"):
        captioned_digits.parts(text)
