"""The commands and the blocks of code of README.md."""

from __future__ import annotations

import re

from places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of README.md in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The `qdq` commands of README.md, in order."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("qdq ")]


def of_torch(text: str) -> bool:
    """Whether a block or a command needs torch: `test_readme_torch.py` runs it."""
    return "torch" in text
