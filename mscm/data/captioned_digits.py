"""Two real digits on a canvas of 16 x 16 pixels, and a caption that says which and where: text to image in small.

    "a seven left of a two"    "an eight below a zero"

A caption says all there is to say, so that whether an image shows it can be looked up (`parts`).
"""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

SIDE, DIGIT_SIDE = 16, 8
NUM_EXAMPLES = 16_384  # 61 of each caption that names the near digit first, 20 of each other

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NEAR, _FAR, _BETWEEN = 0, DIGIT_SIDE, DIGIT_SIDE // 2
# Row and column of the first digit and of the second.
_RELATIONS = {
    "left of": ((_BETWEEN, _NEAR), (_BETWEEN, _FAR)),
    "right of": ((_BETWEEN, _FAR), (_BETWEEN, _NEAR)),
    "above": ((_NEAR, _BETWEEN), (_FAR, _BETWEEN)),
    "below": ((_FAR, _BETWEEN), (_NEAR, _BETWEEN)),
}
# Three of four captions name the left or the upper digit first. Were it two, what is named first would say nothing of
# its place until the relation is read as well, and a training would stand still until it finds both at once.
_DRAWN = ("left of",) * 3 + ("right of",) + ("above",) * 3 + ("below",)
_A_DIGIT = f"an? ({'|'.join(_WORDS)})"
_CAPTION = re.compile(f"{_A_DIGIT} ({'|'.join(_RELATIONS)}) {_A_DIGIT}")


class Part(NamedTuple):
    """What a caption says of one part of the image."""

    digit: int
    place: tuple[slice, slice]  # rows and columns


def caption(first: int, second: int, relation: str) -> str:
    """In words."""
    one, other = (f"{'an' if digit == 8 else 'a'} {_WORDS[digit]}" for digit in (first, second))
    return f"{one} {relation} {other}"


def parts(text: str) -> tuple[Part, Part]:
    """What a caption says.

    Raises:
      ValueError: it is none of those that `caption` makes.
    """
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise ValueError(f"got {text!r}, expected a caption such as {caption(7, 2, 'left of')!r}")
    first, relation, second = match.groups()
    one, other = _RELATIONS[relation]
    return _part(first, *one), _part(second, *other)


def _part(word: str, top: int, left: int) -> Part:
    return Part(_WORDS.index(word), (slice(top, top + DIGIT_SIDE), slice(left, left + DIGIT_SIDE)))


class Composed(NamedTuple):
    """Images, what they show as a class, and what they show in words."""

    images: UInt8[np.ndarray, "n 16 16 1"]
    labels: Int32[np.ndarray, "n"]
    captions: tuple[tuple[str], ...]


# Two captions say the same of one image: a seven left of a two, a two right of a seven.
CLASS_NAMES = tuple(caption(i, j, how) for how in ("left of", "above") for i, j in np.ndindex(10, 10))


def compose(digits: UInt8[np.ndarray, "n 8 8 1"], labels: Int32[np.ndarray, "n"]) -> Composed:
    """Images of pairs of digits: pairs and relations at random, the same for everybody."""
    rng = np.random.RandomState(0)  # not default_rng: NumPy froze its stream
    images, classes, captions = np.zeros((NUM_EXAMPLES, SIDE, SIDE, 1), np.uint8), [], []
    for image in images:
        chosen = rng.randint(len(digits), size=2)
        first, second = labels[chosen].tolist()
        relation = _DRAWN[rng.randint(len(_DRAWN))]
        text = caption(first, second, relation)
        for part, i in zip(parts(text), chosen, strict=True):
            image[part.place] = digits[i]
        is_mirrored = relation in ("right of", "below")
        near, far = (second, first) if is_mirrored else (first, second)
        classes.append(100 * (relation in ("above", "below")) + 10 * near + far)
        captions.append((text,))
    return Composed(images, np.array(classes, np.int32), tuple(captions))
