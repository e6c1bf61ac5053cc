"""Exports for detectors and segmenters: real folders of every layout, read back as those tools read them."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from recofuse_core.data import find_pairs, read_vis, write_image
from recofuse_core.errors import ConfigError, DatasetError
from recofuse_core.evaluation.downstream import Item, Task, export_pairs, plan_export, read_boxes
from recofuse_core.evaluation.protocol import degrade_pair
from recofuse_core.scenes.scene import make_scene
from tests.core.tiny import tiny_model

HEIGHT, WIDTH = 40, 64
MODEL = tiny_model()


def put_pair(root: Path, vis: str, ir: str, seed: int = 0) -> None:
    scene = make_scene(seed, HEIGHT, WIDTH)
    write_image(root / vis, scene.vis)
    write_image(root / ir, scene.ir)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def voc(*boxes: tuple[str, float, float, float, float], size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{left}</xmin><ymin>{top}</ymin>"
        f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for name, left, top, right, bottom in boxes
    )
    width, height = size
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"


def export(root: Path, output: Path, task: Task, **options: Any) -> list[Item]:
    items = plan_export(root, find_pairs(root), task)
    return list(export_pairs(MODEL, items, output, task, root=root, **options))


def test_boxes_of_llvip_become_yolo_lines_beside_their_images(tmp_path: Path) -> None:
    root, out = tmp_path / "LLVIP", tmp_path / "out"
    put_pair(root, "visible/train/010001.jpg", "infrared/train/010001.jpg")
    put_pair(root, "visible/test/190001.jpg", "infrared/test/190001.jpg")
    put(root / "Annotations" / "010001.xml", voc(("person", 16, 10, 32, 30), ("car", -4, 0, 64, 40)))
    put(root / "Annotations" / "190001.xml", voc(("person", 0, 0, 8, 8), ("person", 70, 0, 90, 8)))
    done = export(root, out, "detection")
    assert [(item.stem, item.split) for item in done] == [("010001", "train"), ("190001", "test")]
    rows = [line.split() for line in (out / "labels" / "train" / "010001.txt").read_text().splitlines()]
    assert [row[0] for row in rows] == ["1", "0"]
    assert [float(value) for value in rows[0][1:]] == pytest.approx([0.375, 0.5, 0.25, 0.5])
    assert [float(value) for value in rows[1][1:]] == pytest.approx([0.5, 0.5, 1, 1])  # cut to the image
    assert len((out / "labels" / "test" / "190001.txt").read_text().splitlines()) == 1  # the other lies outside
    described = yaml.safe_load((out / "data.yaml").read_text())
    assert described == {
        "train": "images/train",
        "val": "images/test",
        "test": "images/test",
        "names": {0: "car", 1: "person"},
    }
    assert read_vis(out / "images" / "train" / "010001.png").shape == (3, HEIGHT, WIDTH)


def test_exported_images_are_what_the_model_makes_of_the_inputs(tmp_path: Path) -> None:
    root = tmp_path / "data"
    put_pair(root, "vis/a.png", "ir/a.png")
    put(root / "labels" / "a.txt", "0 0.5 0.5 0.2 0.2\n")
    export(root, tmp_path / "given", "detection")
    export(root, tmp_path / "strong", "detection", strength="strong", seed=3)
    given, strong = (read_vis(tmp_path / name / "images" / "train" / "a.png") for name in ("given", "strong"))
    assert not torch.equal(given, strong)
    from recofuse_core.data import read_pair, to_float, to_uint8
    from recofuse_core.evaluation.protocol import item_seed

    vis, ir, _, _ = degrade_pair(read_pair(find_pairs(root)[0]), "strong", 3)
    again = MODEL.fuse(to_float(vis)[None], to_float(ir)[None], seeds=item_seed(3, "a", "model")).fused
    assert again is not None
    assert torch.equal(strong, to_uint8(again[0]))


def test_yolo_labels_keep_their_lines_and_take_names_from_a_list_or_the_caller(tmp_path: Path) -> None:
    root = tmp_path / "data"
    put_pair(root, "vis/a.png", "ir/a.png")
    put_pair(root, "vis/b.png", "ir/b.png", 1)
    lines = "2 0.5 0.5 0.25 0.25\n0 0.1 0.1 0.2 0.2\n"
    put(root / "labels" / "a.txt", lines)
    done = export(root, tmp_path / "numbered", "detection")
    assert [item.label is not None for item in done] == [True, False]
    assert (tmp_path / "numbered" / "labels" / "train" / "a.txt").read_text() == lines
    assert (tmp_path / "numbered" / "labels" / "train" / "b.txt").read_text() == ""  # a picture without objects
    described = yaml.safe_load((tmp_path / "numbered" / "data.yaml").read_text())
    assert described["names"] == {0: "class0", 1: "class1", 2: "class2"}
    assert described["val"] == "images/train"
    put(root / "labels" / "classes.txt", "person\ncar\nbus: red\n")
    export(root, tmp_path / "listed", "detection")
    assert yaml.safe_load((tmp_path / "listed" / "data.yaml").read_text())["names"][2] == "bus: red"
    with pytest.raises(ConfigError, match="class 2"):
        export(root, tmp_path / "few", "detection", names=("person", "car"))
    put(root / "labels" / "a.txt", "0 12 30 5 5\n")
    with pytest.raises(DatasetError, match=r"a\.txt"):
        export(root, tmp_path / "pixels", "detection")


def test_masks_of_msrs_stay_as_they_are_and_splits_are_listed(tmp_path: Path) -> None:
    root, out = tmp_path / "MSRS", tmp_path / "out"
    masks = {}
    for split, stem in (("train", "00001D"), ("train", "00002N"), ("test", "00001D")):
        put_pair(root, f"{split}/vi/{stem}.png", f"{split}/ir/{stem}.png")
        if stem == "00001D":
            mask = np.full((HEIGHT, WIDTH), 3 if split == "train" else 7, np.uint8)
            path = root / split / "Segmentation_labels" / f"{stem}.png"
            path.parent.mkdir(parents=True)
            cv2.imwrite(str(path), mask)
            masks[split] = path.read_bytes()
    done = export(root, out, "segmentation")
    assert [item.stem for item in done] == ["test_00001D", "train_00001D"]  # one stem in two splits, one without a mask
    for split in ("train", "test"):
        stem = f"{split}_00001D"
        assert (out / "masks" / split / f"{stem}.png").read_bytes() == masks[split]
        assert read_vis(out / "images" / split / f"{stem}.png").shape == (3, HEIGHT, WIDTH)
        assert (out / f"{split}.txt").read_text().split() == [stem]


def test_masks_of_mfnet_are_found(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 4), np.uint8)
    cv2.imwrite(str(tmp_path / "images" / "00001D.png"), pixels)
    cv2.imwrite(str(tmp_path / "labels" / "00001D.png"), pixels[..., 0] % 9)
    (item,) = export(tmp_path, tmp_path / "out", "segmentation")
    assert item.label == tmp_path / "labels" / "00001D.png"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object></annotation>", "cannot read"),
        ("<annotation><object><name>a</name></object></annotation>", "without bndbox"),
        (voc(("", 0, 0, 5, 5)), "no <name>"),
        (voc(("a", 0, 0, 5, 5), size=(1280, 1024)), "1280x1024"),
    ],
)
def test_annotations_that_do_not_fit_are_named(tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path / "a.xml", text)
    with pytest.raises(DatasetError, match=message):
        read_boxes(tmp_path / "a.xml", HEIGHT, WIDTH)


def test_data_sets_without_fitting_labels_say_so(tmp_path: Path) -> None:
    put_pair(tmp_path, "vis/a.png", "ir/a.png")
    with pytest.raises(DatasetError, match="no label"):
        plan_export(tmp_path, find_pairs(tmp_path), "segmentation")
    put(tmp_path / "labels" / "a.txt", "")
    put(tmp_path / "Annotations" / "a.xml", voc())
    with pytest.raises(DatasetError, match="several labels"):
        plan_export(tmp_path, find_pairs(tmp_path), "detection")
    with pytest.raises(ConfigError, match="detection or segmentation"):
        plan_export(tmp_path, find_pairs(tmp_path), "tracking")  # type: ignore[arg-type]
    cv2.imwrite(str(tmp_path / "labels" / "a.png"), np.zeros((HEIGHT, WIDTH + 1), np.uint8))
    with pytest.raises(DatasetError, match="65x40"):
        export(tmp_path, tmp_path / "out", "segmentation")
