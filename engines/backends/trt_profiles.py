"""What is known of TensorRT 10.3 (JetPack 6), 10.16 and 11 on graphs with Q/DQ nodes. None of it was measured here.

Sources, as `Fact.source` and the comments name them: "release notes", "support matrix" and "guide" are NVIDIA's
documentation; "headers" are NvInfer.h and NvInferRuntime.h of that release; "#n" is an issue of NVIDIA/TensorRT,
answered by a maintainer unless "user" stands there; "dumps" are the layer dumps of TensorRT 8 on A100 and RTX 3090 in
NVIDIA's trt-engine-explorer; "Model Optimizer" is the source of NVIDIA's own quantizer, a2fbac7b, whose placement is
made for TensorRT.
"""

from __future__ import annotations

from dataclasses import replace

from engines.backends import trt
from engines.backends.profile import Fact, Profile

_DUMPS = "dumps of ResNet-18 and ResNet-50"

_LATEST = Profile(
    name=trt.BACKEND.compiler,
    version="11",
    title=f"{trt.BACKEND.title} 11",
    backend=trt.BACKEND.name,
    targets=trt.BACKEND.targets,
    kinds=("data centre", "jetson"),
    # INT8 convolutions on Turing: #2134. INT4 weights, FP8: support matrix of Model Optimizer. FP4: release notes 10.8.
    formats={"int8": 75, "int4": 80, "fp8": 89, "nvfp4": 100},
    blocks={"int4": (128, 64), "nvfp4": (16,)},  # guide, quantized types; NVFP4: parser of 10.15
    opset=25,  # guide of 11.x, ONNX opsets
    types=("int8", "fp8", "int4", "fp4"),
    trtexec=(),  # always strongly typed; CUDA graph, spin wait and no transfers are the default (sampleOptions.h)
    integer_output=Fact(
        holds=True,
        says="with a Q behind it an INT8 convolution writes INT8 (bias, activation, shortcut inside)",
        source=f"#2392, #2383; {_DUMPS}",
    ),
    shift=Fact(
        holds=None,
        says="whether Q behind a Sub still fuses in TensorRT is not known: moving a tensor may cost a kernel",
        source="no test of Mul or Sub around a quantizer was found",
    ),
    hoist=Fact(
        holds=None,
        says="whether a per-channel scale behind a convolution fuses in TensorRT is not known, and per-channel scales "
        "of weights cost it no kernel",
        source="no test of it was found",
    ),
    padding=Fact(
        holds=False,
        says="a Pad in front of a quantizer is a kernel of its own, and TensorRT fills up channels by itself",
        source=f"#2592, #1310; headers, TensorFormat; {_DUMPS}: the first convolution, three channels, in INT8",
    ),
    residual=Fact(
        holds=True,
        says="Add and activation are inside the convolution only where the shortcut has the type of what it writes, so "
        "the shortcut is quantized and the convolution's own output is not",
        source=f"#1992; {_DUMPS}; Model Optimizer, build_non_residual_input_map",
    ),
    concat=Fact(
        holds=True,
        says="a Q behind Concat is cloned into the convolutions before it, with equal scales for all",
        source="#2597 user; NVIDIA's guide to YOLOv7 with Q/DQ on Orin: unequal scales reach .87 of the speed",
    ),
    mean_pool=Fact(
        holds=True,
        says="average pooling runs in INT8 where Q/DQ stands on both sides of it, else in float",
        source=_DUMPS,
    ),
    conv_transpose=Fact(
        holds=True,
        says="a quantized ConvTranspose fuses with an activation behind it and not with a normalization; in 3-D the "
        "reader of the activation must be quantized too",
        source="#3412; users saw FP16 in 3-D (#4668) and a Q behind Concat not merged into it (#2597)",
    ),
    first_layer=Fact(holds=True, says="it runs in INT8, with its pooling inside", source=_DUMPS),
    depthwise=Fact(
        holds=True,
        says="it has an INT8 kernel of its own; SiLU behind it is another kernel",
        source="#3205; Model Optimizer quantizes 3x3 with channels in eights",
    ),
    small_products=Fact(
        holds=False,
        says="with one row, fewer than 16 summands or fewer than 16 outputs a product gains nothing by INT8",
        source="Model Optimizer, find_nodes_from_matmul_to_exclude",
    ),
    attention=Fact(
        holds=None,
        says="a product of two computed tensors (attention): TensorRT fuses attention in INT8 for some head sizes and "
        "up to 512 tokens only, and a user measured it slower than FP16",
        source="#3724; guide as quoted in #2981 and #4167; #4322 user",
    ),
    narrow=Fact(
        holds=False,
        says="TensorRT fills channels up to 32 for its INT8 kernels, so few channels gain nothing",
        source="#1310; Model Optimizer, find_nodes_from_convs_to_exclude",
    ),
    odd_groups=Fact(
        holds=False,
        says="in INT8 TensorRT wants multiples of 4 channels in each group",
        source="headers, IConvolutionLayer::setNbGroups",
    ),
    fp8_convolutions=Fact(
        holds=False,
        says="TensorRT has no fast FP8 kernels for groups, for more than 32 taps, or for 16 channels and fewer",
        source="release notes 10.12 and 10.13, limitations; Model Optimizer, find_nodes_from_convs_to_exclude",
    ),
    two_level=Fact(
        holds=None,
        says="whether TensorRT keeps weights of 4 bits that an INT8 product reads is not known; NVIDIA lists INT4 "
        "weights with float data only",
        source="support matrix of Model Optimizer",
    ),
    token=Fact(
        holds=None,
        says="whether TensorRT multiplies in INT8 where each token has its own scale is not known",
        source="no test of it was found",
    ),
    tables=Fact(
        holds=None,
        says="whether TensorRT keeps a quantized table that a Gather reads as codes, or makes floats of all of it, is "
        "not known",
        source="no document names Gather among the readers of quantized weights",
    ),
    attention_fp8=Fact(
        holds=True,
        says="attention fuses in FP8 on Ada for up to 3072 tokens and heads of up to 64, on newer GPUs for more",
        source="release notes 10.6 and 10.10",
    ),
)

_TEN = replace(
    _LATEST,
    version="10.16",
    title=f"{trt.BACKEND.title} 10.16",
    opset=24,  # operators.md of the parser, 10.15
    # weakly typed unless asked; timed with transfers, without CUDA graph, the profiler on (sampleOptions.h and .cpp)
    trtexec=("--stronglyTyped", "--useCudaGraph", "--useSpinWait", "--noDataTransfers", "--separateProfileRun"),
)

_JETPACK_6 = replace(
    _TEN,
    version="10.3",
    title=f"{trt.BACKEND.title} 10.3",
    # FP4 came with 10.8, Blackwell too; block scales of INT4 weights are for matrices (headers 10.0 to 10.6)
    targets=tuple(target for target in trt.BACKEND.targets if int(target[2:]) <= 90),
    formats={"int8": 75, "int4": 80, "fp8": 89},
    blocks={"int4": (128, 64)},
    opset=20,  # operators.md of the parser, 10.3, from memory; of opset 21 it reads INT4 all the same (parser, 10.1)
    types=("int8", "fp8", "int4"),
    attention_fp8=Fact(
        holds=None,
        says="whether TensorRT 10.3 fuses attention in FP8 is not known",
        source="release notes name it from 10.6 on",
    ),
)

PROFILES = (_LATEST, _TEN, _JETPACK_6)
