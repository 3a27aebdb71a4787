"""transformers' EsmModel, ESM-2 of 35 million weights (Lin et al. 2023), on 128 residues.

    python tools/export/esm.py esm.onnx [--checkpoint model.pt] [--samples FOLDER --text a.txt --tokenizer FOLDER]

Its output is the last hidden state; with --open the file takes any number of proteins of any length, and samples have
several, filled up behind their ends. Sizes of others, as --layers, --heads and --hidden:
8 million 6 20 320, 150 million 30 20 640, 650 million 33 20 1280.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
from common import TOKENS, Rng, Sample, library, main

# Of L A G V S E R T I D P K Q N F Y M H W C, ids 4 to 23, in UniProtKB/Swiss-Prot, in percent.
FREQUENT = (9.6, 8.3, 7.1, 6.9, 6.6, 6.7, 5.5, 5.4, 5.9, 5.5, 4.7, 5.8, 3.9, 4.1, 3.9, 2.9, 2.4, 2.3, 1.1, 1.4)
BEGIN, PAD, END = 0, 1, 2


def proteins(rng: Rng, given: argparse.Namespace) -> Sample:
    """Residues as frequent as in proteins, between the marks of begin and end."""
    ids = rng.choice(np.arange(4, 24), (given.batch, given.length), p=np.divide(FREQUENT, sum(FREQUENT)))
    least = given.length // 2 if given.open else given.length
    lengths = rng.integers(least, given.length, given.batch, endpoint=True)
    for row, length in zip(ids, lengths, strict=True):
        row[0], row[length - 1], row[length:] = BEGIN, END, PAD
    ids = ids[:, : lengths.max()].astype(np.int64)
    return {"input_ids": ids, "attention_mask": (ids != PAD).astype(np.int64)}


KIND = replace(
    TOKENS,
    options={**TOKENS.options, "mask": True},
    draw=proteins,
    drawn="random residues, as frequent as in proteins",
)


def build(
    vocab: int = 33, layers: int = 12, heads: int = 20, hidden: int = 480, mlp: int = 0, positions: int = 1026
) -> Any:
    """The network without its pooler; `mlp` 0 is four times `hidden`."""
    hub = library("transformers")
    config = hub.EsmConfig(
        vocab_size=vocab,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=hidden,
        intermediate_size=mlp or 4 * hidden,
        max_position_embeddings=positions,
        pad_token_id=PAD,
        mask_token_id=32,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
    )
    return hub.EsmModel(config, add_pooling_layer=False)


if __name__ == "__main__":
    raise SystemExit(main(build, KIND, "last_hidden_state"))
