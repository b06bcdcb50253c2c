#!/usr/bin/env bash
# XLA's CPU compiler rounds "x * y + z" once, as one fused operation; torch's own kernels round the
# product and then the sum. Float images then differ in the last bit from those of the CPU, also where
# every operation is elementwise; they agree where the product is materialised before the sum.
#
# Seen with torch 2.9.1, torch_xla 2.9.0 (its CPU plugin): the output at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.9.1 torch_xla==2.9.0 numpy==2.4.6
cd "$folder"
cat > seen.py <<'PYTHON'
import torch
import torch_xla

torch.manual_seed(0)
a, b, c = (torch.rand(100_000) for _ in range(3))
device = torch_xla.device()


def product_and_sum(x, y, z):
    return x * y + z


def in_two_steps(x, y, z):
    product = x * y
    torch_xla.sync()
    return product + z


cpu = product_and_sum(a, b, c)
fused = (a.double() * b.double() + c.double()).float()
for function in (product_and_sum, in_two_steps):
    given = [part.to(device) for part in (a, b, c)]
    out = function(*given).cpu()
    known = [name for name, one in (("rounded twice", cpu), ("rounded once", fused)) if one.equal(out)]
    print(function.__name__, *known)
PYTHON
PJRT_DEVICE=CPU venv/bin/python -I seen.py 2> /dev/null | tee seen.txt
diff seen.txt - <<'EXPECTED'
product_and_sum rounded once
in_two_steps rounded twice
EXPECTED
