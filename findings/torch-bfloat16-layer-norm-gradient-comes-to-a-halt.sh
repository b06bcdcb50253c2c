#!/usr/bin/env bash
# On a CPU torch adds up the gradients of a LayerNorm's weight and bias, and of an Embedding, row by
# row in the precision of the model. In bfloat16 a sum of many rows comes to a halt once a summand
# is less than a 256th of it: of 4,096 ones the bias of a LayerNorm gets 256. A Linear, a GroupNorm
# and an RMSNorm add up in float32, as a Conv2d has since pytorch/pytorch#68048 was repaired.
#
# Seen with torch 2.14.1: the output at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1
cd "$folder"
cat > seen.py <<'PYTHON'
import torch
from torch import nn

torch.set_num_threads(1)
ROWS = 4096
inputs = torch.randn(ROWS, 32, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
for layer in (nn.Linear(32, 32), nn.GroupNorm(4, 32), nn.LayerNorm(32)):
    layer.bfloat16()(inputs).sum().backward()
    print(f"{type(layer).__name__}: {layer.bias.grad[0].item():.0f} of {ROWS}")
rows = nn.Embedding(4, 32, dtype=torch.bfloat16)
rows(torch.zeros(ROWS, dtype=torch.long)).sum().backward()
print(f"Embedding: {rows.weight.grad[0, 0].item():.0f} of {ROWS}")
PYTHON
venv/bin/python -I -W ignore seen.py 2> said.txt | tee seen.txt
diff seen.txt - <<'EXPECTED'
Linear: 4096 of 4096
GroupNorm: 4096 of 4096
LayerNorm: 256 of 4096
Embedding: 256 of 4096
EXPECTED
