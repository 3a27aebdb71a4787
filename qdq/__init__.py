"""An ONNX model and real samples become a verified INT8 TensorRT engine, without a GPU.

    from qdq import Settings, load_float, quantize, save
    made = quantize("unet.onnx", samples, settings=Settings(calibrator="entropy"))
    save(made.model, "unet.int8.onnx")

Every name is imported at its first use, so that `import qdq` stays light. The folders stand in the
order of the pipeline; other functions are imported from their file: `from qdq.deploy.deploy import deploy`.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as of `typing`, whose import would take most of what this one does
if TYPE_CHECKING:
    from typing import Any

    from qdq.assemble.quantize import Quantized, quantize
    from qdq.build.recipe import Recipe
    from qdq.core.disk.cache import caching
    from qdq.core.errors import InputError, MissingRuntimeError, ModelError, QdqError, StaleFileError
    from qdq.deploy.check import evaluate
    from qdq.deploy.deploy import Deployed
    from qdq.deploy.report.report import DeployReport
    from qdq.frontend.export import export_torch
    from qdq.frontend.exported import Exported
    from qdq.measure.collect import collect
    from qdq.measure.table import CalibrationTable
    from qdq.model.model import Model
    from qdq.model.storage import load, save
    from qdq.passes.prepare import load_float
    from qdq.plan.plan import Plan, Point, Skip
    from qdq.plan.settings import Settings
    from qdq.plan.spec import Spec
    from qdq.solve.solve import Solution

_NAMES = {  # module -> the public names that it holds
    "assemble.quantize": "Quantized quantize",
    "build.recipe": "Recipe",
    "core.disk.cache": "caching",
    "core.errors": "InputError MissingRuntimeError ModelError QdqError StaleFileError",
    "deploy.check": "evaluate",
    "deploy.deploy": "Deployed",
    "deploy.report.report": "DeployReport",
    "frontend.export": "export_torch",
    "frontend.exported": "Exported",
    "measure.collect": "collect",
    "measure.table": "CalibrationTable",
    "model.model": "Model",
    "model.storage": "load save",
    "passes.prepare": "load_float",
    "plan.plan": "Plan Point Skip",
    "plan.settings": "Settings",
    "plan.spec": "Spec",
    "solve.solve": "Solution",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "CalibrationTable",
    "DeployReport",
    "Deployed",
    "Exported",
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
    "caching",
    "collect",
    "evaluate",
    "export_torch",
    "load",
    "load_float",
    "quantize",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'qdq' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"qdq.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
