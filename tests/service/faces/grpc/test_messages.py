"""The contract's words are the service's, and raw frames are what numpy reads in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from service.faces.grpc.messages import fusion_of
from service.terms import jobs
from service.terms.errors import ErrorCode
from service.watch.metrics import FlowMode
from tests.fakes import picture
from tests.service.error_cases import IR, VIS
from tests.service.faces.grpc.face import Face, Facing, detail_of, grey, one_by_one, pixels_of, raw_frame


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (pb.Output, jobs.Output), (pb.Part, jobs.Part), (pb.Priority, jobs.Priority), (pb.FlowControl, FlowMode),
        (pb.PixelFormat, jobs.PixelFormat), (pb.ImageFormat, [*jobs.ImageFormat, "raw"]),
        (pb.Sampler, ["euler", "posterior", "ode1", "ode2"]), (pb.JobStatus, jobs.JobStatus),
        (pb.InfraredSource, ["raw", "palette", "grey"]),
    ],
)  # fmt: skip
def test_the_contract_names_what_the_service_has(kind: Any, names: Iterable[str]) -> None:
    prefix = kind.Name(0).removesuffix("UNSPECIFIED")
    assert {name.removeprefix(prefix).lower() for name in kind.keys()} == {"unspecified", *names}  # noqa: SIM118


@pytest.mark.parametrize("source", ["", "a word of a newer worker"])
def test_a_source_that_is_not_known_is_unspecified(source: str) -> None:
    result = jobs.FusionResult(job_id="j", ir_source=source)
    fusion = fusion_of(result, is_raw=False, started_s=0.0)
    assert fusion.infrared_source == pb.INFRARED_SOURCE_UNSPECIFIED


# raw frames


@dataclass(frozen=True)
class RawCase:
    """A raw pair, drawn."""

    width: int
    height: int
    vis_format: jobs.PixelFormat
    ir_format: jobs.PixelFormat
    padding: int  # bytes after each row, -1: stride is left out
    is_last_padded: bool
    seed: int


RAW_CASES = st.builds(
    RawCase,
    width=st.integers(16, 30).map(lambda half: 2 * half),
    height=st.integers(16, 24).map(lambda half: 2 * half),
    vis_format=st.sampled_from(jobs.PixelFormat),
    ir_format=st.sampled_from([jobs.PixelFormat.MONO8, jobs.PixelFormat.MONO16, jobs.PixelFormat.NV12]),
    padding=st.integers(-1, 9),
    is_last_padded=st.booleans(),
    seed=st.integers(0, 1000),
)


def raw_image(case: RawCase, pixel_format: jobs.PixelFormat, seed: int) -> tuple[pb.RawImage, NDArray[Any]]:
    """A frame of random bytes, and its rows without padding, as the bytes of each."""
    rng = np.random.default_rng(seed)
    row_bytes = case.width * pixel_format.bytes_per_pixel
    num_rows = case.height * 3 // 2 if pixel_format is jobs.PixelFormat.NV12 else case.height
    rows = rng.integers(0, 256, (num_rows, row_bytes), dtype=np.uint8)
    padding = max(case.padding, 0)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    data = padded.tobytes() if case.is_last_padded else padded.tobytes()[: padded.size - padding]
    image = pb.RawImage(
        pixel_format=pb.PixelFormat.Value(f"PIXEL_FORMAT_{pixel_format.name}"),
        width=case.width,
        height=case.height,
        stride=0 if case.padding == -1 else row_bytes + padding,
        data=data,
    )
    return image, rows


def expected_vis(rows: NDArray[Any], case: RawCase) -> NDArray[Any]:
    match case.vis_format:
        case jobs.PixelFormat.MONO8:
            return np.stack([rows] * 3, axis=2)
        case jobs.PixelFormat.MONO16:  # little endian: the second byte of each pixel is the upper one
            counts = rows[:, ::2] + 256.0 * rows[:, 1::2]
            return np.stack([np.rint(counts / 257).astype(np.uint8)] * 3, axis=2)
        case jobs.PixelFormat.RGB8:
            return np.stack([rows[:, channel::3] for channel in (0, 1, 2)], axis=2)
        case jobs.PixelFormat.BGR8:
            return np.stack([rows[:, channel::3] for channel in (2, 1, 0)], axis=2)
        case jobs.PixelFormat.NV12:
            return np.asarray(cv2.cvtColor(rows, cv2.COLOR_YUV2RGB_NV12))


def expected_ir(rows: NDArray[Any], case: RawCase, low: float, high: float) -> NDArray[Any]:
    values = rows[: case.height].astype(np.float64)
    if case.ir_format is jobs.PixelFormat.MONO16:
        values = values[:, ::2] + 256 * values[:, 1::2]
    elif case.ir_format is jobs.PixelFormat.NV12:  # luma of video range, expanded
        values = np.rint(np.clip((values - 16) * 255 / 219, 0, 255))
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cases=st.lists(RAW_CASES, min_size=1, max_size=12),
    ir_range=st.tuples(st.integers(-50, 100), st.integers(120, 60_000)),
)
async def test_raw_frames_arrive_as_numpy_reads_them(
    facing: Facing, cases: list[RawCase], ir_range: tuple[int, int]
) -> None:
    async with facing() as face:
        fuse = pb.FuseOptions(
            output=pb.OUTPUT_ALL,
            format=pb.IMAGE_FORMAT_RAW,
            ir_range=pb.IrRange(low=ir_range[0], high=ir_range[1]),
        )
        pairs = [
            (raw_image(case, case.vis_format, case.seed), raw_image(case, case.ir_format, ~case.seed & 0xFFFF))
            for case in cases
        ]
        messages = [raw_frame(number, vis[0], ir[0]) for number, (vis, ir) in enumerate(pairs)]
        call = face.stub.FuseStream(one_by_one([pb.FuseStreamRequest(options=pb.StreamOptions(fuse=fuse)), *messages]))
        answers = [answer async for answer in call]
    assert [answer.sequence for answer in answers] == list(range(len(cases)))
    for case, (vis, ir), answer in zip(cases, pairs, answers, strict=True):
        fused, clean_vis, clean_ir = answer.fusion.pictures
        assert [fused.part, clean_vis.part, clean_ir.part] == [pb.PART_FUSED, pb.PART_VIS, pb.PART_IR]
        np.testing.assert_array_equal(pixels_of(clean_vis.image), expected_vis(vis[1], case))
        np.testing.assert_array_equal(pixels_of(clean_ir.image), expected_ir(ir[1], case, *ir_range))


async def test_nv12_shows_the_colours_that_it_was_made_from(face: Face) -> None:
    colours = cv2.resize(picture(8, 6), (64, 48), interpolation=cv2.INTER_LINEAR)
    planar = cv2.cvtColor(colours, cv2.COLOR_RGB2YUV_I420)
    chroma = planar[48:].reshape(2, 24, 32)
    nv12 = np.concatenate([planar[:48], np.stack([chroma[0], chroma[1]], axis=2).reshape(24, 64)])
    vis = pb.RawImage(pixel_format=pb.PIXEL_FORMAT_NV12, width=64, height=48, data=nv12.tobytes())
    answer = await face.stub.Fuse(
        pb.FuseRequest(
            vis=pb.Image(raw=vis), ir=pb.Image(encoded=IR), options=pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW)
        )
    )
    (fused,) = answer.fusion.pictures
    assert np.abs(pixels_of(fused.image).astype(int) - colours).mean() < 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pixel_format": 0}, "pixel_format is missing"),
        ({"pixel_format": 99}, "no value 99"),
        ({"width": 0}, "width"),
        ({"height": 2_000_000}, "height"),
        ({"stride": 20}, "stride"),
        ({"stride": 1 << 31}, "stride"),
        ({"data": b"short"}, "bytes"),
        ({"width": 16, "height": 16, "data": bytes(256)}, "at least 32"),
        ({"pixel_format": pb.PIXEL_FORMAT_NV12, "width": 63}, "even"),
    ],
)
async def test_raw_frames_that_cannot_be_are_refused(face: Face, change: dict[str, Any], words: str) -> None:
    raw = grey(64, 48)
    for name, value in change.items():
        setattr(raw, name, value)
    message = pb.FuseRequest(vis=pb.Image(encoded=VIS), ir=pb.Image(raw=raw))
    detail = await detail_of(face.stub.Fuse(message), ErrorCode.INVALID_INPUT)
    assert words in detail.message
