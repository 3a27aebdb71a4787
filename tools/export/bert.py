"""transformers' BertModel, BERT-base (arXiv 1810.04805) with 128 tokens; its output is the last hidden state.

python tools/export/bert.py bert.onnx [--checkpoint model.pt] [--samples FOLDER --text a.txt --tokenizer FOLDER]
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from common import TOKENS, library, main


def build(
    vocab: int = 30522, layers: int = 12, heads: int = 12, hidden: int = 768, mlp: int = 3072, positions: int = 512
) -> Any:
    """The network without its pooler."""
    hub = library("transformers")
    config = hub.BertConfig(
        vocab_size=vocab,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=hidden,
        intermediate_size=mlp,
        max_position_embeddings=positions,
    )
    return hub.BertModel(config, add_pooling_layer=False)


if __name__ == "__main__":
    raise SystemExit(main(build, replace(TOKENS, options={**TOKENS.options, "mask": True}), "last_hidden_state"))
