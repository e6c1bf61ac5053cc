"""Names of pairs: as real data sets have them, as people mistake them, and at random in every layout."""

import random
import unicodedata
from collections.abc import Iterable
from typing import Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recofuse_images.names import (
    BOTH_SIDES,
    NO_PARTNER,
    READABLE_SUFFIXES,
    WRONG_SIDE,
    PairingError,
    Role,
    match_names,
    match_within,
)

# What a data set calls the two files of one scene, and the name that they have in common.
TWO_FOLDERS = {
    "equal names": ("0001.png", "0001.png", "0001"),
    "MSRS": ("00004N.png", "00004N.png", "00004N"),
    "other suffix and case": ("0001.PNG", "0001.jpeg", "0001"),
    "name in capitals": ("IMG_1.bmp", "img_1.tiff", "IMG_1"),
    "FLIR ADAS": ("FLIR_0001_RGB.jpg", "FLIR_0001.jpeg", "FLIR_0001"),
    "word on the infrared side": ("0001.png", "0001_thermal.png", "0001"),
    "nested": ("day/1.png", "day/1.png", "day/1"),
    "nested, other case": ("Day/1.png", "day/1.png", "Day/1"),
    "leading zeros": ("1.png", "0001.png", "1"),
    "leading zeros and words": ("1_vis.png", "0001_ir.png", "1"),
    "short word on one side": ("DJI_0001.JPG", "DJI_0001_T.JPG", "DJI_0001"),
    "a word that is no role": ("car_color_1.png", "car_color_1.png", "car_color_1"),
    "letters that are no role": ("T_1.png", "T_1.png", "T_1"),
    "a word in both": ("thermal_bath.png", "thermal_bath.png", "thermal_bath"),
    "composed and decomposed": ("caf\u00e9.png", "cafe\u0301.png", "caf\u00e9"),
    "other scripts": ("夜_可视_1.png", "夜_可视_1.tif", "夜_可视_1"),
}
ONE_FOLDER_TOO = {
    "suffix": ("0001_vis.png", "0001_ir.png", "0001"),
    "other separators": ("0001-VIS.png", "0001.ir.tif", "0001"),
    "space": ("street 7 visible.jpg", "street 7 infrared.jpg", "street 7"),
    "brackets": ("0001 (vis).png", "0001 (ir).png", "0001"),
    "prefix": ("vis_0001.png", "ir_0001.png", "0001"),
    "between": ("scene_VIS_12_crop.png", "scene_IR_12_crop.png", "scene_12_crop"),
    "grown together": ("VIS1.png", "IR1.png", "1"),
    "camel case": ("gateVis.png", "gateThermal.png", "gate"),
    "dotted": ("frame.0001.rgb.png", "frame.0001.nir.png", "frame.0001"),
    "TNO": ("Kaptein_1123_Vis.bmp", "Kaptein_1123_IR.bmp", "Kaptein_1123"),
    "TNO, folders of scenes": ("tank/VIS.tif", "tank/LWIR.tif", "tank"),
    "TNO, sequences": ("visual/1800v.bmp", "thermal/1800i.bmp", "1800"),
    "RGBT234": ("visible/00001v.jpg", "infrared/00001i.jpg", "00001"),
    "GTOT": ("v/00001v.png", "i/00001i.png", "00001"),
    "KAIST": ("set00/V000/visible/I00000.jpg", "set00/V000/lwir/I00000.jpg", "set00/V000/I00000"),
    "CVC-14": ("Day/Visible/Train/FramesPos/20_5.tif", "Day/FIR/Train/FramesPos/20_5.tif", "Day/Train/FramesPos/20_5"),
    "LLVIP": ("visible/train/010001.jpg", "infrared/train/010001.jpg", "train/010001"),
    "FLIR ADAS 1": ("train/RGB/FLIR_1.jpg", "train/thermal_8_bit/FLIR_1.jpeg", "train/FLIR_1"),
    "FLIR ADAS, aligned": ("FLIR_00002_RGB.jpg", "FLIR_00002_PreviewData.jpeg", "FLIR_00002"),
    "FLIR ADAS, one folder": ("FLIR_00002_RGB.jpg", "FLIR_00002.jpeg", "FLIR_00002"),
    "VEDAI": ("00000000_co.png", "00000000_ir.png", "00000000"),
    "DroneVehicle": ("trainimg/00001.jpg", "trainimgr/00001.jpg", "train/00001"),
    "VT5000": ("Test/RGB/1.jpg", "Test/T/1.jpg", "Test/1"),
    "PST900": ("rgb/44_bag.png", "thermal/44_bag.png", "44_bag"),
    "Freiburg": ("fl_rgb/fl_rgb_123_456.png", "fl_ir_aligned/fl_ir_aligned_123_456.png", "fl/fl_123_456"),
    "word in folder and name": ("visible/a_vis.png", "lwir/a_lwir.png", "a"),
    "a role word in the name": ("car_color_vis.png", "car_color_ir.png", "car_color"),
    "a name that is the other word": ("ir_vis.png", "ir_ir.png", "ir"),
    "DJI": ("DJI_0001_W.JPG", "DJI_0001_T.JPG", "DJI_0001"),
    "DJI, zoom": ("DJI_0001_Z.JPG", "DJI_0001_T.JPG", "DJI_0001"),
    "DJI, dated": ("DJI_20240229235959_0001_V.JPG", "DJI_20240229235959_0001_T.JPG", "DJI_20240229235959_0001"),
    "DJI, a second apart": ("DJI_20240229235959_01_W.JPG", "DJI_20240301000000_01_T.JPG", "DJI_20240229235959_01"),
    "DJI, named way point": (
        "DJI_20240101120000_0001_W_Gate.JPG",
        "DJI_20240101120001_0001_T_Gate.JPG",
        "DJI_20240101120000_0001_Gate",
    ),
    "DJI H20T": ("DJI_20200925130551_0001_WIDE.JPG", "DJI_20200925130551_0001_THRM.JPG", "DJI_20200925130551_0001"),
    "role words alone": ("VIS.png", "IR.png", "fused"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("vis", "ir", "name"), (TWO_FOLDERS | ONE_FOLDER_TOO).values(), ids=TWO_FOLDERS | ONE_FOLDER_TOO
)
def test_names_of_two_folders(vis: str, ir: str, name: str) -> None:
    (match,), left = match_names([vis, "lonely.png"], [ir])
    assert (match.name, match.vis, match.ir) == (name, vis, ir)
    assert [(item.name, item.role, item.reason) for item in left] == [("lonely.png", "vis", NO_PARTNER)]


@pytest.mark.parametrize(("vis", "ir", "name"), ONE_FOLDER_TOO.values(), ids=ONE_FOLDER_TOO)
def test_names_of_one_folder(vis: str, ir: str, name: str) -> None:
    for names in ([vis, ir, "lonely.png"], ["lonely.png", ir, vis]):
        (match,), left = match_within(names)
        assert (match.name, match.vis, match.ir) == (name, vis, ir)
        assert [(item.name, item.role, item.reason) for item in left] == [("lonely.png", None, NO_PARTNER)]


def test_names_that_are_no_pair() -> None:
    for vis, ir in [
        ("1.png", "2.png"),
        ("day/1.png", "night/1.png"),
        ("day/1.png", "1.png"),
        ("1_1_vis.png", "11_ir.png"),
        ("DJI_20240101120000_0001_W.JPG", "DJI_20240101120100_0001_T.JPG"),  # the number of another flight
        ("DJI_20240101120000_0001_W.JPG", "DJI_20240101120001_0002_T.JPG"),
        ("vis8.png", "thermal_9.png"),
        ("virus_1.png", "iris_1.png"),
        ("fl_1.png", "flir_1.png"),
    ]:
        assert match_names([vis], [ir])[0] == []
        assert match_within([vis, ir])[0] == []
    assert match_within(["1.png", "01.png"])[0] == []  # nothing says which one is infrared


def test_what_is_left_says_why() -> None:
    matches, left = match_names(["a.png", "b_ir.png", "c_vis_ir.png"], ["a.png", "d.png", "e_rgb.png"])
    assert [match.name for match in matches] == ["a"]
    assert {item.name: (item.role, item.reason) for item in left} == {
        "b_ir.png": ("vis", WRONG_SIDE),
        "c_vis_ir.png": ("vis", BOTH_SIDES),
        "d.png": ("ir", NO_PARTNER),
        "e_rgb.png": ("ir", WRONG_SIDE),
    }


def test_the_surest_rule_wins() -> None:
    # Folders that hold both sides each: equal names would fuse visible with visible.
    matches, left = match_names(["x_vis.png", "x_ir.png"], ["x_vis.png", "x_ir.png"])
    assert [(match.vis, match.ir) for match in matches] == [("x_vis.png", "x_ir.png")]
    assert len(left) == 2
    # Equal names before words that may mean something else, and before loosened numbers and cases.
    for names in (["T_1.png", "V_1.png"], ["1.png", "01.png"], ["A.png", "a.png"], ["a b.png", "a_b.png"]):
        assert [(match.vis, match.ir) for match in match_names(names, names)[0]] == [
            (name, name) for name in sorted(names)
        ]
    # Within one folder, what an earlier run has made of a pair is no rival of it.
    assert [match.name for match in match_within(["1_vis.png", "1_ir.png", "1.png"])[0]] == ["1"]


@pytest.mark.parametrize(
    ("vis", "ir", "candidates"),
    [
        (["0001_vis.png", "0001_rgb.png"], ["0001_ir.png"], "0001_rgb.png and 0001_vis.png both"),
        (["0001.png", "0001_vis.png"], ["0001_ir.png"], "0001.png and 0001_vis.png both"),
        (["a.png", "a.jpg"], ["a.png"], "a.jpg and a.png both"),
        (["a.png"], ["A.tif", "A.png"], "A.png and A.tif both"),
        (["1.png", "01.png"], ["001.png"], "01.png and 1.png both"),
        (["1.png", "01.png"], ["1.png", "001.png"], "01.png and 1.png both fit ir 001.png"),
        (["s_W.png", "s_Z.png"], ["s_T.png"], "s_W.png and s_Z.png both"),
        (["s_W.png"], ["s_T.png", "s_ir.png", "s_i.png"], "s_T.png, s_i.png and s_ir.png all"),
        (
            ["DJI_20240101120000_0001_W.JPG", "DJI_20240101120001_0001_Z.JPG"],
            ["DJI_20240101120001_0001_T.JPG"],
            "DJI_20240101120000_0001_W.JPG and DJI_20240101120001_0001_Z.JPG both",
        ),
    ],
)
def test_two_candidates_are_an_error_that_names_them(vis: list[str], ir: list[str], candidates: str) -> None:
    with pytest.raises(PairingError, match=candidates):
        match_names(vis, ir)


def test_two_candidates_in_one_folder() -> None:
    with pytest.raises(PairingError, match=r"^1_rgb.png and 1_vis.png both fit 1_ir.png"):
        match_within(["1_vis.png", "1_rgb.png", "1_ir.png"])
    assert {item.reason for item in match_within(["vis_a_ir.png", "ir_a_vis.png"])[1]} == {BOTH_SIDES}


def test_two_pairs_of_one_name_are_refused() -> None:
    with pytest.raises(
        PairingError, match=r"two pairs would be called a: a.png with a.png and a_vis.png with a_ir.png"
    ):
        match_names(["a.png", "a_vis.png"], ["a.png", "a_ir.png"])


# --- at random --------------------------------------------------------------------------------------------------------


Layout = tuple[str, str]
WORDS: list[Layout] = [
    ("vis", "ir"), ("VIS", "IR"), ("vi", "inf"), ("RGB", "thermal"), ("visible", "infrared"), ("color", "lwir"),
    ("colour", "mwir"), ("eo", "therm"), ("visual", "FIR"), ("RGB", "NIR"),
]  # fmt: skip
SHORT: list[Layout] = [("W", "T"), ("v", "i"), ("Z", "T"), ("co", "ir"), ("rgb", "t"), ("tv", "th")]
PATTERNS = ["{name}_{word}", "{word}-{name}", "{name}.{word}", "{word} {name}", "head_{word}_{name}", "{word}/{name}"]

# Scenes as people call them: letters, digits, other scripts, separators within. Role words may turn up among them.
scene = st.from_regex(r"\A[a-zA-Zäéñжの0-9]{1,6}([_ -][a-zA-Zäéñжの0-9]{1,5})?\Z")
scenes = st.lists(scene, min_size=1, max_size=7, unique_by=lambda name: loosened(name))
suffixes = st.sampled_from(sorted(READABLE_SUFFIXES | {suffix.upper() for suffix in READABLE_SUFFIXES}))
folders = st.sampled_from(["", "day/", "night/01/"])
EVERY_WORD = {word.casefold() for layout in (*WORDS, *SHORT) for word in layout} | {
    *(
        "ccd",
        "optical",
        "w",
        "v",
        "z",
        "wide",
        "zoom",
        "i",
        "t",
        "swir",
        "tir",
        "ther",
        "thrm",
        "irx",
        "infra",
        "thermo",
    ),
    *("previewdata", "img", "image", "reg", "cam", "bit"),
}


def loosened(name: str) -> str:
    """What the loosest rule leaves of a name: two scenes that agree in it may be refused, so none here do."""
    words = "".join(sign if sign.isalnum() else " " for sign in name.casefold()).split()
    return " ".join(word.lstrip("0") or "0" for word in words)


def has_role_word(name: str) -> bool:
    """Whether a name may be read as naming a camera, cut wherever letters, digits or cases change."""
    runs: list[str] = [""]
    for sign in name:
        kind = "digit" if sign.isdigit() else "letter" if sign.isalpha() else "other"
        before = runs[-1][-1:]
        same = before.isdigit() == (kind == "digit") and before.isalpha() == (kind == "letter")
        if not same or (before.islower() and sign.isupper()):
            runs.append("")
        runs[-1] += sign
    return any(run.casefold() in EVERY_WORD for run in (*runs, *name.replace("-", " ").replace("_", " ").split()))


def rendered(
    names: Iterable[str], pattern: str, words: Layout, endings: list[str], folder: str, form: Literal["NFC", "NFD"]
) -> list[tuple[str, str]]:
    texts = []
    for number, name in enumerate(names):
        vis, ir = (folder + pattern.format(name=name, word=word) for word in words)
        texts.append((f"{vis}{endings[2 * number]}", unicodedata.normalize(form, f"{ir}{endings[2 * number + 1]}")))
    return texts


layouts = st.tuples(
    st.sampled_from(PATTERNS), st.lists(suffixes, min_size=14, max_size=14), folders, st.sampled_from(["NFC", "NFD"])
)


@settings(deadline=None, max_examples=200)
@given(names=scenes, layout=layouts, words=st.sampled_from(WORDS), seed=st.integers(0, 99))
def test_pairs_come_back_from_any_layout(
    names: list[str], layout: tuple[str, list[str], str, Literal["NFC", "NFD"]], words: Layout, seed: int
) -> None:
    pattern, endings, folder, form = layout
    names = [name for name in names if not has_role_word(name)]
    expected = rendered(names, pattern, words, endings, folder, form)
    vis, ir = [pair[0] for pair in expected], [pair[1] for pair in expected]
    shuffle = random.Random(seed).shuffle
    shuffle(vis)
    shuffle(ir)
    for matches, left in (match_names(vis, ir), match_within([*vis, *ir])):
        assert {(match.vis, match.ir) for match in matches} == set(expected)
        assert left == []
        # The common name holds the folder and the scene, and no role word.
        assert {match.name.split("/")[-1].removeprefix("head_") for match in matches} == set(names)
        assert all(match.name.startswith(folder) for match in matches)


@settings(deadline=None, max_examples=100)
@given(names=scenes, layout=layouts, words=st.sampled_from(SHORT), seed=st.integers(0, 99))
def test_short_words_do_where_they_are_alone(
    names: list[str], layout: tuple[str, list[str], str, Literal["NFC", "NFD"]], words: Layout, seed: int
) -> None:
    pattern, endings, folder, form = layout
    assume("/{name}" not in pattern or set(words) <= {"v", "i", "W", "Z", "T", "t", "rgb"})
    names = [name for name in names if not has_role_word(name)]
    expected = rendered(names, pattern, words, endings, folder, form)
    everything = [name for pair in expected for name in pair]
    random.Random(seed).shuffle(everything)
    matches, left = match_within(everything)
    assert {(match.vis, match.ir) for match in matches} == set(expected)
    assert left == []


@settings(deadline=None, max_examples=200)
@given(names=scenes, layout=layouts)
def test_equal_names_pair_whatever_they_say(
    names: list[str], layout: tuple[str, list[str], str, Literal["NFC", "NFD"]]
) -> None:
    _, endings, folder, form = layout
    expected = rendered(names, "{name}", ("", ""), endings, folder, form)
    if sum(has_role_word(name) for name in names) > 1:  # vis_x and ir_x in both folders are two scenes or one
        return
    matches, left = match_names([pair[0] for pair in expected], [pair[1] for pair in expected])
    assert {(match.vis, match.ir) for match in matches} == set(expected)
    assert left == []


part = st.sampled_from(["vis", "ir", "VIS", "rgb", "T", "W", "v", "i", "a", "b", "A", "1", "01", "2", "img", "co"])
odd_name = st.builds(
    lambda parts, separator, suffix: separator.join(parts) + suffix,
    st.lists(part, min_size=1, max_size=3),
    st.sampled_from(["_", "-", "", "/"]),
    st.sampled_from([".png", ".jpg"]),
)
odd_names = st.lists(odd_name, max_size=9, unique=True)


def outcome(vis: list[str], ir: list[str] | None) -> object:
    try:
        return match_within(vis) if ir is None else match_names(vis, ir)
    except PairingError as error:
        return str(error)


@settings(deadline=None, max_examples=400)
@given(vis=odd_names, ir=odd_names, seed=st.integers(0, 99))
def test_no_name_is_used_twice_and_the_order_does_not_matter(vis: list[str], ir: list[str], seed: int) -> None:
    mixed_vis, mixed_ir = list(vis), list(ir)
    for mixed in (mixed_vis, mixed_ir):
        random.Random(seed).shuffle(mixed)
    two, one = outcome(vis, ir), outcome(vis, None)
    assert outcome(mixed_vis, mixed_ir) == two
    assert outcome(mixed_vis, None) == one
    if not isinstance(two, str):
        matches, left = match_names(vis, ir)
        used: list[tuple[Role | None, str]] = [("vis", match.vis) for match in matches]
        used += [("ir", match.ir) for match in matches] + [(item.role, item.name) for item in left]
        assert sorted(map(str, used)) == sorted(
            map(str, [*(("vis", name) for name in vis), *(("ir", name) for name in ir)])
        )
        assert len({match.name for match in matches}) == len(matches)
    if not isinstance(one, str):
        matches, left = match_within(vis)
        names = [name for match in matches for name in (match.vis, match.ir)] + [item.name for item in left]
        assert sorted(names) == sorted(vis)  # each once, so none with itself
