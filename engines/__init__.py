"""Compile, run, audit and compare engines. Knows nothing of quantization and imports nothing of `qdq`.

A `Backend`'s `build` turns an ONNX file into an `Engine` with a `LayerTable`;
`audit.audit` says which node really ran in which type; `compare.compare` says what that costs in accuracy.
The verbs live in the modules of their name (`from engines.verify.audit import audit`).
`open` gives services one object for what was deployed; it is imported at its first use.
Runtimes are imported inside the functions that need them, so that `import engines` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engines.backends.backend import Backend, Running
from engines.backends.compiler import Engine, ShapeRange
from engines.backends.doctor import Diagnosis, diagnose
from engines.backends.layers import KernelTensor, Layer, LayerTable
from engines.backends.tensorrt_options import TensorRtOptions
from engines.core.errors import (
    BuildError,
    EngineError,
    MissingRuntimeError,
    OutOfMemoryError,
    UnsupportedTargetError,
)
from engines.core.files import sha256_file
from engines.verify.audit import Audit, NodeAudit
from engines.verify.manifest import Manifest, sha256_model
from engines.verify.report import Limits, OutputReport, Report

if TYPE_CHECKING:
    from engines.runtime.predictor import Predictor, open

__all__ = [
    "Audit",
    "Backend",
    "BuildError",
    "Diagnosis",
    "Engine",
    "EngineError",
    "KernelTensor",
    "Layer",
    "LayerTable",
    "Limits",
    "Manifest",
    "MissingRuntimeError",
    "NodeAudit",
    "OutOfMemoryError",
    "OutputReport",
    "Predictor",
    "Report",
    "Running",
    "ShapeRange",
    "TensorRtOptions",
    "UnsupportedTargetError",
    "diagnose",
    "open",
    "sha256_file",
    "sha256_model",
]


def __getattr__(name: str) -> Any:
    """Import what runs engines when it is first used."""
    if name not in ("Predictor", "open"):
        raise AttributeError(f"module 'engines' has no attribute {name!r}")
    from engines.runtime import predictor

    return getattr(predictor, name)
