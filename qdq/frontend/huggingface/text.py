"""A text through a folder's tokenizer: what a network reads of each piece, or of each block of it.

text -> pieces, or blocks of one length -> token ids -> samples with a batch axis of 1. Equal ones come once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdq.core.errors import InputError
from qdq.frontend.huggingface.choose import pieces, text_of
from qdq.frontend.huggingface.network import Network

LENGTH = 128  # tokens of a sample, where neither the user nor the model says less
MOST = 50_000  # pieces or blocks that are tokenized to choose from
LONGEST_TEXT = 64 << 20  # characters of a text that are looked at for blocks
Ids = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a text becomes samples.

    Attributes:
        unit: a value of `UNITS`.
        length: tokens of a sample: what is longer is cut off.
        padding: 'none': each piece has its own length; 'max': all are filled up to `length`; 'blocks': the pieces are
            joined, and cut into blocks of `length`, as perplexity is measured.
    """

    unit: str
    length: int
    padding: str


def cut_of(network: Network, *, unit: str | None, length: int | None, padding: str | None) -> Cut:
    """What is asked for, or else fits the network.

    Raises:
        InputError: more tokens than the model takes, or filling up without a token for it.
    """
    tokenizer = require_tokenizer(network)
    longest = network.longest
    if length is not None and (length < 2 or (longest is not None and length > longest)):
        raise InputError(
            f"--max-length {length} does not fit {network.folder.name}, which takes 2 to {longest or 'any number of'} "
            "tokens. Give another."
        )
    size = length or min(LENGTH, longest or LENGTH)
    kind = padding or ("blocks" if network.wish.task.shape == "decoder" else "none")
    if kind == "max" and tokenizer.pad_token_id is None:
        raise InputError(f"The tokenizer of {network.folder.name} has no token for padding. Give --padding none.")
    return Cut(unit=unit or "line", length=size, padding=kind)


def require_tokenizer(network: Network) -> Any:
    """The folder's tokenizer.

    Raises:
        InputError: it has none.
    """
    if network.tokenizer is None:
        raise InputError(
            f"{network.folder.name} has no tokenizer that transformers can load, so --text cannot be read. Save it "
            "there (tokenizer.json, tokenizer_config.json), or give token ids with --data."
        )
    return network.tokenizer


def token_ids(network: Network, path: Path, cut: Cut) -> tuple[list[Ids], int]:
    """(tokens,) of each sample that differs from all others, and how many were cut off; padding is not in them.

    Raises:
        InputError: the text is missing or too short.
    """
    tokenizer = require_tokenizer(network)
    if cut.padding == "blocks":
        found = _blocks(tokenizer, text_of(path)[:LONGEST_TEXT], cut.length)
        if not found:
            raise InputError(
                f"{path} has fewer than {cut.length} tokens, which one sample has. Give a longer text, a smaller "
                "--max-length, or --padding none."
            )
        return _different(found), 0
    read = pieces(path, cut.unit)[:MOST]
    whole = [np.asarray(ids, np.int64) for ids in tokenizer(read, truncation=False, verbose=False)["input_ids"]]
    short = tokenizer(read, truncation=True, max_length=cut.length, verbose=False)["input_ids"]
    long = sum(len(ids) > cut.length for ids in whole)
    return _different([np.asarray(ids, np.int64) for ids in short if len(ids) > 1]), long


def text_sample(network: Network, ids: Ids, cut: Cut, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The inputs of one sample, (1, tokens), of these names."""
    fill = cut.length - len(ids) if cut.padding == "max" else 0
    tokenizer = network.tokenizer
    left = getattr(tokenizer, "padding_side", "right") == "left"
    around = (fill, 0) if left else (0, fill)
    made = {
        "input_ids": np.pad(ids, around, constant_values=tokenizer.pad_token_id if fill else 0),
        "attention_mask": np.pad(np.ones_like(ids), around),
        "token_type_ids": np.zeros(len(ids) + fill, np.int64),
    }
    return {name: made[name][None] for name in names if name in made}


def _blocks(tokenizer: Any, text: str, length: int) -> list[Ids]:
    """Blocks of one length, of the whole text's tokens; each begins as the tokenizer begins a text."""
    start = [i for i in tokenizer("", verbose=False)["input_ids"] if i == tokenizer.bos_token_id][:1]
    size = length - len(start)
    ids: list[int] = []
    for at in range(0, len(text), 1 << 16):  # tokenizers are slow on one long text
        ids += tokenizer(text[at : at + (1 << 16)], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= MOST * size:
            break
    return [np.asarray([*start, *ids[at : at + size]], np.int64) for at in range(0, len(ids) - size + 1, size)]


def _different(found: list[Ids]) -> list[Ids]:
    return list({ids.tobytes(): ids for ids in found}.values())
