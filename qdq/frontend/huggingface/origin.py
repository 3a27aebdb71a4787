"""`hf:FOLDER` as a model that becomes an ONNX file, with samples of its text, pictures or recordings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qdq.frontend.exported import Exported
from qdq.frontend.huggingface.choose import Take
from qdq.frontend.huggingface.folder import Folder, open_folder
from qdq.frontend.huggingface.tasks import wish_of
from qdq.frontend.origin import Wanted

COMPARED = 3  # samples on which the ONNX file is held against PyTorch


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFace:
    """A local folder."""

    folder: Folder

    @property
    def stem(self) -> str:
        """See `Origin.stem`."""
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in self.folder.name)

    def export(self, path: Path, wanted: Wanted) -> Exported:
        """See `Origin.export`; `wanted.own` is a `samples.Take`, and the samples lie where that says.

        Raises:
            InputError: the folder's model cannot be exported so, or the samples do not fit it.
            MissingRuntimeError: torch or transformers is missing.
        """
        wish = wish_of(self.folder, wanted.task)
        from qdq.frontend.huggingface.network import network_of, quiet, transformers_here

        with quiet(transformers_here()):
            from qdq.frontend.export import export_torch
            from qdq.frontend.huggingface.forms import form_of, plain
            from qdq.frontend.huggingface.samples import made_samples

            take = wanted.own if isinstance(wanted.own, Take) else Take()
            network = network_of(self.folder, wish)
            form = form_of(network, past=take.past)
            made = made_samples(network, form, take)
            exported = export_torch(
                plain(network, form),
                tuple(form.example.values()),
                path,
                dynamic=wanted.dynamic if wanted.dynamic is not None else form.dynamic or False,
                opset=wanted.opset,
                input_names=tuple(form.example),
                samples=_first(made.calibration) or wanted.samples or (),
                tolerance=wanted.tolerance,
                source=f"hf:{self.folder.name}",
            )
        part = f", its {wish.part}" if wish.part else ""
        said = f"Exported for {wish.task.name}{part}, as {wish.why} says."
        return replace(
            exported,
            notes=(said, *network.notes, *made.notes, *exported.notes),
            calibration=made.calibration,
            evaluation=made.evaluation,
        )


def folder_of(text: str) -> HuggingFace:
    """The local folder that `hf:FOLDER` names.

    Raises:
        InputError: there is none, or it holds no model.
    """
    return HuggingFace(folder=open_folder(text))


def _first(folder: Path | None) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.npz")) if folder else []
    found = []
    for file in islice(files, COMPARED):
        with np.load(file) as stored:
            found.append(dict(stored))
    return found
