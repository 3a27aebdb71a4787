"""Run a model in ONNX Runtime and see the tensors inside it.

Model + tensor names -> Session -> for each sample tensor name -> array; `overlapped` runs several at a time.
A model with much external data is run in `partitioned`, so that its weights are never in memory together.
A session runs each sample on `threads` threads: with one, a value depends on the sample alone, whatever the machine's
cores or the samples beside it (on more, ONNX Runtime splits small products differently and the last bits change).
This module must not keep a sample or an activation, and must not write files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, helper

from engines.core.fp4 import holds_fp4, runnable
from engines.core.onnx_runtime import give_weights, open_session, refusals, register_library, session_options, trim
from qdq.core.errors import InputError, MissingRuntimeError
from qdq.core.resources import given_bytes
from qdq.measure.inference.inside import gathered, joined
from qdq.measure.inference.partitioned import PartitionedSession
from qdq.measure.inference.samples import Sample
from qdq.model.external import is_large
from qdq.model.model import Model
from qdq.model.nodes import needed

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_LIBRARIES: ContextVar[tuple[str, ...]] = ContextVar("custom operator libraries", default=())


@contextmanager
def registered(libraries: Sequence[str]) -> Iterator[None]:
    """Every session made inside, by whichever stage, registers the custom operator libraries of these paths."""
    token = _LIBRARIES.set((*_LIBRARIES.get(), *map(str, libraries)))
    try:
        yield
    finally:
        _LIBRARIES.reset(token)


def libraries() -> tuple[str, ...]:
    """The paths that `registered` gave."""
    return _LIBRARIES.get()


class Session:
    """An ONNX Runtime session of a model whose outputs are the wanted tensors, and nothing else.

    Invariants: tensors that are graph inputs come from the sample itself; only what the wanted tensors need is
    computed; may be called from several threads at once.
    """

    def __init__(
        self,
        model: Model,
        tensors: Iterable[str],
        *,
        provider: str = "cpu",
        custom_ops: Sequence[str] = (),
        threads: int = 0,
        in_order: bool = False,
        called: str = "the float model",
    ) -> None:
        """Create the session.

        Args:
            model: prepared float model.
            tensors: names of float tensors in it.
            provider: "cpu" or "cuda".
            custom_ops: paths of ONNX Runtime custom operator libraries, besides those of `registered`.
            threads: inside one operator; 0 lets ONNX Runtime choose.
            in_order: run each node as early as the order of the nodes has it. ONNX Runtime would run what makes outputs
                of the graph as late as it can, and keep all that these read until then.
            called: what messages call the model.

        Raises:
            MissingRuntimeError: onnxruntime or the provider is missing.
            InputError: onnxruntime refuses the model or a library.
        """
        try:
            import onnxruntime as ort
        except ImportError:
            raise MissingRuntimeError(
                "Calibration runs the float model in ONNX Runtime, which is not installed. Install it with: "
                "pip install 'qdq[cpu]'"
            ) from None
        if provider not in PROVIDERS:
            raise InputError(f"Unknown provider {provider!r}: it must be one of {', '.join(PROVIDERS)}.")
        if PROVIDERS[provider] not in ort.get_available_providers():
            raise MissingRuntimeError(
                f"ONNX Runtime {ort.__version__} here has no {PROVIDERS[provider]}; it has "
                f"{', '.join(ort.get_available_providers())}. Install it with: pip install 'qdq[gpu]', or use the CPU."
            )
        fed = {i.name for i in model.inputs}
        self._given = [t for t in dict.fromkeys(tensors) if t in fed]
        wanted = [t for t in dict.fromkeys(tensors) if t not in fed]
        model, self._sequences = gathered(model, [t for t in wanted if t in model.inner_tensors])
        self._wanted, self._computed = wanted, [self._sequences.get(t, t) for t in wanted]
        self._failures = refusals()
        self._called = called
        self._session: Any = None
        if not self._computed:
            return
        fp4 = holds_fp4(model.proto)
        libraries = dict.fromkeys([*_LIBRARIES.get(), *map(str, custom_ops)])

        def start(proto: bytes, weights: Mapping[str, npt.NDArray[Any]], folder: Path) -> tuple[Any, object]:
            options = self._options(libraries, threads)
            if in_order:
                options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            given = give_weights(options, weights, folder)
            if fp4:
                proto = runnable(ModelProto.FromString(proto), folder).SerializeToString()
            opened = open_session(proto, options, [PROVIDERS[provider]])
            if given_bytes() is not None:
                trim()  # what its optimizers have left
            return opened, given

        if provider == "cpu" and is_large(model.graph.initializer):
            self._session = PartitionedSession(model, self._computed, start)
            self._inputs = list(self._session.inputs)
            return
        try:
            self._session, _ = start(_with_outputs(model, self._computed).SerializeToString(), {}, model.directory)
        except self._failures as error:
            raise _refused(error, self._called) from None
        used = ", ".join(self._session.get_providers())
        if PROVIDERS[provider] not in used:  # its libraries do not load: ONNX Runtime only prints that and goes on
            raise MissingRuntimeError(
                f"ONNX Runtime {ort.__version__} could not start {PROVIDERS[provider]} and would use {used}. "
                "Install the CUDA and cuDNN libraries it was built for (`qdq doctor` says more), or use the CPU."
            )
        self._inputs = [i.name for i in self._session.get_inputs()]

    def _options(self, libraries: Iterable[str], threads: int) -> Any:
        """What every session has; each tensor is given back at its last reader where there is a budget to keep.

        Else ONNX Runtime holds a tensor's memory for a later one of the same size, which saves up to 40 % of the time.
        """
        options = session_options(threads=threads, severity=4)
        options.enable_mem_reuse = given_bytes() is None
        if given_bytes() is not None:
            trim()
        for library in libraries:
            try:
                register_library(options, library)
            except self._failures as error:
                raise InputError(
                    f"ONNX Runtime cannot load the custom operators of {library}: {' '.join(str(error).split())[:300]} "
                    "Give a shared library that exports RegisterCustomOps and was built for this system."
                ) from None
        return options

    def __call__(self, sample: Sample) -> dict[str, npt.NDArray[np.floating]]:
        """Run one sample, input name -> array: wanted tensor name -> array in the tensor's own float type.

        A tensor in a body has its values of all runs (`inside.joined`), and is left out where no run reached it.

        Raises:
            InputError: onnxruntime cannot run the model on the sample.
        """
        seen: dict[str, npt.NDArray[np.floating]] = {t: np.asarray(sample[t]) for t in self._given}
        if self._session is not None:
            try:
                values = self._session.run(self._computed, {name: sample[name] for name in self._inputs})
            except self._failures as error:
                raise _refused(error, self._called) from None
            seen.update(zip(self._wanted, values, strict=True))
        for name in self._sequences:
            whole = joined(list(seen.pop(name)))
            seen.update({} if whole is None else {name: whole})
        return seen


_UNLIKE = "Inconsistent shape in loop output"  # ONNX Runtime's words where the turns of a Loop give unlike elements
_PADDED = (
    "What the turns of that Loop make has several shapes, and is stacked here, for the compiler has no sequences: let "
    "every turn make elements of one shape (pad them), and export the model again."
)


def _refused(error: Exception, called: str) -> InputError:
    said = " ".join(str(error).split())
    fix = _PADDED if _UNLIKE in said else "Check that the model runs by itself on these samples."
    return InputError(f"ONNX Runtime cannot run {called}: {said[:500]} {fix}")


def _with_outputs(model: Model, tensors: Sequence[str]) -> ModelProto:
    """A shallow model whose outputs are the tensors, without the nodes that they do not need: ONNX Runtime runs all."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    nodes = needed(model.graph.node, tensors)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    known = {o.name: o for o in model.graph.output}
    del proto.graph.output[:]
    proto.graph.output.extend(known.get(t) or helper.make_empty_tensor_value_info(t) for t in tensors)
    return proto
