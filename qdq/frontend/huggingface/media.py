"""Pictures through a folder's image processor, recordings through its feature extractor: one sample each.

Must not decide which files are samples, nor scale or resample where the processor does so itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from engines.core.errors import how_to_install
from qdq.core.errors import InputError, MissingRuntimeError
from qdq.frontend.huggingface.network import Network

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
RECORDINGS = (".wav",)
Sample = dict[str, np.ndarray]


def files_of(folder: Path, network: Network) -> list[Path]:
    """Pictures or recordings of a folder and those in it, by name; none where the network takes text."""
    endings = {"pixel_values": PICTURES, "input_features": RECORDINGS, "input_values": RECORDINGS}
    wanted = endings.get(network.main_input, ())
    if not folder.is_dir():
        return [folder] if folder.suffix.lower() in wanted and folder.is_file() else []
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in wanted and not p.name.startswith("."))


def media_samples(network: Network, files: Sequence[Path]) -> Iterator[Sample]:
    """The main input of each file, with a batch axis of 1.

    Raises:
        InputError: a file is unreadable, or the folder has no processor.
    """
    for path in files:
        yield (_picture if network.main_input == "pixel_values" else _recording)(network, path)


def example_shape(network: Network) -> tuple[int, ...]:
    """Of the main input without the batch: what the processor makes, else what config.json says.

    Raises:
        InputError: neither tells.
    """
    name = network.main_input
    if name == "pixel_values":
        if network.pictures is not None:
            image = np.zeros((64, 64, 3), np.uint8)
            return tuple(np.asarray(_processed(network.pictures, image)[name]).shape[1:])
        size, channels = (getattr(network.model.config, key, None) for key in ("image_size", "num_channels"))
        if size:
            height, width = size if isinstance(size, list | tuple) else (size, size)
            return (channels or 3, height, width)
    elif name in ("input_features", "input_values"):
        if network.hearing is not None:
            rate = int(network.hearing.sampling_rate)
            return tuple(np.asarray(_heard(network.hearing, np.zeros(rate, np.float32), rate)[name]).shape[1:])
        config = network.model.config
        if name == "input_features" and getattr(config, "max_source_positions", None):
            return (config.num_mel_bins, 2 * config.max_source_positions)
        if name == "input_values":
            return (16000,)
    raise InputError(
        f"Nobody tells the shape of {name!r} of {network.folder.name}: it has no preprocessor_config.json, and its "
        "config.json names no size. Save its processor into the folder."
    )


def _picture(network: Network, path: Path) -> Sample:
    try:
        from PIL import Image
    except ImportError:
        raise MissingRuntimeError(f"Pictures need pillow. {how_to_install('PIL')}") from None
    if network.pictures is None:
        raise InputError(_without(network, "preprocessor_config.json of an image processor", "arrays as .npz files"))
    try:
        with Image.open(path) as opened:
            image = np.asarray(opened.convert("RGB"))
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read the picture {path}: {error}. Leave it out or convert it.") from None
    return {"pixel_values": np.asarray(_processed(network.pictures, image)["pixel_values"], np.float32)}


def _processed(processor: Any, image: np.ndarray) -> Any:
    return processor(images=image, return_tensors="np")


def _recording(network: Network, path: Path) -> Sample:
    if network.hearing is None:
        raise InputError(_without(network, "preprocessor_config.json of a feature extractor", "arrays as .npz files"))
    rate, sound = wave_of(path)
    wanted = int(network.hearing.sampling_rate)
    if rate != wanted:
        from scipy.signal import resample_poly

        step = gcd(rate, wanted)
        sound = resample_poly(sound, wanted // step, rate // step).astype(np.float32)
    name = network.main_input
    return {name: np.asarray(_heard(network.hearing, sound, wanted)[name], np.float32)}


def _heard(extractor: Any, sound: np.ndarray, rate: int) -> Any:
    return extractor(sound, sampling_rate=rate, return_tensors="np")


def wave_of(path: Path) -> tuple[int, np.ndarray]:
    """Samples per second, and the mean of the channels as float32 in [-1, 1].

    Raises:
        InputError: no WAV file, or in a coding that scipy does not read.
    """
    try:
        from scipy.io import wavfile
    except ImportError:
        raise MissingRuntimeError("Recordings need scipy: pip install 'qdq[hf]'.") from None
    try:
        rate, sound = wavfile.read(path)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"Cannot read the recording {path}: {error}. Convert it to WAV.") from None
    if not len(sound):
        raise InputError(f"The recording {path} is empty. Leave it out.")
    if sound.dtype == np.uint8:
        scaled = (sound.astype(np.float32) - 128) / 128
    elif sound.dtype.kind == "i":
        scaled = sound.astype(np.float32) / np.float32(np.iinfo(sound.dtype).max + 1)
    else:
        scaled = sound.astype(np.float32)
    return int(rate), scaled if scaled.ndim == 1 else scaled.mean(axis=1, dtype=np.float32)


def _without(network: Network, what: str, instead: str) -> str:
    name = network.folder.name
    return f"{name} has no {what}, so nobody can tell what the model sees. Save it there, or give {instead}."
