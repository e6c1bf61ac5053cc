"""Aligned visible/infrared pairs on disk: finding them, reading them, writing images.

`find_pairs(root)` walks a folder and pairs files by name. What a folder holds is read from its path, so that the usual
data sets need no configuration:

    plain          vis/*.png                        ir/*.png
    MSRS           train/vi/*.png                   train/ir/*.png
    FMB            train/Visible/*.png              train/Infrared/*.png
    LLVIP          visible/train/*.jpg              infrared/train/*.jpg
    M3FD           Vis/*.png                        Ir/*.png
    AWMM           Train/Haze/{vi,gt_vi}/*.png      Train/Haze/{ir,gt_ir}/*.png
    ReCoFuse       FMB/vi/{LQ,HQ}/*.png             FMB/ir/{LQ,HQ}/*.png    (also {LQ,HQ}/{vis,ir}/*.png)
    KAIST          set00/V000/visible/*.jpg         set00/V000/lwir/*.jpg
    FLIR ADAS      train/RGB/*.jpg                  train/thermal_8_bit/*.jpeg
    DroneVehicle   train/trainimg/*.jpg             train/trainimgr/*.jpg
    MFNet          images/*.png                     the fourth channel of the same file; train.txt lists a split
    VEDAI, TNO     *_co.png                         *_ir.png    (one folder for both, where no folder names a side)

Letter case does not matter; folders that name neither modality (labels, annotations) are passed over. Where a clean
copy exists (`HQ`, `gt`), it is the pair's image and the other one its degraded input. Within such folders files pair by
the rules of recofuse_images/names.py: equal stems, or stems that differ by a role word (`0001_vis`, `0001_ir`).

A file manifest.csv in the root or beside it may tell more: columns name, and any of dataset, time_of_day, vis_color.

Images are torch tensors, RGB, uint8 as long as they rest in memory: vis (3, H, W), ir (1, H, W). `recofuse_images`
reads them, so that a file means the same here and in the service.
"""

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recofuse_core.errors import DatasetError, ShapeError
from recofuse_images import reader, scale, writer
from recofuse_images.errors import ImageError
from recofuse_images.limits import OWN_FILES
from recofuse_images.names import (
    FOLDER_WORDS,
    NO_PARTNER,
    READABLE_SUFFIXES,
    PairingError,
    listed,
    match_names,
    match_within,
    names_a_role,
)
from recofuse_images.pairs import is_packed
from recofuse_images.picture import Picture

Modality = Literal["vis", "ir"]

IMAGE_SUFFIXES = READABLE_SUFFIXES
VIS_NAMES = FOLDER_WORDS["vis"]
IR_NAMES = FOLDER_WORDS["ir"]
_USUAL_NAMES = {"vis", "vi", "visible", "ir", "inf", "infrared", "thermal"}
# Single letters (VT5000: RGB and T, GTOT: v and i) count where no other part of the path names a modality.
LETTERS: Mapping[str, Modality] = {"v": "vis", "i": "ir", "t": "ir"}
CLEAN_NAMES = {"hq", "gt"}
DEGRADED_NAMES = {"lq"}
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}
MAX_DEPTH = 5
_DRONE_VEHICLE = re.compile(r"(train|val|test)img(r?)", re.IGNORECASE)
_BESIDE_NAMES = {
    "fl",
    "aligned",
    "8",
    "bit",
}  # beside a modality's name: fl_ir_aligned (Freiburg), thermal_8_bit (FLIR)


@dataclass(frozen=True)
class PairFiles:
    """Where one registered pair lies. vis and ir are the clean images; the degraded ones exist in LQ/HQ folders only.

    name is unique within one search: the stem without role words, or folder/stem where stems repeat. source names the
    data set. In the MFNet layout vis and ir are the same four-channel file.
    """

    name: str
    vis: Path
    ir: Path
    vis_degraded: Path | None = None
    ir_degraded: Path | None = None
    source: str = ""
    split: str | None = None
    time_of_day: str = "unknown"  # day, night or unknown
    is_colour: bool = True  # False: a grey visible image stored as RGB

    @property
    def stems(self) -> tuple[str, ...]:
        """What files that belong to the pair (labels, fused images) may be called, the likeliest first."""
        return tuple(dict.fromkeys((self.vis.stem, self.name.rpartition("/")[2], self.ir.stem)))


@dataclass(frozen=True)
class Pair:
    """One pair in memory, uint8: vis images (3, H, W), ir images (1, H, W), all of one size."""

    files: PairFiles
    vis: Tensor
    ir: Tensor
    vis_degraded: Tensor | None = None
    ir_degraded: Tensor | None = None


@dataclass(frozen=True)
class _Folder:
    """A folder of images: what its path says."""

    path: Path
    modality: Modality
    quality: Literal["clean", "degraded", "unsaid"]
    context: tuple[str, ...]  # the other components of its path
    split: str | None
    rank: int  # how surely it is meant: 0 as most data sets call theirs, 1 other words, 2 a single letter


# --- finding ----------------------------------------------------------------------------------------------------------


def find_pairs(root: Path, *, split: str | None = None) -> list[PairFiles]:
    """All pairs below `root`, sorted by name; `split` ("train", "val", "test") keeps one split of a data set.

    Raises DatasetError if there is none, if an image lacks its partner (which it names), or if a folder is ambiguous.
    """
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder")
    folders = [folder for folder in _image_folders(root) if split is None or folder.split == split]
    groups: dict[tuple[str, ...], list[_Folder]] = defaultdict(list)
    for folder in folders:
        groups[folder.context].append(folder)
    pairs = [pair for context, members in groups.items() for pair in _pair_group(root, context, _surest(members))]
    if not pairs:
        pairs = _pairs_by_role_words(root, split)
    if not pairs:
        pairs = _packed_pairs(root, split)
    if not pairs:
        of_split = f" of the split {split!r}" if split else ""
        raise DatasetError(
            f"no image pairs{of_split} in {root}: expected folders such as vis/ and ir/ with files of the same stem, "
            "or names such as 0001_vis.png and 0001_ir.png"
        )
    return sorted(_described(root, _uniquely_named(pairs)), key=lambda pair: pair.name)


def find_images(folder: Path) -> dict[str, Path]:
    """The image files of one folder by stem. Raises DatasetError for a missing folder or two files of one stem."""
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder")
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            if path.stem in images:
                raise DatasetError(f"two images share the stem {path.stem!r}: {images[path.stem]} and {path}")
            images[path.stem] = path
    return images


def _walk(root: Path) -> Iterable[tuple[Path, list[str]]]:
    """The folders below a root that hold images, and the images' names."""
    for directory, subdirectories, names in os.walk(root, followlinks=True):
        path = Path(directory)
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        if len(path.relative_to(root).parts) >= MAX_DEPTH:
            subdirectories.clear()
        images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")]
        if images:
            yield path, images


def _image_folders(root: Path) -> list[_Folder]:
    classified = (_classify(path, path.relative_to(root).parts) for path, _ in _walk(root))
    return [folder for folder in classified if folder is not None]


def _classify(path: Path, parts: tuple[str, ...]) -> _Folder | None:
    """What a path's components say; None if they name no modality or both."""
    modalities: set[Modality] = set()
    rank = 0
    quality: Literal["clean", "degraded", "unsaid"] = "unsaid"
    context = []
    for part in parts:
        words = set(part.casefold().split("_"))
        if match := _DRONE_VEHICLE.fullmatch(part):
            modalities.add("ir" if match[2] else "vis")
            context.append(match[1])
            rank = 1
            continue
        if words & (VIS_NAMES | IR_NAMES) and words & _BESIDE_NAMES:
            words -= _BESIDE_NAMES
            rank = 1
        if words <= VIS_NAMES | IR_NAMES | CLEAN_NAMES | DEGRADED_NAMES:
            if words & VIS_NAMES:
                modalities.add("vis")
            if words & IR_NAMES:
                modalities.add("ir")
            if words & (VIS_NAMES | IR_NAMES) and not words & _USUAL_NAMES:
                rank = 1
            if words & CLEAN_NAMES:
                quality = "clean"
            elif words & DEGRADED_NAMES:
                quality = "degraded"
            continue
        context.append(part)
    letters = [part for part in context if part.casefold() in LETTERS]
    if not modalities and len(letters) == 1:
        modalities.add(LETTERS[letters[0].casefold()])
        context.remove(letters[0])
        rank = 2
    if len(modalities) != 1:
        return None
    return _Folder(path, modalities.pop(), quality, tuple(context), split_of(context), rank)


def split_of(parts: Iterable[str]) -> str | None:
    """The split that the components of a path name, "train", "val" or "test" by the first word of one; None if none."""
    for part in parts:
        first_word = part.casefold().split("_")[0]
        if first_word in SPLIT_NAMES:
            return "val" if first_word.startswith("val") else first_word
    return None


def _surest(folders: list[_Folder]) -> list[_Folder]:
    """Of folders for one place those with the surest name; unsure names alone (rgb/ without a partner) are no pair."""
    best: dict[tuple[str, str], int] = {}
    for folder in folders:
        place = (folder.modality, folder.quality)
        best[place] = min(folder.rank, best.get(place, folder.rank))
    kept = [folder for folder in folders if folder.rank == best[folder.modality, folder.quality]]
    is_pair = len({folder.modality for folder in kept}) == 2
    return [folder for folder in kept if is_pair or folder.rank == 0]


def _pair_group(root: Path, context: tuple[str, ...], folders: list[_Folder]) -> list[PairFiles]:
    if not folders:
        return []
    vis, vis_degraded = _clean_and_degraded([folder for folder in folders if folder.modality == "vis"])
    ir, ir_degraded = _clean_and_degraded([folder for folder in folders if folder.modality == "ir"])
    if vis is None or ir is None:
        found = ", ".join(str(folder.path.relative_to(root)) for folder in folders)
        missing, names = ("visible", VIS_NAMES) if vis is None else ("infrared", IR_NAMES)
        raise DatasetError(f"{root}: {found} has no clean {missing} partner folder ({', '.join(sorted(names))})")
    present = [folder for folder in (vis, ir, vis_degraded, ir_degraded) if folder is not None]
    images = {folder.path: find_images(folder.path) for folder in present}
    infrared = _partners(vis.path, ir.path, images)
    visible_input = _partners(vis.path, vis_degraded.path, images, ("vis", "vis")) if vis_degraded else {}
    infrared_input = _partners(ir.path, ir_degraded.path, images, ("ir", "ir")) if ir_degraded else {}
    return [
        PairFiles(
            name=name,
            vis=vis_file,
            ir=_distinct(vis_file, ir_file),
            vis_degraded=visible_input[vis_file][1] if vis_degraded else None,
            ir_degraded=infrared_input[ir_file][1] if ir_degraded else None,
            source=_source(context),
            split=vis.split,
        )
        for vis_file, (name, ir_file) in infrared.items()
    ]


def _source(context: Iterable[str]) -> str:
    return "/".join(part for part in context if part.casefold() not in SPLIT_NAMES)


def _partners(
    left: Path, right: Path, images: Mapping[Path, Mapping[str, Path]], roles: tuple[Modality, Modality] = ("vis", "ir")
) -> dict[Path, tuple[str, Path]]:
    """For every image of one folder the name that it shares with its partner in the other one, and the partner.

    Raises DatasetError if an image of either has none, or more than one.
    """
    files = [{path.name: path for path in images[folder].values()} for folder in (left, right)]
    try:
        matches, unmatched = match_names(files[0], files[1], roles=roles)
    except PairingError as error:
        raise DatasetError(f"{left} and {right}: {error}") from error
    for others, found, folder in ((files[0], right, left), (files[1], left, right)):
        missing = [item for item in unmatched if others.get(item.name) == folder / item.name]
        if missing:
            named = listed([others[item.name].stem for item in missing])
            reasons = sorted({item.reason for item in missing} - {NO_PARTNER})
            why = f"; {', '.join(reasons)}" if reasons else ""
            raise DatasetError(f"{found} lacks a partner for {named} (such as {others[missing[0].name]}{why})")
    return {files[0][match.vis]: (match.name, files[1][match.ir]) for match in matches}


def _distinct(vis: Path, ir: Path) -> Path:
    """The infrared file, if it is not the visible one under another name; a packed file is named once for both."""
    if not vis.samefile(ir):
        return ir
    if is_packed(vis):
        return vis
    raise DatasetError(f"{vis} and {ir} are one file: a pair is two images, or a PNG whose fourth channel is infrared")


def _clean_and_degraded(folders: list[_Folder]) -> tuple[_Folder | None, _Folder | None]:
    """The clean folder of one modality and its degraded one; a folder that says nothing is whichever is missing."""
    by_quality: dict[str, _Folder] = {}
    for folder in folders:
        if folder.quality in by_quality:
            raise DatasetError(f"{by_quality[folder.quality].path} and {folder.path} claim the same place")
        by_quality[folder.quality] = folder
    if "clean" in by_quality:
        if {"degraded", "unsaid"} <= by_quality.keys():
            raise DatasetError(f"{by_quality['degraded'].path} and {by_quality['unsaid'].path} claim the same place")
        return by_quality["clean"], by_quality.get("degraded", by_quality.get("unsaid"))
    return by_quality.get("unsaid"), by_quality.get("degraded")


def _pairs_by_role_words(root: Path, split: str | None) -> list[PairFiles]:
    """Pairs whose files lie in one folder, or in folders that name no modality, told apart by role words.

    Images that name no role (labels, masks) are passed over; one that does and has no partner is an error.
    """
    images = {
        path.relative_to(root).as_posix(): path
        for folder, names in _walk(root)
        for path in sorted(folder / name for name in names)
        if split is None or split_of(folder.relative_to(root).parts) == split
    }
    try:
        matches, unmatched = match_within(images)
    except PairingError as error:
        raise DatasetError(f"{root}: {error}") from error
    lonely = [item for item in unmatched if names_a_role(item.name)]
    if matches and lonely:
        named = listed([f"{item.name} ({item.reason})" for item in lonely])
        raise DatasetError(f"{root} lacks a partner for {named}")
    pairs = []
    for match in matches:
        *folders, stem = match.name.split("/")
        vis, ir = images[match.vis], images[match.ir]
        pairs.append(PairFiles(stem, vis, _distinct(vis, ir), source=_source(folders), split=split_of(folders)))
    return pairs


def _packed_pairs(root: Path, split: str | None) -> list[PairFiles]:
    """The MFNet layout: four-channel PNG files, their split in a text file of stems."""
    folder = root / "images"
    if not folder.is_dir():
        return []
    images = {stem: path for stem, path in find_images(folder).items() if path.suffix.lower() == ".png"}
    if split is not None:
        listing = root / f"{split}.txt"
        if not listing.is_file():
            raise DatasetError(f"{root} has no {listing.name}, which lists its split {split!r}")
        stems = listing.read_text(encoding="utf-8").split()
        missing = [stem for stem in stems if stem not in images]
        if missing:
            raise DatasetError(f"{listing} lists {listed(missing)}, missing from {folder}")
        images = {stem: images[stem] for stem in stems}
    return [PairFiles(name=stem, vis=path, ir=path, split=split) for stem, path in images.items()]


def _uniquely_named(pairs: list[PairFiles]) -> list[PairFiles]:
    counts = Counter(pair.name for pair in pairs)
    named = [replace(pair, name=f"{_prefix(pair)}/{pair.name}") if counts[pair.name] > 1 else pair for pair in pairs]
    repeated = [name for name, count in Counter(pair.name for pair in named).items() if count > 1]
    if repeated:
        raise DatasetError(f"several pairs are named {listed(repeated)}")
    return named


def _prefix(pair: PairFiles) -> str:
    return "/".join(part for part in (pair.split, pair.source) if part)


def _described(root: Path, pairs: list[PairFiles]) -> Iterable[PairFiles]:
    manifest = next((path for path in (root / "manifest.csv", root.parent / "manifest.csv") if path.is_file()), None)
    if manifest is None:
        return pairs
    with manifest.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "name" not in (reader.fieldnames or ()):
            return pairs  # somebody else's manifest
        rows = {row["name"]: row for row in reader}
    described = []
    for pair in pairs:
        row = next((rows[stem] for stem in pair.stems if stem in rows), {})
        described.append(
            replace(
                pair,
                source=row.get("dataset") or pair.source,
                time_of_day=row.get("time_of_day") or pair.time_of_day,
                is_colour=(row.get("vis_color") or "true").casefold() != "false",
            )
        )
    return described


# --- reading and writing ----------------------------------------------------------------------------------------------


def read_pair(files: PairFiles) -> Pair:
    """Read one pair. Raises DatasetError for a file that cannot be read and for images that differ in size."""
    if files.vis == files.ir:
        vis, ir = _read_packed(files.vis)
        return Pair(files, vis, ir)
    pair = Pair(
        files,
        read_vis(files.vis),
        read_ir(files.ir),
        read_vis(files.vis_degraded) if files.vis_degraded else None,
        read_ir(files.ir_degraded) if files.ir_degraded else None,
    )
    images = (
        (files.vis, pair.vis),
        (files.ir, pair.ir),
        (files.vis_degraded, pair.vis_degraded),
        (files.ir_degraded, pair.ir_degraded),
    )
    sizes = {path: (image.shape[2], image.shape[1]) for path, image in images if path and image is not None}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{path} {width}x{height}" for path, (width, height) in sizes.items())
        raise DatasetError(f"the images of {files.name} differ in size: {listed}")
    return pair


def read_vis(path: Path) -> Tensor:
    """A visible image as uint8 (3, H, W), RGB, upright, alpha dropped. Raises DatasetError."""
    return _tensor(scale.vis_levels(_picture(path, "vis")))


def read_ir(path: Path) -> Tensor:
    """An infrared image as uint8 (1, H, W), upright, deep files scaled to the scene. Raises DatasetError."""
    with _cannot_read(path):
        infrared = reader.read_infrared(path.read_bytes(), OWN_FILES)
    return _tensor(scale.ir_levels(infrared.picture)[..., None])


def write_image(path: Path, image: Tensor) -> None:
    """Write a (1, H, W) or (3, H, W) image, uint8 or floats in [0, 1], in the format of the suffix; makes the folder.

    Raises ShapeError for another shape, DatasetError if the file cannot be written.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ShapeError(f"expected an image of shape (1, H, W) or (3, H, W), got {tuple(image.shape)}")
    pixels = to_uint8(image).permute(1, 2, 0).contiguous().cpu().numpy()
    try:
        encoded = writer.encoded(pixels[..., 0] if pixels.shape[2] == 1 else pixels, path.suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    except (ImageError, OSError) as error:
        raise DatasetError(f"cannot write {path}: {error}") from error


def to_float(image: Tensor) -> Tensor:
    """A uint8 image of any shape as float32 in [0, 1]."""
    return image.float() / 255


def to_uint8(image: Tensor) -> Tensor:
    """Floats in [0, 1], any shape, rounded to uint8 (values outside are clipped); uint8 passes unchanged."""
    if image.dtype == torch.uint8:
        return image
    return (image.detach().clamp(0, 1) * 255).round().to(torch.uint8)


def _read_packed(path: Path) -> tuple[Tensor, Tensor]:
    both = _picture(path, "vis")
    if both.alpha is None or both.values.dtype != np.uint8:
        raise DatasetError(f"{path} should hold 8-bit RGB and infrared in four channels")
    return _tensor(both.values), _tensor(both.alpha[..., None])


def _picture(path: Path, role: Modality) -> Picture:
    with _cannot_read(path):
        return reader.read_picture(path.read_bytes(), role, OWN_FILES)


@contextmanager
def _cannot_read(path: Path) -> Iterator[None]:
    try:
        yield
    except (ImageError, OSError) as error:
        raise DatasetError(f"cannot read {path}: {error}") from error


def _tensor(pixels: NDArray[Any]) -> Tensor:
    """(H, W, C) uint8 to (C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
