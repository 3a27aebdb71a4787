"""Split options that are quoted as in a shell, and end each word with a zero byte; an error is one of `qdq --json`.

Usage: python3 words.py "--min-sqnr-db 20 --recipe 'my recipe.yaml'"
"""

from __future__ import annotations

import json
import shlex
import sys

if __name__ == "__main__":
    try:
        sys.stdout.write("".join(f"{word}\0" for word in shlex.split(sys.argv[1])))
    except ValueError as error:
        said = f"Cannot split the further options into words: {error}. Quote them as in a shell."
        sys.stderr.write(f"Error: {said}\n")
        json.dump({"schema": "qdq.error/1", "error": {"kind": "usage", "exit_code": 2, "message": said}}, sys.stdout)
        raise SystemExit(2) from None
