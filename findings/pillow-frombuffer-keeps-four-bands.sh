#!/usr/bin/env bash
# Pixels of four bytes, the last one unused, read as mode "RGB" through the raw mode "RGBX":
# Image.frombytes gives an RGB image, Image.frombuffer one of mode "RGBX" with four bands, whatever
# mode was asked for. With the raw mode "BGRX" or "XRGB" both give RGB. An array or a transform made
# of it has four channels where three were asked for.
#
# Seen with Pillow 13.0.0: the output at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet pillow==13.0.0
cd "$folder"
cat > seen.py <<'PYTHON'
from PIL import Image

data = bytes(range(16))
for raw in ("RGBX", "BGRX", "XRGB"):
    copied = Image.frombytes("RGB", (2, 2), data, "raw", raw)
    shared = Image.frombuffer("RGB", (2, 2), data, "raw", raw, 0, 1)
    print(raw, *(f"{image.mode} {image.getpixel((0, 0))}" for image in (copied, shared)), sep=": ")
PYTHON
venv/bin/python -I seen.py | tee seen.txt
diff seen.txt - <<'EXPECTED'
RGBX: RGB (0, 1, 2): RGBX (0, 1, 2, 3)
BGRX: RGB (2, 1, 0): RGB (2, 1, 0)
XRGB: RGB (1, 2, 3): RGB (1, 2, 3)
EXPECTED
