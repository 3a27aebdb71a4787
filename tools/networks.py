"""Sixty everyday networks, small and with random weights: how each is made and what it reads. Loads no library."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SWITCHES = (("static", "dynamic"), ("float", "half"), ("script", "dynamo"))
VARIANTS = tuple(".".join(words) for words in itertools.product(*SWITCHES))
# The sizes that are open in a dynamic file: samples take these values in turn, a static file has the first.
SIZES = {"batch": (1, 2), "length": (24, 32), "frames": (48, 64), "height": (64, 96), "past": (7, 16), "atoms": (9, 12)}


@dataclass(frozen=True, slots=True)
class Input:
    """An input: its shape, keys of `SIZES` for open sizes; a kind of values; for whole numbers how many there are."""

    shape: tuple[int | str, ...]
    values: str = "field"
    most: int = 0


@dataclass(frozen=True, slots=True)
class Network:
    """One network.

    Attributes:
        make: builds it, with random weights.
        inputs: by name, in order.
        takes: which output to keep where a network gives many; None keeps what it gives.
        variant: in place of the one whose turn it is; a comment says why.
    """

    make: Callable[[], Any]
    inputs: Mapping[str, Input]
    takes: str | None = None
    variant: str = ""


def of(library: str, name: str, *args: Any, **options: Any) -> Callable[[], Any]:
    """Calls a library's class or function."""
    return lambda: getattr(importlib.import_module(library), name)(*args, **options)


def monai(name: str, **options: Any) -> Callable[[], Any]:
    """One of MONAI's networks for volumes of one channel."""
    return of("monai.networks.nets", name, **options)


def tv(name: str, **options: Any) -> Callable[[], Any]:
    """One of torchvision's models."""
    return of("torchvision.models", name, **options)


def timm(name: str, **options: Any) -> Callable[[], Any]:
    """One of timm's models with ten classes."""
    return of("timm", "create_model", name, pretrained=False, num_classes=10, **options)


def own(name: str) -> Callable[[], Any]:
    """A network that is written out in `networks_own.py`."""
    return of("networks_own", name)


def hf(model: str, config: str, attention: str = "sdpa", **options: Any) -> Callable[[], Any]:
    """One of transformers' models."""

    def make() -> Any:
        library = importlib.import_module("transformers")
        made = getattr(library, config)(**options)
        return getattr(library, model)._from_config(made, attn_implementation=attention)

    return make


IMAGE, LARGER = ({"image": Input(("batch", 3, n, n))} for n in (64, 96))
VOLUME = {"volume": Input(("batch", 1, 32, 32, 32))}
PIXELS = {"pixel_values": Input(("batch", 3, 64, 64))}
TOKENS = {"input_ids": Input(("batch", "length"), "tokens", 500)}
WORDS = {**TOKENS, "attention_mask": Input(("batch", "length"), "mask")}
DECODER = {"decoder_input_ids": Input(("batch", "past"), "tokens", 500)}
SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
TEXT = {**SMALL, "vocab_size": 500, "max_position_embeddings": 64}
VISION: dict[str, Any] = {**SMALL, "image_size": 64, "patch_size": 16}
LLAMA: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
GPT2: dict[str, Any] = {"vocab_size": 500, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5: dict[str, Any] = {"vocab_size": 500, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
SIDES = {f"{side}_{what}": n for side in ("encoder", "decoder")
         for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 256))}  # fmt: skip
# fmt: off
WHISPER: dict[str, Any] = {
    **SIDES, "vocab_size": 500, "d_model": 128, "max_source_positions": 50, "max_target_positions": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}


def cache(heads: int) -> dict[str, Input]:
    """The inputs of a decoder's step of two layers: one token, then keys and values."""
    names = [f"past_{kind}_{layer}" for layer in range(2) for kind in ("key", "value")]
    past = {name: Input(("batch", heads, "past", 32), "normal") for name in names}
    return {"input_ids": Input(("batch", 1), "tokens", 500), **past}


NETWORKS: dict[str, Network] = {
    "monai_unet": Network(
        monai("UNet", spatial_dims=3, in_channels=1, out_channels=4, channels=(16, 32, 64), strides=(2, 2),
              num_res_units=2),
        {"volume": Input(("batch", 1, "height", 32, 32))}),
    "monai_basic_unet": Network(monai("BasicUNet", features=(16, 16, 32, 64, 64, 16)), VOLUME),
    "monai_segresnet": Network(monai("SegResNet", init_filters=8, out_channels=3), VOLUME),
    "monai_dynunet": Network(
        monai("DynUNet", spatial_dims=3, in_channels=1, out_channels=3, kernel_size=[3] * 4, strides=[1, 2, 2, 2],
              upsample_kernel_size=[2] * 3, filters=[8, 16, 32, 64], res_block=True), VOLUME),
    "monai_swin_unetr": Network(
        monai("SwinUNETR", in_channels=1, out_channels=3, feature_size=12, depths=(1, 1, 1, 1)),
        {"volume": Input((1, 1, 64, 32, 32))}),
    "monai_unetr": Network(
        monai("UNETR", in_channels=1, out_channels=3, img_size=32, feature_size=8, hidden_size=96, mlp_dim=192,
              num_heads=4), VOLUME),
    "monai_vnet": Network(monai("VNet", in_channels=1, out_channels=2), VOLUME),
    "monai_attention_unet": Network(
        monai("AttentionUnet", spatial_dims=3, in_channels=1, out_channels=3, channels=(8, 16, 32), strides=(2, 2)),
        VOLUME),
    "monai_highresnet": Network(
        monai("HighResNet", spatial_dims=3, in_channels=1, out_channels=4),
        {"volume": Input(("batch", 1, 24, 24, 24))}),
    "monai_densenet121": Network(monai("DenseNet121", spatial_dims=2, in_channels=3, out_channels=4), IMAGE),
    "tv_resnet18": Network(tv("resnet18"), IMAGE),
    "timm_resnet26d": Network(timm("resnet26d"), IMAGE),
    "tv_regnet": Network(tv("regnet_y_400mf"), IMAGE),
    "tv_mobilenet_v3": Network(tv("mobilenet_v3_small"), IMAGE),
    "timm_mobilenet_v3": Network(timm("mobilenetv3_small_050"), LARGER),
    "tv_efficientnet": Network(tv("efficientnet_b0"), IMAGE),
    "timm_efficientnet": Network(timm("efficientnet_lite0"), LARGER),
    "timm_convnext": Network(timm("convnext_atto", depths=(1, 1, 2, 1)), IMAGE),
    "tv_vit": Network(
        tv("VisionTransformer", image_size=64, patch_size=16, num_layers=2, num_heads=4, hidden_dim=128, mlp_dim=256),
        IMAGE),
    "timm_vit": Network(timm("vit_tiny_patch16_224", img_size=64, depth=2), IMAGE),
    "timm_deit": Network(timm("deit_tiny_distilled_patch16_224", img_size=64, depth=2), IMAGE),
    "tv_swin": Network(
        tv("SwinTransformer", patch_size=[4, 4], embed_dim=48, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4]),
        IMAGE),
    "timm_swin": Network(
        timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=48, depths=(2, 2),
             num_heads=(2, 4)), IMAGE),
    "timm_mixer": Network(timm("mixer_s32_224", img_size=64), IMAGE),
    "timm_ghostnet": Network(timm("ghostnet_050"), IMAGE),
    "timm_repvgg": Network(timm("repvgg_a0"), IMAGE),
    "tv_maxvit": Network(
        tv("MaxVit", input_size=(64, 64), stem_channels=16, partition_size=4, block_channels=[32, 64],
           block_layers=[1, 1], head_dim=16, stochastic_depth_prob=0.0, num_classes=10), IMAGE),
    "timm_levit": Network(timm("levit_128s", img_size=64, depth=(1, 1, 1)), IMAGE),
    "hf_bert": Network(hf("BertModel", "BertConfig", **TEXT), WORDS, "last_hidden_state"),
    "hf_distilbert": Network(
        hf("DistilBertForTokenClassification", "DistilBertConfig", vocab_size=500, dim=128, n_layers=2, n_heads=4,
           hidden_dim=256, max_position_embeddings=64), WORDS, "logits"),
    "hf_gpt2": Network(hf("GPT2LMHeadModel", "GPT2Config", use_cache=False, **GPT2), TOKENS, "logits"),
    "hf_llama": Network(hf("LlamaForCausalLM", "LlamaConfig", use_cache=False, **LLAMA), WORDS, "logits"),
    "hf_t5": Network(
        hf("T5ForConditionalGeneration", "T5Config", "eager", use_cache=False, **T5), {**WORDS, **DECODER}, "logits"),
    "hf_whisper": Network(
        hf("WhisperForConditionalGeneration", "WhisperConfig", use_cache=False, **WHISPER),
        {"input_features": Input(("batch", 80, 100), "signal"), **DECODER}, "logits"),
    "hf_esm": Network(
        hf("EsmModel", "EsmConfig", "eager", pad_token_id=1, position_embedding_type="rotary",
           **{**TEXT, "vocab_size": 33}),
        {**WORDS, "input_ids": Input(("batch", "length"), "tokens", 33)}, "last_hidden_state"),
    "hf_segformer": Network(
        hf("SegformerForSemanticSegmentation", "SegformerConfig", "eager", depths=[1, 1, 1, 1],
           hidden_sizes=[16, 32, 64, 128], decoder_hidden_size=64, num_labels=8),
        {"pixel_values": Input(("batch", 3, "height", 64))}, "logits"),
    "hf_detr": Network(own("detr"), PIXELS),
    "hf_yolos": Network(
        hf("YolosForObjectDetection", "YolosConfig", "eager", num_detection_tokens=8,
           **{**VISION, "image_size": [64, 64]}),
        PIXELS, "logits"),
    # script: a normalization of a half model gets FP32 beside FP16, which ONNX Runtime does not load
    "hf_clip": Network(own("clip"), {**WORDS, **PIXELS}, "logits_per_image", "static.half.dynamo"),
    "hf_wav2vec2": Network(
        hf("Wav2Vec2ForCTC", "Wav2Vec2Config", "eager", conv_dim=[32] * 4, conv_kernel=[10, 3, 3, 2],
           conv_stride=[5, 2, 2, 2], num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=32,
           **SMALL),
        {"input_values": Input(("batch", 3200), "signal")}, "logits"),
    # dynamo: the batch is fixed in the file though asked to be open
    "lstm": Network(own("Lstm"), {"x": Input(("frames", "batch", 40), "normal")}, None, "dynamic.float.script"),
    "gru": Network(own("Gru"), {"x": Input(("batch", "frames", 40), "normal")}),
    "diffusion_unet": Network(
        of("diffusers", "UNet2DConditionModel", sample_size=16, block_out_channels=(32, 64), layers_per_block=1,
           cross_attention_dim=64, norm_num_groups=8, attention_head_dim=8,
           down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
           up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
        {"sample": Input(("batch", 4, 16, 16)), "timestep": Input((1,), "step", 1000),
         "encoder_hidden_states": Input(("batch", 8, 64), "normal")}, "sample"),
    # script: half of the operators of a gradient are unknown to it; traced with one shape
    "mlp_forces": Network(own("forces"), {"positions": Input(("atoms", 3), "normal")}, None, "static.float.dynamo"),
    "detector_nms": Network(own("Detector"), {"image": Input((1, 3, 96, 96))}),
    "yolo": Network(own("Yolo"), {"image": Input(("batch", 3, "height", 96))}),
    "super_resolution": Network(own("SuperResolution"), {"image": Input(("batch", 3, "height", 48))}),
    "speech_enhancement": Network(own("Enhancement"), {"wave": Input(("batch", 1, 4000), "signal")}),
    "voice_detection": Network(
        own("VoiceDetection"),
        {"wave": Input(("batch", 1, 1024), "signal"), "hidden": Input((1, "batch", 64), "normal"),
         "cell": Input((1, "batch", 64), "normal")}),
    "keyword_spotting": Network(own("Keywords"), {"features": Input(("batch", 1, 49, 40))}),
    "crnn_ocr": Network(own("Crnn"), {"line": Input(("batch", 1, 32, "height"))}),
    "pitch": Network(own("Pitch"), {"wave": Input(("batch", 1024), "signal")}),
    "llama_decode": Network(own("llama_step"), cache(2)),
    "gpt2_decode": Network(own("gpt2_step"), cache(4)),
    "tv_lraspp": Network(
        of("torchvision.models.segmentation", "lraspp_mobilenet_v3_large", weights=None, weights_backbone=None,
           num_classes=5), LARGER, "out"),
    "shufflenet": Network(tv("shufflenet_v2_x0_5"), IMAGE),
    "inception": Network(timm("inception_next_atto"), IMAGE),
    "mobilevit": Network(timm("mobilevit_xxs", img_size=64), IMAGE),
    "point_net": Network(own("PointNet"), {"points": Input(("batch", 3, 128), "normal")}),
    "autoencoder_kl": Network(own("Autoencoder"), {"image": Input(("batch", 3, 32, 32))}),
}
# fmt: on


def variant_of(name: str) -> str:
    """The variant whose turn it is; rounds begin one later each, so that no family meets one kind alone."""
    index = list(NETWORKS).index(name)
    return NETWORKS[name].variant or VARIANTS[(index + index // len(VARIANTS)) % len(VARIANTS)]
