#!/usr/bin/env bash
# Pillow's ImageFilter.BLUR, the blur of many augmentation policies, is a kernel of 5 x 5 pixels, and
# kernels leave the pixels that they do not cover wholly as they are: two at every side. An image of
# 4 x 4 is not blurred at all, one of 8 x 8 in a quarter of its pixels. GaussianBlur and BoxBlur go up
# to the border.
#
# Seen with pillow 13.0.0, numpy 2.4.6: the output at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet pillow==13.0.0 numpy==2.4.6
cd "$folder"
cat > seen.py <<'PYTHON'
import numpy as np
from PIL import Image, ImageFilter

for side in (4, 8):
    # 0 and 255 by turns: every mean of a neighbourhood is another value
    board = (255 * (np.indices((side, side)).sum(0) % 2)).astype(np.uint8)
    for filtered in (ImageFilter.BLUR, ImageFilter.GaussianBlur(1), ImageFilter.BoxBlur(1)):
        result = np.asarray(Image.fromarray(board).filter(filtered))
        print(side, filtered.name, int((result != board).sum()), "of", board.size, "changed")
PYTHON
venv/bin/python -I seen.py | tee seen.txt
diff seen.txt - <<'EXPECTED'
4 Blur 0 of 16 changed
4 GaussianBlur 16 of 16 changed
4 BoxBlur 16 of 16 changed
8 Blur 16 of 64 changed
8 GaussianBlur 64 of 64 changed
8 BoxBlur 64 of 64 changed
EXPECTED
