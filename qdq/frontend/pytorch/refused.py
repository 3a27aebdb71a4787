"""Why torch does not export a module, in a sentence that names the place in the user's code.

exception of an exporter -> `why` -> `Why`.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LONGEST = 300  # characters of another library's message
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_DATA = re.compile(
    r"data.?dependent|GuardOnDataDependent|Dynamic control flow|unbacked|not allowed to call .*item|"
    r"converted? .* to a (python|concrete) (bool|number)",
    re.IGNORECASE,
)
_COMPLEX = re.compile(r"complex(64|128|float|double)?\b|view_as_(complex|real)|\b_?fft_", re.IGNORECASE)
_ONE_SIZE = re.compile(
    r"Constraints? violated|specialized it to be a constant|specialized to a constant", re.IGNORECASE
)
_OPERATOR = re.compile(
    r"(?:No (?:ONNX function|decompositions?) (?:found|registered)[^<]*<OpOverload\(op='|operator ')([\w.:]+)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """Why a module is not exported.

    Attributes:
        says: a sentence.
        fix: what to do.
        traced: whether a trace may do better: it knows other operators, and follows no branches.
        fixed: whether the module takes one size where another was tried, which a trace would only hide.
    """

    says: str
    fix: str
    traced: bool = False
    fixed: bool = False


def why(error: BaseException) -> Why:
    """What an exporter's exception means."""
    chain = list(_chain(error))
    text = "\n".join(f"{type(e).__name__}: {e}" for e in chain)
    place = next(filter(None, (in_user_code(str(e)) or _raised_in(e) for e in reversed(chain))), "")
    where = f" ({place})" if place else ""
    missing = next((e for e in chain if isinstance(e, ModuleNotFoundError) and e.name), None)
    if missing is not None:
        package = str(missing.name).partition(".")[0]
        return Why(
            says=f"it needs the package {package}, which is not installed{where}",
            fix=f"pip install {package}.",
        )
    if _ONE_SIZE.search(text):
        return Why(
            says=f"its code takes no other size than the example's{where}",
            fix="Leave that size fixed.",
            traced=True,
            fixed=True,
        )
    if _COMPLEX.search(text):
        return Why(
            says=f"it computes with complex numbers, which ONNX's operators do not take{where}",
            fix="Write them as pairs of real numbers, as torch.view_as_real gives them.",
        )
    if _DATA.search(text):
        return Why(
            says=f"what it computes, or the size of it, depends on values of a tensor{where}",
            fix="Use torch.where or torch.cond in place of Python's if, while or item().",
        )
    if found := _OPERATOR.search(text):
        return Why(
            says=f"ONNX has no form of the operator {found[1]}{where}",
            fix="Compute it with other operators.",
            traced=True,
        )
    last = chain[-1]
    said = " ".join(str(last).split())[:LONGEST]
    return Why(
        says=f"{type(last).__name__}: {said}{where}" if said else f"{type(last).__name__}{where}",
        fix="",
        traced=True,
    )


def in_user_code(text: str) -> str:
    """The last place in a stack trace's text that is in no installed package: "nets.py line 12"; "" where none is."""
    found = [(path, line) for path, line in _FRAME.findall(text) if is_users(path)]
    return f"{Path(found[-1][0]).name} line {found[-1][1]}" if found else ""


def _raised_in(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f"{Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""


def is_users(path: str) -> bool:
    """Whether a file is the user's: not of a package, of Python or of this program, and no code made on the way."""
    parts = Path(path).parts
    own = Path(__file__).resolve().parents[2]
    standard = Path(traceback.__file__).resolve().parent
    return not (
        path.startswith("<")
        or "site-packages" in parts
        or "dist-packages" in parts
        or Path(path).is_relative_to(own)
        or Path(path).is_relative_to(standard)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exceptions that led to one, the first last."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
