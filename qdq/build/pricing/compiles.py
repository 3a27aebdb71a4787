"""The compiler under a price: models to the work of their kernels, several at a time, equal graphs only once.

Model -> structure hash -> temporary file -> a worker, or this process -> work of the kernels of each target
A structure is the graph without the values of weights, on which no kernel depends. It must not price.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from onnx import TensorProto

from engines.backends.backend import backend_named
from engines.backends.compiler import ShapeRange
from engines.core.errors import BuildError, import_runtime
from engines.core.files import Scratch
from qdq.build.engine import compile_engine
from qdq.build.pricing.processes import Job, Workers, Works, works_of
from qdq.build.recipe import Recipe
from qdq.core.disk.cache import keep, recalled
from qdq.core.resources import cores
from qdq.model.model import Model
from qdq.model.nodes import captured, without_initializers
from qdq.model.storage import save

MOST_WORKERS = 4  # compilers at a time: each needs some hundred MB
SLOW_S = 0.2  # a compile that takes longer is worth a process
LARGE = 300  # nodes of a model that is taken to compile as long
SMALL = 64  # elements up to which a constant may be an argument, such as a shape or an axis


@dataclass(slots=True)
class Compiles:
    """Compiles models for targets at fixed shapes.

    Attributes:
        backend: that compiles.
        targets: that it compiles for.
        shapes: of each input; the usual one is taken.
        failure: the compiler's last refusal.
    """

    backend: str
    targets: tuple[str, ...]
    shapes: Mapping[str, ShapeRange]
    failure: BuildError | None = None
    _workers: Workers | None = None
    _slow: bool = False
    _place: Path = Path()
    _begun: dict[str, Future[Works | BuildError]] = field(default_factory=dict)

    def __call__(self, models: Mapping[str, Model]) -> list[Works | BuildError]:
        """The work of each, or why it does not compile; by keys that can be names of files.

        A refusal may be of the machine, not of the model, and is not kept for another run.
        """
        known = {key: works for key in models if (works := recalled("works", (key,), _decode)) is not None}
        unknown = {key: model for key, model in models.items() if key not in known}
        answers = dict(zip(unknown, self._compiled(unknown), strict=True))
        for key, answer in answers.items():
            if not isinstance(answer, BuildError):
                keep("works", (key,), {"works": msgspec.msgpack.encode(answer)})
        return [known[key] if key in known else answers[key] for key in models]

    def begin(self, key: str, model: Model) -> None:
        """Compile a model beside what follows, in a process of its own; does nothing where there are none yet."""
        if self._workers and self._slow and key not in self._begun and recalled("works", (key,), _decode) is None:
            folder = self._place / key
            future = self._begun[key] = self._workers.begin(self._job(model, folder))
            future.add_done_callback(lambda _: shutil.rmtree(folder))

    def _compiled(self, models: Mapping[str, Model]) -> list[Works | BuildError]:
        begun = {key: self._begun.pop(key) for key in models if key in self._begun}
        new = {key: model for key, model in models.items() if key not in begun}
        answers = dict(zip(new, self._at_once(new), strict=True))
        answers |= {key: future.result() for key, future in begun.items()}
        self.failure = next((a for a in reversed(answers.values()) if isinstance(a, BuildError)), self.failure)
        return [answers[key] for key in models]

    def _at_once(self, models: Mapping[str, Model]) -> list[Works | BuildError]:
        if not models:
            return []
        self._slow = self._slow or (len(models) > 1 and max(len(m.graph.node) for m in models.values()) > LARGE)
        with Scratch() as folder:
            jobs = [self._job(model, folder / key) for key, model in models.items()]
            if self._workers and self._slow:
                answers = self._workers(jobs)
            else:
                began = time.monotonic()
                answers = [_here(job) for job in jobs]
                self._slow = self._slow or time.monotonic() - began > SLOW_S * max(len(jobs), 1)
        return answers

    def refusal(self, model: Model) -> BuildError:
        """Why a model does not compile, with the node that the compiler refuses; the last refusal, if it does."""
        with Scratch() as folder:
            job = self._job(model, folder / "refused")
            try:
                compile_engine(job.path, recipe=Recipe().compiled_by(self.backend, self.targets), shapes=job.shapes)
            except BuildError as error:
                return error
        return self.failure or BuildError("No way to write the model compiles.")

    @property
    def width(self) -> int:
        """How many models are best compiled at a time."""
        return self._workers.count if self._workers and self._slow else 1

    @contextmanager
    def parallel(self) -> Iterator[None]:
        """Inside, models that take long to compile are compiled in processes of their own, one per core."""
        workers = self._workers = Workers(min(cores(), MOST_WORKERS), self.backend)
        with Scratch() as self._place:
            try:
                yield
            except BaseException:
                workers.close(now=True)
                raise
            else:
                workers.close()
            finally:
                self._workers = None
                self._begun.clear()

    def key(self, model: Model, *others: object) -> str:
        """SHA-256 of the structure, of everything else that its kernels depend on, and of others.

        Constants are called by who reads them first: no kernel depends on their names; layers are named after nodes.
        """
        proto = without_initializers(model.proto)
        inner, called = {name for node in proto.graph.node for name in captured(node)}, dict[str, str]()
        for node in proto.graph.node:
            for index, name in enumerate(node.input):
                if name in model.initializers and name not in inner:
                    node.input[index] = called.setdefault(name, f"constant {len(called)}")
        for tensor in sorted(model.graph.initializer, key=lambda t: called.get(t.name, t.name)):
            weight = math.prod(tensor.dims) > SMALL or tensor.data_type in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)
            light = TensorProto(data_type=tensor.data_type, dims=tensor.dims)
            if not weight:
                light.CopyFrom(tensor)
            light.name = called.get(tensor.name, tensor.name)
            proto.graph.initializer.append(light)
        proto.graph.ClearField("value_info")  # no compiler reads it, nor who made the model
        for said in ("metadata_props", "producer_name", "producer_version", "doc_string"):
            proto.ClearField(said)
        runtime = backend_named(self.backend).runtime
        version = f"{runtime} {import_runtime(runtime).__version__}"
        made = [version, self.targets, sorted((n, repr(s)) for n, s in self.shapes.items()), *others]
        return hashlib.sha256(proto.SerializeToString(deterministic=True) + repr(made).encode()).hexdigest()

    def _job(self, model: Model, folder: Path) -> Job:
        folder.mkdir()
        save(model, folder / "model.onnx")
        fixed = {name: ShapeRange.fixed(shape.opt) for name, shape in self.shapes.items()}
        return Job(path=folder / "model.onnx", targets=self.targets, shapes=fixed, backend=self.backend)


def _decode(parts: dict[str, bytes]) -> Works:
    return msgspec.msgpack.decode(parts["works"], type=Works)


def _here(job: Job) -> Works | BuildError:
    try:
        return works_of(job)
    except BuildError as error:
        return error
