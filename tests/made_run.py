"""The folder of a run, made in a second: a real plan, table and comparison, kernels with made-up times, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from models import images, segmenter

from engines.core.documents import replace
from engines.verify.volumes import CaseReport, MaskReport, VolumeComparison, VolumeReport, summed
from qdq.assemble.finish import finish
from qdq.assemble.quantize import quantize
from qdq.build.cost import Kernel, Price
from qdq.deploy.check import evaluate
from qdq.deploy.costs.errors import tensor_errors
from qdq.deploy.report.details import details_of
from qdq.deploy.report.report import DeployReport
from qdq.deploy.steps.shipped import told_of
from qdq.measure.inference.inputs import as_samples
from qdq.plan.settings import Settings

HOSTILE = '<script>document.title="broken"</script><!-- </script> "\'&'


def made_run(
    folder: Path, *, limits: dict[str, float] | None = None, settings: Settings | None = None, hostile: bool = False
) -> DeployReport:
    """Writes plan.json, table.json and report.json of a small segmentation network.

    `hostile` gives nodes, tensors, outputs and notes names that are markup.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = _renamed(segmenter()) if hostile else segmenter()
    samples = images(4)
    made = quantize(model, samples, settings=settings or Settings())
    finished = finish(made.model, made.plan, unquantized_type="fp16", table=made.table).model
    judged = as_samples(images(2, seed=5), made.prepared)
    check = evaluate(model, finished.proto, judged, limits=limits or {})
    nodes = [node.name for node in made.prepared.graph.node]
    kernels = [
        Kernel(us=1.5 + n, macs=0, bytes=64, nodes=(name,), signature=name, kind="gemm", dtype=dtype, bound="start")
        for n, (name, dtype) in enumerate(zip(nodes, ("int8", "", "float16"), strict=False))
    ]
    told = told_of(made)
    errors = tensor_errors(told, finished, judged)
    price = Price(us=sum(k.us for k in kernels), kernels=tuple(kernels))
    report = DeployReport(
        evaluated_on="evaluation samples",
        notes=(HOSTILE if hostile else "a note",),
        model_file=f"{HOSTILE[:8]}.onnx" if hostile else "net.int8.onnx",
        float_file_bytes=4096,
        fp16_file_bytes=2048,
        int8_file_bytes=1024,
        float_engine=None,
        check=check,
        audit=None,
        compiler="TensorRT 11",
        targets=("sm86",),
        not_built="run build_engine.sh where the GPU is",
        quantized_nodes=len(made.plan.quantized_nodes),
        details=details_of(told, finished, errors, price=price, gpus=("a10",), shapes={}),
    )
    made.plan.save(folder / "plan.json")
    made.table.save(folder / "table.json")
    (folder / "report.json").write_text(report.to_json())
    return report


def with_volumes(folder: Path, report: DeployReport, dices: Sequence[float | None]) -> DeployReport:
    """The same run with one whole volume for each Dice."""

    def mask(dice: float | None) -> MaskReport:
        hd95 = None if dice is None else 10 * (1 - dice)
        same: dict[str, Any] = {"lesions": 1, "missed": 0, "false": 0, "missed_ml": 0.0, "false_ml": 0.0}
        return MaskReport(dice=dice, hd95_mm=hd95, surface_mm=hd95, found_ml=1.5, true_ml=1.0, **same)

    masks = [mask(dice) for dice in dices]
    cases = tuple(CaseReport(case=f"key{n}", structures={"core": m}) for n, m in enumerate(masks))
    compared = VolumeComparison(
        found="Q/DQ model", true="float model", structures=(summed("core", masks),), cases=cases
    )
    volumes = VolumeReport(
        cases=len(dices), window="w", grid="g", decoded="d", windows=8, repeated=0, to_float=compared
    )
    report = replace(report, check=replace(report.check, volumes=volumes))
    (folder / "report.json").write_text(report.to_json())
    return report


def _renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every node, tensor, input and output with markup behind its name; inputs keep theirs, for the samples."""
    inputs = {v.name for v in model.graph.input}

    def called(name: str) -> str:
        return name if name in inputs or not name else f"{name}{HOSTILE}"

    for node in model.graph.node:
        node.name = called(node.name)
        node.input[:] = [called(name) for name in node.input]
        node.output[:] = [called(name) for name in node.output]
    for value in (*model.graph.output, *model.graph.value_info, *model.graph.initializer):
        value.name = called(value.name)
    return model


def blobs(seed: int = 0) -> np.ndarray:
    """(12, 10, 6) labels from 0 to 2."""
    return np.random.default_rng(seed).integers(0, 3, (12, 10, 6)).astype(np.uint8)
