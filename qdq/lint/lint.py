"""What TensorRT refuses in a Q/DQ model, gets wrong, or builds and then runs in float: one rule each.

Model -> View of its quantizers -> every rule yields findings with the node and a remedy -> `lint`, in graph order.
Every row was tried in tensorrt_rtx 1.7.1 (SM89), and the tests try it again. This module must not change a model.

| rule | effect | repaired | what is found |
|---|---|---|---|
| operator | refused | QLinearConv, QLinearMatMul | an operator on integers in place of Q/DQ nodes |
| int32-bias | refused | yes | DequantizeLinear of INT32 codes, ONNX Runtime's bias |
| asymmetric | refused | yes | a zero point that is not 0 |
| unsigned | wrong | yes | an activation quantized to UINT8 with zero point 0 |
| unsigned-codes | refused | yes | stored UINT8 codes with zero point 0 |
| no-zero-point | wrong | yes | neither zero point nor output_dtype: UINT8 to ONNX, INT8 to TensorRT |
| code-type | refused | integers | codes of 16, 4 (activations) or 2 bits, FP8 E5M2 |
| output-dtype | refused | yes | output_dtype that is not the zero point's type, or UINT8 |
| computed-zero-point | refused | no | a zero point that depends on an input |
| computed-scale | crash | no | a scale of a convolution that depends on an input |
| scale-value | refused | yes (not NaN) | a scale of zero, below zero or NaN |
| scale-range | wrong | yes (not infinite) | a subnormal scale, whose reciprocal overflows, or an infinite one |
| scale-type | refused | yes | a dequantized operand of another float type than its twin |
| scale-shape | refused | where the weight tells | axis outside the tensor, or a number of scales other than its size |
| zero-point-shape | refused | yes | a zero point of another size than the scale |
| block-shape | refused | weights | blocks that do not divide the axis, or are not on the last two axes |
| odd-codes | refused | weights | 4-bit codes, an odd number of them |
| scalar-codes | refused | yes | stored codes of rank 0 |
| mixed-types | refused | no | FP8 and INT8 operands of one product |
| block-product | wrong | yes | block scales on a product of two quantized operands |
| dynamic-scale | float | no | any other scale that depends on an input |
| weight-axis | float | yes | scales of a weight along another axis than its output channels |
| activation-axis | float | yes | scales of an activation along the channels that are summed |
| one-element-scale | float | yes | scale of shape [1] on the data of a convolution: read as per channel |
| unpaired-activation | float | yes | data quantized, constant weight in float |
| unpaired-weight | kernel | no | a convolution with a quantized weight and float data |
| transposed | kernel | yes | a quantized ConvTranspose |
| slow-weight | kernel | yes | a weight-only product that no kernel fuses: INT8 in blocks, INT4 per channel |
| attention | kernel | yes | quantized products of two computed tensors in FP16: the fused attention is lost |
| output | rounding | yes | Q/DQ before an output |
| before-float | rounding | yes | Q/DQ before operators that run in float (activation, norm, softmax) |
| float-weight | size | yes | float weight, Q and DQ: four times the bytes of its codes in the file |
| default-axis | version | yes | no axis on a vector of scales: TensorRT 10.1 takes axis 0, ONNX and later ones axis 1 |

Effects: refused, crash (of the compiler's process) and wrong (results differ) are errors. float, kernel (one more),
rounding (a quantizer that no integer kernel reads), size and version are warnings.
Source of the texts: the parser's and the builder's own messages, tensorrt_rtx 1.7.1.116; for default-axis,
onnx-tensorrt's parser of 10.1 and 10.15.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from engines.core.nodes import label
from qdq.lint import errors, warnings
from qdq.lint.rule import Rule
from qdq.lint.view import View
from qdq.model.model import Model

RULES: tuple[Rule, ...] = (*errors.RULES, *warnings.RULES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong at one node.

    Attributes:
        rule: its name, a row of the table above.
        severity: "error" (refused, crash, wrong) or "warning".
        effect: what TensorRT makes of it.
        node: name of the ONNX node.
        message: what is found there.
        tensorrt: TensorRT's own words, or what it was seen to do.
        remedy: what to do.
    """

    rule: str
    severity: str
    effect: str
    node: str
    message: str
    tensorrt: str
    remedy: str

    def to_mapping(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def lint(model: Model) -> list[Finding]:
    """Everything that the rules find in a model.

    Args:
        model: any ONNX model; one without quantizers has no findings.

    Returns:
        The findings in the order of the nodes, of one node in the order of the rules.
    """
    view = View(model)
    order = {id(node): i for i, node in enumerate(view.nodes)}
    found = [(order[id(node)], i, rule, node, text) for i, rule in enumerate(RULES) for node, text in rule.find(view)]
    return [
        Finding(
            rule=rule.name,
            severity=rule.severity,
            effect=rule.effect,
            node=label(node),
            message=text,
            tensorrt=rule.tensorrt,
            remedy=rule.remedy,
        )
        for _, _, rule, node, text in sorted(found, key=lambda row: row[:2])
    ]


def to_json(findings: list[Finding], **more: object) -> str:
    """JSON text of findings, with other facts of the command."""
    counts: Mapping[str, int] = {s: sum(f.severity == s for f in findings) for s in ("error", "warning")}
    return (
        json.dumps({"format": "qdq.lint/1", **counts, "findings": [f.to_mapping() for f in findings], **more}, indent=1)
        + "\n"
    )
