"""Fused images as training data for detectors and segmenters: one image a pair, its label beside it, lists of splits.

Labels are looked for below the data set's root, in folders whose names say so (labels, Annotations, masks, ...), by the
stem of the pair or of one of its files: `.txt` (YOLO) and `.xml` (Pascal VOC) for detection, pictures for segmentation.
Fused images have the size of their pairs, so boxes and masks stay true.

    detection      images/SPLIT/STEM.png    labels/SPLIT/STEM.txt    data.yaml (as ultralytics reads it)
    segmentation   images/SPLIT/STEM.png    masks/SPLIT/STEM.png     SPLIT.txt (stems)
"""

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import torch

from recofuse_core.data import IMAGE_SUFFIXES, PairFiles, read_pair, split_of, to_float, to_uint8, write_image
from recofuse_core.errors import ConfigError, DatasetError
from recofuse_core.evaluation.protocol import EvaluationStrength, Fuser, degrade_pair, item_seed
from recofuse_images.errors import ImageError
from recofuse_images.limits import OWN_FILES
from recofuse_images.reader import inspect

Task = Literal["detection", "segmentation"]
LABEL_WORDS = {"label", "labels", "annotation", "annotations", "mask", "masks", "seg", "segmentation", "bbox", "xml"}
SUFFIXES: dict[Task, frozenset[str]] = {
    "detection": frozenset({".txt", ".xml"}),
    "segmentation": frozenset(IMAGE_SUFFIXES),
}
WHOLE_SET = "train"  # where pairs without a split go
CLASS_FILE = "classes.txt"


@dataclass(frozen=True)
class Item:
    """One pair of an export: the stem of its files, its split and where its label is."""

    files: PairFiles
    stem: str
    split: str
    label: Path | None


@dataclass(frozen=True)
class Box:
    """An object of a Pascal VOC file, in px."""

    name: str
    left: float
    top: float
    right: float
    bottom: float


def plan_export(root: Path, pairs: Sequence[PairFiles], task: Task) -> list[Item]:
    """The items of an export.

    Raises ConfigError for an unknown task, DatasetError if no pair has a label or if one has several.
    """
    if task not in SUFFIXES:
        raise ConfigError(f"task must be {' or '.join(SUFFIXES)}, not {task!r}")
    labels = _label_files(root, SUFFIXES[task])
    stems = [pair.name.rpartition("/")[2] for pair in pairs]
    repeated = len(set(stems)) < len(pairs)
    items = []
    for pair, own_stem in zip(pairs, stems, strict=True):
        stem = pair.name.replace("/", "_") if repeated else own_stem
        label = _label_of(pair, next((labels[stem] for stem in pair.stems if stem in labels), ()))
        items.append(Item(pair, stem, pair.split or WHOLE_SET, label and root / label))
    if not any(item.label for item in items):
        wanted = ", ".join(sorted(SUFFIXES[task]))
        raise DatasetError(
            f"no label ({wanted}) in {root} has the stem of a pair; folders such as labels/ are searched"
        )
    return items


def export_pairs(
    model: Fuser,
    items: Sequence[Item],
    output: Path,
    task: Task,
    *,
    root: Path,
    strength: EvaluationStrength = "given",
    seed: int = 0,
    names: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Iterator[Item]:
    """Fuse every pair and write it with its label; yields each item when its files are there, lists come last.

    strength: "given" takes the files as they are (the degraded ones of LQ/HQ folders), others degrade them first.
    names: of the classes of YOLO labels, where no classes.txt tells them. A pair without a label is a picture without
    objects for detection; segmentation leaves it out.
    Raises DatasetError for a label that does not fit its image, ConfigError for a class without a name.
    """
    chosen = [item for item in items if item.label is not None or task == "detection"]
    classes = _class_names(root, chosen, names) if task == "detection" else ()
    for item in chosen:
        pair = read_pair(item.files)
        vis, ir, _, _ = degrade_pair(pair, strength, seed)
        result = model.fuse(
            to_float(vis)[None].to(device),
            to_float(ir)[None].to(device),
            steps=None,
            sampler=None,
            seeds=item_seed(seed, item.files.name, "model"),
            coupled=True,
            exposure="as_shot",
        )
        if result.fused is None:
            raise ConfigError("the model returned no fused image")
        height, width = vis.shape[-2:]
        if task == "detection":
            target = output / "labels" / item.split / f"{item.stem}.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_yolo_lines(item.label, classes, height, width), encoding="utf-8")
        elif item.label is not None:
            _copy_mask(item.label, output / "masks" / item.split / f"{item.stem}{item.label.suffix}", height, width)
        write_image(output / "images" / item.split / f"{item.stem}.png", to_uint8(result.fused[0]).cpu())
        yield item
    splits: dict[str, list[str]] = defaultdict(list)
    for item in chosen:
        splits[item.split].append(item.stem)
    if task == "detection":
        (output / "data.yaml").write_text(_data_yaml(splits, classes), encoding="utf-8")
    else:
        for split, stems in splits.items():
            (output / f"{split}.txt").write_text("\n".join(sorted(stems)) + "\n", encoding="utf-8")


# --- finding labels ---------------------------------------------------------------------------------------------------


def _is_label_folder(parts: Iterable[str]) -> bool:
    return any(LABEL_WORDS & set(re.split(r"[^a-z]+", part.casefold())) for part in parts)


def _label_files(root: Path, suffixes: frozenset[str]) -> dict[str, list[Path]]:
    """Labels by stem, relative to the root: what lies above it says nothing about splits."""
    found: dict[str, list[Path]] = defaultdict(list)
    for directory, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        path = Path(directory).relative_to(root)
        if _is_label_folder(path.parts):
            for name in sorted(files):
                if Path(name).suffix.lower() in suffixes and not name.startswith("."):
                    found[Path(name).stem].append(path / name)
    return found


def _label_of(pair: PairFiles, candidates: Sequence[Path]) -> Path | None:
    """The one label of a pair: where several have its stem, that of its split and data set."""
    if len(candidates) > 1:
        of_split = [path for path in candidates if split_of(path.parts) in (None, pair.split)]
        candidates = of_split or candidates
    if len(candidates) > 1 and pair.source:
        of_source = [path for path in candidates if set(pair.source.split("/")) <= set(path.parts)]
        candidates = of_source or candidates
    if len(candidates) > 1:
        raise DatasetError(f"{pair.name} has several labels: {', '.join(map(str, candidates[:3]))}")
    return candidates[0] if candidates else None


# --- labels -----------------------------------------------------------------------------------------------------------


def read_boxes(path: Path, height: int, width: int) -> list[Box]:
    """The objects of a Pascal VOC file, cut to an image of that size; empty ones are left out.

    Raises DatasetError if it is damaged or was drawn on an image of another size.
    """
    try:
        tree = ElementTree.parse(path).getroot()
        size = tree.find("size")
        if size is not None:
            drawn = (int(_text(size, "width")), int(_text(size, "height")))
            if drawn != (width, height) and 0 not in drawn:
                raise DatasetError(
                    f"{path} was drawn on an image of {drawn[0]}x{drawn[1]}, its pair is {width}x{height}"
                )
        boxes = []
        for found in tree.iter("object"):
            box = found.find("bndbox")
            if box is None:
                raise ValueError("an object without bndbox")
            left, top, right, bottom = (float(_text(box, name)) for name in ("xmin", "ymin", "xmax", "ymax"))
            left, right = max(left, 0.0), min(right, float(width))
            top, bottom = max(top, 0.0), min(bottom, float(height))
            if right > left and bottom > top:
                boxes.append(Box(_text(found, "name"), left, top, right, bottom))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DatasetError(f"cannot read {path}: {error}") from error
    return boxes


def _text(element: ElementTree.Element, name: str) -> str:
    text = element.findtext(name)
    if not text or not text.strip():
        raise ValueError(f"no <{name}> in <{element.tag}>")
    return text.strip()


def _yolo_lines(label: Path | None, classes: Sequence[str], height: int, width: int) -> str:
    """One line an object: class, centre and size in parts of the image."""
    if label is None:
        return ""
    if label.suffix.lower() == ".txt":
        text = label.read_text(encoding="utf-8").strip()
        return text + "\n" if text else ""
    lines = []
    for box in read_boxes(label, height, width):
        centre = ((box.left + box.right) / 2 / width, (box.top + box.bottom) / 2 / height)
        size = ((box.right - box.left) / width, (box.bottom - box.top) / height)
        lines.append(f"{classes.index(box.name)} {centre[0]:.6f} {centre[1]:.6f} {size[0]:.6f} {size[1]:.6f}\n")
    return "".join(lines)


def _class_names(root: Path, items: Sequence[Item], names: Sequence[str]) -> tuple[str, ...]:
    """Of Pascal VOC files the names that occur, sorted; of YOLO files `names`, else a classes.txt beside the labels."""
    voc, yolo = set(), set()
    for item in items:
        if item.label is None:
            continue
        if item.label.suffix.lower() == ".xml":
            try:
                voc |= {_text(found, "name") for found in ElementTree.parse(item.label).getroot().iter("object")}
            except (OSError, ElementTree.ParseError, ValueError) as error:
                raise DatasetError(f"cannot read {item.label}: {error}") from error
        else:
            yolo |= _yolo_classes(item.label)
    if voc and yolo:
        raise DatasetError(f"{root} mixes YOLO and Pascal VOC labels; keep one of them")
    if not yolo:
        return tuple(sorted(voc))
    beside = {item.label.parent / CLASS_FILE for item in items if item.label} | {root / CLASS_FILE}
    listing = next((path for path in sorted(beside) if path.is_file()), None)
    if not names and listing is not None:
        names = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        return tuple(f"class{number}" for number in range(max(yolo) + 1))
    if max(yolo) >= len(names):
        raise ConfigError(f"the labels have a class {max(yolo)}, but only {len(names)} names are given (from class 0)")
    return tuple(names)


def _yolo_classes(path: Path) -> set[int]:
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if any(len(row) < 5 or not all(0 <= float(value) <= 1 for value in row[1:]) for row in rows):
            raise ValueError("expected lines of a class and at least four numbers in [0, 1]")
        return {int(row[0]) for row in rows}
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read {path}: {error}") from error


def _copy_mask(source: Path, target: Path, height: int, width: int) -> None:
    """Copy a mask unchanged, once it is known to fit."""
    try:
        mask = inspect(source.read_bytes(), "vis", OWN_FILES)
    except (ImageError, OSError) as error:
        raise DatasetError(f"cannot read {source}: {error}") from error
    if (mask.width, mask.height) != (width, height):
        raise DatasetError(f"{source} is {mask.width}x{mask.height}, its pair {width}x{height}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _data_yaml(splits: Mapping[str, Sequence[str]], classes: Sequence[str]) -> str:
    """The description that ultralytics reads; paths are relative to the file, strings are JSON, which YAML contains."""
    train = "train" if "train" in splits else next(iter(splits))
    validation = next((split for split in ("val", "test") if split in splits), train)
    lines = [f"train: images/{train}", f"val: images/{validation}"]
    if "test" in splits:
        lines.append("test: images/test")
    lines += ["names:", *(f"  {number}: {json.dumps(name)}" for number, name in enumerate(classes))]
    return "\n".join(lines) + "\n"
