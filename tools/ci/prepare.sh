#!/usr/bin/env bash
# Prepare a model in CI: deploy it, and say what changed since the last run.
# Ends as `qdq deploy` does: 0, 1 where a limit failed (all files are written), 2 and more after an error (none are).
#
# QDQ_MODEL, QDQ_DATA   the float model and its samples
# QDQ_EVAL              samples to check on; empty: those of QDQ_DATA
# QDQ_ARGUMENTS         further options of `qdq deploy`, quoted as in a shell: the limits, the GPU, a recipe
# QDQ_OUT               folder for the results; default qdq-build
# QDQ_PREVIOUS          report.json of the last run; without it there is no difference
# QDQ_CHANGES           file for a page of the difference; default qdq-changes.html
# QDQ_COMMENT           file for the difference in Markdown; default qdq-comment.md
# QDQ_CACHE             folder of earlier work, which `qdq` itself reads
# QDQ_NAME              name of this job among those that comment on the same request
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${QDQ_OUT:-qdq-build}
comment=${QDQ_COMMENT:-qdq-comment.md}
changes=${QDQ_CHANGES:-qdq-changes.html}
rm -f "$comment" "$changes" # of an earlier run in this folder
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT

failed() { # nothing was made: say why, and end with that code
  python3 "$here/difference.py" --error "$answer" -o "$comment"
  exit "$1"
}

words=()
if [ -n "${QDQ_EVAL:-}" ]; then
  words+=(--eval "$QDQ_EVAL")
fi
if [ -n "${QDQ_ARGUMENTS:-}" ]; then
  python3 "$here/words.py" "$QDQ_ARGUMENTS" >"$answer" || failed 2
  while IFS= read -r -d '' word; do words+=("$word"); done <"$answer"
fi

status=0
qdq deploy --data "$QDQ_DATA" --out "$out" "${words[@]}" --json -- "$QDQ_MODEL" >"$answer" || status=$?
if [ "$status" -gt 1 ] || [ ! -s "$answer" ]; then
  failed "$status"
fi

previous=()
if [ -n "${QDQ_PREVIOUS:-}" ] && [ -f "$QDQ_PREVIOUS" ]; then
  previous=("$QDQ_PREVIOUS")
  # the last run may be of another version, which is no reason to fail
  if ! qdq report "$(dirname "$QDQ_PREVIOUS")" "$out" -o "$changes"; then
    echo "There is no page of what changed; the comment says it." >&2
  fi
fi
python3 "$here/difference.py" "$out/report.json" "${previous[@]}" -o "$comment"
exit "$status"
