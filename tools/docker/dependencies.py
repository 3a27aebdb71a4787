"""The requirements of a project with some of its extras, one a line: to be installed before its sources are there.

Usage: python3 dependencies.py pyproject.toml EXTRA[,EXTRA...]
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def requirements(project: dict, extras: list[str]) -> list[str]:
    """The requirements, those of extras that an extra names among them.

    Raises:
        KeyError: there is no such extra.
    """
    found = list(project["dependencies"])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{re.escape(project['name'])}\[([\w,-]+)\]", line.replace(" ", ""))
            found += requirements({**project, "dependencies": []}, own[1].split(",")) if own else [line]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    file, wanted = sys.argv[1:]
    project = tomllib.loads(Path(file).read_text(encoding="utf-8"))["project"]
    print("\n".join(requirements(project, [name for name in wanted.split(",") if name])))
