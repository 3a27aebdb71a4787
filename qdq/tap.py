"""Run a float model in ONNX Runtime and see the tensors inside it.

Model + tensor names -> Tap -> for each sample a mapping of tensor name to array.
This module must not keep a sample or an activation, and must not write files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, helper

from qdq.errors import InputError, MissingRuntimeError
from qdq.graph import Model

Sample = Mapping[str, npt.NDArray[Any]]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Tap:
    """An ONNX Runtime session of a model whose outputs are the wanted tensors, and nothing else.

    Invariants: tensors that are graph inputs come from the sample itself; only what the wanted tensors need is computed.
    """

    def __init__(self, model: Model, tensors: Iterable[str], *, provider: str = "cpu", custom_ops: Sequence[str] = ()) -> None:
        """Create the session.

        Args:
            model: prepared float model.
            tensors: names of float tensors in it.
            provider: "cpu" or "cuda".
            custom_ops: paths of ONNX Runtime custom operator libraries.

        Raises:
            MissingRuntimeError: onnxruntime or the provider is missing.
            InputError: onnxruntime refuses the model.
        """
        try:
            import onnxruntime as ort
        except ImportError:
            raise MissingRuntimeError(
                "Calibration runs the float model in ONNX Runtime, which is not installed. Install it with: pip install 'qdq[cpu]'"
            ) from None
        if PROVIDERS[provider] not in ort.get_available_providers():
            raise MissingRuntimeError(
                f"ONNX Runtime {ort.__version__} here has no {PROVIDERS[provider]}; it has {', '.join(ort.get_available_providers())}. Install it with: pip install 'qdq[gpu]', or use the CPU."
            )
        fed = {i.name for i in model.inputs}
        self._given = [t for t in dict.fromkeys(tensors) if t in fed]
        self._computed = [t for t in dict.fromkeys(tensors) if t not in fed]
        self._session = None
        if not self._computed:
            return
        state = vars(ort.capi.onnxruntime_pybind11_state)  # ONNX Runtime's exceptions share no base but Exception
        own = [t for t in state.values() if isinstance(t, type) and issubclass(t, Exception)]
        self._refusals: tuple[type[Exception], ...] = (RuntimeError, ValueError, *own)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.directory))
        try:
            for library in custom_ops:
                options.register_custom_ops_library(library)
            self._session = ort.InferenceSession(
                _with_outputs(model, self._computed).SerializeToString(), options, providers=[PROVIDERS[provider]]
            )
        except self._refusals as error:
            raise _refused(error) from None
        self._inputs = [i.name for i in self._session.get_inputs()]

    def __call__(self, sample: Sample) -> dict[str, npt.NDArray[np.floating]]:
        """Run one sample.

        Args:
            sample: input name -> array, as the model's inputs demand.

        Returns:
            Wanted tensor name -> array in the tensor's own float type.

        Raises:
            InputError: onnxruntime cannot run the model on the sample.
        """
        seen: dict[str, npt.NDArray[np.floating]] = {t: np.asarray(sample[t]) for t in self._given}
        if self._session is not None:
            try:
                values = self._session.run(self._computed, {name: sample[name] for name in self._inputs})
            except self._refusals as error:
                raise _refused(error) from None
            seen.update(zip(self._computed, values, strict=True))
        return seen


def _refused(error: Exception) -> InputError:
    return InputError(
        f"ONNX Runtime cannot run the float model: {' '.join(str(error).split())[:500]} Check that the model runs by itself on these samples."
    )


def _with_outputs(model: Model, tensors: Sequence[str]) -> ModelProto:
    """A shallow model whose outputs are the tensors; ONNX Runtime prunes what they do not need."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    outputs = list(proto.graph.output)
    del proto.graph.output[:]
    known = {o.name: o for o in outputs}
    for tensor in tensors:
        proto.graph.output.append(known.get(tensor) or helper.make_empty_tensor_value_info(tensor))
    return proto


def counted(samples: Iterable[Sample]) -> Iterator[tuple[int, Sample]]:
    """Number the samples and refuse none at all.

    Raises:
        InputError: there is no sample.
    """
    index = -1
    for index, sample in enumerate(samples):
        yield index, sample
    if index < 0:
        raise InputError("There are no samples: calibration needs at least one. Give --data a folder or file with samples of real inputs.")


def length(samples: Iterable[Sample]) -> int | None:
    """How many samples there are, None where only counting would tell."""
    try:
        return len(samples)  # type: ignore[arg-type]
    except TypeError:
        return None
