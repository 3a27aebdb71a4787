"""A service on this machine's own address: a NIfTI image in, its segmentation out, by what `qdq deploy` wrote.

    python tools/service/serve.py build/ --port 8000
    curl -F image=@scan.nii.gz http://127.0.0.1:8000/segment -o labels.nii.gz
    curl http://127.0.0.1:8000/health

POST /segment, field image -> a temporary file -> `Predictor.segment` in a thread, a few at once -> labels as .nii.gz.
What is wrong gives {"error": one paragraph} with 4xx, and leaves nothing behind. It asks nobody who they are: it is for
programs of this machine, and a gateway of yours stands before it for others. Must not log a name of a file, or a value
of a header.

Needs pip install 'qdq[cpu,medical,service]'.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import shutil
import socket
import sys
import time
import traceback
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import uvicorn
from fastapi import FastAPI, File, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteError
from starlette.middleware.trustedhost import TrustedHostMiddleware

import engines
from calib_data.extras import need
from calib_data.validation import DataError
from calib_data.volumes.case import told
from engines.core.documents import byte_count
from engines.core.files import Scratch
from engines.core.onnx_runtime import trim
from qdq.core.errors import QdqError

LOG = logging.getLogger("service")
PIECE = 1 << 20
GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may ask of the machine.

    Attributes:
        upload_bytes: of a request, all of it.
        voxels: of an image, all channels, by its header.
        at_once: images that are segmented at the same time.
        waiting: requests that may wait for their turn; more are sent away with 503.
    """

    upload_bytes: int = 512 << 20
    voxels: int = 512**3
    at_once: int = 1
    waiting: int = 16


class Guard:
    """An ASGI application behind limits on how many requests there are and how large one is."""

    def __init__(self, app: Any, limits: Limits) -> None:
        """Around an application."""
        self._app, self._limits, self.inside = app, limits, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request; the body is counted as it arrives."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        limits = self._limits
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit() or int(length) > limits.upload_bytes:
            await _too_large(limits)(scope, receive, send)
            return
        if self.inside >= limits.at_once + limits.waiting:
            busy = f"{self.inside} requests are here already: try again in a few seconds."
            await JSONResponse({"error": busy}, 503, {"Retry-After": "5"})(scope, receive, send)
            return
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limits.upload_bytes:
                raise HTTPException(413, _too_large_text(limits))
            return message

        self.inside += 1
        try:
            await self._app(scope, counted, send)
        finally:
            self.inside -= 1


def create_app(model: engines.Predictor, limits: Limits | None = None) -> FastAPI:
    """The service of an opened model; at its end it closes the model."""
    limits = limits or Limits()
    turns = asyncio.Semaphore(limits.at_once)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        seconds = await asyncio.to_thread(model.warm_up)
        LOG.info("%s on %s, warm after %.1f s", model.name, model.title, seconds)
        yield
        await asyncio.to_thread(model.close)
        LOG.info("closed")

    app = FastAPI(title="Segmentation", lifespan=life, docs_url=None, redoc_url=None)
    described = {"status": "ok", **model.describe()}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """What runs, and where."""
        return described

    @app.post("/segment")
    async def segment(image: Annotated[UploadFile, File(description="a NIfTI image")]) -> Response:
        """The labels of an image on its own grid, with the names of structures in a comment and in a header."""
        async with turns:
            content, names, said = await asyncio.to_thread(_segmented, model, image.file, limits)
        LOG.info("segmented %s", said)
        headers = {
            "Content-Disposition": 'attachment; filename="labels.nii.gz"',
            "X-Structures": json.dumps(names),
        }
        return Response(content, media_type="application/gzip", headers=headers)

    @app.exception_handler(RequestValidationError)
    async def no_field(_: Request, error: RequestValidationError) -> Response:
        return _refused(422, "There is no file in the field image: send one, as curl -F image=@scan.nii.gz does.")

    @app.exception_handler(StarletteError)
    async def refused(_: Request, error: StarletteError) -> Response:
        return _refused(error.status_code, str(error.detail))

    app.add_middleware(Guard, limits=limits)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "testserver"])
    return app


def _segmented(model: engines.Predictor, file: BinaryIO, limits: Limits) -> tuple[bytes, Any, str]:
    """Labels as a file, names of structures, and a line for the log.

    Raises:
        HTTPException: the image is refused, or memory is short, or there is a fault of ours.
    """
    began = time.perf_counter()
    try:
        with Scratch() as folder:
            packed = file.read(2) == GZIP
            file.seek(0)
            path = folder / ("image.nii.gz" if packed else "image.nii")
            with path.open("wb") as copy:
                shutil.copyfileobj(file, copy, PIECE)
            _check_size(path, limits)
            found = model.segment(path)
        content = found.to_bytes()
        size = "x".join(map(str, found.array.shape))
        return content, found.names, f"{size} voxels in {time.perf_counter() - began:.2f} s"
    except engines.OutOfMemoryError as error:
        raise HTTPException(503, str(error)) from None
    except (QdqError, DataError, engines.EngineError) as error:
        LOG.info("refused: %s", type(error).__name__)
        raise HTTPException(422, str(error)) from None
    except HTTPException:
        raise
    except Exception as error:  # what it says may quote the file
        LOG.error("fault: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        raise HTTPException(500, "A fault of the service; its log says where.") from None
    finally:
        trim()


def _check_size(path: Path, limits: Limits) -> None:
    """Refuse what is no NIfTI image, or one too large, before its voxels are read.

    Raises:
        DataError: it is none.
        HTTPException: it is too large.
    """
    nibabel = need("nibabel", install="qdq[medical]", for_what="A NIfTI image")
    with told("the image"):
        shape = nibabel.load(path).shape
    if math.prod(shape) > limits.voxels:
        raise HTTPException(
            413, f"The image has {'x'.join(map(str, shape))} voxels by its header; at most {limits.voxels} are taken."
        )


def _refused(code: int, why: str) -> Response:
    return JSONResponse({"error": why}, code)


def _too_large_text(limits: Limits) -> str:
    return f"The request is too large: at most {limits.upload_bytes} bytes are taken, and it must say how many it has."


def _too_large(limits: Limits) -> Response:
    return _refused(413, _too_large_text(limits))


def main() -> None:
    """Serve until SIGTERM or Ctrl-C; requests that run are finished first."""
    parser = argparse.ArgumentParser(description="Serve what qdq deploy wrote: NIfTI in, labels out.")
    parser.add_argument("path", type=Path, help="folder of qdq deploy, an engine, or a Q/DQ model")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1; 0 takes a free one and prints it")
    parser.add_argument("--on", choices=("auto", "gpu", "cpu"), default="auto", help="as engines.open has it")
    parser.add_argument("--max-upload", default="512M", help="bytes of a request, such as 512M (default)")
    parser.add_argument("--max-voxels", type=int, default=Limits().voxels, help="of an image (default 512^3)")
    parser.add_argument("--at-once", type=int, default=1, help="images segmented at the same time (default 1)")
    parser.add_argument("--waiting", type=int, default=16, help="requests that wait for their turn (default 16)")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        limits = Limits(
            upload_bytes=byte_count(given.max_upload),
            voxels=given.max_voxels,
            at_once=max(given.at_once, 1),
            waiting=max(given.waiting, 0),
        )
        model = engines.open(given.path, on=given.on)
        listening = socket.create_server(("127.0.0.1", given.port))
    except ValueError:
        sys.exit(f"--max-upload {given.max_upload} is no size such as 800M or 2G.")
    except (engines.EngineError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
    server = uvicorn.Server(
        uvicorn.Config(create_app(model, limits), log_config=None, access_log=False, timeout_graceful_shutdown=60)
    )
    print(f"Serving on http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    server.run(sockets=[listening])


if __name__ == "__main__":
    main()
