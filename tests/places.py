"""Folders that tests read."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# models of some tests, which skip where it is absent
SHARED = Path(os.environ.get("QDQ_SHARED") or ROOT.parent / "shared")
