"""transformers' GPT2LMHeadModel, the smallest GPT-2, on 128 tokens without a cache; its output is the logits.

python tools/export/gpt2.py gpt2.onnx [--checkpoint model.pt] [--samples FOLDER --text a.txt --tokenizer FOLDER]
"""

from __future__ import annotations

from typing import Any

from common import TOKENS, library, main


def build(vocab: int = 50257, layers: int = 12, heads: int = 12, hidden: int = 768, positions: int = 1024) -> Any:
    """The network."""
    hub = library("transformers")
    return hub.GPT2LMHeadModel(
        hub.GPT2Config(
            vocab_size=vocab, n_layer=layers, n_head=heads, n_embd=hidden, n_positions=positions, use_cache=False
        )
    )


if __name__ == "__main__":
    raise SystemExit(main(build, TOKENS, "logits"))
