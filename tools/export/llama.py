"""transformers' LlamaForCausalLM (arXiv 2302.13971) on 128 tokens without a cache; its output is the logits.

    python tools/export/llama.py llama.onnx [--checkpoint model.pt] [--samples FOLDER --text a.txt --tokenizer FOLDER]

The sizes are those of the 110 million weights trained on TinyStories. TinyLlama has --layers 22 --heads 32 --groups 4
--hidden 2048 --mlp 5632, Llama 2 7B --layers 32 --heads 32 --groups 32 --hidden 4096 --mlp 11008.
"""

from __future__ import annotations

from typing import Any

from common import TOKENS, library, main


def build(
    vocab: int = 32000,
    layers: int = 12,
    heads: int = 12,
    groups: int = 12,
    hidden: int = 768,
    mlp: int = 2048,
    positions: int = 1024,
) -> Any:
    """The network; `groups` heads of keys and values."""
    hub = library("transformers")
    return hub.LlamaForCausalLM(
        hub.LlamaConfig(
            vocab_size=vocab,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            hidden_size=hidden,
            intermediate_size=mlp,
            max_position_embeddings=positions,
            use_cache=False,
        )
    )


if __name__ == "__main__":
    raise SystemExit(main(build, TOKENS, "logits"))
