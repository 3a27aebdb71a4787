"""A module as a function of tensors in a row, whatever its `forward` takes and returns.

example inputs, signature -> `call_of` -> `Call`: names, tensors, and how arguments are made of them again.
what `forward` returned -> `named_tensors` -> name and tensor of each output.
Must not run the module.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qdq.core.errors import InputError
from qdq.frontend.pytorch.libraries import torch_here

SHOWN = 60  # characters of a value in a note


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a tensor, by its number, in arguments whose other values are fixed."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The tensors that a module takes.

    Attributes:
        names: of each.
        tensors: of the example.
        arguments: with a `Slot` in place of each tensor.
        notes: what is fixed or left out.
    """

    names: tuple[str, ...]
    tensors: tuple[Any, ...]
    arguments: inspect.BoundArguments
    notes: tuple[str, ...]

    def filled(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments with these tensors."""
        args = tuple(_filled(value, tensors) for value in self.arguments.args)
        return args, {name: _filled(value, tensors) for name, value in self.arguments.kwargs.items()}


def call_of(module: Any, example: Any, names: Sequence[str], label: str, *, by_name: Collection[str] = ()) -> Call:
    """How an example calls a module.

    Args:
        module: whose `forward` is called.
        example: a tensor or array, a tuple or list of arguments by position, or a mapping by name.
        names: in place of those of the signature; empty: those.
        label: what messages call the module.
        by_name: parameters that it takes by name alone, though its signature does not say so.

    Raises:
        InputError: the example does not fit `forward`, holds no tensor, or there are not as many names as tensors.
    """
    signature = _signature(module)
    if by_name:
        only = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=only) if n in by_name else p for n, p in signature.parameters.items()]
        signature = signature.replace(parameters=parameters)
    args, kwargs = _given(example)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"The example inputs do not fit {label}: {error}; its forward takes {_shown(signature)}. Give a tuple of "
            "the arguments by position, or a dict by name."
        ) from None
    tensors: list[Any] = []
    found: list[str] = []
    fixed: list[str] = []
    for name, value in list(bound.arguments.items()):
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = {k: _slots(v, k, tensors, found, fixed) for k, v in value.items()}
        else:
            bound.arguments[name] = _slots(value, name, tensors, found, fixed)
    if not tensors:
        raise InputError(f"The example inputs of {label} hold no tensor; its forward takes {_shown(signature)}.")
    if names and len(names) != len(found):
        raise InputError(
            f"{len(names)} input names are given for {label}, and its example holds {len(found)} tensors: "
            f"{', '.join(found)}. Give as many names."
        )
    left = [n for n, p in signature.parameters.items() if n not in bound.arguments and p.default is not p.empty]
    notes = [f"Fixed in the file, as in the example: {', '.join(fixed)}."] if fixed else []
    if left:
        notes.append(f"Not inputs of the file, for the example does not give them: {', '.join(left)}.")
    return Call(names=_distinct(names or found), tensors=tuple(tensors), arguments=bound, notes=tuple(notes))


def one_call(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Arguments by position and by name as one example that `call_of` takes."""
    return {**dict(zip(_signature(module).parameters, args, strict=False)), **kwargs} if kwargs else tuple(args)


def parameter_names(module: Any) -> tuple[list[str], bool]:
    """Names that `forward` needs, or where it needs none those that it takes; and whether it takes any name."""
    kinds = inspect.Parameter
    parameters = list(_signature(module).parameters.values())
    plain = [p for p in parameters if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    needed = [p.name for p in plain if p.default is p.empty]
    return needed or [p.name for p in plain], any(p.kind is kinds.VAR_KEYWORD for p in parameters)


def accepted_names(module: Any) -> list[str]:
    """All names that `forward` declares."""
    return list(_signature(module).parameters)


def named_tensors(returned: Any, label: str) -> tuple[list[tuple[str, Any]], list[str]]:
    """Name and tensor of each output, in order; and the names of what is no tensor, which a file cannot give.

    Raises:
        InputError: an object is returned that is no tuple, list, mapping or dataclass of tensors; or no tensor is.
    """
    outputs: list[tuple[str, Any]] = []
    dropped: list[str] = []
    for name, value in _leaves(returned, ""):
        if isinstance(value, torch_here().Tensor):
            outputs.append((name or "output", value))
        elif value is None:
            continue
        elif isinstance(value, bool | int | float | str):
            dropped.append(name or "output")
        else:
            raise InputError(
                f"{label} returns a {type(value).__name__}{f' as {name!r}' if name else ''}, which no ONNX file can "
                "give. Wrap the module in one whose forward returns tensors, in a tuple, a dict or a dataclass."
            )
    if not outputs:
        raise InputError(f"{label} returns no tensor: {type(returned).__name__}. Return what the network computes.")
    return outputs, dropped


def distinct_outputs(names: Iterable[str], inputs: Iterable[str]) -> tuple[str, ...]:
    """Output names that are those of no input, as ONNX wants, and of no other output."""
    taken = set(inputs)
    return _distinct([f"{name}_out" if name in taken else name for name in names])


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    inner: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, tuple | list):
        fields = getattr(value, "_fields", None)
        words = fields or [str(i) if name else f"output_{i}" for i in range(len(value))]
        if len(value) == 1 and not fields and not name:  # (logits,): as one tensor
            words = [""]
        inner = zip(words, value, strict=True)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    else:
        yield name, value
        return
    for key, item in inner:
        yield from _leaves(item, "_".join(filter(None, (name, "_".join(str(key).split())))))


def _slots(value: Any, name: str, tensors: list[Any], names: list[str], fixed: list[str]) -> Any:
    """The value with a `Slot` for each tensor in it; collects them, their names, and what is fixed."""
    torch = torch_here()
    if isinstance(value, np.ndarray | np.generic):
        value = torch.from_numpy(np.array(value))  # a copy: it may be read only
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach())
        names.append(name)
        return Slot(len(tensors) - 1)
    if isinstance(value, tuple | list):
        made = [_slots(item, f"{name}_{i}", tensors, names, fixed) for i, item in enumerate(value)]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, Mapping):
        return {key: _slots(item, f"{name}_{key}", tensors, names, fixed) for key, item in value.items()}
    if value is not None:
        shown = repr(value)
        fixed.append(f"{name}={shown if len(shown) <= SHOWN else type(value).__name__}")
    return value


def _filled(value: Any, tensors: Sequence[Any]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.number]
    if isinstance(value, tuple | list):
        made = [_filled(item, tensors) for item in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict):
        return {key: _filled(item, tensors) for key, item in value.items()}
    return value


def _given(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as positional and named arguments."""
    if isinstance(example, Mapping):
        return (), {str(name): value for name, value in example.items()}
    return (tuple(example), {}) if isinstance(example, tuple | list) else ((example,), {})


def _signature(module: Any) -> inspect.Signature:
    """Of `forward`; of a ScriptModule, which has none in Python, from its schema."""
    schema = getattr(module.forward, "schema", None)
    if schema is None:
        return inspect.signature(module.forward)
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return inspect.Signature(
        [
            inspect.Parameter(a.name, kind, default=a.default_value if a.has_default_value() else empty)
            for a in schema.arguments[1:]
        ]
    )


def _shown(signature: inspect.Signature) -> str:
    """A signature without annotations."""
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    """The names, those that are there before with a number behind."""
    found: dict[str, None] = {}
    for name in names:
        number, free = 0, name
        while free in found:
            number, free = number + 1, f"{name}_{number + 1}"
        found[free] = None
    return tuple(found)
