"""How a long job says how far it is: called with (done, in all or None, text)."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int | None, str], None]
