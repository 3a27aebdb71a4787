"""The service as a process of its own: images in, labels out, from eight threads; what is bad leaves nothing behind."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from clinic import AFFINE, classes_of, image, save, thresholds
from image_files import write_nifti
from places import ROOT

import engines
from qdq.cli.main import main

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
for package in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'qdq[service]'")

RECIPE = """
volume: {orientation: RAS, patch: [16, 16, 16]}
window: {patch: [16, 16, 16], overlap: 0.25}
segmentation: {structures: {background: 0, grey: 1, white: 2}}
tune: "off"
"""
SHAPE = (40, 37, 30)
PATIENT = "ROENTGEN_WILHELM"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployed model, and images as files."""
    folder = tmp_path_factory.mktemp("service")
    onnx.save(thresholds(1, 2, batch="n"), folder / "net.onnx")
    (folder / "recipe.yaml").write_text(RECIPE)
    data = save(folder / "data", [image(n, SHAPE) for n in range(2)])
    words = ("--data", data, "--recipe", folder / "recipe.yaml", "--out", folder / "out")
    done = CliRunner().invoke(main, ["deploy", str(folder / "net.onnx"), *map(str, words)])
    assert done.exit_code == 0, done.output
    for n in range(4):
        write_nifti(folder / f"{PATIENT}_{n}.nii.gz", image(n, SHAPE), AFFINE)
    return folder


class Service:
    """The process, and a client of it."""

    def __init__(self, place: Path, *options: str) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="service-", dir=place))
        script = str(ROOT / "tools/service/serve.py")
        self.log = (place / f"{self.temporary.name}.log").open("w+")
        environment = {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        self.process = subprocess.Popen(
            [sys.executable, script, str(place / "out"), "--port", "0", "--on", "cpu", *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert match, self.said()
        self.port = int(match[1])
        for _ in range(300):
            try:
                assert self.ask("GET", "/health").status == 200
                self.own = self.left()  # what libraries make at their start
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.said())

    def left(self) -> set[str]:
        """What lies where it has its temporary files."""
        return {path.name for path in self.temporary.iterdir()}

    def said(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()

    def ask(self, method: str, path: str, body: bytes | Iterator[bytes] = b"", **headers: str) -> Any:
        """Status, headers and content of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        found = SimpleNamespace(status=answer.status, headers=answer.headers, content=answer.read())
        connection.close()
        return found

    def segment(self, content: bytes, *, name: str = "x.nii.gz", field: str = "image") -> Any:
        kind, body = multipart(content, name, field)
        return self.ask("POST", "/segment", body, Content_Type=kind)

    def resident(self) -> int:
        """Bytes of memory that are its own."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)
        assert self.process.stdout
        self.process.stdout.close()
        self.log.close()


def multipart(content: bytes, name: str, field: str) -> tuple[str, bytes]:
    head = f'--edge\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
    return "multipart/form-data; boundary=edge", head.encode() + content + b"\r\n--edge--\r\n"


@pytest.fixture(scope="module")
def service(place: Path) -> Iterator[Service]:
    started = Service(place, "--at-once", "2", "--max-upload", "1Mi", "--max-voxels", "100000")
    yield started
    started.stop()


def bad_files() -> dict[str, tuple[bytes, int, str]]:
    """What is sent -> status, and what the answer says."""
    voxels, infinite = image(0, (8, 8, 8)), image(0, (8, 8, 8))
    infinite[1, 1, 1] = np.inf
    large = nib.Nifti1Image(np.zeros((50, 50, 50), np.uint8), AFFINE)
    two = np.stack([voxels, voxels], -1)
    whole = file_of(voxels)
    return {
        "not an image": (b"hello", 422, "Cannot use the image"),
        "empty": (b"", 422, "Cannot use the image"),
        "cut off": (whole[: len(whole) // 2], 422, "Cannot use the image"),
        "infinite": (file_of(infinite), 422, "1 of its 512 voxels are NaN or infinite"),
        "two channels": (file_of(two), 422, "has 2 channels"),
        "too many voxels": (gzip.compress(large.to_bytes()), 413, "50x50x50 voxels by its header; at most 100000"),
        "too many bytes": (b"x" * (2 << 20), 413, "at most 1048576 bytes"),
        "a few bytes that stand for many": (
            gzip.compress(gzip.decompress(whole) + bytes(64 << 20)),
            422,
            "more data than its header says",
        ),
    }


def file_of(array: np.ndarray) -> bytes:
    made = nib.Nifti1Image(array, AFFINE)
    made.set_sform(AFFINE, 1)
    return gzip.compress(made.to_bytes())


def test_an_image_gives_what_the_command_gives(place: Path, service: Service) -> None:
    for n in range(4):
        path = place / f"{PATIENT}_{n}.nii.gz"
        for content in (path.read_bytes(), gzip.decompress(path.read_bytes())):
            answer = service.segment(content, name=path.name)
            assert answer.status == 200 and answer.headers["Content-Type"] == "application/gzip"
            with engines.open(place / "out", on="cpu") as model:
                assert answer.content == model.segment(path).to_bytes()
            found = np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(answer.content)).dataobj)
            assert np.mean(found == classes_of(image(n, SHAPE), 1, 2)) > 0.95
            assert json.loads(answer.headers["X-Structures"]) == {"background": 0, "grey": 1, "white": 2}
    assert PATIENT not in service.said() and "segmented 40x37x30 voxels" in service.said()


def test_health_says_what_runs(place: Path, service: Service) -> None:
    found = json.loads(service.ask("GET", "/health").content)
    assert found["status"] == "ok" and found["runs_on"].startswith("ONNX Runtime")
    assert str(place) not in str(found) and found["segments"]["windows_per_run"] == 1


@pytest.mark.parametrize("what", bad_files())
def test_a_bad_file_is_refused_and_leaves_nothing_behind(service: Service, what: str) -> None:
    content, status, says = bad_files()[what]
    answer = service.segment(content, name=f"{PATIENT}.nii.gz")
    said = json.loads(answer.content)["error"]
    assert answer.status == status and says in said and PATIENT not in said + service.said()
    assert service.left() == service.own


def test_other_requests_are_refused(service: Service) -> None:
    assert service.segment(b"x", field="picture").status == 422
    assert "field image" in json.loads(service.segment(b"x", field="picture").content)["error"]
    assert service.ask("GET", "/segment").status == 405 and service.ask("GET", "/none").status == 404
    assert service.ask("GET", "/health", Host="evil.example").status == 400
    kind, body = multipart(b"x" * (2 << 20), "x.nii", "image")
    pieces = (body[n : n + 65536] for n in range(0, len(body), 65536))
    try:  # a body that does not say how long it is
        answer = service.ask("POST", "/segment", pieces, Content_Type=kind)
        assert answer.status == 413 and "at most 1048576 bytes" in json.loads(answer.content)["error"]
    except (BrokenPipeError, ConnectionResetError):
        pass  # the answer came before all was sent
    assert service.ask("GET", "/health").status == 200


def test_two_hundred_requests_from_eight_threads(place: Path, service: Service) -> None:
    """Two of them bad: right answers, and memory as before."""
    contents = [(place / f"{PATIENT}_{n}.nii.gz").read_bytes() for n in range(4)]
    bad = [content for content, status, _ in bad_files().values() if status == 422]

    def load(count: int, wrong: set[int]) -> list[Any]:
        with ThreadPoolExecutor(8) as pool:
            jobs = [bad[n % len(bad)] if n in wrong else contents[n % 4] for n in range(count)]
            return list(pool.map(service.segment, jobs))

    expected = [service.segment(content).content for content in contents]
    load(64, {7, 31})
    before = service.resident()
    wrong = {50, 150}
    answers = load(200, wrong)
    after = service.resident()
    for n, answer in enumerate(answers):
        if n in wrong:
            assert answer.status == 422 and "Cannot use the image" in json.loads(answer.content)["error"]
        else:
            assert answer.status == 200 and answer.content == expected[n % 4]
    assert abs(after - before) < 0.05 * before, f"{before / 2**20:.1f} MB before, {after / 2**20:.1f} after"
    assert service.left() == service.own
    print(f"own memory: {before / 2**20:.1f} MB before, {after / 2**20:.1f} after")


def test_more_than_may_wait_are_sent_away_and_sigterm_lets_work_end(place: Path) -> None:
    busy = Service(place, "--at-once", "1", "--waiting", "1")
    try:
        large = file_of(image(0, (120, 120, 100)))
        with ThreadPoolExecutor(6) as pool:
            jobs = [pool.submit(busy.segment, large) for _ in range(6)]
            while not any(job.done() for job in jobs):
                time.sleep(0.01)
            time.sleep(0.5)
            busy.process.send_signal(signal.SIGTERM)
            answers = [job.result() for job in jobs]
        busy.process.wait(60)
        assert sorted({a.status for a in answers}) == [200, 503]
        sent = next(a for a in answers if a.status == 503)
        assert sent.headers["Retry-After"] == "5" and "try again" in json.loads(sent.content)["error"]
        done = [a for a in answers if a.status == 200]
        assert len({a.content for a in done}) == 1 and "closed" in busy.said()
        assert busy.left() == busy.own
    finally:
        busy.stop()


def test_it_does_not_start_on_an_altered_file(place: Path, tmp_path: Path) -> None:
    script = str(ROOT / "tools/service/serve.py")
    done = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2 and "holds 0 models" in done.stderr and "Traceback" not in done.stderr
