"""transformers' WhisperEncoder, of Whisper base (arXiv 2212.04356), on 30 s of sound.

    python tools/export/whisper_encoder.py whisper.onnx [--checkpoint encoder.pt] [--samples FOLDER --sound speech.wav]

--layers, --heads, --hidden, --mlp: tiny 4 6 384 1536, small 12 12 768 3072; large-v3 32 20 1280 5120 with --mels 128.
"""

from __future__ import annotations

from typing import Any

from common import MEL, library, main


def build(
    mels: int = 80, layers: int = 6, heads: int = 8, hidden: int = 512, mlp: int = 2048, positions: int = 1500
) -> Any:
    """The network; two frames of the features are a position."""
    hub = library("transformers")
    return library("transformers.models.whisper.modeling_whisper").WhisperEncoder(
        hub.WhisperConfig(
            num_mel_bins=mels,
            encoder_layers=layers,
            encoder_attention_heads=heads,
            d_model=hidden,
            encoder_ffn_dim=mlp,
            max_source_positions=positions,
        )
    )


if __name__ == "__main__":
    raise SystemExit(main(build, MEL, "last_hidden_state"))
