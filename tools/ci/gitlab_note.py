"""Write a file as a note of a GitLab merge request, or change the note that an earlier run wrote there.

Usage: python3 gitlab_note.py comment.md, in a job of a merge request; QDQ_TOKEN is a token that may write notes.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

PAGE = 100  # the most that GitLab gives at a time


def asked(method: str, path: str, content: object = None) -> Any:
    """The answer of GitLab's interface, parsed.

    Raises:
        OSError: GitLab refuses, or is not there.
    """
    project = f"{os.environ['CI_API_V4_URL']}/projects/{os.environ['CI_PROJECT_ID']}"
    head = {"PRIVATE-TOKEN": os.environ["QDQ_TOKEN"], "Content-Type": "application/json"}
    body = None if content is None else json.dumps(content).encode()
    call = urllib.request.Request(project + path, data=body, headers=head, method=method)
    with urllib.request.urlopen(call, timeout=60) as answer:
        return json.load(answer)


def main() -> None:
    """Write the note."""
    notes = f"/merge_requests/{os.environ['CI_MERGE_REQUEST_IID']}/notes"
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    body, mark = {"body": text}, text.splitlines()[0]
    own, page, full = [], 1, True
    while full and not own:
        found = asked("GET", f"{notes}?per_page={PAGE}&page={page}")
        own, page, full = [n["id"] for n in found if n["body"].startswith(mark)], page + 1, len(found) >= PAGE
    if own:
        asked("PUT", f"{notes}/{own[0]}", body)
    else:
        asked("POST", notes, body)


if __name__ == "__main__":
    main()
