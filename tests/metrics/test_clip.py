"""CLIP against the transformers library with random weights, and what must hold of it without."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.metrics import clip
from mscm.metrics.clip import Config, Tower

WIDTH, LENGTH, VOCABULARY, PATCH, JOINT = 16, 7, 11, 56, 8
TOWER = Tower(num_heads=2, activation="quick_gelu", epsilon=1e-5)
CONFIG = Config(TOWER, TOWER, patch=PATCH, length=LENGTH, end=VOCABULARY - 1)
IMAGES = np.random.RandomState(0).randint(0, 256, (5, 40, 40, 3), np.uint8)


def shapes(depth=2):
    """Names and shapes of the tensors of a small CLIP."""
    found = {
        "logit_scale": (),
        "vision_model.embeddings.class_embedding": (WIDTH,),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        "vision_model.embeddings.position_embedding.weight": (1 + (224 // PATCH) ** 2, WIDTH),
        "text_model.embeddings.token_embedding.weight": (VOCABULARY, WIDTH),
        "text_model.embeddings.position_embedding.weight": (LENGTH, WIDTH),
        "visual_projection.weight": (JOINT, WIDTH),
        "text_projection.weight": (JOINT, WIDTH),
    }
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm", "text_model.final_layer_norm"]
    for tower in ("vision_model", "text_model"):
        for i in range(depth):
            layer = f"{tower}.encoder.layers.{i}"
            norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
            linear = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
            linear |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
            for name, shape in linear.items():
                found |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    return found | {f"{name}.{part}": (WIDTH,) for name in norms for part in ("weight", "bias")}


def random_tensors():
    rng = np.random.default_rng(0)

    def draw(name, shape):
        noise = rng.standard_normal(shape, np.float32)
        if "norm" in name:
            return 0.2 * noise + (1 if name.endswith("weight") else 0)
        return noise / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 and "embedding" not in name else 0.5 * noise

    return {name: np.asarray(draw(name, shape), np.float32) for name, shape in shapes().items()}


def tokens_of(captions):
    """A number for each letter between marks of start and end, filled up with ends."""
    rows = np.full((len(captions), LENGTH), VOCABULARY - 1, np.int32)
    for row, caption in zip(rows, captions, strict=True):
        row[: len(caption) + 1] = [0, *(1 + ord(letter) - ord("a") for letter in caption)]
    return rows


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, clip.from_torch(random_tensors()))


@pytest.fixture(scope="module")
def alignment(params):
    return clip.make(params, CONFIG, tokens_of, "f")


CAPTIONS = ["abc", "a", "", "fed", "abc"]


def test_scores_are_cosines_of_each_pair_alone(alignment):
    """Whatever is beside it, and more than one batch of texts."""
    scores = alignment.score(IMAGES, CAPTIONS)
    assert scores.dtype == np.float32 and (np.abs(scores) <= 1 + 1e-6).all() and scores.std() > 1e-3
    np.testing.assert_allclose(alignment.score(IMAGES[3:], CAPTIONS[3:]), scores[3:], atol=1e-5)
    many = alignment.score(np.tile(IMAGES[:1], (70, 1, 1, 1)), ["abc"] * 70)
    np.testing.assert_allclose(many, scores[0], atol=1e-5)
    assert abs(alignment.score(IMAGES[:1], ["d"])[0] - scores[0]) > 1e-3


def test_what_follows_the_end_does_not_count(params):
    tokens = tokens_of(["ab"])
    other = tokens.copy()
    other[0, 5:] = 3
    for end in (CONFIG.end, None):
        config = Config(TOWER, TOWER, PATCH, LENGTH, end)
        np.testing.assert_allclose(
            clip.encode_texts(params["text"], jnp.asarray(tokens), config=config),
            clip.encode_texts(params["text"], jnp.asarray(other), config=config),
            atol=1e-6,
        )


def test_a_missing_tensor_is_a_sentence():
    for name in ("visual_projection.weight", "text_model.encoder.layers.1.mlp.fc1.bias"):
        tensors = random_tensors()
        del tensors[name]
        with pytest.raises(ValueError, match=f"got no tensor {name}, expected those of a CLIP"):
            clip.from_torch(tensors)
    with pytest.raises(ValueError, match="got no tensor vision_model.encoder.layers.0"):
        clip.from_torch({})


def test_settings_that_are_not_known():
    values = {"vision_config": {"image_size": 224}, "text_config": {"hidden_act": "relu"}}
    with pytest.raises(ValueError, match="hidden_act of text is 'relu', expected one of quick_gelu, gelu"):
        clip.read_config(values)
    with pytest.raises(ValueError, match="image_size is 336, expected 224"):
        clip.read_config({"vision_config": {"image_size": 336}, "text_config": {}})
    assert clip.read_config({"vision_config": {}, "text_config": {"eos_token_id": 2}}).end is None


def test_a_directory_that_is_no_clip(tmp_path):
    with pytest.raises(ValueError, match="nowhere', expected a directory with the files of a CLIP"):
        clip.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got no config.json, expected it"):
        clip.load(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    with pytest.raises(ValueError, match="got a CLIP that cannot be read"):
        clip.load(tmp_path)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A directory as the transformers library writes it, with random weights and words as tokens."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["a", "cat", "dog", "red", "<start>", "<end>"]
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    config = transformers.CLIPConfig(
        text_config=dict(
            vocab_size=len(words), max_position_embeddings=9, bos_token_id=4, eos_token_id=5, hidden_act="gelu", **sizes
        ),
        vision_config=dict(image_size=224, patch_size=56, **sizes),
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is near the zero or one that would hide it
            parameter.add_(0.1 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("clip")
    model.save_pretrained(directory)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 4), ("<end>", 5)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory, model


def test_it_is_the_librarys(published):
    """Cosines of images of another size and of texts that are short, empty and too long."""
    import torch
    from PIL import Image

    directory, model = published
    captions = ["a red cat", "", "dog " * 20, "a dog", "red"]
    rows = [[4, 0, 3, 1, 5], [4, 5], [4, *[2] * 7, 5], [4, 0, 2, 5], [4, 3, 5]]
    tokens = torch.tensor([row + [5] * (9 - len(row)) for row in rows])
    resized = [Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC) for image in IMAGES]
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in resized])
    mean, std = np.float32(clip._MEAN), np.float32(clip._STD)
    with torch.inference_mode():
        out = model(input_ids=tokens, pixel_values=torch.tensor(((pixels - mean) / std).transpose(0, 3, 1, 2)))
    expected = (out.image_embeds * out.text_embeds).sum(dim=1).numpy()
    got = clip.load(directory).score(IMAGES, captions)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert expected.std() > 1e-2
    assert json.loads((directory / "config.json").read_text())["text_config"]["hidden_act"] == "gelu"
