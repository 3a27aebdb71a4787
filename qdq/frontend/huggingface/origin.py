"""`hf:FOLDER` as a model that becomes an ONNX file, with samples of its text, pictures or recordings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from calib_data import Samples, open_samples
from qdq.frontend.exported import Exported
from qdq.frontend.huggingface.choose import Take
from qdq.frontend.huggingface.folder import Folder, open_folder
from qdq.frontend.huggingface.tasks import wish_of
from qdq.frontend.origin import Wanted
from qdq.frontend.sizes import Given, Sizes, differing
from qdq.measure.inference.inputs import input_specs
from qdq.model.model import Model


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
            samples: Given = _opener(made.calibration) if made.calibration else wanted.samples or ()
            sizes = Sizes()
            if wanted.dynamic is None and take.past is None:
                example = {name: tensor.numpy() for name, tensor in form.example.items()}
                sizes = differing(samples, example, form.dynamic)
            exported = export_torch(
                plain(network, form),
                tuple(form.example.values()),
                path,
                dynamic=wanted.dynamic if wanted.dynamic is not None else sizes.with_batch(form.dynamic) or False,
                opset=wanted.opset,
                input_names=tuple(form.example),
                samples=samples,
                tolerance=wanted.tolerance,
                source=f"hf:{self.folder.name}",
            )
        part = f", its {wish.part}" if wish.part else ""
        said = f"Exported for {wish.task.name}{part}, as {wish.why} says."
        return replace(
            exported,
            notes=(said, *network.notes, *made.notes, *sizes.notes, *exported.notes),
            calibration=made.calibration,
            evaluation=made.evaluation,
        )


def folder_of(text: str) -> HuggingFace:
    """The local folder that `hf:FOLDER` names.

    Raises:
        InputError: there is none, or it holds no model.
    """
    return HuggingFace(folder=open_folder(text))


def _opener(folder: Path) -> Callable[[Model], Samples]:
    """What opens the samples of a folder for a model."""
    return lambda model: open_samples(str(folder), input_specs(model))
