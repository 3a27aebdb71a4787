"""What the files of a Hugging Face folder say, before anything heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdq.core.errors import InputError

PREFIX = "hf:"
POOLINGS = ("cls_token", "lasttoken", "max_tokens", "mean_sqrt_len_tokens", "mean_tokens", "weightedmean_tokens")
_STEP = "sentence_transformers.models."


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How sentence-transformers makes one vector of a sentence's tokens.

    Attributes:
        modes: keys of `POOLINGS`; the vectors of several are joined.
        dense: folders of linear layers behind them, each with its config.json.
        normalize: to length 1 at the end.
        max_length: tokens of a sentence, the others are cut off; None where the folder does not say.
    """

    modes: tuple[str, ...]
    dense: tuple[Path, ...] = ()
    normalize: bool = False
    max_length: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder with a model.

    Attributes:
        path: of the model itself: of sentence-transformers' first step, where that has its own folder.
        name: of the folder that the user named, for files and messages.
        config: config.json.
        pooling: where sentence-transformers' files say how; else None.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    pooling: Pooling | None

    @property
    def architecture(self) -> str:
        """The class that the weights were saved from, '' where config.json names none."""
        return str((self.config.get("architectures") or [""])[0])

    @property
    def kind(self) -> str:
        """`model_type`."""
        return str(self.config.get("model_type", ""))

    @property
    def hears(self) -> bool:
        """Whether the model gets recordings: its processor says how many values a second, or it filters them itself."""
        place = self.path / "preprocessor_config.json"
        said = _read(place) if place.is_file() else {}
        return "num_feat_extract_layers" in self.config or (isinstance(said, dict) and "sampling_rate" in said)


def open_folder(text: str) -> Folder:
    """The folder that `hf:FOLDER` names.

    Raises:
        InputError: there is no such folder, or it holds no model.
    """
    named = text.removeprefix(PREFIX)
    path = Path(named).expanduser()
    if not named or not path.is_dir():
        raise InputError(
            f"No folder {named or '(empty)'}: `hf:FOLDER` takes a local folder with config.json, weights, and "
            "tokenizer or processor. Nothing is downloaded here. Fetch a model of the Hub first, as with `hf "
            "download ORGANIZATION/MODEL --local-dir FOLDER`."
        )
    steps = _read(path / "modules.json") if (path / "modules.json").is_file() else []
    if not isinstance(steps, list):
        raise InputError(f"Cannot read {path / 'modules.json'}: a list of sentence-transformers' steps is needed.")
    inner = path / str(steps[0].get("path", "")) if steps else path
    config = inner / "config.json"
    if not config.is_file():
        raise InputError(
            f"The folder {path} holds no config.json, so it is no model that transformers saved. Give the folder that "
            "`save_pretrained` wrote; in the Hub's cache that is snapshots/REVISION."
        )
    read = _read(config)
    if not isinstance(read, dict) or not read.get("model_type"):
        raise InputError(f"{config} has no `model_type`, so nobody can tell what network it is of. Save it again.")
    name = path.resolve().name
    return Folder(path=inner, name=name, config=read, pooling=_pooling(path, inner, steps) if steps else None)


def _pooling(path: Path, inner: Path, steps: list[Mapping[str, Any]]) -> Pooling:
    modes: tuple[str, ...] = ()
    dense: list[Path] = []
    normalize = False
    for step in steps[1:]:
        kind, place = str(step.get("type", "")), path / str(step.get("path", ""))
        kind = kind.removeprefix(_STEP).rpartition(".")[2]
        if kind == "Pooling" and not modes:
            modes = _modes(place / "config.json")
        elif kind == "Dense" and modes and not normalize:
            dense.append(place)
        elif kind == "Normalize" and modes:
            normalize = True
        else:
            raise InputError(
                f"{path / 'modules.json'} has the step {kind!r} at this place, and qdq knows Transformer, Pooling, "
                "Dense and Normalize in this order. Export the tokens with --task feature-extraction, and do the step "
                "behind the engine."
            )
    if not modes:
        raise InputError(f"{path / 'modules.json'} has no step Pooling. Give --task feature-extraction.")
    length = None
    for place in (inner, path):
        if (place / "sentence_bert_config.json").is_file():
            length = _read(place / "sentence_bert_config.json").get("max_seq_length")
            break
    return Pooling(modes=modes, dense=tuple(dense), normalize=normalize, max_length=length)


def _modes(config: Path) -> tuple[str, ...]:
    read = _read(config)
    if isinstance(one := read.get("pooling_mode"), str):
        modes = [next((mode for mode in POOLINGS if mode.removesuffix("_tokens") == one or mode == one), one)]
        modes = ["cls_token"] if modes == ["cls"] else modes
    else:
        modes = [
            key.removeprefix("pooling_mode_") for key, on in read.items() if key.startswith("pooling_mode_") and on
        ]
    if not modes or (unknown := [mode for mode in modes if mode not in POOLINGS]):
        raise InputError(
            f"{config} pools by {', '.join(unknown) if modes else 'nothing'}; qdq knows {', '.join(POOLINGS)}. "
            "Give --task feature-extraction, and pool behind the engine."
        )
    return tuple(sorted(modes, key=_ORDER.index))


_ORDER = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise InputError(f"Cannot read {path}: {said}. Fetch or save the folder again.") from None
