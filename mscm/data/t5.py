"""T5's encoder of a local directory of weights, through the transformers library: for preparing data and for prompts.

`pip install mscm[t5]`. Training reads what it has made of the captions, and imports neither this nor PyTorch.
"""

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float16

from mscm.data.embeddings import Encoder

_WEIGHTS = ("*.safetensors", "*.bin")


def load(directory: str | os.PathLike, *, length: int) -> Encoder:
    """The encoder; on a GPU where PyTorch has one, in bfloat16 there.

    Raises:
      ValueError: no such directory, weights or tokeniser, or the libraries are not there.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"got {os.fspath(directory)!r}, expected a directory with a T5's weights and its tokeniser")
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not files:
        raise ValueError(f"{folder}: got no weights, expected files such as model.safetensors")
    # Pickles can run code when they are read.
    if not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(f"{folder}: got pickles ({files[0].name}), expected model.safetensors; convert them")
    try:
        import torch
        from transformers import AutoTokenizer, T5EncoderModel
    except ImportError as error:
        raise ValueError(f"got no {error.name}, which reads T5; pip install mscm[t5]") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = T5EncoderModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: got no T5 that can be read ({' '.join(str(error).split()):.300})") from error
    model = model.to(device).eval()

    def encode(captions: Sequence[str]) -> list[Float16[np.ndarray, "_ e"]]:
        batch = tokenizer(
            list(captions), truncation=True, max_length=length, padding="longest", return_tensors="pt"
        ).to(device)
        with torch.inference_mode():
            hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        rows, counts = hidden.float().cpu().numpy(), batch.attention_mask.sum(dim=1).tolist()
        return [row[:count].astype(np.float16) for row, count in zip(rows, counts, strict=True)]

    name = os.path.basename(os.path.abspath(folder))
    return Encoder(name, _fingerprint(files), length, int(model.config.d_model), encode)


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            for chunk in iter(functools.partial(file.read, 2**22), b""):
                digest.update(chunk)
    return digest.hexdigest()
