"""An ONNX model and real samples become a verified INT8 TensorRT engine, without a GPU.

    from qdq import Settings, load_float, quantize, save
    made = quantize("unet.onnx", samples, settings=Settings(calibrator="entropy"))
    save(made.model, "unet.int8.onnx")

Every name is imported at its first use, so that `import qdq` stays light. Functions that share the name of their
module are imported from there: `from qdq.deploy import deploy`, `from qdq.placement import plan`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdq.calibrate import CalibrationTable, collect
    from qdq.deploy import Deployed, evaluate
    from qdq.errors import InputError, MissingRuntimeError, ModelError, QdqError, StaleFileError
    from qdq.graph import Model, load, save
    from qdq.pipeline import Quantized, load_float, quantize
    from qdq.plan import Plan, Point, Skip
    from qdq.recipe import Recipe
    from qdq.report import DeployReport
    from qdq.scheme import Settings, Spec
    from qdq.solve import Solution

_HOME = {
    "CalibrationTable": "calibrate",
    "collect": "calibrate",
    "Deployed": "deploy",
    "evaluate": "deploy",
    "InputError": "errors",
    "MissingRuntimeError": "errors",
    "ModelError": "errors",
    "QdqError": "errors",
    "StaleFileError": "errors",
    "Model": "graph",
    "load": "graph",
    "save": "graph",
    "Quantized": "pipeline",
    "load_float": "pipeline",
    "quantize": "pipeline",
    "Plan": "plan",
    "Point": "plan",
    "Skip": "plan",
    "Recipe": "recipe",
    "DeployReport": "report",
    "Settings": "scheme",
    "Spec": "scheme",
    "Solution": "solve",
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
