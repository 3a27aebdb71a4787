"""The members of a folder: one file each, found by its name, so that adding one changes no other file.

package -> names, from its files -> a member, whose file is loaded when it is asked for.
It must not know what the members are.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class Members(Mapping[str, T]):
    """File name -> the value that each file of a package defines under one name, in the order of the file names."""

    def __init__(self, package: str, attribute: str) -> None:
        """Say in which package, and what each file calls its value; nothing is loaded yet."""
        self._package, self._attribute = package, attribute

    def __iter__(self) -> Iterator[str]:
        """The names, sorted; loads the package, and no member."""
        package = importlib.import_module(self._package)
        return iter(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))

    def __len__(self) -> int:
        """How many there are."""
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        """Whether there is a file of that name; loads no member."""
        return name in list(self)

    def __getitem__(self, name: str) -> T:
        """The member of a name.

        Raises:
            KeyError: there is none.
        """
        if name not in self:
            raise KeyError(name)
        member: T = getattr(importlib.import_module(f"{self._package}.{name}"), self._attribute)
        return member
