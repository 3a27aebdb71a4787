"""An ONNX model and real samples become a verified INT8 TensorRT engine, without a GPU.

    from qdq import Settings, load_float, quantize, save
    made = quantize("unet.onnx", samples, settings=Settings(calibrator="entropy"))
    save(made.model, "unet.int8.onnx")

Every name is imported at its first use, so that `import qdq` stays light. The folders stand in the
order of the pipeline; other functions are imported from their file: `from qdq.deploy.deploy import deploy`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdq.assemble.quantize import Quantized, quantize
    from qdq.build.recipe import Recipe
    from qdq.core.errors import InputError, MissingRuntimeError, ModelError, QdqError, StaleFileError
    from qdq.deploy.check import evaluate
    from qdq.deploy.deploy import Deployed
    from qdq.deploy.report import DeployReport
    from qdq.measure.collect import collect
    from qdq.measure.table import CalibrationTable
    from qdq.model.model import Model
    from qdq.model.storage import load, save
    from qdq.passes.prepare import load_float
    from qdq.plan.plan import Plan, Point, Skip
    from qdq.plan.settings import Settings
    from qdq.plan.spec import Spec
    from qdq.solve.solve import Solution

_HOME = {
    "CalibrationTable": "measure.table",
    "collect": "measure.collect",
    "Deployed": "deploy.deploy",
    "evaluate": "deploy.check",
    "InputError": "core.errors",
    "MissingRuntimeError": "core.errors",
    "ModelError": "core.errors",
    "QdqError": "core.errors",
    "StaleFileError": "core.errors",
    "Model": "model.model",
    "load": "model.storage",
    "save": "model.storage",
    "Quantized": "assemble.quantize",
    "load_float": "passes.prepare",
    "quantize": "assemble.quantize",
    "Plan": "plan.plan",
    "Point": "plan.plan",
    "Skip": "plan.plan",
    "Recipe": "build.recipe",
    "DeployReport": "deploy.report",
    "Settings": "plan.settings",
    "Spec": "plan.spec",
    "Solution": "solve.solve",
}

__all__ = [
    "CalibrationTable",
    "DeployReport",
    "Deployed",
    "InputError",
    "MissingRuntimeError",
    "Model",
    "ModelError",
    "Plan",
    "Point",
    "QdqError",
    "Quantized",
    "Recipe",
    "Settings",
    "Skip",
    "Solution",
    "Spec",
    "StaleFileError",
    "collect",
    "evaluate",
    "load",
    "load_float",
    "quantize",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'qdq' has no attribute {name!r}")
    return getattr(import_module(f"qdq.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
