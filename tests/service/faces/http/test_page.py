"""The playground in a real Chromium against real `recofuse serve` processes. Skipped where there is no Chromium."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Browser, Locator, Page, Route, expect

from benchmarks.processes import all_in_one
from recofuse_images.colours import greyed, overlaid
from recofuse_images.measures import outlined
from recofuse_rigs.rig import Distortion, Rig, corners_of, flat, from_json, mapped, matrix_of, to_json
from recofuse_rigs.warp import warp_of
from service.command.environment import API_KEY_VARIABLE
from service.command.processes import serve_all_in_one
from service.terms.settings import Settings
from service.work.engine import NullEngine
from tests.browser import chromium, chromium_path
from tests.fakes import TellingCodec, file_of, pair, picture

ROOT = Path(__file__).parents[4]
BROWSER = chromium_path()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt install chromium)")

PATIENCE_MS = 60_000  # of every wait; a busy machine may be slow
QUIET = {"grpc": {"port": -1}, "worker": {"metrics_port": -1}}
VIS, IR = pair(128, 96)

# Where focus is can be seen: an outline on the element, or on what stands for it beside it.
HAS_OUTLINE = """() => {
  const focused = document.activeElement;
  const outlined = (element, part) => getComputedStyle(element, part).outlineStyle === "solid";
  return focused === document.body || [focused, ...focused.parentElement.children].some(element =>
    outlined(element, "") || outlined(element, "::after"));
}"""

TO_FIT = np.array([[1.2, 0.0, 16.1], [0.0, 1.2, 0.1], [0.0, 0.0, 1.0]])  # 80x80 in the middle of 128x96

Opener = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert BROWSER is not None
    expect.set_options(timeout=PATIENCE_MS)
    with chromium(BROWSER) as browser:
        yield browser


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server whose engine returns its input."""
    with all_in_one({**QUIET, "engine": {"kind": "null"}}) as stack:
        yield "http://{}:{}".format(*stack.address)


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opener]:
    """`opened(address, width=..., errors=..., **context)`: the page, with its sample loaded.

    Afterwards no request may have left the server and the console must be silent, but for `errors` refused requests.
    """
    checks: list[Callable[[], None]] = []

    def open_page(address: str, *, width: int = 1280, height: int = 900, errors: int = 0, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        urls: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: urls.append(request.url))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))

        def check() -> None:
            assert [url for url in urls if not url.startswith((f"{address}/", f"blob:{address}/"))] == []
            refused = [text for text in complaints if text.startswith("Failed to load resource: the server responded")]
            assert [text for text in complaints if text not in refused] == []
            assert len(refused) == errors
            context.close()

        page.goto(address)
        expect(page.locator("#stage img").first).to_be_visible()
        checks.append(check)
        return page

    yield open_page
    for check in checks:
        check()


def give(page: Page, vis: tuple[str, bytes], ir: tuple[str, bytes]) -> None:
    for role, (name, content) in (("vis", vis), ("ir", ir)):
        page.set_input_files(f"#{role}", {"name": name, "mimeType": "application/octet-stream", "buffer": content})
        expect(page.locator(f"#{role}-note strong")).to_have_text(name)


def fuse(page: Page) -> None:
    page.click("#fuse")
    expect(page.locator("#outcome")).to_be_visible()


def downloaded(page: Page, name: str) -> bytes:
    with page.expect_download() as download:
        page.get_by_role("link", name=name).click()
    return Path(download.value.path()).read_bytes()


def pixels(content: bytes) -> NDArray[Any]:
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    assert decoded is not None
    return np.asarray(decoded)


def line(page: Page) -> int:
    return int(page.get_by_role("slider").get_attribute("aria-valuenow") or -1)


def zoom(page: Page) -> int:
    return int(page.locator("#zoom").inner_text().removesuffix(" %"))


def until(is_so: Callable[[], bool]) -> None:
    """Not by the page's own means: its policy lets no string become code."""
    end = time.monotonic() + PATIENCE_MS / 1000
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_pair_is_fused_by_the_real_model_as_by_any_other_client(opened: Opener) -> None:
    engine = {"model": "compact", "device": "cpu", "num_threads": 1, "warm_up_sizes": "128x96"}
    with all_in_one({**QUIET, "engine": engine}) as stack:
        address = "http://{}:{}".format(*stack.address)
        page = opened(address)
        expect(page.locator("#model")).to_contain_text("compact")
        give(page, ("street.vis.png", VIS), ("street.ir.png", IR))
        page.fill("[name=steps]", "2")
        page.fill("[name=seed]", "5")
        fuse(page)
        assert page.locator("#times th").all_inner_texts() == [
            "Decoding", "Queue", "Batching", "Model", "Encoding", "In all",
        ]  # fmt: skip
        answer = httpx.post(
            f"{address}/v1/fuse",
            files={"vis": VIS, "ir": IR},
            data={"output": "all", "steps": "2", "seed": "5"},
            timeout=60,
            trust_env=False,
        )
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            for part, name in (("fused", "fused"), ("vis", "vis-restored"), ("ir", "ir-restored")):
                ours = pixels(downloaded(page, f"street-{name}.png"))
                np.testing.assert_array_equal(ours, pixels(archive.read(f"{part}.png")))
                assert ours.shape[:2] == (96, 128)
        with zipfile.ZipFile(io.BytesIO(downloaded(page, "street-recofuse.zip"))) as archive:
            assert archive.testzip() is None


def test_a_sample_is_picked_and_compared(opened: Opener, address: str) -> None:
    page = opened(address)
    button = page.get_by_role("button", name="Haze")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#vis-note strong")).to_have_text("haze-vis.webp")
    fuse(page)
    expect(page.locator("#phase")).to_contain_text("Fused in")
    assert page.locator("#left option").all_inner_texts() == [
        "Visible, as given", "Infrared, as given", "Visible, restored", "Infrared, restored", "Fused",
    ]  # fmt: skip
    assert (page.locator("#left").input_value(), page.locator("#right").input_value()) == ("vis-in", "fused")
    assert page.evaluate("[...document.querySelectorAll('#stage img')].map(image => image.naturalWidth)") == [512, 512]
    page.select_option("#left", "ir-in")
    assert page.locator("#stage img").first.get_attribute("alt") == "Infrared, as given"
    # Without another picture the result stays; a new pair takes it away, for it would be compared with the wrong one.
    page.get_by_role("button", name="Dusk").click()
    expect(page.locator("#outcome")).to_be_hidden()


def test_a_bad_file_shows_the_servers_own_message(opened: Opener, address: str) -> None:
    page = opened(address, errors=2)
    hostile = "<img src=x onerror=alert(1)>.png"
    give(page, (hostile, b"no picture at all, but long enough to be looked at"), ("ir.png", IR))
    page.click("#fuse")
    files = {"vis": b"no picture at all, but long enough to be looked at", "ir": IR}
    expected = httpx.post(f"{address}/v1/fuse", files=files, trust_env=False).json()
    problem = page.get_by_role("alert")
    expect(problem).to_contain_text(expected["title"])
    expect(problem).to_contain_text(expected["detail"])
    # An option that cannot be is the server's to refuse as well; names and messages are only ever text.
    give(page, (hostile, VIS), ("ir.png", IR))
    page.fill("[name=steps]", "many")
    page.click("#fuse")
    expect(problem).to_contain_text("steps")
    assert page.locator("#form img[src=x]").count() == 0
    page.fill("[name=steps]", "")
    fuse(page)
    expect(page.locator("#problem")).to_be_empty()


def test_what_arrives_late_does_not_replace_what_was_fused(opened: Opener, address: str) -> None:
    page = opened(address)
    held: list[Route] = []
    page.route("**/samples/dusk-ir.webp", lambda route: held.append(route))
    page.get_by_role("button", name="Dusk").click()
    until(lambda: page.locator("#phase").count() == 1 and bool(held))
    fuse(page)
    fused = page.locator("#vis-note strong").inner_text()
    assert not fused.startswith("dusk")
    with page.expect_response("**/samples/dusk-ir.webp") as late:
        held[0].continue_()
    late.value.finished()
    page.wait_for_timeout(300)
    expect(page.locator("#outcome")).to_be_visible()
    expect(page.locator("#vis-note strong")).to_have_text(fused)
    # Two own files that are chosen at once do not put each other off.
    page.evaluate(
        """files => {
          for (const [role, bytes] of files) {
            const chosen = new DataTransfer();
            chosen.items.add(new File([new Uint8Array(bytes)], `${role}.png`));
            document.getElementById(role).files = chosen.files;
            document.getElementById(role).dispatchEvent(new Event("change"));
          }
        }""",
        [["vis", list(VIS)], ["ir", list(IR)]],
    )
    expect(page.locator("#vis-note strong")).to_have_text("vis.png")
    expect(page.locator("#ir-note strong")).to_have_text("ir.png")


def test_a_missing_picture_is_asked_for_without_a_request(opened: Opener, address: str) -> None:
    page = opened(address)
    page.set_input_files("#vis", {"name": "only.png", "mimeType": "image/png", "buffer": VIS})
    expect(page.locator("#ir-note")).to_have_text("Drop a file or choose one")
    page.click("#fuse")
    expect(page.get_by_role("alert")).to_contain_text("infrared")
    expect(page.locator("#ir")).to_be_focused()


def test_two_files_that_are_dropped_find_their_places(opened: Opener, address: str) -> None:
    page = opened(address)
    page.evaluate(
        """files => {
          const dropped = new DataTransfer();
          for (const [name, bytes] of files) dropped.items.add(new File([new Uint8Array(bytes)], name));
          for (const kind of ["dragenter", "drop"])
            document.querySelector("main").dispatchEvent(
              new DragEvent(kind, { dataTransfer: dropped, bubbles: true, cancelable: true }));
        }""",
        [["road_thermal.png", list(IR)], ["road.png", list(VIS)]],
    )
    expect(page.locator("#vis-note strong")).to_have_text("road.png")
    expect(page.locator("#ir-note strong")).to_have_text("road_thermal.png")
    page.click("#swap")
    expect(page.locator("#vis-note strong")).to_have_text("road_thermal.png")


def test_everything_is_reached_and_seen_by_keyboard_alone(opened: Opener, address: str) -> None:
    page = opened(address)
    seen: list[str] = []

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            seen.append(page.evaluate("document.activeElement.id || document.activeElement.name || ''"))
            assert page.evaluate(HAS_OUTLINE), seen[-1]
            if page.evaluate(f"document.activeElement.matches({selector!r})"):
                return
        raise AssertionError(f"no way to {selector}; passed {seen}")

    tab_to("[data-name=noise]")
    page.keyboard.press("Enter")
    expect(page.locator("#vis-note strong")).to_have_text("noise-vis.webp")
    tab_to("[name=output]")
    page.keyboard.press("ArrowRight")
    tab_to("[name=seed]")
    page.keyboard.type("7")
    tab_to("#fuse")
    page.keyboard.press("Enter")
    expect(page.locator("#outcome")).to_be_visible()
    expect(page.locator("#fuse")).to_be_focused()  # after Cancel, which has gone
    tab_to("#left")
    tab_to("[role=slider]")
    page.keyboard.press("ArrowRight")
    assert line(page) == 52
    page.keyboard.press("Home")
    assert line(page) == 0
    page.keyboard.press("End")
    page.keyboard.press("PageDown")
    assert line(page) == 90
    fitted = zoom(page)
    page.keyboard.press("+")
    assert zoom(page) > fitted
    page.keyboard.press("0")
    assert zoom(page) == fitted
    tab_to("#files a")
    tab_to("#copy")
    assert {"vis", "ir", "swap", "sampler", "format", "steps", "vis_range", "ir_range", "zoom-in", "stage"} <= set(seen)
    assert page.locator("input:not([aria-label]), select:not([aria-label])").evaluate_all(
        "controls => controls.filter(control => !control.labels.length).length"
    ) == 0  # fmt: skip


def test_the_line_and_the_zoom_follow_the_pointer(opened: Opener, address: str) -> None:
    page = opened(address)
    fuse(page)
    handle = page.get_by_role("slider")
    stage = page.locator("#stage").bounding_box()
    assert stage is not None
    middle = (stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2)
    assert line(page) == 50
    handle.hover()
    page.mouse.down()
    page.mouse.move(stage["x"] + stage["width"] / 4, middle[1], steps=4)
    page.mouse.up()
    assert line(page) == 25
    assert page.locator(".over").evaluate("element => element.style.clipPath").startswith("inset(0px 0px 0px 25")
    fitted = zoom(page)
    page.mouse.move(middle[0] + 100, middle[1] + 50)
    page.mouse.wheel(0, -400)  # the stage was clicked, so the wheel is its own
    until(lambda: zoom(page) > 2 * fitted)
    before = page.locator("#stage img").first.evaluate("image => image.style.transform")
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1] + 50, steps=2)
    page.mouse.up()
    assert page.locator("#stage img").first.evaluate("image => image.style.transform") != before
    assert line(page) == 25  # a zoomed picture is what moves
    page.check("[name=layout][value=panes]")
    places = page.locator("#stage .pane").evaluate_all(
        """panes => panes.map(pane => {
          const image = pane.querySelector("img"), [x, y, s] = image.style.transform.match(/[-\\d.]+/g).map(Number);
          const middle = [(pane.clientWidth / 2 - x) / s / parseFloat(image.style.width),
            (pane.clientHeight / 2 - y) / s / parseFloat(image.style.height)];
          return [s, ...middle].map(value => value.toFixed(3));
        })"""
    )
    assert len(places) == 5
    assert len({tuple(place) for place in places}) == 1  # in step
    assert float(places[0][0]) > 2
    page.click("#zoom-fit")
    assert page.locator("#stage img").first.evaluate("image => image.style.transform").endswith("scale(1)")


def test_two_fingers_zoom(opened: Opener, address: str) -> None:
    page = opened(address, width=360, height=740, has_touch=True)
    page.locator("#stage").scroll_into_view_if_needed()
    stage = page.locator("#stage").bounding_box()
    assert stage is not None
    fitted = zoom(page)
    touch = page.context.new_cdp_session(page)
    x, y = stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2
    for kind, spread in (("touchStart", 20), ("touchMove", 30), ("touchMove", 60), ("touchMove", 80)):
        points = [{"x": x - spread, "y": y, "id": 0}, {"x": x + spread, "y": y, "id": 1}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    until(lambda: zoom(page) > 2 * fitted)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_width_overflows_and_each_scheme_is_its_own(opened: Opener, address: str, scheme: str) -> None:
    page = opened(address, color_scheme=scheme, reduced_motion="reduce")
    page.locator("#options").evaluate("details => { details.open = true; }")
    give(page, (f"{'a-very-long-name-' * 12}.png", VIS), ("ir.png", IR))
    page.select_option("[name=rig]", label="laid by hand")
    fuse(page)
    for width in (320, 360, 768, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        for layout in ("slider", "panes"):
            page.check(f"[name=layout][value={layout}]")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (width, layout)
    ground, ink = page.evaluate(
        "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
    )
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ground, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")
    assert page.evaluate("getComputedStyle(document.getElementById('bar')).animationName") == "none"


def test_deep_and_tiff_pictures_are_fused_without_a_preview(opened: Opener, address: str) -> None:
    page = opened(address)
    deep = (picture(128, 96, channels=1).astype(np.uint16) + 7000) * 2
    give(page, ("street.tiff", file_of(picture(128, 96), ".tiff")), ("thermal.png", file_of(deep)))
    expect(page.locator("#vis-note")).to_contain_text("TIFF: no preview")
    expect(page.locator("#ir-note")).to_contain_text("16 bits: no preview")
    expect(page.locator("#stage")).to_contain_text("No preview")
    page.fill("[name=ir_range]", "14000,14510")
    page.fill("[name=vis_range]", "40,50")
    expect(page.locator("#command")).to_contain_text("vis_range=40,50")
    fuse(page)
    assert page.locator("#left option").all_inner_texts() == ["Visible, restored", "Infrared, restored", "Fused"]
    expected = np.rint(np.clip((picture(128, 96) - 40.0) / 10, 0, 1) * 255)  # the null engine gives back its input
    np.testing.assert_array_equal(pixels(downloaded(page, "street-vis-restored.png"))[..., ::-1], expected)
    assert pixels(downloaded(page, "street-fused.png")).shape == (96, 128, 3)


@contextlib.contextmanager
def telling(told: dict[bytes, Any]) -> Iterator[str]:
    """A server in this process, whose codec says of these infrared files what is told of them."""

    async def serve() -> None:
        stop.append((asyncio.get_running_loop(), asyncio.Event()))
        await serve_all_in_one(Settings.from_values(values), NullEngine(), stop[0][1], addresses.put)

    values = {**QUIET, "http": {"port": 0}}
    addresses: queue.Queue[str] = queue.Queue()
    stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    with pytest.MonkeyPatch.context() as patch:
        TellingCodec.serve(patch, told)
        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        try:
            yield addresses.get(timeout=60)
        finally:
            loop, event = stop[0]
            loop.call_soon_threadsafe(event.set)
            thread.join(60)


def test_what_was_read_of_the_infrared_file_is_shown(opened: Opener) -> None:
    odd, raw = (file_of(picture(128, 96, channels=1, seed=seed)) for seed in (7, 8))
    hostile = "ir: <b>in colour</b>, 100%"
    with telling({odd: ("palette", (hostile, "ir: 暖かい")), raw: ("raw", ())}) as address:
        page = opened(address)
        warnings, facts = page.locator("#warnings"), page.locator("#facts")
        for name, ir, read, told in (
            ("odd.png", odd, "a false-colour picture", [hostile, "ir: 暖かい"]),
            ("raw.png", raw, "the camera’s own values", []),
            ("grey.png", IR, None, []),
        ):
            give(page, ("street.png", VIS), (name, ir))
            expect(warnings).to_be_hidden()
            fuse(page)
            assert page.locator("#warnings li").all_inner_texts() == told
            expect(warnings).to_be_visible(visible=bool(told))
            expect(page.locator("#phase")).to_have_text(re.compile(r"with warnings$" if told else r"s$"))
            if read is None:
                expect(facts).not_to_contain_text("Infrared read")
            else:
                expect(facts).to_contain_text(f"Infrared read: {read}")


def test_a_rig_is_chosen_where_there_are_any(opened: Opener, address: str, tmp_path: Path) -> None:
    page = opened(address)
    expect(page.locator("#model")).not_to_be_empty()
    assert page.locator("[name=rig] option").all_inner_texts() == ["none", "laid by hand"]
    rig = Rig((128, 96), (80, 80), (0.8, 0.0, 30.0, 0.0, 0.8, 10.0, 0.0, 0.0, 1.0), is_sure=False)
    (tmp_path / "roof.json").write_text(to_json(rig))
    with all_in_one({**QUIET, "engine": {"kind": "null"}, "rigs": {"directory": str(tmp_path)}}) as stack:
        page = opened("http://{}:{}".format(*stack.address))
        expect(page.locator("[name=rig] option")).to_have_text(["none", "laid by hand", "roof, covers 33 %, unsure"])
        give(page, ("street.png", VIS), ("ir.png", file_of(picture(80, 80, channels=1))))
        page.select_option("[name=rig]", "roof")
        page.select_option("[name=align]", "refine")
        expect(page.locator("#command")).to_contain_text("rig=roof")
        expect(page.locator("#command")).to_contain_text("align=refine")
        fuse(page)
        expect(page.locator("#facts")).to_contain_text(re.compile(r"Infrared: residual .*, moved 0\.0 px\."))
        (warning,) = page.locator("#warnings li").all_inner_texts()
        assert "unsure" in warning
        assert pixels(downloaded(page, "street-fused.png")).shape == (96, 128, 3)


def laid(page: Page) -> NDArray[np.float64]:
    """The matrix of what is laid by hand."""
    return matrix_of(page.locator("#aligner .matrix").inner_text())


def corner(page: Page, name: str) -> tuple[float, float]:
    x, y = (float(page.get_by_label(f"{name}, {axis}", exact=True).input_value()) for axis in "xy")
    return x, y


def drag(page: Page, handle: Locator, x: float, y: float) -> None:
    box = handle.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + x, box["y"] + box["height"] / 2 + y, steps=3)
    page.mouse.up()


def test_infrared_is_laid_by_hand_and_fused_so(opened: Opener, address: str) -> None:
    page = opened(address)
    ir = picture(80, 80, channels=1)
    give(page, ("street.png", VIS), ("ir.png", file_of(ir)))
    expect(page.locator("#aligner")).to_be_hidden()
    page.select_option("[name=rig]", label="laid by hand")
    np.testing.assert_allclose(laid(page), TO_FIT)
    ring, upper_left = page.get_by_role("button", name="All of infrared"), page.get_by_role("button", name="Upper left")
    ring.focus()
    for keys, moved in (("ArrowRight", (17.1, 0.1)), ("Shift+ArrowDown", (17.1, 10.1)), ("ArrowUp", (17.1, 9.1))):
        page.keyboard.press(keys)
        assert corner(page, "Upper left") == moved
        assert laid(page)[:2, 2].tolist() == pytest.approx(moved)
    page.keyboard.press("-")
    np.testing.assert_allclose(laid(page)[:2, :2], np.eye(2) * 1.2 / 1.01, atol=1e-7)
    page.keyboard.press("+")
    upper_left.focus()
    page.keyboard.press("Shift+ArrowLeft")
    assert corner(page, "Upper left") == (7.1, 9.1)
    assert corner(page, "Lower right") == (111.9, 103.9)
    assert abs(laid(page)[2, :2]).max() > 1e-6  # no longer straight
    page.get_by_label("Lower right, y").fill("99,5")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    np.testing.assert_allclose(mapped(laid(page), corners_of((80, 80)))[[0, 2]], [[7.1, 9.1], [111.9, 99.5]], atol=1e-5)
    # A place that folds the picture over is none.
    page.get_by_label("Upper left, x").fill("150")
    page.keyboard.press("Tab")
    expect(page.locator("#aligner .told")).to_contain_text("folded")
    assert corner(page, "Upper left") == (7.1, 9.1)
    scale = page.locator("#aligner .vis").evaluate("image => image.getBoundingClientRect().width / 128")
    before = corner(page, "Upper right")
    drag(page, page.get_by_role("button", name="Upper right"), -20, 10)
    after = corner(page, "Upper right")
    assert np.subtract(after, before) == pytest.approx([-20 / scale, 10 / scale], abs=0.06)
    drag(page, ring, 15, 0)
    assert np.subtract(corner(page, "Upper right"), after) == pytest.approx([15 / scale, 0], abs=0.06)
    # What is shown is where the matrix lays it: the middle of every handle, and the bounds of the picture.
    boxes = {name: page.locator(f"#aligner {name}").bounding_box() for name in (".vis", ".ir")}
    placed = mapped(laid(page), np.array([[-0.5, -0.5], [79.5, -0.5], [79.5, 79.5], [-0.5, 79.5]])) + 0.5
    vis_box, ir_box = boxes[".vis"], boxes[".ir"]
    assert vis_box is not None
    assert ir_box is not None
    shown = placed.min(axis=0) * scale + (vis_box["x"], vis_box["y"])
    assert (ir_box["x"], ir_box["y"]) == pytest.approx(tuple(shown), abs=0.1)
    assert (ir_box["width"], ir_box["height"]) == pytest.approx(tuple(np.ptp(placed, axis=0) * scale), abs=0.1)
    matrix = laid(page)
    expect(page.locator("#command")).to_contain_text(
        f"rig={page.locator('#aligner .matrix').inner_text().replace(' ', '')}"
    )
    fuse(page)
    rig = Rig((128, 96), (80, 80), flat(matrix))
    np.testing.assert_array_equal(pixels(downloaded(page, "street-ir-restored.png")), warp_of(rig).apply(ir))
    saved = from_json(downloaded(page, "rig.json"))
    np.testing.assert_allclose(saved.array, matrix, atol=1e-9)
    assert (saved.vis_size, saved.ir_size, saved.method, saved.is_sure) == ((128, 96), (80, 80), "corners", False)


def test_laying_by_hand_begins_with_a_rig(opened: Opener, tmp_path: Path) -> None:
    lens = Distortion((80.0, 80.0), (40.0, 40.0), (0.1, 0.0, 0.0, 0.0, 0.0))
    rigs = {
        "bent": Rig((128, 96), (80, 80), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0), distortion=lens),
        "roof": Rig((256, 192), (160, 160), (1.0, 0.1, 30.0, 0.0, 1.1, 10.0, 0.0, 1e-4, 1.0), parallax_px=5.0),
        "wide": Rig((200, 100), (80, 80), (1.0, 0.0, 30.0, 0.0, 1.0, 10.0, 0.0, 0.0, 1.0)),
    }
    for name, rig in rigs.items():
        (tmp_path / f"{name}.json").write_text(to_json(rig))
    with all_in_one({**QUIET, "engine": {"kind": "null"}, "rigs": {"directory": str(tmp_path)}}) as stack:
        page = opened("http://{}:{}".format(*stack.address))
        give(page, ("street.png", VIS), ("ir.png", file_of(picture(80, 80, channels=1))))
        page.select_option("[name=rig]", "roof")
        page.select_option("[name=rig]", label="laid by hand")
        begin = page.get_by_label("Begin with")
        expect(begin).to_have_value("roof")
        expect(begin.locator("option[disabled]")).to_have_text("bent, whose lens bends")
        own = rigs["roof"].resized((128, 96), (80, 80))
        np.testing.assert_allclose(laid(page), own.array, rtol=1e-7, atol=1e-9)
        saved = from_json(downloaded(page, "rig.json"))
        assert saved.parallax_px == 2.5
        expect(page.locator("#command")).to_contain_text('"parallax_px":2.5')
        fuse(page)
        assert pixels(downloaded(page, "street-fused.png")).shape == (96, 128, 3)
        # What was laid stays for other pictures of these sizes, and begins anew for others.
        page.get_by_role("button", name="All of infrared").press("ArrowLeft")
        moved = laid(page)
        give(page, ("next.png", VIS), ("ir.png", file_of(picture(80, 80, channels=1, seed=4))))
        np.testing.assert_array_equal(laid(page), moved)
        page.get_by_role("button", name="Begin again").click()
        np.testing.assert_allclose(laid(page), own.array, rtol=1e-7, atol=1e-9)
        begin.select_option("wide")
        expect(page.locator("#aligner .told")).to_contain_text(
            "wide is for pictures of another shape, 200 × 100 and 80 × 80"
        )
        np.testing.assert_allclose(laid(page), TO_FIT)
        expect(page.locator("#command")).not_to_contain_text("parallax_px")


def test_what_is_laid_by_hand_is_seen_in_three_ways(opened: Opener, address: str) -> None:
    page = opened(address)
    edge = np.zeros((60, 80), np.uint8)
    edge[:, 40:] = 200
    give(page, ("street.png", VIS), ("ir.png", file_of(edge)))
    page.select_option("[name=rig]", label="laid by hand")
    infrared, opacity = page.locator("#aligner .ir"), page.get_by_label("Opacity")
    assert infrared.evaluate("image => getComputedStyle(image).opacity") == "0.5"
    opacity.press("ArrowRight")
    assert infrared.evaluate("image => getComputedStyle(image).opacity") == "0.51"
    page.check("[name=view][value=blink]")
    assert infrared.evaluate("image => getComputedStyle(image).animationName") == "blink"
    expect(opacity).to_be_disabled()
    page.check("[name=view][value=edges]")
    expect(infrared).to_be_hidden()
    canvas = page.locator("#aligner canvas")
    until(lambda: canvas.evaluate("canvas => canvas.width") == 80)
    opaque = canvas.evaluate(
        """canvas => {
          const { data } = canvas.getContext("2d").getImageData(0, 30, 80, 1);
          return [...Array(80).keys()].filter(x => data[4 * x + 3] > 200);
        }"""
    )
    assert opaque == list(range(opaque[0], 80 - opaque[0]))  # about the edge, between 39 and 40
    assert opaque[0] >= 36
    # Closer: the corner that is used is in the middle, and a pixel is four times as large.
    vis, plate = page.locator("#aligner .vis"), page.locator("#aligner .plate")
    wide = vis.evaluate("image => image.getBoundingClientRect().width")
    page.get_by_role("button", name="Lower right").focus()
    page.get_by_role("button", name="Closer").click()
    assert vis.evaluate("image => image.getBoundingClientRect().width") == pytest.approx(4 * wide)
    handle, around = page.get_by_role("button", name="Lower right").bounding_box(), plate.bounding_box()
    assert handle is not None
    assert around is not None
    assert handle["x"] + handle["width"] / 2 == pytest.approx(around["x"] + around["width"] / 2, abs=0.6)
    assert handle["y"] + handle["height"] / 2 == pytest.approx(around["y"] + around["height"] / 2, abs=0.6)
    # What cannot be seen cannot be laid, and is not sent as if it were registered.
    give(page, ("street.png", VIS), ("deep.png", file_of(edge.astype(np.uint16) * 100)))
    expect(page.locator("#aligner")).to_contain_text("no preview")
    expect(plate).to_be_hidden()
    page.click("#fuse")
    expect(page.get_by_role("alert")).to_contain_text("no preview")
    expect(page.locator("[name=rig]")).to_be_focused()


def test_colours_are_chosen_with_their_range(opened: Opener, address: str) -> None:
    page = opened(address)
    give(page, ("street.png", VIS), ("ir.png", IR))
    expect(page.locator("#colour-range-field")).to_be_hidden()
    page.select_option("[name=colour]", "rainbow")
    page.fill("[name=colour_range]", "40,200")
    expect(page.locator("#command")).to_contain_text("colour_range=40,200")
    fuse(page)
    vis = np.ascontiguousarray(pixels(VIS)[..., ::-1])
    shown = overlaid(vis, pixels(IR), "rainbow", (0.0, 255.0), (40.0, 200.0))
    np.testing.assert_array_equal(pixels(downloaded(page, "street-fused.png"))[..., ::-1], shown)
    page.select_option("[name=colour]", "grey")
    expect(page.locator("#colour-range-field")).to_be_hidden()
    expect(page.locator("#command")).not_to_contain_text("colour_range")
    give(page, ("street.png", VIS), ("ir.png", IR))
    fuse(page)
    np.testing.assert_array_equal(pixels(downloaded(page, "street-fused.png")), greyed(vis))


def test_an_alarm_is_told_and_values_are_saved(opened: Opener, address: str) -> None:
    page = opened(address)
    counts = np.full((96, 128), 8000, np.uint16)
    counts[40:50, 60:80] = 9000
    give(page, ("street.png", VIS), ("ir.png", file_of(counts)))
    page.fill("[name=alarm]", "80C")
    page.fill("[name=degrees]", "0.04,-273.15")
    page.select_option("[name=outline]", "true")
    page.select_option("[name=values]", "npy")
    page.select_option("[name=metadata]", "keep")
    expect(page.locator("#command")).to_contain_text("metadata=keep")
    page.check("[name=output][value=fused]")
    expect(page.locator("#command")).to_contain_text("recofuse.zip")
    fuse(page)
    expect(page.locator("#facts")).to_contain_text("Regions of 80 °C or more: 1 of 200 pixels, the hottest 86.8 °C.")
    assert np.load(io.BytesIO(downloaded(page, "street-values.npy")))[45, 70] == pytest.approx(86.85, abs=1e-3)
    vis = np.ascontiguousarray(pixels(VIS)[..., ::-1])
    np.testing.assert_array_equal(
        pixels(downloaded(page, "street-fused.png"))[..., ::-1], outlined(vis, counts == 9000)
    )


@pytest.mark.parametrize("kind", ["npy", "webp"])
def test_other_formats_are_shown_and_saved_as_they_are(opened: Opener, address: str, kind: str) -> None:
    page = opened(address)
    give(page, ("street.png", VIS), ("ir.png", IR))
    page.check("[name=output][value=ir]")
    page.select_option("[name=format]", kind)
    fuse(page)
    assert (page.locator("#left").input_value(), page.locator("#right").input_value()) == ("ir-in", "ir")
    assert page.locator("#stage img").last.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [128, 96]
    content = downloaded(page, f"street-ir-restored.{kind}")
    if kind == "npy":
        np.testing.assert_array_equal(np.load(io.BytesIO(content)), pixels(IR))
    else:
        assert pixels(content).shape[:2] == (96, 128)


def run_command(page: Page, folder: Path, **environ: str) -> None:
    """Copy the command as a user does, and run it in a shell."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy")
    expect(page.locator("#copied")).to_have_text("Copied")
    command = page.evaluate("navigator.clipboard.readText()")
    assert command == page.locator("#command").inner_text()
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    run = subprocess.run(["sh", "-c", command], cwd=folder, env={**clean, **environ}, capture_output=True, timeout=60)
    assert run.returncode == 0, (command, run.stderr, [path.read_bytes()[:500] for path in folder.glob("recofuse.zip")])


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl is installed")
def test_the_copied_command_does_the_same(opened: Opener, address: str, tmp_path: Path) -> None:
    page = opened(address)
    page.get_by_role("button", name="Dusk").click()
    expect(page.locator("#vis-note strong")).to_have_text("dusk-vis.webp")
    page.fill("[name=seed]", "11")
    run_command(page, tmp_path)
    with zipfile.ZipFile(tmp_path / "recofuse.zip") as archive:
        assert pixels(archive.read("fused.png")).shape == (384, 512, 3)
    # Names that mean something to the shell or to curl are quoted for both.
    names = ('it\'s; a "street", $HOME `x` \\ @now.png', "-ir=<file>.png")
    (tmp_path / names[0]).write_bytes(VIS)
    (tmp_path / names[1]).write_bytes(IR)
    give(page, (names[0], VIS), (names[1], IR))
    page.check("[name=output][value=vis]")
    page.select_option("[name=format]", "webp")
    run_command(page, tmp_path)
    fuse(page)
    assert downloaded(page, "vis-restored.webp") == (tmp_path / "vis.webp").read_bytes()


def new_key(path: Path, *words: str) -> str:
    """As an operator makes one: asyncio is the browser's in this module."""
    command = [sys.executable, "-m", "service", "keys", "create", "page", "--store", f"file:{path}", *words]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_a_key_is_asked_for_and_kept_in_memory_alone(opened: Opener, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = new_key(keys)
    with all_in_one({**QUIET, "engine": {"kind": "null"}, "auth": {"keys": f"file:{keys}"}}) as stack:
        address = "http://{}:{}".format(*stack.address)
        page = opened(address, errors=4)  # the models without a key, with a wrong and a narrow one; a fusion
        field = page.get_by_label("API key")
        expect(field).to_be_visible()
        field.fill("wrong")
        page.click("#fuse")
        expect(page.get_by_role("alert")).to_contain_text("key")
        expect(field).to_be_focused()
        field.fill(key)
        field.press("Enter")
        expect(page.locator("#outcome")).to_be_visible()
        expect(page.locator("#model")).to_contain_text("null 1")
        assert key not in page.locator("#command").inner_text()
        if shutil.which("curl"):
            run_command(page, tmp_path, **{API_KEY_VARIABLE: key})
            assert zipfile.is_zipfile(tmp_path / "recofuse.zip")
        # A key that may only submit waits on one connection.
        page.get_by_role("button", name="Dusk").click()
        expect(page.locator("#outcome")).to_be_hidden()
        with page.expect_response("**/v1/models") as answer:
            field.fill(new_key(keys, "--scope", "fuse"))
            field.press("Tab")
        assert answer.value.status == 403
        fuse(page)
        expect(page.get_by_role("alert")).to_be_empty()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.search]") == [
            0, 0, "", "",
        ]  # fmt: skip


def test_cancelling_works_before_the_job_has_a_name(opened: Opener, address: str) -> None:
    page = opened(address)
    page.evaluate(
        """() => {
          window.XMLHttpRequest = class extends XMLHttpRequest {
            send(body) {  // between the end of the upload and the answer
              this.upload.addEventListener("load", () => document.getElementById("cancel").click());
              super.send(body);
            }
          };
        }"""
    )
    with page.expect_request(lambda request: request.method == "DELETE") as cancelled:
        page.click("#fuse")
    assert "/v1/jobs/" in cancelled.value.url
    expect(page.locator("#phase")).to_have_text("Cancelled")
    expect(page.locator("#outcome")).to_be_hidden()
    # Nor does it wait for a server that does not say what it serves.
    held: list[Route] = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    expect(page.locator("#vis-note strong")).to_have_text("night-vis.webp")
    page.click("#fuse")
    page.click("#cancel")
    expect(page.locator("#phase")).to_have_text("Cancelled")
    expect(page.locator("#fuse")).to_be_enabled()
    until(lambda: page.locator("#phase").count() == 1 and bool(held))
    held[0].continue_()
    expect(page.locator("#model")).to_contain_text("null 1")


def test_waiting_is_told_and_a_cancelled_job_is_cancelled(opened: Opener) -> None:
    one_by_one = {"batch": {"max_batch": 1}, "worker": {**QUIET["worker"], "max_held": 1}}
    with all_in_one({**QUIET, **one_by_one, "engine": {"kind": "fixed", "fixed_batch_s": 4}}) as stack:
        address = "http://{}:{}".format(*stack.address)
        page = opened(address)
        jobs: list[str] = []
        with httpx.Client(base_url=address, trust_env=False) as client:
            for _ in range(40):  # so that ours waits, however slow this machine is
                accepted = client.post("/v1/fuse", files={"vis": VIS, "ir": IR}, headers={"Prefer": "respond-async"})
                jobs.append(accepted.headers["location"])

            def fuse_and_wait() -> str:
                """Returns the job's path."""
                with page.expect_request(re.compile("/v1/jobs/")) as asked:
                    page.click("#fuse")
                expect(page.locator("#phase")).to_have_text(re.compile(r"In the queue, one of \d+ that wait"))
                return asked.value.url.removeprefix(address)

            ours = fuse_and_wait()
            expect(page.locator("#cancel")).to_be_focused()
            page.keyboard.press("Enter")
            expect(page.locator("#phase")).to_have_text("Cancelled")
            expect(page.locator("#fuse")).to_be_enabled()
            expect(page.locator("#outcome")).to_be_hidden()
            until(lambda: client.get(ours).json()["status"] == "cancelled")
            # Who leaves does not wait either.
            left = fuse_and_wait()
            page.goto(f"{address}/docs")
            until(lambda: client.get(left).json()["status"] == "cancelled")
            for job in jobs:
                client.delete(job)
