#!/usr/bin/env bash
# numba's cache=True compiles a function anew when its own file changes, but not when a function that
# it calls, in another file, does: the old callee goes on living inside the cached caller, while a
# direct call of it is new. One program then gives two results for one function.
#
# Seen with numba 0.68.1, numpy 2.4.6: the output at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numba==0.68.1 numpy==2.4.6
cd "$folder"
cat > callee.py <<'PYTHON'
from numba import njit


@njit(cache=True)
def level(x):
    return x + 1
PYTHON
cat > caller.py <<'PYTHON'
from callee import level
from numba import njit


@njit(cache=True)
def run(x):
    return level(x)


print("through the caller", run(1), "directly", level(1))
PYTHON
unset NUMBA_CACHE_DIR NUMBA_DISABLE_JIT
venv/bin/python caller.py | tee seen.txt
sed -i 's/x + 1/x + 100/' callee.py
venv/bin/python caller.py | tee -a seen.txt
diff seen.txt - <<'EXPECTED'
through the caller 2 directly 2
through the caller 2 directly 101
EXPECTED
