"""Folders and zips of images, a folder for each class, as uint8 tensors."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

# One image may ask for no more than this.
_MOST_BYTES, _MOST_PIXELS = 64 * 2**20, 64_000_000
_ORIENTATION = 0x0112
_PARTS = ("train", "test", "reference")
#: What other people call them.
_ALSO = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation"),
}
#: Those of torchvision's ImageFolder, and what else Pillow reads of a picture on the web.
_ENDINGS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", ".jp2", ".avif")
#: Broken images, and notes, that an error names.
_NAMED = 5


def read_folder(
    path: Path, size: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[str, ...], tuple[str, ...]]:
    """Images and labels of each part, the classes, and what was done to the images.

    Args:
        path: a directory or a zip with train/CLASS/IMAGE, test/CLASS/IMAGE and, maybe,
            reference/CLASS/IMAGE.
        size: images are scaled and centre-cropped to this many pixels a side.

    Raises:
        ValueError: no images, a class that is not trained on, or an image that cannot be read.
        FileNotFoundError: no such path.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such directory or zip: {path}")
    packed = path.is_file()
    files, left_out = _sort_out((_zip_entries if packed else _directory_entries)(path), packed)
    classes = sorted({name for part, name, *_ in files if part == "train"})
    if missing := [part for part in ("train", "test") if part not in {file[0] for file in files}]:
        raise ValueError(
            f"no images in {' and '.join(missing)} of {path}: it must hold train/CLASS/IMAGE and "
            "test/CLASS/IMAGE files"
            + "".join(f"; {note}" for note in [*_meant(path, missing), *left_out[:_NAMED]])
        )
    for part in _PARTS:
        if unknown := {name for own, name, *_ in files if own == part} - {*classes}:
            raise ValueError(
                f"{part} of {path} has classes that train lacks: {', '.join(sorted(unknown))}"
            )
    parts, found, broken = {}, Counter(), {}
    bits = _grey_bits(files, broken)
    for part in _PARTS:
        chosen = [file[1:] for file in files if file[0] == part]
        made = _each(chosen, lambda name, read: _decode(name, read, size, bits, found), broken)
        if made and not broken:
            images = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()
            parts[part] = images, torch.tensor([classes.index(name) for name, *_ in chosen])
    if broken:
        more = len(broken) - _NAMED
        named = "; ".join([*broken.values()][:_NAMED])
        raise ValueError(named + f"; and {more} more" * (more > 0))
    told = (*_notes(found, size, bits), *left_out, *_shared(parts))
    return parts, tuple(classes), told


#: What may be done to an image of a folder, and how it is told.
_TOLD = {
    "resized": "scaled and cropped to {size} x {size} (--image-size)",
    "upright": "turned upright, as their orientation tag says",
    "deep": "grey of {bits} bits, 0 .. {top}, scaled to 0 .. 255",
    "grey": "grey, made colour",
    "other": "with a palette, transparency or other colours, made RGB",
    "frames": "with several frames or pages: the first is taken",
}
#: Images of one part that should not be in another, and what they do there.
_APART = (
    ("test", "train", "the accuracy is partly one of images that are known"),
    ("test", "reference", "the accuracy is partly one of images that are known"),
    ("reference", "train", "what helps cannot be measured on images that are trained on"),
)


def _notes(found: Counter, size: int, bits: int) -> list[str]:
    count = found["images"]
    return [
        f"{found[what]} of {count} images {text.format(size=size, bits=bits, top=2**bits - 1)}"
        for what, text in _TOLD.items()
        if found[what]
    ]


def _shared(parts: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Notes on images that are in two parts."""
    pixels = {
        part: [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
        for part, (images, _) in parts.items()
    }
    notes = []
    for one, other, why in _APART:
        known = {*pixels.get(other, ())}
        if count := sum(image in known for image in pixels.get(one, ())):
            notes.append(f"{count} of {len(pixels[one])} {one} images are in {other}, too: {why}")
    return notes


def _meant(path: Path, missing: list[str]) -> list[str]:
    """Notes on folders that may be the parts that are missing, under another name."""
    if path.is_dir():
        folders = {entry.name for entry in path.iterdir() if entry.is_dir()}
    else:
        with zipfile.ZipFile(path) as archive:
            folders = {part for name in archive.namelist() for part in name.split("/")[:-1]}
    return [
        f"{folder}/ is there: rename it to {part}/"
        for part in missing
        for folder in sorted(folders)
        if folder != part and folder.lower() in _ALSO[part]
    ]


def _zip_entries(path: Path) -> Iterator[tuple]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"neither a directory nor a zip: {path}") from error
    for entry in sorted(archive.namelist()):
        read = None if entry.endswith("/") else _reader(archive, entry)
        yield PurePosixPath(entry).parts, f"{entry} of {path}", read


def _directory_entries(path: Path) -> Iterator[tuple]:
    # Links are followed to folders of classes, and no deeper: these may lead back.
    patterns = (f"{part}{deep}" for part in _PARTS for deep in ("", "/*/*", "/**/*"))
    for entry in sorted({entry for pattern in patterns for entry in path.glob(pattern)}):
        read = None if entry.is_dir() else entry.read_bytes
        yield entry.relative_to(path).parts, str(entry), read


def _sort_out(entries: Iterable[tuple], packed: bool) -> tuple[list, list[str]]:
    """Images in folders of classes, and notes on what is left out.

    Args:
        entries: the path in parts, what an error calls it, and how it is read; None of a folder.
        packed: whether train, test and reference may lie in another folder.
    """
    found, folders, astray, others = [], set(), Counter(), Counter()
    for parts, name, read in entries:
        ending = PurePosixPath(parts[-1]).suffix.lower()
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            continue  # such as macOS leaves beside each file, or in a folder apart
        if read is None:
            own = parts[-2:] if {*parts[-2:-1]} & {*_PARTS} else parts[-1:]
            folders |= {own} if own[0] in _PARTS else set()
        elif ending not in _ENDINGS:
            others[ending or "without"] += 1
        elif {*parts[-3:-2]} & {*_PARTS} and (packed or len(parts) == 3):
            found.append((*parts[-3:-1], name, read))
        else:
            astray["/".join(parts[:-1]) or "the root"] += 1
    filled = {file[:depth] for file in found for depth in (1, 2)}
    notes = []
    for folder, count in sorted(astray.items()):
        noun = "image" if count == 1 else "images"
        notes.append(f"{count} {noun} in {folder}, which is no folder of a class: left out")
    if others:
        kinds = ", ".join(f"{count} {ending}" for ending, count in sorted(others.items()))
        notes.append(f"files that do not end as images do: {kinds}: left out")
    empty = sorted("/".join(folder) for folder in folders - filled)
    return found, [*notes, *(f"no images in {folder}: left out" for folder in empty)]


def _reader(archive: zipfile.ZipFile, entry: str):
    def read() -> bytes:
        with archive.open(entry) as file:  # what its header says of its size may not be so
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        return data

    return read


_UNREADABLE = (
    OSError, ValueError, SyntaxError, RuntimeError, zipfile.BadZipFile, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def _decode(name: str, read, size: int, bits: int, found: Counter) -> np.ndarray:
    def in_color(image: Image.Image) -> Image.Image:
        found["images"] += 1
        found["frames"] += getattr(image, "n_frames", 1) > 1
        found["deep" if image.mode[0] in "IF" else _KINDS.get(image.mode, "other")] += 1
        return _eight_bits(_upright(image, found), bits).convert("RGB")

    picture = _opened(name, read, in_color)
    if picture.size != (size, size):
        found["resized"] += 1
        scale = size / min(picture.size)
        wide = [max(size, round(side * scale)) for side in picture.size]
        left, top = (wide[0] - size) // 2, (wide[1] - size) // 2
        picture = picture.resize(wide).crop((left, top, left + size, top + size))
    return np.asarray(picture)


_KINDS = {"RGB": "colour", "L": "grey", "1": "grey", "LA": "grey"}


def _upright(image: Image.Image, found: Counter) -> Image.Image:
    """Turned as the camera's tag says, which Pillow by itself, and ImageFolder, leave aside."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except _UNREADABLE:  # a broken tag beside a good image
        return image
    if orientation not in range(2, 9):
        return image
    found["upright"] += 1
    return ImageOps.exif_transpose(image)


def _each(files: list, use, broken: dict[str, str]) -> list:
    """What ``use`` makes of each file; those that cannot be read join ``broken``, by names."""
    made = []
    for *_, name, read in files:
        try:
            if name not in broken:
                made.append(use(name, read))
        except ValueError as error:
            broken[name] = str(error)
    return made


def _opened(name: str, read, use):
    """What ``use`` makes of an image file."""
    try:
        with Image.open(io.BytesIO(read())) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            return use(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read the image {name}: Pillow knows no such format") from error
    except _UNREADABLE as error:
        raise ValueError(f"cannot read the image {name}: {error}") from error


def _grey_bits(files: list, broken: dict[str, str]) -> int:
    """How many bits the grey levels of a data set take: a PNG of 10 or 12 is stored in 16."""
    tops = _each(files, lambda name, read: _opened(name, read, _top), broken)
    return max(8, max(tops, default=0).bit_length())


def _top(image: Image.Image) -> int:
    """The highest grey level of an image with more than 8 bits, 0 of another."""
    if image.mode[0] not in "IF":
        return 0
    levels = np.asarray(image)
    if image.mode[0] == "F" or levels.min() < 0 or levels.max() > 65535:
        raise ValueError(
            f"mode {image.mode} with levels {levels.min()} .. {levels.max()}: store whole levels "
            "of 8 or 16 bits"
        )
    return int(levels.max())


def _eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """More bits of grey become eight; Pillow by itself would cut them off at 255."""
    if image.mode[0] not in "IF":
        return image
    levels = np.asarray(image).astype(np.int64)
    return Image.fromarray((levels * 255 // (2**bits - 1)).astype(np.uint8))
