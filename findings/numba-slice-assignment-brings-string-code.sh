#!/usr/bin/env bash
# In a function compiled by numba, "out[:] = row" checks the lengths at run time and puts the two
# numbers into the text of an error: eight times as much code as the loop over elements, most of it
# handling unicode strings, which is compiled anew in each function that has such a line. Array
# kernels with a few of them take many times as long to compile.
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


@njit
def by_slice(out, row):
    out[:] = row


@njit
def by_element(out, row):
    for i in range(len(row)):
        out[i] = row[i]


sizes = []
for function in (by_slice, by_element):
    out = np.zeros(4, np.uint8)
    function(out, np.arange(4, dtype=np.uint8))
    (text,) = function.inspect_llvm().values()
    sizes.append(len(text))
    print(function.__name__, out, "string code:", "unicode" in text)
print("at least five times as much code:", sizes[0] > 5 * sizes[1])
PYTHON
venv/bin/python -I seen.py | tee seen.txt
diff seen.txt - <<'EXPECTED'
by_slice [0 1 2 3] string code: True
by_element [0 1 2 3] string code: False
at least five times as much code: True
EXPECTED
