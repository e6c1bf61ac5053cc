"""The playground's files as the server gives them; what the page does is in test_page.py."""

from __future__ import annotations

import re
from importlib import resources

import httpx

from service.terms.images import decode_pair
from service.terms.settings import LimitSettings
from tests.service.conftest import Serving

PAGE = resources.files("service.faces.http").joinpath("page")


def sample_names() -> list[str]:
    listed = re.search(r"const SAMPLES = (\[.*\]);", PAGE.joinpath("page.js").read_text("utf-8"))
    assert listed
    return re.findall(r'\["(\w+)"', listed[1])


async def test_every_file_is_served_with_its_kind_and_asked_again(serving: Serving) -> None:
    async with serving() as server:
        for name, kind in (
            ("", "text/html"), ("playground/page.css", "text/css"), ("playground/page.js", "text/javascript"),
            ("playground/icon.svg", "image/svg+xml"), ("playground/samples/night-vis.webp", "image/webp"),
        ):  # fmt: skip
            answer = await server.client.get(f"/{name}")
            assert answer.status_code == 200, name
            assert answer.headers["content-type"].startswith(kind)
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache"
            known = await server.client.get(
                f"/{name}", headers={"If-None-Match": f'"other", W/{answer.headers["etag"]}'}
            )
            assert (known.status_code, known.content) == (304, b"")
            head = await server.client.head(f"/{name}")
            assert (head.status_code, head.content) == (200, b"")
            assert int(head.headers["content-length"]) == len(answer.content)


async def test_the_page_may_run_and_load_nothing_but_its_own_files(serving: Serving) -> None:
    async with serving() as server:
        answer = await server.client.get("/")
        policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|(?:src|href)=\"(?:\w+:)?//", answer.text)
        for link in re.findall(r'(?:src|href)="([^"#]+)"', answer.text):
            assert (await server.client.get(f"/{link}")).status_code == 200, link
        for name in ("page.js", "client.js", "files.js", "viewer.js"):
            source = (await server.client.get(f"/playground/{name}")).text
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|localStorage|eval\(", source)
            assert not re.search(r"https?://", source)


async def test_nothing_else_is_served(serving: Serving) -> None:
    async with serving() as server:
        for name in (
            "nothing.js",
            "",
            "index.html",
            "samples/",
            "../app.py",
            "%2e%2e/app.py",
            "samples/..%2f..%2fapp.py",
        ):
            answer = await server.client.get(httpx.URL(f"{server.client.base_url}").join(f"/playground/{name}"))
            assert answer.status_code == 404, name
        assert (await server.client.post("/")).status_code == 405


def test_samples_are_pairs_that_the_service_accepts_and_stay_small() -> None:
    folder = PAGE.joinpath("samples")
    names = sample_names()
    assert len(names) == 4
    files = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    assert files.keys() == {f"{name}-{role}.webp" for name in names for role in ("vis", "ir")}
    assert sum(map(len, files.values())) < 400 * 1024
    for name in names:
        pair = decode_pair(files[f"{name}-vis.webp"], files[f"{name}-ir.webp"], LimitSettings())
        assert pair.vis.shape == (384, 512, 3)
        assert pair.ir.std() > 5
