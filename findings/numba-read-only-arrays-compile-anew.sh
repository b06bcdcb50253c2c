#!/usr/bin/env bash
# For numba a read-only array is of another type than a writable one, though a function that only
# reads could serve both. Bytes from a file (np.frombuffer), a memory map and a broadcast array are
# read-only: the first of them has a function that was compiled, or loaded from the cache, compiled a
# second time, in the middle of a program and without a word.
#
# Seen with numba 0.68.1, numpy 2.4.6: the output at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numba==0.68.1 numpy==2.4.6
cd "$folder"
cat > seen.py <<'PYTHON'
import numpy as np
from numba import njit


@njit(cache=True)
def total(levels):
    found = 0
    for level in levels:
        found += level
    return found


levels = np.arange(5, dtype=np.uint8)
print(total(levels), "compiled", len(total.signatures))
print(total(levels.copy()), "compiled", len(total.signatures))
print(total(np.frombuffer(levels.tobytes(), np.uint8)), "compiled", len(total.signatures))
print([signature[0].mutable for signature in total.signatures])
PYTHON
unset NUMBA_CACHE_DIR NUMBA_DISABLE_JIT
venv/bin/python -I seen.py | tee seen.txt
diff seen.txt - <<'EXPECTED'
10 compiled 1
10 compiled 1
10 compiled 2
[True, False]
EXPECTED
