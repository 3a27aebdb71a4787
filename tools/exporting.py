"""What the scripts that export networks share. Needs torch."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


def write(network: torch.nn.Module, sample: torch.Tensor, path: Path) -> None:
    """Write a network of one input, x, and one output, y."""
    with torch.no_grad():
        torch.onnx.export(
            network, (sample,), str(path), opset_version=17, input_names=["x"], output_names=["y"], dynamo=False
        )


def export_all(names: Iterable[str], export: Callable[[str, Path], None]) -> None:
    """Write the networks that the command line names, or all."""
    warnings.filterwarnings("ignore")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or names:
        start, path = time.time(), folder / f"{name}.onnx"
        export(name, path)
        print(name, f"{time.time() - start:.0f} s", f"{path.stat().st_size / 1e6:.1f} MB", flush=True)
