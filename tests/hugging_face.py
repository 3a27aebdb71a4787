"""Hugging Face folders of small networks with random weights, and tokenizers built in code. Needs transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

WORDS = (
    "the of and a to in is it you that he was for on are with as his they be at one have this from or had by hot but"
)
TEXT = "\n".join(" ".join(np.random.default_rng(seed).choice(WORDS.split(), 4 + seed % 9)) + "." for seed in range(400))
VOCABULARY, WIDTH = 96, 64
KEPT = ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Transpose")  # of a weight
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]


def tokenizer(template: str = "") -> Any:
    """Byte pairs of `TEXT`; <pad> is 0, <s> 1, </s> 2."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator(TEXT.splitlines(), trainer)
    if template:
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {f"{name}_token": f"<{word}>" for name, word in (("pad", "pad"), ("unk", "unk"), ("mask", "mask"))}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", model_max_length=64, **names
    )


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        **more,
    }


def _gpt2() -> tuple[Any, ...]:
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": WIDTH, "vocab_size": VOCABULARY, "n_positions": 64}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)), tokenizer()


def _llama() -> tuple[Any, ...]:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_sizes(num_key_value_heads=2))), tokenizer()


def _t5() -> tuple[Any, ...]:
    sizes = {"d_model": WIDTH, "d_kv": 16, "d_ff": 2 * WIDTH, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    config = hf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    return hf.T5ForConditionalGeneration(config), tokenizer("$A </s>")


def _bert() -> tuple[Any, ...]:
    return hf.BertForMaskedLM(hf.BertConfig(**_sizes())), tokenizer("<s> $A </s>")


def _esm() -> tuple[Any, ...]:
    config = hf.EsmConfig(
        **_sizes(), position_embedding_type="rotary", pad_token_id=0, mask_token_id=4, token_dropout=True
    )
    return hf.EsmForMaskedLM(config), tokenizer("<s> $A </s>")


def _whisper() -> tuple[Any, ...]:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = hf.WhisperConfig(
        **sizes,
        d_model=WIDTH,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        vocab_size=VOCABULARY,
        max_source_positions=50,
        max_target_positions=48,
        num_mel_bins=80,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return hf.WhisperForConditionalGeneration(config), hf.WhisperFeatureExtractor(feature_size=80, chunk_length=1)


def _vit() -> tuple[Any, ...]:
    sizes = {name: value for name, value in _sizes().items() if name not in ("vocab_size", "max_position_embeddings")}
    return (hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3)),)


NETWORKS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "t5": _t5,
    "bert": _bert,
    "esm": _esm,
    "whisper": _whisper,
    "vit": _vit,
}


def make_folder(place: Path, name: str) -> Path:
    """A key of `NETWORKS` as a folder; the same weights each time."""
    torch.manual_seed(0)
    for part in NETWORKS[name]():
        part.save_pretrained(place / name)
    return place / name


def make_sentence_encoder(place: Path) -> Path:
    """The BERT as sentence-transformers saves it: mean of the tokens, length 1, at most 24 tokens."""
    folder = make_folder(place, "bert")
    kinds = ("Transformer", "Pooling", "Normalize")
    steps = [
        f'{{"idx": {i}, "name": "{i}", "path": "{"" if not i else f"{i}_{kind}"}", '
        f'"type": "sentence_transformers.models.{kind}"}}'
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(f"[{', '.join(steps)}]")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    return folder


def write_text(place: Path) -> Path:
    """`TEXT` as a file."""
    (place / "text.txt").write_text(TEXT)
    return place / "text.txt"


def write_sounds(place: Path, count: int = 4) -> Path:
    """A folder of recordings of half a second, 22050 values a second, 16 bits."""
    import wave

    place = place / "sounds"
    place.mkdir()
    for seed in range(count):
        time = np.arange(11025) / 22050
        rng = np.random.default_rng(seed)
        values = 8000 * np.sin(2 * np.pi * time * rng.uniform(200, 2000)) + rng.normal(0, 400, time.shape)
        with wave.open(str(place / f"{seed}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(22050)
            file.writeframes(values.astype("<i2").tobytes())
    return place


def linear_share(run: Path) -> float:
    """The part of the multiply-adds of products and convolutions with weights that a run's engine does in INT8."""
    report = json.loads((run / "report.json").read_text())
    graph = onnx.load(run / report["model_file"], load_external_data=False).graph
    weights, made = {t.name for t in graph.initializer}, {o: node for node in graph.node for o in node.output}

    def constant(name: str) -> bool:
        node = made.get(name)
        if node is None or node.op_type == "Constant":
            return name in weights or node is not None
        return node.op_type in KEPT and all(map(constant, filter(None, node.input)))

    operands = {node.name: node.input[:2] for node in graph.node}
    linear = [n for n in report["audit"]["nodes"] if any(map(constant, operands[n["node"]]))]
    return sum(n["macs"] for n in linear if n["consumed"] == "int8") / sum(n["macs"] for n in linear)
