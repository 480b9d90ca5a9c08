"""How well images show what their captions say: one number an image, whose mean over all is the score.

    alignment = of_digits(load_or_train(open_source("digits", split="all"), cache_dir), captioned_digits.parts)
    alignment.score(images, captions)  # float32 "n": 1 where both digits are those of the caption, else 0
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float32, UInt8

from mscm.metrics.classifier import Classifier
from mscm.metrics.features import Outputs, rows_of


@dataclasses.dataclass(frozen=True, eq=False)
class Alignment:
    """A function of images and captions; every process calls it with all of them."""

    name: str  # of the score
    fingerprint: str  # scores of another one are not comparable
    score: Callable[[UInt8[np.ndarray, "n h w c"], Sequence[str]], Float32[np.ndarray, "n"]]

    def beside(
        self, network: Callable[[np.ndarray], Outputs], captions: Sequence[str]
    ) -> Callable[[np.ndarray], Outputs]:
        """A network that is shown images in the order of their captions, with the scores among its outputs."""
        count = 0

        def both(images: UInt8[np.ndarray, "n h w c"]) -> Outputs:
            nonlocal count
            start, count = count, count + len(images)
            return network(images)._replace(alignment=self.score(images, captions[start:count]))

        return both


def of_digits(
    classifier: Classifier, parts_of: Callable[[str], Iterable[tuple[int, tuple[slice, slice]]]]
) -> Alignment:
    """The fraction of images in which a classifier reads all digits of the caption where that says.

    `parts_of`: digits, and rows and columns of each, that a caption means.
    """

    def score(images: UInt8[np.ndarray, "n 16 16 1"], captions: Sequence[str]) -> Float32[np.ndarray, "n"]:
        said = [list(parts_of(caption)) for caption in captions]
        crops = [image[place] for image, parts in zip(images, said, strict=True) for _, place in parts]
        probabilities = rows_of(classifier.network(np.stack(crops)).probabilities, "probabilities")
        read = iter(probabilities.argmax(axis=1).tolist())
        right = [all([next(read) == digit for digit, _ in parts]) for parts in said]  # a list: all of them are read
        return np.array(right, np.float32)

    return Alignment("caption_accuracy", classifier.fingerprint, score)
