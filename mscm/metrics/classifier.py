"""A small classifier, trained on the spot, whose penultimate activations are the features of a Frechet distance.

For data sets that Inception was not made for (8 x 8 digits) and machines that have no weights to download. Distances in
these features compare runs of this package on one data set; they are not FID and are comparable only between equal
`Classifier.fingerprint`s.

    classifier = load_or_train(open_source("digits", split="all"), cache_dir="~/.cache/mscm")
    features = classifier.network(images).features  # uint8 "n 8 8 1" -> float32 "n 64"
"""

import dataclasses
import functools
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import linen as nn
from jaxtyping import Array, Float, Integer, UInt8

from mscm import compilation, terminal
from mscm.metrics import files
from mscm.metrics.features import FeatureNetwork, Outputs

ARCHITECTURE = "conv64-v2"  # change it with the network or its training: cached weights of another one are refused
FEATURE_DIM = 64
EVAL_BATCH = 256
_BATCH_SIZE, _LEARNING_RATE = 64, 2e-3
MAX_IMAGES = 50_000  # in memory while it trains; of more, so many are drawn
MAX_EXAMPLES = 150_000  # seen in training, at least one epoch: a minute on two CPU cores at 32 pixels


@runtime_checkable
class LabelledImages(Protocol):
    """What this module needs of a data set; every `mscm.data.sources.Source` has it."""

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def transform(self) -> str | None: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def resolution(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Hash of what the examples are."""

    def __len__(self) -> int:
        """Number of examples."""

    def load(self, indices: Integer[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        """`{'image': uint8 'b h w c', 'label': int32 'b'}`."""


class SmallConvNet(nn.Module):
    """Scaling to [-1, 1], convolutions, halving down to at most 4 x 4, then 64 features and the logits."""

    num_classes: int

    @nn.compact
    def __call__(self, images: UInt8[Array, "b h w c"]) -> tuple[Float[Array, "b d"], Float[Array, "b k"]]:
        stride = 2 if images.shape[1] > 16 else 1  # a quarter of the work where pixels are many
        hidden = nn.gelu(nn.Conv(32, (3, 3), strides=stride)(images.astype(jnp.float32) / 127.5 - 1.0))
        while hidden.shape[1] > 4:
            hidden = nn.gelu(nn.Conv(64, (3, 3), strides=(2, 2))(hidden))
        hidden = hidden.reshape(hidden.shape[0], -1)
        # Leaky: a unit that is always off would be a zero row of the covariance.
        features = nn.leaky_relu(nn.Dense(FEATURE_DIM)(hidden), negative_slope=0.2)
        return features, nn.Dense(self.num_classes)(features)


def _applied(model: SmallConvNet, params: Mapping[str, Any], images: Array) -> tuple[Array, Array]:
    """Features and logits; flax's type of `apply` has the variables that a call may change beside them."""
    return cast("tuple[Array, Array]", model.apply({"params": params}, images))


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """Trained weights and the card that says where they come from."""

    params: Mapping[str, Any]
    card: Mapping[str, Any]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights: names, shapes, types and bytes."""
        return files.fingerprint(files.flat(self.params))

    @functools.cached_property
    def network(self) -> FeatureNetwork:
        """Its penultimate activations as features, and the probabilities of its classes."""

        def forward(params: Mapping[str, Any], images: Array) -> Outputs:
            features, logits = _applied(SmallConvNet(self.card["num_classes"]), params, images)
            return Outputs(features, probabilities=nn.softmax(logits))

        shape = (self.card["resolution"], self.card["resolution"], self.card["channels"])
        return FeatureNetwork("classifier", self.fingerprint, self.params, forward, EVAL_BATCH, shape)


def train_classifier(source: LabelledImages, *, seed: int = 0, num_epochs: int = 12) -> Classifier:
    """Trains `SmallConvNet` on `source`; bit for bit the same on one machine.

    AdamW under a cosine schedule; `num_epochs` is reduced to what `MAX_EXAMPLES` allows.
    """
    rng = np.random.RandomState(seed)
    chosen = np.arange(len(source))
    if len(source) > MAX_IMAGES:
        chosen = np.sort(rng.permutation(len(source))[:MAX_IMAGES])
    data = source.load(chosen)
    images, labels = data["image"], data["label"]
    num_epochs = max(1, min(num_epochs, MAX_EXAMPLES // len(images)))
    batch_size = min(_BATCH_SIZE, len(images))
    steps_per_epoch = len(images) // batch_size
    model = SmallConvNet(source.num_classes)
    rate = optax.cosine_decay_schedule(_LEARNING_RATE, num_epochs * steps_per_epoch)
    optimizer = optax.adamw(rate, weight_decay=1e-2)

    def loss_fn(params: Mapping[str, Any], images: Array, labels: Array) -> Array:
        _, logits = _applied(model, params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    options = compilation.options(jax.default_backend())

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=options)
    def update(
        params: Mapping[str, Any], opt_state: Any, images: Array, labels: Array
    ) -> tuple[Mapping[str, Any], Any]:
        gradient = jax.grad(loss_fn)(params, images, labels)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    started = time.monotonic()
    with terminal.Elapsed(f"Training the feature network: {len(images)} images, {num_epochs} epochs"):
        key, no_images = jax.random.key(seed), jnp.zeros((1, *images.shape[1:]), jnp.uint8)
        params = jax.jit(model.init)(key, no_images)["params"]
        opt_state = optimizer.init(params)
        for _ in range(num_epochs):
            shuffled = rng.permutation(len(images))
            for step in range(steps_per_epoch):
                chosen = shuffled[step * batch_size : (step + 1) * batch_size]
                params, opt_state = update(params, opt_state, images[chosen], labels[chosen])
        jax.block_until_ready(params)
    classifier = Classifier(
        jax.tree.map(np.asarray, params),
        _card(source, seed=seed) | {
            "num_images": len(images),
            "num_epochs": num_epochs,
            "batch_size": batch_size,
            "learning_rate": _LEARNING_RATE,
        },
    )
    logging.info(
        "Trained the feature network on %d images of %s/%s in %.1f s (weights %s).",
        len(images), source.name, source.split, time.monotonic() - started, classifier.fingerprint[:12],
    )
    return classifier


def load_or_train(source: LabelledImages, cache_dir: str | os.PathLike, *, seed: int = 0) -> Classifier:
    """The classifier of `source` from `cache_dir`, or trained (and stored there) when it is absent or does not match.

    A file that is damaged, or whose card or weights are not what they should be, is named in the log and replaced.
    """
    path = os.path.join(cache_dir, f"classifier_{source.name}_{source.split}_seed{seed}.npz")
    try:
        return _load(path, _card(source, seed=seed))
    except FileNotFoundError:
        pass
    except ValueError as error:
        logging.warning("Not using the feature network: %s; training it again.", error)
    classifier = train_classifier(source, seed=seed)
    files.save(path, files.flat(classifier.params), classifier.card)
    return classifier


def _card(source: LabelledImages, *, seed: int) -> dict[str, Any]:
    """What must agree before stored weights are used."""
    return {
        "architecture": ARCHITECTURE,
        "data_set": source.name,
        "split": source.split,
        "count": len(source),
        "fingerprint": source.fingerprint,
        "num_classes": source.num_classes,
        "resolution": source.resolution,
        "channels": source.channels,
        "seed": seed,
    }


def _load(path: str, expected: Mapping[str, Any]) -> Classifier:
    arrays, card = files.load(path)
    for name, value in expected.items():
        if card.get(name) != value:
            raise ValueError(f"{path}: got a card with {name} = {card.get(name)!r}, expected {value!r}")
    return Classifier(files.tree(arrays), card)
