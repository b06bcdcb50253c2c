#!/usr/bin/env bash
# torch.as_tensor and torch.asarray leave a tensor on its device, says their documentation. Under
# torch.set_default_device or `with torch.device(...)` they move it to that device, and with them
# torchvision's tv_tensors: images and boxes that a loader makes on the CPU go to the accelerator
# one by one, and on the device "meta" their values are lost. torch.from_numpy stays on the CPU.
#
# Seen with torchvision 0.29.1, torch 2.14.1: the output at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torchvision==0.29.1 torch==2.14.1 numpy==2.3.5
cd "$folder"
cat > seen.py <<'PYTHON'
import numpy as np
import torch
from torchvision import tv_tensors

image = torch.zeros(3, 4, 4, dtype=torch.uint8)
boxes = torch.tensor([[0, 0, 2, 2]])
with torch.device("meta"):
    print("torch.from_numpy:", torch.from_numpy(np.zeros(3)).device)
    print("torch.as_tensor:", torch.as_tensor(image).device)
    print("torch.asarray:", torch.asarray(image).device)
    print("tv_tensors.Image:", tv_tensors.Image(image).device)
    made = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(4, 4))
    print("tv_tensors.BoundingBoxes:", made.device)
    print("tv_tensors.wrap:", tv_tensors.wrap(boxes, like=made).device)
PYTHON
venv/bin/python -I seen.py 2> said.txt | tee seen.txt
diff seen.txt - <<'EXPECTED'
torch.from_numpy: cpu
torch.as_tensor: meta
torch.asarray: meta
tv_tensors.Image: meta
tv_tensors.BoundingBoxes: meta
tv_tensors.wrap: cpu
EXPECTED
