#!/usr/bin/env bash
# Pillow opens a 16-bit grey PNG as mode I;16, and convert("RGB") cuts every level above 255 off
# instead of scaling: all but the darkest 1/256 of the range is white. The same levels in a 16-bit
# *colour* PNG are scaled to 8 bits when the file is opened. Whatever calls
# Image.open(...).convert("RGB"), as torchvision's ImageFolder does, trains on white images.
#
# Seen with pillow 13.0.0, opencv-python-headless 5.0.0.93, numpy 2.4.6: the output at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \
    pillow==13.0.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$folder"
cat > seen.py <<'PYTHON'
import cv2
import numpy as np
from PIL import Image

levels = (np.arange(6) * 13107).astype(np.uint16)[None].repeat(2, 0)  # 0 .. 65535
cv2.imwrite("grey.png", levels)
cv2.imwrite("colour.png", np.stack([levels] * 3, -1))
for name in ("grey.png", "colour.png"):
    image = Image.open(name)
    print(name, image.mode, np.asarray(image.convert("RGB"))[0, :, 0].tolist())
    print(name, "OpenCV", cv2.imread(name)[0, :, 0].tolist())
PYTHON
venv/bin/python -I seen.py | tee seen.txt
diff seen.txt - <<'EXPECTED'
grey.png I;16 [0, 255, 255, 255, 255, 255]
grey.png OpenCV [0, 51, 102, 153, 204, 255]
colour.png RGB [0, 51, 102, 153, 204, 255]
colour.png OpenCV [0, 51, 102, 153, 204, 255]
EXPECTED
