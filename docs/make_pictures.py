"""Make the pictures of README.md, docs/gallery.md and docs/degradations.md, and the playground's sample pairs, from
generated scenes: `make pictures`.

Nothing of a data set enters them, so that they may be shipped and made again by anybody.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from benchmarks.processes import all_in_one
from recofuse_core import load_pretrained
from recofuse_core.data import to_uint8
from recofuse_core.degradations.physics import motion_blur
from recofuse_core.degradations.recipes import IrKind, Strength, VisKind, degrade_ir, degrade_vis
from recofuse_core.scenes.scene import Scene, make_scene
from service.command.files import contact_sheet, write_picture
from service.terms.settings import CodecSettings
from tests.browser import chromium, chromium_path

IMAGES = Path(__file__).parent / "images"
SAMPLES = Path(__file__).parents[1] / "service" / "faces" / "http" / "page" / "samples"
CODEC = CodecSettings(webp_quality=80)
SAMPLE_CODEC = CodecSettings(webp_quality=75)  # all of them travel inside the package, and noise packs badly
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Exhibit:
    """One entry of the gallery; the fields are the options of `recofuse sample`."""

    name: str
    seed: int
    vis: tuple[str, ...]
    ir: tuple[str, ...]
    degradation_seed: int = 3


GALLERY = (
    Exhibit("night", 7, ("low_light", "gaussian_noise"), ("low_contrast", "stripes", "gaussian_noise")),
    Exhibit("haze", 12, ("haze",), ("gaussian_noise",), 5),
    Exhibit("fog", 31, ("fog",), ("gaussian_noise",), 6),
    Exhibit("rain", 26, ("downpour",), ("gaussian_noise",), 4),
    Exhibit("snow", 44, ("snowfall",), ("low_contrast",), 2),
    Exhibit("stripes", 21, ("poisson_noise",), ("stripes",), 8),
    Exhibit("contrast", 33, ("low_light",), ("low_contrast",), 2),
    Exhibit("blur", 40, ("blur", "jpeg"), ("blur", "gaussian_noise"), 6),
    Exhibit("everything", 58, ("haze", "colour_cast", "gaussian_noise"), ("low_contrast", "stripes", "jpeg"), 9),
)

# The playground's; named in service/faces/http/page/page.js.
PLAYGROUND = (
    Exhibit("night", 7, ("low_light", "gaussian_noise"), ("low_contrast", "stripes", "gaussian_noise")),
    Exhibit("haze", 12, ("haze",), ("gaussian_noise",), 5),
    Exhibit("noise", 21, ("poisson_noise",), ("stripes",), 8),
    Exhibit("dusk", 33, ("low_light",), ("low_contrast",), 2),
)


def pixels(image: Tensor) -> Pixels:
    """(C, H, W) in [0, 1] to (H, W, 3) or (H, W) levels."""
    levels = to_uint8(image).permute(1, 2, 0).contiguous().numpy()
    return levels[..., 0] if levels.shape[2] == 1 else levels


def degraded(exhibit: Exhibit, scene: Scene) -> tuple[Tensor, Tensor]:
    """What the cameras deliver of an exhibit's scene: vis (3, H, W) and ir (1, H, W) in [0, 1]."""
    generator = Generator().manual_seed(exhibit.degradation_seed)
    vis = degrade_vis(scene.vis, generator, kinds=exhibit.vis).image
    return vis, degrade_ir(scene.ir, generator, kinds=exhibit.ir).image


def make_gallery() -> None:
    """Degraded inputs, restored inputs and the fused image of every exhibit."""
    model = load_pretrained("compact")
    for exhibit in GALLERY:
        scene = make_scene(exhibit.seed)
        vis, ir = degraded(exhibit, scene)
        result = model.fuse(vis[None], ir[None])
        if result.vis is None or result.ir is None or result.fused is None:
            raise RuntimeError("the model left an output out")
        rows = [
            [
                ("visible, degraded", pixels(vis)),
                ("visible, restored", pixels(result.vis[0])),
                ("restored and fused", pixels(result.fused[0])),
            ],
            [
                ("infrared, degraded", pixels(ir)),
                ("infrared, restored", pixels(result.ir[0])),
                ("visible, as it was before", pixels(scene.vis)),
            ],
        ]
        write_picture(IMAGES / f"gallery-{exhibit.name}.webp", contact_sheet(rows), CODEC)


def make_degradations() -> None:
    """Every kind alone, at strong strength, on one crop."""
    scene = make_scene(7, 320, 448)
    for modality, clean, kinds, degrade in (
        ("vis", scene.vis, list(VisKind), degrade_vis),
        ("ir", scene.ir, list(IrKind), degrade_ir),
    ):
        cells = [("clean", pixels(clean))]
        for kind in kinds:
            low = degrade(clean, Generator().manual_seed(1), "strong", kinds=[kind]).image
            cells.append((str(kind), pixels(low)))
            if kind == "blur":
                length = 13.0 if modality == "vis" else 7.0
                cells[-1:] = [("blur: defocus", pixels(low)), ("blur: motion", pixels(motion_blur(clean, length, 0.4)))]
        rows = [cells[start : start + 4] for start in range(0, len(cells), 4)]
        write_picture(IMAGES / f"degradations-{modality}.webp", contact_sheet(rows), CODEC)


def make_strengths() -> None:
    """Composite recipes of the same kinds at the three strengths."""
    scene = make_scene(7, 320, 448)
    strengths: tuple[Strength, ...] = ("light", "medium", "strong")
    rows = []
    for name, clean, kinds, degrade in (
        ("haze, gaussian_noise, jpeg", scene.vis, ("haze", "gaussian_noise", "jpeg"), degrade_vis),
        ("low_contrast, stripes, gaussian_noise", scene.ir, ("low_contrast", "stripes", "gaussian_noise"), degrade_ir),
    ):
        cells = [(name, pixels(clean))]
        for strength in strengths:
            cells.append((strength, pixels(degrade(clean, Generator().manual_seed(2), strength, kinds=kinds).image)))
        rows.append(cells)
    write_picture(IMAGES / "degradations-strengths.webp", contact_sheet(rows), CODEC)


def make_samples() -> None:
    """The degraded pairs that the playground offers."""
    for exhibit in PLAYGROUND:
        for role, image in zip(("vis", "ir"), degraded(exhibit, make_scene(exhibit.seed, 384, 512)), strict=True):
            write_picture(SAMPLES / f"{exhibit.name}-{role}.webp", pixels(image), SAMPLE_CODEC)


def make_screenshot(path: str) -> None:
    """The playground after a fusion by the packaged weights, in the Chromium at `path`."""
    with all_in_one({"grpc": {"port": -1}, "engine": {"warm_up_sizes": "512x384"}}) as stack, chromium(path) as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 800}, color_scheme="light")
        page.goto("http://{}:{}".format(*stack.address))
        page.get_by_role("button", name="Dusk").click()
        page.locator("#vis-note", has_text="dusk").wait_for()
        page.click("#fuse")
        page.locator("#outcome").wait_for()
        page.evaluate("scrollTo(0, 0)")
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    write_picture(IMAGES / "playground.webp", np.asarray(shot), CODEC)


if __name__ == "__main__":
    make_degradations()
    make_strengths()
    make_gallery()
    make_samples()
    if (path := chromium_path()) is None:
        raise SystemExit("all pictures are made but the playground's: no Chromium is installed")
    make_screenshot(path)
