#!/usr/bin/env bash
# tools/wheel.sh ENVIRONMENT: what a stranger has who installed the wheel and nothing else, seen from an empty folder.
# PUBLISHING is an environment with mypy and pyright.
set -euo pipefail
script=$(realpath "$(dirname "$0")/../tests/typing/script.py")
cd "$(mktemp -d)"
cp "$script" script.py
"$1/bin/relflat" --version
"$1/bin/python" -c "import relflat; print(relflat.__file__)"
"$1/bin/python" script.py
for command in train measure compare report reproduce data; do
  told=$("$1/bin/relflat" "$command" 2>&1) && { echo "relflat $command left with 0"; exit 1; }
  case $told in *"pip install 'relflat[lab]'"*) ;; *) echo "relflat $command said: $told"; exit 1 ;; esac
done
"$PUBLISHING/bin/mypy" --strict --python-executable "$1/bin/python" script.py
"$PUBLISHING/bin/pyright" --pythonpath "$1/bin/python" script.py
