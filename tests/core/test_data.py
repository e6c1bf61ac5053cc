"""Folders written to disk, found, paired and read back."""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from recofuse_core.data import find_images, find_pairs, read_ir, read_pair, read_vis, to_float, to_uint8, write_image
from recofuse_core.errors import DatasetError, ShapeError

RED, GREEN, BLUE = 200, 100, 30


def put(root: Path, *names: str, value: int = 90, size: tuple[int, int] = (20, 24)) -> None:
    for name in names:
        write_image(root / name, torch.full((1, *size), value, dtype=torch.uint8))


def names(root: Path, split: str | None = None) -> list[str]:
    return [pair.name for pair in find_pairs(root, split=split)]


@pytest.mark.parametrize(
    ("vis", "ir"),
    [
        ("vis/a.png", "ir/a.jpg"),  # plain
        ("train/vi/a.png", "train/ir/a.png"),  # MSRS
        ("train/Visible/a.png", "train/Infrared/a.png"),  # FMB
        ("visible/train/a.jpg", "infrared/train/a.jpg"),  # LLVIP
        ("M3FD_Fusion/Vis/a.png", "M3FD_Fusion/Ir/a.png"),  # M3FD
        ("Test_Image/Test_haze/vi/a.png", "Test_Image/Test_haze/ir/a.png"),  # AWMM, test images
    ],
)
def test_layouts_of_clean_pairs_are_recognised(tmp_path: Path, vis: str, ir: str) -> None:
    put(tmp_path, vis, ir, "train/Label/a.png", "labels/a.png")
    (pair,) = find_pairs(tmp_path)
    assert (pair.name, pair.vis, pair.ir) == ("a", tmp_path / vis, tmp_path / ir)
    assert pair.vis_degraded is None
    assert pair.ir_degraded is None


@pytest.mark.parametrize(
    ("vis", "ir", "name", "source"),
    [
        ("vis/0001_vis.png", "ir/0001_ir.png", "0001", ""),
        ("Vis/VIS1.bmp", "Ir/IR1.bmp", "1", ""),  # TNO, NestFuse
        ("rgb/FLIR_1_RGB.jpg", "thermal/FLIR_1.jpeg", "FLIR_1", ""),  # FLIR ADAS 1
        ("visible/1.png", "infrared/01.png", "1", ""),
        ("visible/00001v.jpg", "infrared/00001i.jpg", "00001", ""),  # RGBT234
        ("v/00001v.png", "i/00001i.png", "00001", ""),  # GTOT
        ("VT5000/RGB/1.jpg", "VT5000/T/1.jpg", "1", "VT5000"),
        ("set00/V000/visible/I00000.jpg", "set00/V000/lwir/I00000.jpg", "I00000", "set00/V000"),  # KAIST
        ("Day/Visible/Train/1.tif", "Day/FIR/Train/1.tif", "1", "Day"),  # CVC-14
        ("train/RGB/FLIR_1.jpg", "train/thermal_8_bit/FLIR_1.jpeg", "FLIR_1", ""),
        ("seq/fl_rgb/fl_rgb_1_2.png", "seq/fl_ir_aligned/fl_ir_aligned_1_2.png", "fl_1_2", "seq"),  # Freiburg
        ("train/trainimg/1.jpg", "train/trainimgr/1.jpg", "1", ""),  # DroneVehicle
        ("Vehicles/00000000_co.png", "Vehicles/00000000_ir.png", "00000000", "Vehicles"),  # VEDAI
        ("FLIR_1_RGB.jpg", "FLIR_1_PreviewData.jpeg", "FLIR_1", ""),  # FLIR ADAS, aligned
        ("DJI_20240101120000_0001_W.JPG", "DJI_20240101120001_0001_T.JPG", "DJI_20240101120000_0001", ""),
        ("images/1_vis.png", "images/1_ir.png", "1", "images"),  # not packed, though they lie where MFNet's do
    ],
)
def test_names_that_differ_by_a_role_word(tmp_path: Path, vis: str, ir: str, name: str, source: str) -> None:
    put(tmp_path, vis, ir, "labels/1.png", "GT/1.png")
    (pair,) = find_pairs(tmp_path)
    assert (pair.name, pair.vis, pair.ir) == (name, tmp_path / vis, tmp_path / ir)
    assert pair.source == source
    assert (pair.vis.stem in pair.stems, pair.ir.stem in pair.stems, name in pair.stems) == (True, True, True)


def test_degraded_files_may_have_role_words_too(tmp_path: Path) -> None:
    put(tmp_path, "HQ/vis/1_vis.png", "HQ/ir/1_ir.png", "LQ/vis/01.png", "LQ/ir/1.png")
    (pair,) = find_pairs(tmp_path)
    assert (pair.vis_degraded, pair.ir_degraded) == (tmp_path / "LQ/vis/01.png", tmp_path / "LQ/ir/1.png")


def test_folders_of_unsure_names_do_not_stand_in_the_way(tmp_path: Path) -> None:
    put(tmp_path, "vis/a.png", "thermal/a.png")
    put(tmp_path, "rgb/a.png", "nir/a.png", "T/a.png", "other/rgb/a.png", "other/v/a.png")
    (pair,) = find_pairs(tmp_path)
    assert (pair.vis, pair.ir) == (tmp_path / "vis/a.png", tmp_path / "thermal/a.png")


def test_splits_of_one_folder_for_both(tmp_path: Path) -> None:
    put(tmp_path, "train/1_vis.png", "train/1_ir.png", "test/2_vis.png", "test/2_ir.png")
    assert names(tmp_path) == ["1", "2"]
    assert names(tmp_path, "test") == ["2"]
    with pytest.raises(DatasetError, match="'val'"):
        find_pairs(tmp_path, split="val")


def test_no_file_is_its_own_partner(tmp_path: Path) -> None:
    put(tmp_path, "vis/a.png")
    (tmp_path / "ir").symlink_to(tmp_path / "vis", target_is_directory=True)
    with pytest.raises(DatasetError, match="are one file"):
        find_pairs(tmp_path)
    assert cv2.imwrite(str(tmp_path / "vis/a.png"), np.full((8, 8, 4), 9, np.uint8))
    (files,) = find_pairs(tmp_path)
    assert set(read_pair(files).ir.flatten().tolist()) == {9}


@pytest.mark.parametrize(
    ("vis", "ir", "vis_degraded", "ir_degraded"),
    [
        ("FMB/vi/HQ/a.png", "FMB/ir/HQ/a.png", "FMB/vi/LQ/a.png", "FMB/ir/LQ/a.png"),
        ("HQ/vis/a.png", "HQ/ir/a.png", "LQ/vis/a.png", "LQ/ir/a.png"),
        ("Rain/gt_vi/a.png", "Rain/gt_ir/a.png", "Rain/vi/a.png", "Rain/ir/a.png"),
        ("vis/a.png", "ir/a.png", "vis_lq/a.png", "ir_lq/a.png"),
        ("gt_vi/a.png", "ir/a.png", "vi/a.png", None),
    ],
)
def test_layouts_with_degraded_inputs(
    tmp_path: Path, vis: str, ir: str, vis_degraded: str, ir_degraded: str | None
) -> None:
    put(tmp_path, vis, ir, value=200)
    put(tmp_path, *[name for name in (vis_degraded, ir_degraded) if name], value=50)
    (files,) = find_pairs(tmp_path)
    pair = read_pair(files)
    assert pair.vis.float().mean() == pair.ir.float().mean() == 200
    assert pair.vis_degraded is not None
    assert pair.vis_degraded.float().mean() == 50
    assert (pair.ir_degraded is None) == (ir_degraded is None)


def test_splits_and_sources(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for weather in ("Haze", "Rain"):
            put(tmp_path, f"{split}/{weather}/vi/1.png", f"{split}/{weather}/ir/1.png")
    put(tmp_path, "train/Haze/vi/only.png", "train/Haze/ir/only.png")
    assert names(tmp_path, "train") == ["only", "train/Haze/1", "train/Rain/1"]
    assert len(names(tmp_path)) == 5
    assert {pair.source for pair in find_pairs(tmp_path)} == {"Haze", "Rain"}
    with pytest.raises(DatasetError, match="'val'"):
        find_pairs(tmp_path, split="val")


def test_packed_files_of_mfnet(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    pixels = np.zeros((20, 24, 4), np.uint8)
    pixels[:] = (BLUE, GREEN, RED, 77)
    for stem in ("00001D", "00002N"):
        assert cv2.imwrite(str(tmp_path / "images" / f"{stem}.png"), pixels)
    (tmp_path / "train.txt").write_text("00002N\n", encoding="utf-8")
    assert names(tmp_path) == ["00001D", "00002N"]
    (files,) = find_pairs(tmp_path, split="train")
    pair = read_pair(files)
    assert files.name == "00002N"
    assert pair.vis[:, 0, 0].tolist() == [RED, GREEN, BLUE]
    assert pair.ir[:, 0, 0].tolist() == [77]
    with pytest.raises(DatasetError, match=r"test\.txt"):
        find_pairs(tmp_path, split="test")
    (tmp_path / "val.txt").write_text("00003D", encoding="utf-8")
    with pytest.raises(DatasetError, match="00003D"):
        find_pairs(tmp_path, split="val")
    put(tmp_path, "images/00004D.png")
    with pytest.raises(DatasetError, match="four channels"):
        read_pair(find_pairs(tmp_path)[-1])


def test_a_manifest_describes_the_pairs(tmp_path: Path) -> None:
    put(tmp_path, "val/vis/a.png", "val/ir/a.png", "val/vis/b.png", "val/ir/b.png")
    (tmp_path / "manifest.csv").write_text("name,dataset,time_of_day,vis_color\na,TNO,night,false\n", encoding="utf-8")
    for root in (tmp_path, tmp_path / "val"):
        first, second = find_pairs(root)
        assert (first.source, first.time_of_day, first.is_colour) == ("TNO", "night", False)
        assert (second.source, second.time_of_day, second.is_colour) == ("", "unknown", True)
    (tmp_path / "manifest.csv").write_text("file,size\nx,1\n", encoding="utf-8")
    assert [pair.source for pair in find_pairs(tmp_path)] == ["", ""]


def test_a_missing_partner_is_named(tmp_path: Path) -> None:
    put(tmp_path, "vis/a.png", "vis/b.png", "ir/a.png")
    with pytest.raises(DatasetError, match=r"ir lacks a partner for b \(such as .*vis.b\.png\)"):
        find_pairs(tmp_path)
    put(tmp_path, "ir/b.png", *[f"ir/extra{i}.png" for i in range(7)])
    with pytest.raises(DatasetError, match=r"vis lacks a partner for extra0, .*extra4 and 2 more"):
        find_pairs(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["vis/a.png"], "infrared partner"),
        (["Ir/a.png"], "visible partner"),
        (["LQ/vis/a.png", "LQ/ir/a.png"], "clean visible partner"),
        (["vis/a.png", "visible/a.png", "ir/a.png"], "claim the same place"),
        (["vis/a.png", "vis/a.jpg", "ir/a.png"], "share the stem 'a'"),
        (["vis/a_vis.png", "vis/a_rgb.png", "ir/a.png"], "a_rgb.png and a_vis.png both fit"),
        (["vis/a_ir.png", "ir/a_vis.png"], "named for the other side"),
        (["a_vis.png", "a_rgb.png", "a_ir.png"], "a_rgb.png and a_vis.png both fit a_ir.png"),
        (["a_vis.png", "a_ir.png", "b_vis.png"], r"lacks a partner for b_vis.png \(no partner\)"),
        (["fused/a.png"], "no image pairs"),
        (["vis_ir/a.png"], "no image pairs"),
        ([], "no image pairs"),
    ],
)
def test_unusable_folders_say_why(tmp_path: Path, files: list[str], message: str) -> None:
    put(tmp_path, *files)
    with pytest.raises(DatasetError, match=message):
        find_pairs(tmp_path)


def test_missing_folders_say_so(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="not a folder"):
        find_pairs(tmp_path / "none")
    with pytest.raises(DatasetError, match="not a folder"):
        find_images(tmp_path / "none")


def test_images_of_a_pair_must_agree_in_size(tmp_path: Path) -> None:
    put(tmp_path, "vis/a.png", size=(20, 24))
    put(tmp_path, "ir/a.png", size=(20, 25))
    (files,) = find_pairs(tmp_path)
    with pytest.raises(DatasetError, match=r"24x20.*25x20"):
        read_pair(files)


@settings(deadline=None, max_examples=10)
@given(height=st.integers(1, 40), width=st.integers(1, 40), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_png_files_come_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, channels: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("images") / "new" / "image.png"
    image = torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=_seeded(seed))
    write_image(path, to_float(image))
    assert torch.equal(read_vis(path) if channels == 3 else read_ir(path), image)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def store(path: Path, pixels: Iterable[Iterable[float]], dtype: type = np.uint8) -> Path:
    assert cv2.imwrite(str(path), np.asarray(pixels, dtype))
    return path


def test_channels_are_converted(tmp_path: Path) -> None:
    grey = store(tmp_path / "grey.png", [[10, 20], [30, 40]])
    assert torch.equal(read_vis(grey), torch.tensor([[10, 20], [30, 40]], dtype=torch.uint8).expand(3, 2, 2))
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[:] = (BLUE, GREEN, RED, 5)
    coloured = store(tmp_path / "alpha.png", pixels)
    assert read_vis(coloured)[:, 0, 0].tolist() == [RED, GREEN, BLUE]
    assert set(read_ir(coloured).flatten().tolist()) == {round(0.299 * RED + 0.587 * GREEN + 0.114 * BLUE)}


def test_deep_files_become_eight_bits(tmp_path: Path) -> None:
    ramp = np.linspace(7000, 9000, 4000).round().astype(np.uint16).reshape(40, 100)
    ramp[0, 0], ramp[0, 1] = 0, 65535  # a dead and a glowing pixel
    path = store(tmp_path / "deep.png", ramp, np.uint16)
    ir = read_ir(path).float()
    low, high = np.percentile(ramp, (0.5, 99.5))
    expected = ((torch.from_numpy(ramp.astype(np.float32)) - low) / (high - low)).clamp(0, 1) * 255
    assert (ir[0] - expected).abs().max() <= 1
    assert torch.equal(read_vis(path)[0], torch.from_numpy(np.rint(ramp / 257).astype(np.uint8)))
    flat = store(tmp_path / "flat.png", np.full((8, 8), 31000), np.uint16)
    assert set(read_ir(flat).flatten().tolist()) == {0}


def test_files_are_upright_and_read_as_the_service_reads_them(tmp_path: Path) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (24, 40, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = 6  # a camera on its side
    Image.fromarray(np.rot90(colours)).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(read_vis(tmp_path / "turned.png"), torch.from_numpy(colours).permute(2, 0, 1))
    degrees = np.linspace(-5, 40, 24 * 40).astype(np.float32).reshape(24, 40)
    degrees[:, :6] = np.nan
    ir = read_ir(store(tmp_path / "degrees.tiff", degrees, np.float32))
    assert not ir[0, :, :6].any()
    assert ir.max() == 255


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    empty, text, short = tmp_path / "empty.png", tmp_path / "text.png", tmp_path / "short.tiff"
    empty.touch()
    text.write_text("not an image", encoding="utf-8")
    store(tmp_path / "whole.tiff", np.zeros((40, 40)), np.float32)
    short.write_bytes((tmp_path / "whole.tiff").read_bytes()[:900])
    for path in (empty, text, short, tmp_path / "missing.png"):
        with pytest.raises(DatasetError, match=path.name):
            read_vis(path)


def test_writing_needs_an_image_and_a_known_suffix(tmp_path: Path) -> None:
    with pytest.raises(ShapeError):
        write_image(tmp_path / "a.png", torch.zeros(2, 4, 4))
    with pytest.raises(DatasetError, match=r"a\.nope"):
        write_image(tmp_path / "a.nope", torch.zeros(3, 4, 4))


def test_rounding_to_eight_bits() -> None:
    assert to_uint8(torch.tensor([-0.5, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0])).tolist() == [0, 0, 0, 1, 255, 255]
    everything = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(everything)), everything)


DEVELOPMENT_SET = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not DEVELOPMENT_SET.is_dir(), reason="the development set is not at hand")
def test_the_development_set_is_complete() -> None:
    pairs = find_pairs(DEVELOPMENT_SET, split="val")
    assert len(pairs) == 25
    assert all(pair.source for pair in pairs)
    assert {"day", "night"} <= {pair.time_of_day for pair in pairs}
    pair = read_pair(pairs[0])
    assert pair.vis.shape[0] == 3
    assert pair.ir.shape == (1, *pair.vis.shape[1:])
