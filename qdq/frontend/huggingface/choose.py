"""Where samples come from, and which pieces of a text or files of a folder they are: a seeded choice, parts apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from qdq.core.errors import InputError

UNITS = ("line", "sentence")
PADDINGS = ("none", "max", "blocks")
COUNT, SEED = 128, 0
SHORTEST = 3  # characters of a piece that says anything
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """Where samples come from, and how they are made.

    Attributes:
        text: a file for the folder's tokenizer.
        data: a folder of pictures or recordings for its processor; what else it names is not for this.
        evaluation: the same to check on, or a text; None: a part of what there is.
        elsewhere: whether evaluation samples are given as arrays.
        unit, length, padding: as of `Cut`; None: what fits the model.
        count: samples of each part, at most.
        seed: of every choice.
        past: tokens of a cache of fixed size; None: open.
        samples: the folder that they are written to; None: none are made.
    """

    text: Path | None = None
    data: str | None = None
    evaluation: str | None = None
    elsewhere: bool = False
    unit: str | None = None
    length: int | None = None
    padding: str | None = None
    count: int = COUNT
    seed: int = SEED
    past: int | None = None
    samples: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts(Generic[T]):
    """What is calibrated on, and what is checked on; none is in both."""

    calibration: list[T]
    evaluation: list[T]


def pieces(path: Path, unit: str) -> list[str]:
    """The lines or sentences of a UTF-8 text, each once, in its order.

    A sentence ends with . ! or ? before a space, or at an empty line.

    Raises:
        InputError: the file is missing, no text, or empty.
    """
    text = text_of(path)
    if unit == "sentence":
        found = re.split(r"(?<=[.!?])\s+|\n\s*\n", re.sub(r"(?<=\S)[ \t]*\n[ \t]*(?=\S)", " ", text))
    else:
        found = text.splitlines()
    kept = list(dict.fromkeys(piece.strip() for piece in found))
    kept = [piece for piece in kept if len(piece) >= SHORTEST]
    if not kept:
        raise InputError(f"{path} holds no {unit}. Give a text with a {unit} a sample.")
    return kept


def text_of(path: Path) -> str:
    """A UTF-8 text.

    Raises:
        InputError: the file is missing, or no such text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: {error}. Save it as UTF-8.") from None
    except OSError as error:
        raise InputError(f"Cannot read the text {path}: {error.strerror}. Check the path.") from None


def apart(found: Sequence[T], *, count: int, seed: int, evaluated: bool) -> Parts[T]:
    """A seeded choice of `count` to calibrate and, where nothing else is checked on, as many others to check.

    Where there are not enough, each gets half; a single one calibrates.

    Args:
        found: to choose from, all different.
        count: of each part.
        seed: of the choice.
        evaluated: whether evaluation samples come from elsewhere.
    """
    order = np.random.default_rng(seed).permutation(len(found))
    first = min(count, len(found) if evaluated or len(found) == 1 else len(found) // 2)
    calibration = [found[i] for i in order[:first]]
    rest = [] if evaluated else [found[i] for i in order[first : first + count]]
    return Parts(calibration=calibration, evaluation=rest)
