"""`torch:package.module:factory` and `x.pt2`: a module that the user's own code makes, or a saved ExportedProgram."""

from __future__ import annotations

from qdq.frontend.origin import Origin


def factory_of(text: str) -> Origin:
    """The module that `factory()` of `package.module` returns, or (module, example inputs).

    The current folder is searched first, as by `python -m`.

    Raises:
        InputError: no such module or callable, it fails, or it gives no module; a package that is missing is named.
        MissingRuntimeError: torch is not installed.
    """
    raise NotImplementedError


def program_of(text: str) -> Origin:
    """The ExportedProgram of a file that `torch.export.save` wrote.

    Raises:
        InputError: no such file, or it is none.
        MissingRuntimeError: torch is not installed.
    """
    raise NotImplementedError
