"""What a frozen encoder made of captions comes back as it was, from files that say what they are."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mscm.data import captions, embeddings, preparation, sources
from mscm.data.captions import TextSpec, WithTokens
from mscm.data.preparation import Settings
from tests import commands
from tests.data.test_captioned_files import EXPECTED, beside, folder

ROOT = Path(__file__).resolve().parents[2]
FEATURES, LENGTH = 5, 6
ALL = [text for said in EXPECTED for text in said]


def rows_of(texts):
    """Of each word a vector that is its own."""
    def vector(word):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
        return np.random.RandomState(seed).standard_normal(FEATURES)

    return [np.array([vector(word) for word in text.split()][:LENGTH], np.float16) for text in texts]


ENCODER = embeddings.Encoder("words-small", "f" * 64, LENGTH, FEATURES, rows_of)


@pytest.fixture
def prepared(tmp_path):
    from mscm.data import captioned_files

    files = captioned_files.open_captioned(folder(tmp_path / "x", beside()))
    output = tmp_path / "records"
    preparation.prepare(files, output, Settings(resolution=4), split="train", num_workers=1, report=lambda *_: None)
    return output


def write(directory, encoder=ENCODER, report=lambda *_: None):
    source = sources.open_source("x", split="train", path=directory)
    texts = [text for said in source.captions for text in said]
    return embeddings.write(directory, "train", texts, source.card.captions_sha256, encoder, report=report)


def opened(directory, **changes):
    spec = TextSpec(**({"encoder": "words-small", "length": LENGTH, "features": FEATURES} | changes))
    return WithTokens(sources.open_source("x", split="train", path=directory), spec)


def test_the_tokens_of_another_encoder_are_other_data(prepared, tmp_path):
    """Of the same name: a training with the one does not go on with the other."""
    other = shutil.copytree(prepared, tmp_path / "other")
    write(prepared)
    write(other, dataclasses.replace(ENCODER, fingerprint="e" * 64))
    bare = sources.open_source("x", split="train", path=prepared)
    assert captions.without_tokens(opened(prepared)).fingerprint == bare.fingerprint
    assert len({bare.fingerprint, opened(prepared).fingerprint, opened(other).fingerprint}) == 3
    assert opened(prepared).fingerprint == opened(prepared, length=2).fingerprint


def test_the_cache_gives_what_the_encoder_gave(prepared, monkeypatch):
    """Of each caption in its turn; in several shards, in another process's copy, and cut to fewer tokens."""
    monkeypatch.setattr(embeddings, "_PER_SHARD", 3)
    reports = []
    card = write(prepared, report=lambda *numbers: reports.append(numbers))
    assert card.shard_sizes == (3, 1) and reports == [(3, 0), (4, 0)]
    source = pickle.loads(pickle.dumps(opened(prepared)))
    for epoch in range(3):
        indices = np.array([2, 1, 0, 1])
        said = captions.in_epochs(source, indices, np.full(4, epoch))
        tokens, mask = source.texts(indices, np.full(4, epoch))
        direct = captions.encode(said, source.text, ENCODER)
        np.testing.assert_array_equal(tokens, direct.tokens)
        np.testing.assert_array_equal(mask, direct.mask)
        assert tokens.dtype == np.float16 and mask.sum(axis=1).tolist() == [len(text.split()) for text in said]
    short = opened(prepared, length=2).texts(np.array([1]), np.array([1]))
    np.testing.assert_array_equal(short.tokens[0], rows_of(["the dog sits"])[0][:2])


def test_a_batch_has_them(prepared):
    write(prepared)
    batch = opened(prepared).load(np.array([0, 2]))
    assert batch["tokens"].shape == (2, LENGTH, FEATURES) and batch["mask"].tolist()[0] == [True, True] + [False] * 4


def test_killed_it_goes_on_with_the_next_shard(prepared, monkeypatch):
    monkeypatch.setattr(embeddings, "_PER_SHARD", 1)
    asked = []

    def counting(limit):
        def encode(texts):
            if len(asked) >= limit:
                raise KeyboardInterrupt
            asked.extend(texts)
            return rows_of(texts)

        return dataclasses.replace(ENCODER, encode=encode)

    with pytest.raises(KeyboardInterrupt):
        write(prepared, counting(2))
    with pytest.raises(ValueError, match="got no train-text.json in .*expected what a text encoder made"):
        opened(prepared)
    reports = []
    write(prepared, counting(9), lambda *numbers: reports.append(numbers))
    assert asked == ALL
    assert reports == [(1, 1), (2, 2), (3, 2), (4, 2)]  # only what was done now counts for the speed
    assert sorted(path.suffix for path in prepared.glob("train-text-*")) == [".array_record"] * 4
    opened(prepared).source.open_embeddings().verify()


def test_an_unfinished_run_of_another_encoder_is_refused(prepared, monkeypatch):
    monkeypatch.setattr(embeddings, "_PER_SHARD", 1)
    answers = iter([rows_of(ALL[:1])])
    with pytest.raises(StopIteration):
        write(prepared, dataclasses.replace(ENCODER, encode=lambda texts: next(answers)))
    with pytest.raises(ValueError, match=r"got an unfinished run of another encoder .*; remove train-text-\*"):
        write(prepared, dataclasses.replace(ENCODER, fingerprint="0" * 64))


def _edit(directory, **changes):
    path = embeddings.card_path(directory, "train")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: embeddings.card_path(d, "train").unlink(), "got no train-text.json in .*; run python -m mscm.prep"),
        (lambda d: embeddings.card_path(d, "train").write_text("{"), "got a file that is no JSON"),
        (lambda d: _edit(d, format="x"), "got format 'x', expected 'mscm text 1' with all its keys"),
        (lambda d: _edit(d, num_captions=3), "got values that no card has"),
        (lambda d: _edit(d, shards=["../x"]), "got values that no card has"),
        (lambda d: _edit(d, features=0), "got values that no card has"),
        (lambda d: _edit(d, captions_sha256="0"), "got embeddings of other captions than the split's"),
        (lambda d: _edit(d, shard_sizes=[3], num_captions=3), r"got shards of \(4,\) captions, expected \(3,\)"),
        (lambda d: next(d.glob("train-text-0*")).write_bytes(b"x" * 100), r"got shards of \(0,\)|a broken shard"),
        (lambda d: _edit(d, encoder="other"), "got embeddings of 'other' with 5 features and up to 6 tokens, exp"),
    ],
)
def test_what_is_not_what_it_says_is_a_sentence(prepared, damage, sentence):
    write(prepared)
    damage(prepared)
    with pytest.raises(ValueError, match=sentence):
        opened(prepared)


def test_what_a_config_asks_for_must_be_there(prepared, tmp_path):
    write(prepared)
    for changes in ({"length": 7}, {"features": 4}, {"encoder": "t5"}):
        with pytest.raises(ValueError, match="got embeddings of 'words-small' with 5 features and up to 6 tokens"):
            opened(prepared, **changes)
    loose = sources.open_source("x", split="train", path=tmp_path / "x", resolution=4, captioned=True)
    with pytest.raises(ValueError, match="got 'x' as it is, expected a directory of python -m mscm.prepare"):
        WithTokens(loose, TextSpec("t5", length=2, features=5))
    with pytest.raises(ValueError, match="train-text.json exists already"):
        write(prepared)
    with pytest.raises(ValueError, match="got no text encoder, expected 'words-small'"):
        captions.encode(["a"], TextSpec("words-small", 2, FEATURES))
    with pytest.raises(ValueError, match="got the text encoder 'words-small' of 5 features, expected .* of 4"):
        captions.encode(["a"], TextSpec("words-small", 2, 4), ENCODER)


def test_changed_bytes_are_found(prepared):
    write(prepared)
    embedded = opened(prepared).source.open_embeddings()
    embedded.verify()
    _edit(prepared, shard_sha256=["0" * 64])
    with pytest.raises(ValueError, match="got other bytes than were written; embed the captions again"):
        opened(prepared).source.open_embeddings().verify()


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A directory with a tiny T5 of random weights and a tokeniser of words."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("t5") / "t5-tiny"
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(directory)
    words = ["<pad>", "</s>", "<unk>", *sorted({word for text in ALL for word in text.split()})]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words.index("</s>"))]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory


def test_t5_through_the_cache_is_t5(t5, prepared, tmp_path):
    """As PyTorch gives it for each caption alone; and training reads it without transformers or PyTorch."""
    import torch
    import transformers

    output = tmp_path / "out"
    flags = (f"--source={tmp_path / 'x'}", f"--output={output}", "--resolution=4", "--captions", "--workers=1")
    assert commands.run("prepare", *flags, f"--text_encoder={t5}", "--text_length=8") == 0
    spec = TextSpec("t5-tiny", length=8, features=16)
    source = WithTokens(sources.open_source("x", split="train", path=output), spec)
    tokens, mask = source.texts(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 0]))
    model = transformers.T5EncoderModel.from_pretrained(t5).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5)
    for text, row, there in zip(ALL, tokens, mask, strict=True):
        with torch.inference_mode():
            expected = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        assert there.sum() == len(expected) == len(text.split()) + 1
        np.testing.assert_allclose(row[: len(expected)], expected.numpy(), atol=2e-3)  # half precision

    script = (
        "import sys, numpy as np\n"
        "from mscm.data import sources\n"
        "from mscm.data.captions import TextSpec, WithTokens\n"
        f"source = WithTokens(sources.open_source('x', split='train', path={os.fspath(output)!r}), "
        "TextSpec('t5-tiny', 8, 16))\n"
        "source.load(np.array([0, 1]))\n"
        "import mscm.experiment\n"
        "print([name for name in ('transformers', 'torch', 'tensorflow') if name in sys.modules])\n"
        "import mscm.training_loop  # with tensorboardX, which imports PyTorch where it is installed\n"
        "print([name for name in ('transformers', 'tensorflow') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_a_t5_that_is_none(t5, tmp_path, capfd):
    from mscm.data import t5 as t5_lib

    with pytest.raises(ValueError, match="got '.*nowhere', expected a directory with a T5's weights"):
        t5_lib.load(tmp_path / "nowhere", length=4)
    with pytest.raises(ValueError, match="got no weights, expected files such as model.safetensors"):
        t5_lib.load(tmp_path, length=4)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"got pickles \(pytorch_model.bin\), expected model.safetensors"):
        t5_lib.load(tmp_path, length=4)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="got no T5 that can be read"):
        t5_lib.load(tmp_path, length=4)
