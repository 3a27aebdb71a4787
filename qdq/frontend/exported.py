"""What an export gives: the ONNX file, its names, and how far it is from the model that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TOLERANCE = 1e-3  # largest difference of an output, as a part of its largest magnitude

Dynamic = Mapping[str, Mapping[int, str]]
"""Input name -> axis -> name of the size that stays open: `{"input": {0: "batch"}}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """How far one output of the ONNX file is from the original's, over all samples that were compared.

    Attributes:
        name: of the output.
        largest: largest absolute difference, in the output's own unit.
        relative: `largest` over the largest magnitude of the original's output; 0.0 where both are zero.
        sqnr_db: signal to noise ratio, in dB; None where there is no difference.
    """

    name: str
    largest: float
    relative: float
    sqnr_db: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An ONNX file and where it came from.

    Attributes:
        path: of the file; external data lies beside it as `<name>.data`.
        source: what it was exported from, in words that name no folder: "torch:nets:unet", "UNet".
        exporter: that wrote it: "torch.export" or "TorchScript"; "" where there was none.
        framework: with its version, as "torch 2.13.0".
        opset: of the standard domain.
        inputs, outputs: their names, in the order of the file.
        dynamic: sizes that stay open.
        errors: of each output, in ONNX Runtime against the original.
        samples: how many inputs were compared: the example, others made of it, and samples.
        calibration, evaluation: folders of samples that were made with it, None where there are none.
        notes: what else a person must know, a sentence each.
    """

    path: Path
    source: str
    exporter: str
    framework: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: Dynamic
    errors: tuple[OutputError, ...]
    samples: int
    calibration: Path | None = None
    evaluation: Path | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def lines(self) -> tuple[str, ...]:
        """All that a reader of a result must know, a sentence each."""
        by = f" by {self.framework}{f' ({self.exporter})' if self.exporter else ''}"
        worst = max((e.relative for e in self.errors), default=0.0)
        many = f"{self.samples} input{'s' * (self.samples != 1)}"
        first = (
            f"The float model is exported from {self.source}{by}, opset {self.opset}; on {many} ONNX Runtime is "
            f"within {worst:.1g} of its outputs' largest magnitudes."
        )
        return first, *self.notes
