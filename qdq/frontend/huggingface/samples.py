"""Samples of a folder's model to calibrate and to check, as .npz files, of a text, pictures or recordings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdq.core.errors import InputError
from qdq.frontend.huggingface.choose import Parts, Take, apart
from qdq.frontend.huggingface.forms import Form
from qdq.frontend.huggingface.media import files_of, media_samples
from qdq.frontend.huggingface.network import Network
from qdq.frontend.huggingface.steps import WRITTEN, cached_steps, written_steps
from qdq.frontend.huggingface.text import Cut, cut_of, text_sample, token_ids

CALIBRATION, EVALUATION = "calibration", "evaluation"  # folders of the samples
Sample = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Folders of .npz files, None where there are none, and what was done."""

    calibration: Path | None = None
    evaluation: Path | None = None
    notes: tuple[str, ...] = ()


def made_samples(network: Network, form: Form, take: Take) -> Made:
    """Write the samples that are asked for, calibration and evaluation apart.

    Raises:
        InputError: the text or the files do not fit the model.
    """
    if take.count < 1:
        raise InputError(f"--count {take.count}: at least one sample is needed.")
    if take.samples is None:
        return Made()
    if take.text is not None:
        return _of_text(network, form, take, take.samples)
    files = _files(network, take.data)
    return _of_files(network, form, take, files, take.samples) if files else Made()


def processed(network: Network, data: str | None) -> bool:
    """Whether what --data or --eval names is for the folder's processor, not for `calib_data`."""
    return bool(_files(network, data))


def _files(network: Network, data: str | None) -> list[Path]:
    return files_of(Path(data), network) if data else []


def _of_text(network: Network, form: Form, take: Take, folder: Path) -> Made:
    assert take.text is not None
    if network.main_input != "input_ids":
        raise InputError(
            f"--text is for networks that read text, and {network.folder.name} reads {network.main_input}. Give a "
            "folder of pictures or recordings with --data."
        )
    cut = cut_of(network, unit=take.unit, length=take.length, padding=take.padding)
    found, long = token_ids(network, take.text, cut)
    other = None if take.evaluation is None else Path(take.evaluation)
    parts = apart(found, count=take.count, seed=take.seed, evaluated=other is not None or take.elsewhere)
    if other is not None:
        own = {ids.tobytes() for ids in parts.calibration}
        read = [ids for ids in token_ids(network, other, cut)[0] if ids.tobytes() not in own]
        parts = Parts(
            calibration=parts.calibration,
            evaluation=apart(read, count=take.count, seed=take.seed, evaluated=True).calibration,
        )
    said = [_said(parts, cut, take, len(found), long)]
    return _written(folder, _text(network, form, take, cut, parts), said)


def _text(
    network: Network, form: Form, take: Take, cut: Cut, parts: Parts[Any]
) -> Iterator[tuple[str, Iterable[Sample]]]:
    for seed, (name, ids) in enumerate(((CALIBRATION, parts.calibration), (EVALUATION, parts.evaluation))):
        if network.wish.task.shape == "decoder" and network.wish.past:
            yield name, cached_steps(network, form, ids, past=take.past, seed=take.seed + seed)
            continue
        encoder = network.wish.part not in ("decoder", "decoder-with-past")
        names = tuple(form.example) if encoder else ("input_ids", "attention_mask")
        sources = (text_sample(network, one, cut, names) for one in ids)
        most = min(WRITTEN, cut.length)
        yield (
            name,
            sources
            if encoder
            else written_steps(network, form, sources, past=take.past, seed=take.seed + seed, most=most),
        )


def _of_files(network: Network, form: Form, take: Take, files: Sequence[Path], folder: Path) -> Made:
    other = _files(network, take.evaluation)
    parts = apart(files, count=take.count, seed=take.seed, evaluated=bool(other) or take.elsewhere)
    if other:
        parts = Parts(
            calibration=parts.calibration,
            evaluation=apart(other, count=take.count, seed=take.seed, evaluated=True).calibration,
        )

    def made() -> Iterator[tuple[str, Iterable[Sample]]]:
        for seed, (name, some) in enumerate(((CALIBRATION, parts.calibration), (EVALUATION, parts.evaluation))):
            sources = media_samples(network, some)
            if network.wish.part in ("decoder", "decoder-with-past"):
                yield name, written_steps(network, form, sources, past=take.past, seed=take.seed + seed, most=WRITTEN)
            else:
                yield name, sources

    said = f"Samples: {_counts(parts, take)} of {len(files)} files through the processor of {network.folder.name}."
    return _written(folder, made(), [said])


def _said(parts: Parts[Any], cut: Cut, take: Take, found: int, long: int) -> str:
    what = "blocks" if cut.padding == "blocks" else f"{cut.unit}s"
    how = {
        "blocks": f"joined, in blocks of {cut.length} tokens",
        "max": f"filled up to {cut.length} tokens, {long} cut off",
        "none": f"each of its own length, {long} cut off at {cut.length} tokens",
    }[cut.padding]
    return f"Samples: {_counts(parts, take)} of {found} different {what} of the text, {how}."


def _counts(parts: Parts[Any], take: Take) -> str:
    counts = f"{len(parts.calibration)} to calibrate"
    if parts.evaluation:
        counts += f" and {len(parts.evaluation)} others to check"
    return f"{counts}, seed {take.seed},"


def _written(folder: Path, parts: Iterable[tuple[str, Iterable[Sample]]], notes: list[str]) -> Made:
    places: dict[str, Path] = {}
    for name, samples in parts:
        place, number = folder / name, 0
        for number, sample in enumerate(samples, 1):
            place.mkdir(parents=True, exist_ok=True)
            np.savez(place / f"{number - 1:05d}.npz", **dict[str, Any](sample))
        if number:
            places[name] = place
    return Made(calibration=places.get(CALIBRATION), evaluation=places.get(EVALUATION), notes=tuple(notes))
