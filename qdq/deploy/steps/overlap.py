"""Samples that are calibrated with and checked on: figures on them say little of samples not seen before.

hashes of both -> how many samples to check on are among the others -> refused, or counted where that is allowed.
Must not keep samples; names of files and forms of storage do not matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qdq.core.errors import InputError
from qdq.measure.inference.samples import Sample, sample_sha256
from qdq.measure.table import samples_digest
from qdq.model.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Evaluation samples: how many, how many of them are calibration samples too, and the sha256 of all together."""

    samples: int
    seen: int
    sha256: str


def overlap(calibration: Iterable[Sample], evaluation: Iterable[Sample], model: Model, *, allowed: bool) -> Evaluated:
    """Which evaluation samples have the inputs of a calibration sample; labels beside the inputs do not count.

    Raises:
        InputError: there is one, and it is not allowed.
    """
    names = [info.name for info in model.inputs]

    def hashes(samples: Iterable[Sample]) -> list[str]:
        return [sample_sha256({name: sample[name] for name in names}) for sample in samples]

    known, asked = set(hashes(calibration)), hashes(evaluation)
    count = sum(found in known for found in asked)
    if count and not allowed:
        raise InputError(
            f"{count} of the {len(asked)} samples of --eval are among those of --data: figures on them say little of "
            "samples not seen before. Give other samples, leave out --eval to check on those of --data and have the "
            "report say so, or allow it with --allow-overlap."
        )
    return Evaluated(samples=len(asked), seen=count, sha256=samples_digest(asked))
