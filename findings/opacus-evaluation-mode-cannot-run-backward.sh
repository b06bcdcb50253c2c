#!/usr/bin/env bash
# Opacus's GradSampleModule keeps inputs in training mode alone, but takes them in every backward
# pass: in evaluation mode (influence functions, a model fine-tuned with its statistics held, or
# with one such part) the backward pass ends in "pop from empty list".
#
# Seen with Opacus 1.6.0, torch 2.14.1: the output at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet opacus==1.6.0 torch==2.14.1
cd "$folder"
cat > seen.py <<'PYTHON'
import torch
from opacus import GradSampleModule
from torch import nn

model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
module = GradSampleModule(model)


def backward():
    module.zero_grad()
    try:
        module(torch.ones(5, 4)).sum().backward()
    except IndexError as error:
        return f"IndexError: {error}"
    return f"gradients of {len(model[0].weight.grad_sample)} examples"


print("training:", backward())
module.eval()
print("evaluation:", backward())
PYTHON
venv/bin/python -I -W ignore seen.py 2> said.txt | tee seen.txt
diff seen.txt - <<'EXPECTED'
training: gradients of 5 examples
evaluation: IndexError: pop from empty list
EXPECTED
