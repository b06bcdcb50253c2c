#!/usr/bin/env bash
# torchvision's TrivialAugmentWide has 31 magnitudes, and the middle one of 0 .. 32 pixels is 16.
# torch.linspace gives 15.999999 there, which the transform truncates: images are translated by 15
# pixels, and never by 16, in one of 31 draws of translate_x and translate_y.
#
# Seen with torchvision 0.29.1, torch 2.14.1: the output at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torchvision==0.29.1 torch==2.14.1
cd "$folder"
cat > seen.py <<'PYTHON'
import torch
from torchvision.transforms import v2

print("magnitude 15 of 0 .. 30:", f"{torch.linspace(0.0, 32.0, 31)[15].item():.6f}")
# One bright column, of which translations leave a bright column.
images = torch.eye(101, dtype=torch.uint8)[:, None, None, :].expand(-1, 3, 101, -1) * 255
image, seen = images[50], set()
augment = v2.TrivialAugmentWide()
torch.manual_seed(0)
for _ in range(6000):
    result = augment(image)
    column = int(result[0, 0].argmax())
    if torch.equal(result, images[column]):
        seen.add(abs(column - 50))
print("translated by", *sorted(seen))
PYTHON
venv/bin/python -I seen.py 2> said.txt | tee seen.txt
diff seen.txt - <<'EXPECTED'
magnitude 15 of 0 .. 30: 15.999999
translated by 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 17 18 19 20 21 22 23 24 25 26 27 28 29 30 32
EXPECTED
