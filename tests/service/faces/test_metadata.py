"""Where and when a picture was taken is in no answer, unless somebody asks for it."""

from __future__ import annotations

import io
import itertools
import zipfile

from PIL import ExifTags, Image

import recofuse_client as rc
from service.terms.errors import ErrorCode
from tests.fakes import file_of, picture
from tests.images.test_metadata import FILES as TELLING
from tests.service.conftest import Serving
from tests.service.faces.http.asking import problem
from tests.service.faces.oip.messages import files, outputs_of, post, refusal, tensor

PLAIN = file_of(picture(64, 48, channels=1, seed=3))
WORDS = (b"Exif", b"eXIf", b"EXIF", b"Camera & Sons", b"2026:11:29", b"xmpmeta", b"GPS")


def place_in(content: bytes) -> dict[int, object]:
    with Image.open(io.BytesIO(content)) as image:
        return dict(image.getexif().get_ifd(ExifTags.IFD.GPSInfo))


CASES: list[dict[str, str]] = [
    *({"format": image_format} for image_format in ("png", "jpeg", "webp", "npy")),
    {"metadata": "drop", "format": "jpeg"},
    {"output": "all", "values": "tiff"},
]


async def test_place_and_time_are_in_no_answer_by_default(serving: Serving) -> None:
    async with serving() as server:
        for kind, data in itertools.product(TELLING, CASES):
            given = {"vis": ("vis", TELLING[kind]), "ir": ("ir", TELLING["jpeg" if kind == "tiff" else "tiff"])}
            content = (await server.client.post("/v1/fuse", files=given, data=data)).raise_for_status().content
            parts = [content]
            if "output" in data:
                with zipfile.ZipFile(io.BytesIO(content)) as archive:
                    parts = [archive.read(name) for name in archive.namelist()]
            for part in parts:
                assert not [word for word in WORDS if word in part], (kind, data)


async def test_they_are_copied_when_asked_for_each_from_its_own_file(serving: Serving) -> None:
    async with serving(grpc={"port": 0}) as server:
        for url in (f"grpc://{server.grpc_address}", str(server.client.base_url)):
            async with rc.AsyncClient(url) as client:
                answer = await client.fuse(TELLING["tiff"], PLAIN, output="all", format="jpeg", metadata="keep")
            for part, is_told in (("fused", True), ("vis", True), ("ir", False)):
                assert bool(place_in(answer[part].encoded)) is is_told  # type: ignore[index]
        given = (files("vis", TELLING["jpeg"]), files("ir", PLAIN))
        parameters = {"format": "jpeg", "metadata": "keep", "binary_data_output": True}
        pictures = outputs_of(await post(server.client, *given, parameters=parameters))
        assert place_in(pictures["vis_restored"][0])
        assert not place_in(pictures["ir_restored"][0])
        parameters = {"format": "jpeg", "binary_data_output": True}
        assert not place_in(outputs_of(await post(server.client, *given, parameters=parameters))["fused"][0])


async def test_pixels_without_a_file_keep_none(serving: Serving) -> None:
    async with serving(grpc={"port": 0}) as server:
        given = {"vis": ("vis", TELLING["jpeg"]), "ir": ("ir", PLAIN)}
        for data, words in (
            ({"metadata": "keep", "format": "npy"}, "accepted are png, jpeg and webp"),
            ({"metadata": "some"}, "metadata"),
        ):
            told = problem(await server.client.post("/v1/fuse", files=given, data=data), ErrorCode.INVALID_INPUT)
            assert words in told["detail"]
        pixels = (tensor("vis", picture()), tensor("ir", picture(channels=1)[..., None]))
        assert "png, jpeg" in refusal(
            await post(server.client, *pixels, parameters={"metadata": "keep"}), ErrorCode.INVALID_INPUT
        )
