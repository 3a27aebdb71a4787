"""`torch:package.module:factory` and `x.pt2`: a module that the user's own code makes, or a saved ExportedProgram."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib_data import DataError
from calib_data.users_code import object_of
from qdq.core.errors import InputError
from qdq.frontend.examples import of_data, of_shapes
from qdq.frontend.export import export_torch
from qdq.frontend.exported import Exported
from qdq.frontend.origin import Origin, Wanted
from qdq.frontend.pytorch.call import accepted_names, parameter_names
from qdq.frontend.pytorch.job import called_with
from qdq.frontend.pytorch.libraries import quiet, torch_here
from qdq.frontend.pytorch.programs import program_in
from qdq.frontend.pytorch.refused import why
from qdq.frontend.pytorch.state import unwrapped

FORM = "torch:package.module:factory"
RETURNS = "It must be callable without arguments and return a torch.nn.Module."


@dataclass(frozen=True, slots=True, kw_only=True)
class FromTorch:
    """A module, or an ExportedProgram, in memory.

    Attributes:
        module: it.
        example: inputs that came with it; None where none did.
        stem: as of `Origin`.
        source: what messages and records call it.
    """

    module: Any
    example: Any
    stem: str
    source: str

    def export(self, path: Path, wanted: Wanted) -> Exported:
        """As of `Origin`."""
        return export_torch(
            self.module,
            self._example(wanted),
            path,
            dynamic=wanted.dynamic,
            opset=wanted.opset,
            samples=wanted.samples or (),
            tolerance=wanted.tolerance,
            source=self.source,
        )

    def _example(self, wanted: Wanted) -> Any:
        """What came with the module; else the first candidate that it runs on.

        Raises:
            InputError: there is none, or it runs on none.
        """
        if self.example is not None or isinstance(self.module, torch_here().export.ExportedProgram):
            return self.example
        module = unwrapped(self.module, self.source)
        needed, any_name = parameter_names(module)
        if wanted.data is not None:
            found = list(of_data(wanted.data, wanted.volume, needed, None if any_name else accepted_names(module)))
        elif wanted.shapes:
            found = list(of_shapes(wanted.shapes))
        else:
            raise InputError(
                f"{self.source} has no example inputs: give --data, whose first sample is taken, or "
                f"--shape {needed[0] if needed else 'input'}:1x3x224x224, or let the factory return "
                "(module, example_inputs)."
            )
        refused: list[Exception] = []
        for example in found:
            try:
                called_with(module, example)
            except (InputError, MemoryError):
                raise
            except Exception as error:  # whatever the user's module raises
                refused.append(error)
                continue
            return example
        shown = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in found[0].items())
        found_of = why(refused[0])
        other = (
            "Give samples as the module gets them, or example inputs: a factory that returns (module, example_inputs)."
        )
        raise InputError(
            f"{self.source} does not run on the first sample ({shown}): {found_of.says}. {found_of.fix or other}"
        )


def factory_of(text: str) -> Origin:
    """The module that `factory()` of `package.module` returns, or (module, example inputs).

    The current folder is searched first, as by `python -m`. What is found may be a module itself, too.

    Raises:
        InputError: no such module or callable, it fails, or it gives no module; a package that is missing is named.
        MissingRuntimeError: torch is not installed.
    """
    module_name, _, name = text.removeprefix("torch:").partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise InputError(
            f"{text} names no factory: it must look like {FORM}, with Python's names of a module and in it."
        )
    torch = torch_here()
    found = _named(text)
    if not isinstance(found, torch.nn.Module | torch.export.ExportedProgram):
        if not callable(found):
            raise InputError(
                f"{name} of {module_name} is a {type(found).__name__}: a function that returns a module is needed."
            )
        with _users_code(f"{text} failed"):
            found = found()
    example = None
    if isinstance(found, tuple | list) and len(found) == 2:
        found, example = found
    if not isinstance(found, torch.nn.Module | torch.export.ExportedProgram):
        raise InputError(
            f"{text} returned a {type(found).__name__}; a torch.nn.Module is needed, or (module, example_inputs)."
        )
    if example is None:
        example = getattr(found, "example_input_array", None)  # as Lightning's modules have it
    return FromTorch(module=found, example=example, stem=name.rpartition(".")[2], source=text)


def program_of(text: str) -> Origin:
    """The ExportedProgram of a file that `torch.export.save` wrote.

    Raises:
        InputError: see `program_in`.
        MissingRuntimeError: torch is not installed.
    """
    path = Path(text)
    return FromTorch(module=program_in(path), example=None, stem=path.stem, source=path.name)


def _named(text: str) -> Any:
    """What a module of the user's own calls so."""
    try:
        with quiet():
            return object_of(text.removeprefix("torch:"), text, fix=RETURNS)
    except DataError as error:
        raise InputError(str(error)) from error.__cause__


@contextmanager
def _users_code(doing: str) -> Iterator[None]:
    """Run what the user wrote; whatever it raises, `sys.exit` too, becomes an InputError that says what and where."""
    try:
        with quiet():
            yield
    except (InputError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        found = why(error)
        fix = found.fix or RETURNS
        raise InputError(f"{doing}: {found.says}. {fix}") from error
