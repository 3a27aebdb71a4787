"""A small detector of the kind of YOLO, of `networks_own.py`, at 640 x 640; fresh weights alone.

python tools/export/yolo.py yolo.onnx --batch 8 [--samples FOLDER --pictures FOLDER]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import IMAGE, library, main


def build() -> Any:
    """The network."""
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
    return library("networks_own").Yolo()


if __name__ == "__main__":
    raise SystemExit(main(build, replace(IMAGE, options={**IMAGE.options, "size": 640})))
