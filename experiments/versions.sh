#!/usr/bin/env bash
# README's tests with other versions than the pinned ones: a row of the table in docs/reproducing.md each.
#
#   experiments/versions.sh                                                     the rows below
#   experiments/versions.sh "torch==2.14.1" "transformers==5.24.0 numpy==2.4.5"  these rows
#
# A row is what replaces lines of requirements.txt and requirements-extra.txt; an empty one replaces nothing. Each has an
# environment of its own, removed behind it. The newest of a package that can be had: pip index versions NAME.
# PYTHON is the interpreter, TESTS the arguments of pytest (all but the slow tests). What fails goes to stderr.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- "" "transformers==5.24.0" "torch==2.14.1"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
versions='import platform, numpy, torch, transformers as t
print(platform.python_version(), torch.__version__, t.__version__, numpy.__version__, sep=" | ")'

echo "| Python | torch | transformers | numpy | tests | minutes |"
echo "|---|---|---|---|---|---|"
for row in "$@"; do
  cat requirements.txt requirements-extra.txt >"$work/pins"
  for pin in $row; do sed -i -E "s/^${pin%%=*}(\[.*\])?==.*/$pin/" "$work/pins"; done
  "${PYTHON:-python3}" -m venv --clear "$work/venv"
  python="$work/venv/bin/python"
  if ! "$python" -m pip install --quiet -r "$work/pins" >"$work/log" 2>&1; then
    tail -n 3 "$work/log" >&2
    echo "| $row: cannot be installed | | | | | |"
    continue
  fi
  SECONDS=0
  "$python" -m pytest -q -rfE ${TESTS:-} >"$work/log" 2>&1 || grep -E "^(FAILED|ERROR)" "$work/log" >&2 || true
  result=$(tail -n 1 "$work/log" | sed -E 's/ in [0-9.]+s.*//; s/, [0-9]+ (deselected|warnings?)//g')
  echo "| $("$python" -c "$versions") | $result | $((SECONDS / 60)) |"
done
