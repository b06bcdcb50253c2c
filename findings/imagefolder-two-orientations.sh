#!/usr/bin/env bash
# One folder of photographs, two data sets. A camera held upright stores the sensor's rows and a tag
# that says how to turn them. Pillow's Image.open, with which torchvision's ImageFolder reads, leaves
# the image lying on its side; the "imagefolder" of Hugging Face's datasets, and OpenCV's imread, turn
# it upright; OpenCV's IMREAD_UNCHANGED does not. A model that is trained on one and used on the other
# meets images rotated by a quarter turn.
#
# Seen with pillow 13.0.0, datasets 5.2.0, opencv-python-headless 5.0.0.93, numpy 2.4.6: the output at
# the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \
    pillow==13.0.0 datasets==5.2.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$folder"
cat > seen.py <<'PYTHON'
import os

import cv2
import datasets
from PIL import Image

datasets.disable_progress_bars()
tags = Image.Exif()
tags[0x0112] = 6  # turn by a quarter, clockwise
os.makedirs("photographs/train/cat")
path = "photographs/train/cat/1.jpg"
Image.new("RGB", (40, 20)).save(path, exif=tags)
print("Pillow", Image.open(path).size)
print("OpenCV", cv2.imread(path).shape[1::-1])
print("OpenCV, unchanged", cv2.imread(path, cv2.IMREAD_UNCHANGED).shape[1::-1])
found = datasets.load_dataset("imagefolder", data_dir="photographs", cache_dir="cache")
print("datasets", found["train"][0]["image"].size)
PYTHON
HF_HUB_OFFLINE=1 venv/bin/python -I seen.py | tee seen.txt
diff seen.txt - <<'EXPECTED'
Pillow (40, 20)
OpenCV (20, 40)
OpenCV, unchanged (40, 20)
datasets (20, 40)
EXPECTED
