"""Do what `docker build` and `docker run` do of our Dockerfile, without Docker: every RUN and COPY, in a clean folder.

Dockerfile, build arguments -> stages -> each step in a folder that stands for the image -> the entry point
The base image is this machine, with the Python that runs this script; paths of the image that the Dockerfile itself
makes (/opt, /source, /data, ...) are those of the folder. The environment is empty but for what pip needs to reach its
index, so a step that leans on something else fails.

Usage: python tools/docker/run_steps.py [--target cpu] [--build-arg NAME=VALUE ...] [--keep DIR] [-- ARGUMENTS OF QDQ]
Ends with 1 where a step fails, the health check does, or the site-packages are larger than --most-mb.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = Path(__file__).with_name("Dockerfile")
MADE = ("opt", "source", "wheels", "data", "cache")  # folders at the image's root that are ours, not the base's
_PASSED = (
    "PIP_",
    "SSL_",
    "REQUESTS_CA",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)


@dataclass(frozen=True)
class Step:
    """One instruction: its word in capitals, and the rest of its line."""

    word: str
    rest: str


@dataclass
class Stage:
    """One FROM: its name, what it is made from, and its steps."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)


@dataclass
class Image:
    """What came of a stage: its environment, working folder, user, and what it starts."""

    env: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = ""
    entry: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


def steps(text: str) -> Iterator[Step]:
    """The instructions of a Dockerfile, lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield Step(word.upper(), re.sub(r"\s+", " ", rest).strip())


def stages(text: str, given: Mapping[str, str]) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first FROM with their values, and the stages."""
    arguments: dict[str, str] = {}
    found: list[Stage] = []
    for step in steps(text):
        if step.word == "FROM":
            base, _, name = re.split(r"(\s+AS\s+|$)", step.rest, maxsplit=1, flags=re.IGNORECASE)
            found.append(Stage(name=name or str(len(found)), base=filled(base.strip(), arguments)))
        elif found:
            found[-1].steps.append(step)
        elif step.word == "ARG":
            name, _, value = step.rest.partition("=")
            arguments[name] = given.get(name, value)
    return arguments, found


def filled(text: str, values: Mapping[str, str]) -> str:
    """A text with its ${NAME} and $NAME in place."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda m: values.get(m[1] or m[2], ""), text)


def chain(found: list[Stage], target: str) -> list[Stage]:
    """The stages that a target is made of, in their order: those it comes from, and those it copies from."""
    known = {stage.name: stage for stage in found}
    if target not in known:
        raise SystemExit(f"There is no stage {target!r} in the Dockerfile: it has {', '.join(known)}.")
    wanted, left = set[str](), [target]
    while left:
        stage = known[left.pop()]
        wanted.add(stage.name)
        used = [stage.base, *re.findall(r"--from=(\S+)", " ".join(s.rest for s in stage.steps))]
        left += [name for name in used if name in known and name not in wanted]
    return [stage for stage in found if stage.name in wanted]


class Machine:
    """The folder that stands for an image's file system, one stage after the other at the same place.

    A stage that is done moves aside, so that a path in it (a virtual environment's own) is the same in the next.
    """

    def __init__(self, folder: Path, ignored: list[str]) -> None:
        """Work in an empty folder; `ignored` are the lines of .dockerignore."""
        self.folder, self.ignored = folder, ignored
        self.here, self.images = folder / "root", dict[str, Image]()

    def build(self, stage: Stage, given: Mapping[str, str]) -> None:
        """Do the steps of a stage."""
        before = self.images.get(stage.base)
        image = Image() if before is None else Image(dict(before.env), before.folder, before.user, list(before.entry))
        self.here.mkdir()
        if before is not None:
            shutil.copytree(self._of(stage.base), self.here, symlinks=True, dirs_exist_ok=True)
        arguments: dict[str, str] = {}
        for step in stage.steps:
            began = time.monotonic()
            values = {"PATH": os.defpath, **arguments, **image.env}
            if step.word == "ARG":
                name, _, value = step.rest.partition("=")
                arguments[name] = given.get(name, value)
            elif step.word == "ENV":
                pairs = (pair.partition("=") for pair in shlex.split(filled(step.rest, values)))
                image.env |= {name: value for name, _, value in pairs}
            elif step.word == "WORKDIR":
                image.folder = filled(step.rest, values)
                self.path(image.folder).mkdir(parents=True, exist_ok=True)
            elif step.word == "COPY":
                self._copy(shlex.split(filled(step.rest, values)), image)
            elif step.word == "RUN":
                print(f"{stage.name}: RUN {step.rest[:150]}", flush=True)
                if code := self.run(["/bin/sh", "-e", "-c", self.mapped(step.rest)], image, arguments):
                    raise SystemExit(f"{stage.name}: the step above ended with {code}.")
                print(f"{stage.name}: {time.monotonic() - began:.0f} s", flush=True)
            elif step.word == "USER":
                image.user = step.rest
            elif step.word == "ENTRYPOINT":
                image.entry = json.loads(step.rest)
            elif step.word == "HEALTHCHECK":
                image.health = json.loads(step.rest.partition("CMD")[2])
            elif step.word not in ("CMD", "VOLUME", "LABEL", "EXPOSE"):
                raise SystemExit(f"{stage.name}: {step.word} is not known here.")
        self.images[stage.name] = image

    def done(self, stage: Stage) -> None:
        """Move a stage aside."""
        self.here.rename(self._of(stage.name))

    def run(self, command: list[str], image: Image, more: Mapping[str, str] | None = None) -> int:
        """The exit code of a command inside."""
        place = str(Path(sys.executable).resolve().parent)
        usual = {name: value for name, value in os.environ.items() if name.startswith(_PASSED)}
        env = {"HOME": str(self.folder), "LANG": "C.UTF-8", **usual, **(more or {})}
        env |= {name: self.mapped(value) for name, value in image.env.items() if value}
        own = env.get("PATH", "").removesuffix(os.defpath)
        env["PATH"] = f"{own}{place}:{os.defpath}"
        env["HOME"] = str(self.folder)
        return subprocess.run(command, cwd=self.path(image.folder), env=env, check=False).returncode

    def path(self, inside: str) -> Path:
        """Where a path of the image lies."""
        return self.here / inside.lstrip("/")

    def mapped(self, text: str) -> str:
        """A text with the image's own paths where they lie."""
        return re.sub(rf"(?<![\w./-])/({'|'.join(MADE)})\b", rf"{self.here}/\1", text)

    def _of(self, stage: str) -> Path:
        return self.folder / f"stage-{stage}"

    def _copy(self, words: list[str], image: Image) -> None:
        origin = next((w.partition("=")[2] for w in words if w.startswith("--from=")), None)
        *sources, target = [w for w in words if not w.startswith("--")]
        into = self.path(target if target.startswith("/") else f"{image.folder}/{target}")
        for source in sources:
            found = self._of(origin) / source.lstrip("/") if origin else ROOT / source
            if origin is None and self._is_ignored(source):
                raise SystemExit(f"COPY {source}: .dockerignore leaves it out.")
            if found.is_dir():
                leave = None if origin else shutil.ignore_patterns("__pycache__")
                shutil.copytree(found, into, symlinks=True, dirs_exist_ok=True, ignore=leave)
            else:
                into.mkdir(parents=True, exist_ok=True) if target.endswith("/") else into.parent.mkdir(exist_ok=True)
                shutil.copy2(found, into)

    def _is_ignored(self, source: str) -> bool:
        """Whether .dockerignore leaves a file out: the last line that fits it, or a folder above it, decides."""
        ignored = False
        for line in self.ignored:
            pattern, keeps = line.lstrip("!"), line.startswith("!")
            parts = Path(source).parts
            if any(fnmatch.fnmatch("/".join(parts[: i + 1]), pattern) for i in range(len(parts))):
                ignored = not keeps
        return ignored


def packages_mb(folder: Path) -> tuple[float, list[tuple[float, str]]]:
    """Megabytes (10^6 bytes) of the site-packages below a folder, and the ten largest entries."""
    (place,) = folder.glob("lib/python*/site-packages")
    held = [
        (sum(f.lstat().st_size for f in (e.rglob("*") if e.is_dir() else [e])) / 1e6, e.name) for e in place.iterdir()
    ]
    return sum(size for size, _ in held), sorted(held, reverse=True)[:10]


def main() -> int:
    """Build a target and start it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=DOCKERFILE)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work here, and leave it")
    parser.add_argument("--most-mb", type=float, default=700.0)
    parser.add_argument("arguments", nargs="*", help="of the entry point; default: demo, as README begins")
    asked = parser.parse_args()
    given = dict(pair.split("=", 1) for pair in asked.build_arg)
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    arguments, found = stages(asked.file.read_text(encoding="utf-8"), given)
    print(f"base: {arguments.get('BASE', '')}, for which this machine stands, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory(prefix="qdq-image-") as scratch:
        if asked.keep:
            asked.keep.mkdir(parents=True)
        machine = Machine((asked.keep or Path(scratch)).resolve(), ignored)
        order = chain(found, asked.target)
        for stage in order:
            machine.build(stage, given)
            if stage is not order[-1]:
                machine.done(stage)
        image = machine.images[asked.target]
        total, largest = packages_mb(machine.path("/opt/qdq"))
        for size, name in largest:
            print(f"{size:8.1f} MB  {name}")
        print(f"{total:8.1f} MB of site-packages, at most {asked.most_mb:.0f}")
        health = machine.run(image.health, image)
        print(f"health check {shlex.join(image.health)}: {health}")
        command = [*image.entry, *(asked.arguments or ["demo"])]
        began = time.monotonic()
        code = machine.run(command, image)
        print(f"{shlex.join(command)}: {code}, {time.monotonic() - began:.0f} s, as user {image.user}")
        return int(bool(health or code or total > asked.most_mb or not image.user or image.user.startswith("0")))


if __name__ == "__main__":
    sys.exit(main())
