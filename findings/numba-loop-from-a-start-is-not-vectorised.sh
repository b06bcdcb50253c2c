#!/usr/bin/env bash
# "for i in range(start, stop): ... x[i]" compiled by numba reads element by element: start could be
# below 0, and each index that is negative would have to be counted from the end. The same loop over
# x[start:stop], whose index begins at 0, reads whole vectors; on bytes it is some nine times as
# fast. Nothing warns of it.
#
# Seen with numba 0.68.1, numpy 2.4.6 on x86-64: the output at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numba==0.68.1 numpy==2.4.6
cd "$folder"
cat > seen.py <<'PYTHON'
import timeit

import numpy as np
from numba import njit


@njit
def by_index(x, start, stop):
    total = np.int32(0)
    for i in range(start, stop):
        total = np.int32(total + np.int32(x[i]))
    return total


@njit
def by_slice(x, start, stop):
    total, part = np.int32(0), x[start:stop]
    for i in range(len(part)):
        total = np.int32(total + np.int32(part[i]))
    return total


x = np.ones(1 << 20, np.uint8)
seconds = []
for function in (by_index, by_slice):
    total = function(x, 1, x.size)
    (text,) = function.inspect_llvm().values()
    seconds.append(min(timeit.repeat(lambda: function(x, 1, x.size), number=5, repeat=20)))
    print(function.__name__, total, "reads vectors:", "load <" in text)
print("at least three times as fast:", seconds[0] > 3 * seconds[1])
PYTHON
venv/bin/python -I seen.py | tee seen.txt
diff seen.txt - <<'EXPECTED'
by_index 1048575 reads vectors: False
by_slice 1048575 reads vectors: True
at least three times as fast: True
EXPECTED
