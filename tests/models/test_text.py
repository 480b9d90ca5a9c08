"""Captions in the U-ViT: which tokens count, what attends to them, and what a network without them keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mscm.models import attention
from mscm.models.text import TextEncoder, TextStage
from mscm.models.uvit import Stage
from mscm.types import Text
from tests.models.test_uvit import LABELS, LOGSNR, TINY, Z, apply, init, random_params, stack_blocks

LENGTH = 6
READER = TextStage("bytes", length=LENGTH, width=16, num_blocks=1)
NET = TINY.copy(num_classes=None, text=READER, stages=(Stage("transformer", 16, 1),))
CAPTIONS = (b"a cat", b"two", b"", b"a dog!")


def text_of(captions, filler=0):
    """Bytes, with `filler` where there are none."""
    tokens = np.full((len(captions), LENGTH), filler, np.uint8)
    for row, caption in zip(tokens, captions, strict=True):
        row[: len(caption)] = np.frombuffer(caption, np.uint8)
    mask = np.arange(LENGTH) < np.array([[len(caption)] for caption in captions])
    return Text(jnp.asarray(tokens), jnp.asarray(mask))


TEXT = text_of(CAPTIONS)


@pytest.fixture(scope="module")
def params():
    return random_params(NET, Z, LOGSNR, TEXT, train=False)


@pytest.fixture(scope="module")
def answered(params):
    return apply(NET, params, labels=TEXT)


def test_what_is_not_there_does_not_count(params, answered):
    """Bytes beyond a caption change nothing, not even of one without any."""
    np.testing.assert_array_equal(apply(NET, params, labels=text_of(CAPTIONS, filler=77)), answered)


def test_every_byte_and_its_place_count(params, answered):
    for changed in ((b"a bat", *CAPTIONS[1:]), (b"a tac", *CAPTIONS[1:]), (b"a ca", *CAPTIONS[1:])):
        other = apply(NET, params, labels=text_of(changed))
        assert np.abs(other[0] - answered[0]).max() > 1e-3
        np.testing.assert_array_equal(other[1:], answered[1:])  # nor do captions meet those of other images


def test_the_null_caption_is_what_no_caption_says(params):
    """It is finite, and differs from that of a space."""
    null, space = (apply(NET, params, labels=text_of((caption,) * 4)) for caption in (b"", b" "))
    assert np.isfinite(null).all() and np.abs(null - space).max() > 1e-3


@pytest.mark.parametrize("part", ["cross_out", "pooled"])
def test_captions_come_in_by_two_ways(params, answered, part):
    """Through attention in every block, and through the embedding of the noise level."""
    closed = {
        path: jnp.zeros_like(leaf) if part in path else leaf for path, leaf in flatten_dict(params).items()
    }
    assert sum(part in path and path[-1] == "kernel" for path in closed) == (4 if part == "cross_out" else 1)
    half_closed = unflatten_dict(closed)
    one, other = (apply(NET, half_closed, labels=text_of((caption,) * 4)) for caption in (b"a cat", b"two"))
    assert np.abs(one - other).max() > 1e-4


def test_scanned_blocks_are_the_same_function(params, answered):
    scanned = NET.copy(scan_blocks=True)
    of_text = {"text": params["params"]["text"]}  # whose blocks are never scanned
    stacked = {"params": stack_blocks(params["params"]) | of_text}
    np.testing.assert_allclose(apply(scanned, stacked, labels=TEXT), answered, rtol=2e-4, atol=2e-5)


def test_rematerialisation_knows_captions(params, answered):
    np.testing.assert_allclose(
        apply(NET.copy(remat_policy="full"), params, labels=TEXT), answered, rtol=1e-5, atol=1e-6
    )


def test_embeddings_of_a_frozen_encoder():
    """Of half precision as they are stored; where the mask is false nothing is read, not even a NaN."""
    net = NET.copy(text=TextStage("embeddings", length=LENGTH, width=12, num_blocks=0))
    drawn = np.random.default_rng(0).standard_normal((4, LENGTH, 5)).astype(np.float16)
    text = Text(jnp.asarray(drawn), TEXT.mask)
    params = random_params(net, Z, LOGSNR, text, train=False)
    whole = apply(net, params, labels=text)
    other = jnp.where(TEXT.mask[..., None], text.tokens, 7.0)
    np.testing.assert_array_equal(apply(net, params, labels=Text(other, text.mask)), whole)
    moved = text.tokens.at[0, 1].add(1.0)
    assert np.abs(apply(net, params, labels=Text(moved, text.mask))[0] - whole[0]).max() > 1e-3


def test_a_new_network_answers_zero_and_has_parameters_of_text_only_where_it_reads():
    new = init(NET, labels=TEXT)
    assert not np.any(apply(NET, new, labels=TEXT))
    names = {"/".join(path) for path in flatten_dict(init(TINY)["params"])}
    assert not any(word in name for name in names for word in ("text", "cross", "pooled"))


def test_attention_under_a_mask_is_attention_to_what_is_left():
    """To the chosen keys alone, in any place; and a mask that leaves all is none."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, n, 3, 8)) for i, n in enumerate((5, 7, 7)))
    chosen = np.array([0, 2, 3, 6])
    mask = jnp.zeros((2, 7), bool).at[:, chosen].set(True)
    masked = attention.attend(q, k, v, mask=mask)
    np.testing.assert_allclose(
        masked, jax.nn.dot_product_attention(q, k[:, chosen], v[:, chosen]), rtol=1e-5, atol=1e-6
    )
    everything = attention.attend(k, k, v, mask=jnp.ones((2, 7), bool))
    np.testing.assert_allclose(everything, attention.attend(k, k, v, implementation="xla"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: TextStage("words", 4, 8, 1), "got text of kind 'words', expected one of bytes, embeddings"),
        (lambda: TextStage("bytes", 0, 8, 1), "got texts of 0 tokens and width 8, expected at least 1"),
        (lambda: TextStage("bytes", 4, 8, 0), "got 0 blocks that read bytes, expected at least 1"),
        (lambda: TextStage("embeddings", 4, 8, 2), "got 2 blocks that read embeddings, expected 0"),
        (lambda: init(NET, labels=LABELS), "got no text, expected one because text=TextStage"),
        (lambda: init(TINY, labels=TEXT), "got a text, expected none because text=None"),
        (lambda: init(NET, labels=Text(TEXT.tokens[:, 1:], TEXT.mask[:, 1:])), "got 5 tokens .*, expected 6 bytes"),
        (
            lambda: init(NET, labels=Text(jnp.zeros((4, LENGTH, 3)), TEXT.mask)),
            "got 6 tokens of type float32, expected 6 bytes",
        ),
        (
            lambda: init(NET.copy(text=TextStage("bytes", LENGTH, 12, 1)), labels=TEXT),
            "got a text of width 12, expected a multiple of head_dim=8",
        ),
    ],
)
def test_what_does_not_fit_is_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_what_a_word_says_is_not_lost_in_a_long_caption():
    """The vector of the whole caption is the sum of its tokens' over the root of their number, not their mean."""
    encoder = TextEncoder(TextStage("embeddings", length=LENGTH, width=16, num_blocks=0), 8, 8, 2, jnp.float32, False)
    tokens = jnp.ones((2, LENGTH, 5))
    mask = jnp.asarray(np.arange(LENGTH) < np.array([[1], [LENGTH]]))
    variables = random_params(encoder, Text(tokens, mask))
    params = flatten_dict(variables["params"])
    params = {path: jnp.zeros_like(leaf) if path in (("start",), ("pooled", "bias")) else leaf
              for path, leaf in params.items()}
    context, pooled = encoder.apply({"params": unflatten_dict(params)}, Text(tokens, mask))
    word = context.tokens[0, 1] @ params["pooled", "kernel"]
    np.testing.assert_allclose(pooled[0], word / np.sqrt(2), rtol=1e-4)
    np.testing.assert_allclose(pooled[1], LENGTH * word / np.sqrt(LENGTH + 1), rtol=1e-4)
