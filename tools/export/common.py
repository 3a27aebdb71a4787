"""What the export scripts share: options, checkpoints, samples, and the check against PyTorch.

A script gives `main` a function that builds its network and a `Kind` of input. The keyword arguments of that function
are options of the command line, with their defaults. Without a checkpoint the weights come from a seed, and BatchNorm
has seen the first sample, as after training. The file is opset and names of `qdq.export_torch`, which checks it.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
import warnings
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdq import MissingRuntimeError, QdqError

Rng = np.random.Generator
Sample = dict[str, np.ndarray]
NESTED = ("state_dict", "network_weights", "model_state_dict", "model")  # keys that a checkpoint holds weights under
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation
RATE = 16000  # Hz
Takes = str | Callable[[Any, tuple[Any, ...]], Any]  # one output of many, or what is exported of network and example


class BadInput(Exception):
    """What a person gave does not fit; the text says what, where and how to fix it."""


class Missing(Exception):
    """A library is not there, or is there and does not load; the text says which and why."""


def library(name: str) -> Any:
    """Import a module that an environment may lack.

    Raises:
        Missing: it is not installed, or does not load.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision beside a torch of another build raises RuntimeError
        package = name.partition(".")[0].replace("_", "-")
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        raise Missing(f"{package} {why}: pip install {package}") from error


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of input.

    Attributes:
        options: name -> default, beside those of the network.
        draw: a sample from a generator.
        drawn: what such samples are, in words.
        source: the option that names real data; its help.
        read: samples from that; not asked where the option is not given.
        dynamic: sizes that stay open, as of `qdq.export_torch`.
        axes: names of the first axes of every input, which `--open` leaves open; a kind with them has that option.
    """

    options: Mapping[str, Any]
    draw: Callable[[Rng, argparse.Namespace], Sample]
    drawn: str
    source: tuple[str, str]
    read: Callable[[Path, Rng, argparse.Namespace], Iterator[Sample]]
    dynamic: Any = False
    axes: tuple[str, ...] = ()


def field(rng: Rng, sizes: Sequence[int]) -> np.ndarray:
    """A random field of mean 0 and variance 1 whose power falls as f^-n in n dimensions, as that of pictures does."""
    frequency = np.sqrt(sum(f**2 for f in np.meshgrid(*map(np.fft.fftfreq, sizes), indexing="ij")))
    frequency.flat[0] = np.inf
    made = np.fft.ifftn(np.fft.fftn(rng.normal(size=sizes)) * frequency ** (-len(sizes) / 2)).real
    return np.asarray(made / made.std(), np.float32)


def _fields(rng: Rng, shape: Sequence[int]) -> np.ndarray:
    return np.stack([np.stack([field(rng, shape[2:]) for _ in range(shape[1])]) for _ in range(shape[0])])


def _crops(path: Path, rng: Rng, given: argparse.Namespace) -> Iterator[Sample]:
    """Crops around voxels of a NIfTI volume above its mean."""
    nibabel = library("nibabel")
    volume = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata(dtype=np.float32)
    volume = volume[..., 0] if volume.ndim == 4 else volume
    if given.hounsfield:
        low, high = given.hounsfield
        volume = np.clip((volume - low) / (high - low), 0, 1)
    else:
        volume = (volume - volume.mean()) / volume.std()
    short = [max(0, size - have) for size, have in zip(given.patch, volume.shape, strict=True)]
    volume = np.pad(volume, [(n // 2, n - n // 2) for n in short], mode="edge")
    inside = np.argwhere(volume > volume.mean())
    while True:
        crops = []
        for middle in inside[rng.integers(len(inside), size=given.batch)]:
            first = [
                int(np.clip(m - size // 2, 0, have - size))
                for m, size, have in zip(middle, given.patch, volume.shape, strict=True)
            ]
            crops.append(volume[tuple(slice(a, a + size) for a, size in zip(first, given.patch, strict=True))])
        yield {"image": np.repeat(np.stack(crops)[:, None], given.in_channels, axis=1)}


def _pictures(path: Path, rng: Rng, given: argparse.Namespace) -> Iterator[Sample]:
    """Pictures of a folder, as torchvision's reference evaluation prepares them."""
    from PIL import Image, ImageOps

    files = sorted(p for p in path.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"))
    mean, deviation = (np.float32(values).reshape(3, 1, 1) for values in IMAGENET)
    for at in range(0, len(files), given.batch):
        made = []
        for file in (files * given.batch)[at : at + given.batch]:
            with Image.open(file) as picture:
                fitted = ImageOps.fit(picture.convert("RGB"), (given.size, given.size), centering=(0.5, 0.5))
            made.append((np.asarray(fitted, np.float32).transpose(2, 0, 1) / 255 - mean) / deviation)
        yield {"image": np.stack(made)}


def _words(rng: Rng, given: argparse.Namespace) -> Sample:
    ids = np.minimum(rng.zipf(1.2, (given.batch, given.length)) - 1, given.vocab - 1)
    return _masked(ids.astype(np.int64), given)


def _masked(ids: np.ndarray, given: argparse.Namespace) -> Sample:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)} if given.mask else {"input_ids": ids}


def _text(path: Path, rng: Rng, given: argparse.Namespace) -> Iterator[Sample]:
    """The text of a file in pieces, one after the other, of the tokenizer's ids."""
    if given.tokenizer is None:
        raise BadInput(f"{path}: text needs --tokenizer, the folder of the model's tokenizer")
    tokenizer = library("transformers").AutoTokenizer.from_pretrained(given.tokenizer, local_files_only=True)
    ids = np.asarray(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"], np.int64)
    if ids.max() >= given.vocab:
        raise BadInput(f"{given.tokenizer}: its ids go up to {ids.max()}, and the network has --vocab {given.vocab}")
    piece = given.batch * given.length
    for at in range(0, len(ids) - piece + 1, piece):
        yield _masked(ids[at : at + piece].reshape(given.batch, given.length), given)


def _tones(rng: Rng, given: argparse.Namespace) -> Sample:
    """Features of tones with overtones that come and go, over pink noise."""
    time = np.arange(30 * RATE) / RATE
    sound = 0.05 * field(rng, time.shape)
    for _ in range(8):
        pitch, rate, phase = rng.uniform(80, 400), rng.uniform(0.3, 4), rng.uniform(0, 6.3)
        sound += np.maximum(np.sin(rate * time + phase), 0) * sum(
            np.sin(2 * np.pi * k * pitch * time) / k for k in range(1, 9)
        )
    return _mel([sound / np.abs(sound).max()] * given.batch, given)


def _mel(sounds: Sequence[np.ndarray], given: argparse.Namespace) -> Sample:
    made = library("transformers").WhisperFeatureExtractor(feature_size=given.mels)(
        list(sounds), sampling_rate=RATE, return_tensors="np"
    )
    return {"input_features": np.asarray(made["input_features"], np.float32)}


def _sound(path: Path, rng: Rng, given: argparse.Namespace) -> Iterator[Sample]:
    """30 seconds after the other of a WAV file."""
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getsampwidth(), file.getnchannels()) != (RATE, 2, 1):
            raise BadInput(f"{path}: needs one channel of 16 bits at 16 kHz, as `ffmpeg -ac 1 -ar 16000` writes")
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    for at in range(0, len(sound), 30 * RATE):
        yield _mel([sound[at : at + 30 * RATE]] * given.batch, given)


VOLUME = Kind(
    options={"batch": 1, "in_channels": 1, "patch": (96, 96, 96), "hounsfield": ()},
    draw=lambda rng, given: {"image": _fields(rng, (given.batch, given.in_channels, *given.patch))},
    drawn="random fields whose power falls as f^-3, mean 0 and variance 1",
    source=("volume", "NIfTI file whose crops are the samples, in its own spacing; z-scored, or by --hounsfield"),
    read=_crops,
)
IMAGE = Kind(
    options={"batch": 1, "size": 224},
    draw=lambda rng, given: {"image": _fields(rng, (given.batch, 3, given.size, given.size))},
    drawn="random fields whose power falls as f^-2, mean 0 and variance 1",
    source=("pictures", "folder of pictures: scaled and cut to --size, ImageNet's mean and deviation taken out"),
    read=_pictures,
)
TOKENS = Kind(
    options={"batch": 1, "length": 128, "vocab": 30522, "mask": False, "tokenizer": None, "open": False},
    draw=_words,
    drawn="random ids, as frequent as words are by Zipf's law",
    source=("text", "text file that the tokenizer of the folder --tokenizer cuts into ids"),
    read=_text,
    axes=("batch", "length"),
)
MEL = Kind(
    options={"batch": 1, "mels": 80},
    draw=_tones,
    drawn="the features of tones with overtones over pink noise",
    source=("sound", "WAV file, one channel of 16 bits at 16 kHz, 30 s a sample"),
    read=_sound,
)


def weights_of(path: Path) -> dict[str, Any]:
    """The weights of a checkpoint, loaded without running code of its own, under the names of a bare network.

    Raises:
        BadInput: it cannot be loaded so, or holds no weights.
    """
    import torch

    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    scalars = [np.core.multiarray.scalar if np.__version__ < "2" else np._core.multiarray.scalar, np.dtype]
    scalars += [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")]
    try:
        with torch.serialization.safe_globals(scalars):  # numbers of nnU-Net's log
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: pickle, zip, the type that is not allowed
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: torch.load(weights_only=True) refuses it: {why}. Save the state_dict alone") from error
    while isinstance(found, Mapping) and (key := next((k for k in NESTED if isinstance(found.get(k), Mapping)), None)):
        found = found[key]
    if not isinstance(found, Mapping) or not any(isinstance(value, torch.Tensor) for value in found.values()):
        raise BadInput(f"{path}: no weights in it, nor under {', '.join(NESTED)}")
    weights = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in weights)), ""):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def part_of(weights: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The weights under the network's names, where it is a part of what was saved, or what was saved a part of it.

    So Whisper's encoder is found under `model.encoder.`, and GPT-2 without its head belongs under `transformer.`.
    """
    first = next(iter(own))
    forms = [dict(weights)]
    for name in weights:
        if name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            forms.append({n.removeprefix(prefix): value for n, value in weights.items() if n.startswith(prefix)})
        elif first.endswith(f".{name}"):
            forms.append({first.removesuffix(name) + n: value for n, value in weights.items()})
    return max(forms, key=lambda form: len(own.keys() & form.keys()))


def load(network: Any, path: Path) -> None:
    """Give a network the weights of a checkpoint.

    Raises:
        BadInput: a weight is missing, too many or of another shape.
    """
    own, saved = network.state_dict(), weights_of(path)
    weights = part_of(saved, own)
    tied = {own[name].data_ptr() for name in own if name in weights}  # a head that is the table of words
    missing = [name for name in own if name not in weights and own[name].data_ptr() not in tied]
    left = [name for name in weights if name not in own]
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, needs {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    faults = {"missing": missing, "that the network does not have": left, "of another shape": shapes}
    said = [f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in faults.items() if names]
    if said:
        raise BadInput(
            f"{path}: these weights do not fit the network ({'; '.join(said)}). Give the options it was trained with"
        )
    network.load_state_dict(weights, strict=False)
    if len(weights) < len(saved):
        print(f"{path.name}: {len(saved) - len(weights)} weights in it belong to other parts than this network")


def settle(network: Any, sample: Sample) -> None:
    """Make fresh weights like trained ones: no matrix is zero, and BatchNorm has seen a sample."""
    import torch

    for name, values in network.named_parameters():
        if not name.endswith("bias") and values.abs().max() < 1e-4:
            torch.nn.init.normal_(values, 0, values.shape[-1] ** -0.5 if values.ndim > 1 else 0.5)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if norms:
        for norm in norms:
            norm.momentum = None  # the mean of all that it saw
            norm.train()
        with torch.no_grad():
            network(*map(torch.from_numpy, sample.values()))
        network.eval()


def _first(network: Any, names: Sequence[str], takes: str) -> Any:
    """A module of the network's inputs by name that gives one output of many."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *inputs: Any) -> Any:
            return getattr(self.network(**dict(zip(names, inputs, strict=True))), takes)

    return Network().eval()


def _parser(build: Callable[..., Any], kind: Kind) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=inspect.getmodule(build).__doc__, formatter_class=form)
    parser.add_argument("path", type=Path, help="ONNX file to write")
    parser.add_argument("--checkpoint", type=Path, help="state_dict, or a file that holds one; default: fresh weights")
    parser.add_argument("--seed", type=int, default=1, help="of fresh weights and of samples; default 1")
    parser.add_argument("--samples", type=Path, metavar="FOLDER", help="write samples there, one .npz each")
    parser.add_argument("--count", type=int, default=4, help="how many samples; default 4")
    parser.add_argument(f"--{kind.source[0]}", type=Path, dest="source", metavar="PATH", help=kind.source[1])
    own = {name: p.default for name, p in inspect.signature(build).parameters.items()}
    for name, default in {**kind.options, **own}.items():
        option, shown = (
            f"--{name.replace('_', '-')}",
            f"default {default}" if default not in (None, ()) else "default: none",
        )
        if isinstance(default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default, help=shown)
        elif isinstance(default, tuple):
            parser.add_argument(
                option, nargs="+", type=type(default[0]) if default else float, default=default, help=shown
            )
        else:
            parser.add_argument(option, type=str if default is None else type(default), default=default, help=shown)
    return parser


def samples(kind: Kind, given: argparse.Namespace) -> tuple[list[Sample], str]:
    """The samples that the command line asks for, and what they are."""
    rng, made = np.random.default_rng(given.seed), list[Sample]()
    if given.source is None:
        return [kind.draw(rng, given) for _ in range(given.count)], f"no real data: {kind.drawn}"
    if not given.source.exists():
        raise BadInput(f"{given.source}: no such file or folder")
    for sample in kind.read(given.source, rng, given):
        made.append(sample)
        if len(made) == given.count:
            break
    if not made:
        raise BadInput(f"{given.source}: too little in it for one sample")
    return made, f"of {given.source.name}"


def export(build: Callable[..., Any], kind: Kind, given: argparse.Namespace, takes: Takes, weights: str) -> None:
    """Build, load, write, check; then say what was done."""
    torch, export_torch = library("torch"), library("qdq").export_torch
    torch.manual_seed(given.seed)
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that no exporter knows
    made, what = samples(kind, given)
    network = build(**{name: getattr(given, name) for name in inspect.signature(build).parameters}).eval()
    if given.checkpoint:
        load(network, given.checkpoint)
    elif not weights:
        settle(network, made[0])
    given.path.parent.mkdir(parents=True, exist_ok=True)
    names, example = list(made[0]), tuple(map(torch.from_numpy, made[0].values()))
    if callable(takes):
        module, outputs = takes(network, example), []
    else:
        module, outputs = (_first(network, names, takes), [takes]) if takes else (network, [])
    done = export_torch(
        module, example, given.path,
        dynamic={name: dict(enumerate(kind.axes)) for name in names} if kind.axes and given.open else kind.dynamic,
        input_names=names, output_names=outputs, samples=made[1:2] or (), source=Path(sys.argv[0]).stem,
    )  # fmt: skip
    count = sum(p.numel() for p in network.parameters())
    kept = given.checkpoint.name if given.checkpoint else weights or f"fresh, of seed {given.seed}"
    print(f"{given.path.name}: {count / 1e6:.1f} million weights ({kept}), {done.exporter}, opset {done.opset}")
    for name, array in made[0].items():
        print(f"input {name}: {'x'.join(map(str, array.shape))} {array.dtype}")
    for error in done.errors:
        sqnr = "equal" if error.sqnr_db is None else f"{error.sqnr_db:.1f} dB"
        print(f"output {error.name}: {sqnr}, ONNX Runtime against PyTorch on {done.samples} sample(s)")
    for note in done.notes:
        print(note)
    if given.samples:
        given.samples.mkdir(parents=True, exist_ok=True)
        for i, sample in enumerate(made):
            beside = given.samples / f".{i:03}.npz"
            np.savez(beside, **sample)
            os.replace(beside, given.samples / f"{i:03}.npz")
        print(f"{len(made)} samples in {given.samples.name}: {what}")


def main(
    build: Callable[..., Any], kind: Kind, takes: Takes = "", argv: Sequence[str] | None = None, *, weights: str = ""
) -> int:
    """Do what the command line asks for; the exit code: 0, 2 for bad input, 3 where a library is missing.

    `takes` is the output to export, '' all; `weights` says whose weights `build` gives, '' where they are fresh.
    """
    given = _parser(build, kind).parse_args(argv)
    warnings.filterwarnings("ignore")
    try:
        export(build, kind, given, takes, weights)
    except (Missing, ImportError, MissingRuntimeError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 3
    except (BadInput, QdqError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0
