"""The page at `/` and its files: try the service on a pair in a browser.

Everything is read once from the package's folder `page` and served from memory, under names that are known beforehand,
so no request reaches the file system. The page asks this server alone (its policy allows nothing else) and uses the
same addresses as every other client.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request, Response

from service.terms.errors import RouteNotFoundError

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
# No inline script or style, nothing of other origins, and no sink that would read a string as markup or code.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_INDEX = "index.html"


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    tag: str

    def answer(self, request: Request) -> Response:
        """The file, or 304 to a browser that has it."""
        headers = {"ETag": self.tag, "Cache-Control": "no-cache"}  # asked again each time, so never of an older release
        if self.media_type.startswith("text/html"):
            headers["Content-Security-Policy"] = _POLICY
        known = (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(","))
        if self.tag in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers={**headers, "Content-Type": self.media_type})


def build_router() -> APIRouter:
    """Routes of the page. Raises KeyError for a file in the package whose kind has no media type."""
    files = _read(resources.files("service.faces.http").joinpath("page"))
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return files[_INDEX].answer(request)

    @router.api_route("/playground/{path:path}", methods=["GET", "HEAD"])
    async def file(path: str, request: Request) -> Response:
        if path not in files or path == _INDEX:
            raise RouteNotFoundError("there is no such file; the page is at /")
        return files[path].answer(request)

    return router


def _read(folder: Traversable, prefix: str = "") -> dict[str, _File]:
    """Every file below a folder, by its path."""
    found: dict[str, _File] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= _read(entry, f"{prefix}{entry.name}/")
        else:
            content = entry.read_bytes()
            tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
            found[prefix + entry.name] = _File(content, _MEDIA_TYPES[entry.name[entry.name.rindex(".") :]], tag)
    return found
