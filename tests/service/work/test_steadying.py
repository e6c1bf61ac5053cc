"""A worker and the frames of steady streams: what comes with a job, what goes back, and what is not touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recofuse_images.steady import Memory, Seen
from service.queue.contract import JobQueue
from service.terms import images
from service.terms.images import Pixels
from service.terms.jobs import FusionJob, FusionOptions, FusionResult, Output, Part, new_job_id
from service.work.engine import PassOptions
from tests.fakes import FakeEngine, file_of
from tests.service.queue.redis.queues import folder, opened
from tests.service.redis_server import RedisServer
from tests.service.work.workers import SETTINGS, fresh, results, working


class BrighteningEngine(FakeEngine):
    """Every pass is eight levels brighter than the one before, as far as there is room."""

    def fuse(
        self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int], overlap: Pixels | None = None
    ) -> dict[Part, Pixels]:
        pictures = super().fuse(vis, ir, options, seeds, overlap)
        more = 8 * (len(self.batches) - 1)
        return {
            part: np.minimum(picture.astype(np.uint16) // 2 + 60 + more, 255).astype(np.uint8)
            for part, picture in pictures.items()
        }


async def served(jobs: list[FusionJob], queue: JobQueue | None = None) -> list[FusionResult]:
    """Jobs one after the other, each held to those before it if it is a frame at all."""
    memory, found = Memory(), []
    async with working(BrighteningEngine(), queue=queue) as (queue, _):
        for job in jobs:
            known = b"" if memory.means is None else memory.means.to_bytes()
            sent = job if job.means is None else replace(job, means=known)
            await queue.submit(sent)
            found += await results(queue, [sent])
            if found[-1].seen:
                memory.add(Seen.from_bytes(found[-1].seen))
    return found


def frames(count: int, means: bytes | None, **options: object) -> list[FusionJob]:
    """One pair, again and again."""
    first, *others = fresh(count, options=FusionOptions(output=Output.ALL, **options))  # type: ignore[arg-type]
    return [replace(job, vis=first.vis, ir=first.ir, means=means) for job in (first, *others)]


def means_of(result: FusionResult) -> tuple[float, float]:
    pair = images.decode_pair(result.images[Part.FUSED], result.images[Part.IR], SETTINGS.limits)
    return float(pair.vis.mean()), float(pair.ir.mean())


async def test_a_frame_is_held_to_what_came_with_its_job() -> None:
    first, second = await served(frames(2, b""))
    (fused, ir), (held_fused, held_ir) = means_of(first), means_of(second)
    assert 0 < held_fused - fused < 2  # of eight
    assert 0 < held_ir - ir < 2
    told = [Seen.from_bytes(result.seen) for result in (first, second)]
    assert set(told[0].shown) == {"fused", "vis", "ir"}
    # What goes back is of the picture as the model made it, or nothing would ever change again.
    assert 7 < float((told[1].shown["fused"] - told[0].shown["fused"]).mean()) < 9


@pytest.mark.redis
async def test_what_is_remembered_goes_over_redis() -> None:
    with folder() as path:
        server = RedisServer(path)
        server.start()
        try:
            async with opened(server) as queue:
                shared = await served(frames(3, b""), queue)
        finally:
            server.kill()
    alone = await served(frames(3, b""))
    assert [result.seen for result in shared] == [result.seen for result in alone]
    assert [result.images for result in shared] == [result.images for result in alone]


async def test_a_job_that_is_no_frame_is_left_alone() -> None:
    first, second = await served(frames(2, None))
    assert (first.seen, second.seen) == (b"", b"")
    assert 7 < means_of(second)[0] - means_of(first)[0] < 9


async def test_infrared_that_is_measured_is_left_alone() -> None:
    first, second = await served(frames(2, b"", values="npy"))
    assert second.error_code is None, second.error_message
    (fused, ir), (held_fused, next_ir) = means_of(first), means_of(second)
    assert held_fused - fused < 2
    assert 7 < next_ir - ir < 9
    assert "ir" not in Seen.from_bytes(second.seen).shown


# calm frames


def noisy_frames(count: int, history: bytes | None, **options: object) -> list[FusionJob]:
    """One pair with noise that is new in every frame."""
    y, x = np.mgrid[:96, :128] / 20
    plane = 120 + 60 * np.sin(x) * np.cos(y)
    jobs = fresh(count, width=128, height=96, options=FusionOptions(output=Output.ALL, **options))  # type: ignore[arg-type]
    made = []
    for number, job in enumerate(jobs):
        generator = np.random.default_rng(number)
        vis, ir = ((plane[..., None] + generator.normal(0, 6, (96, 128, n))).astype(np.uint8) for n in (3, 1))
        made.append(replace(job, vis=file_of(vis), ir=file_of(ir[..., 0]), history=history))
    return made


async def calmed(jobs: list[FusionJob], queue: JobQueue | None = None) -> list[FusionResult]:
    """Jobs one after the other, each with the history of the one before if it is calm at all."""
    history, found = b"", []
    async with working(FakeEngine(), queue=queue) as (queue, _):
        for job in jobs:
            sent = job if job.history is None else replace(job, history=history)
            await queue.submit(sent)
            found += await results(queue, [sent])
            history = found[-1].history
    return found


def change_of(found: list[FusionResult], part: Part) -> float:
    """Mean change of a pixel over the last two frames."""
    one, other = (
        images.decode_pair(result.images[Part.FUSED], result.images[part], SETTINGS.limits).ir
        if part is Part.IR
        else images.decode_pair(result.images[part], result.images[Part.IR], SETTINGS.limits).vis
        for result in found[-2:]
    )
    return float(np.abs(np.subtract(one, other, dtype=float)).mean())


async def test_noise_is_averaged_with_what_came_with_the_job() -> None:
    alone, calm = await calmed(noisy_frames(8, None)), await calmed(noisy_frames(8, b""))
    assert [result.error_message for result in calm] == [""] * 8
    assert calm[0].images == alone[0].images
    assert {result.history for result in alone} == {b""}
    for part in Part:
        assert change_of(calm, part) < 0.35 * change_of(alone, part)


async def test_infrared_that_is_measured_keeps_its_noise() -> None:
    alone, calm = await calmed(noisy_frames(6, None, values="npy")), await calmed(noisy_frames(6, b"", values="npy"))
    assert [result.images[Part.IR] for result in calm] == [result.images[Part.IR] for result in alone]
    assert [result.values for result in calm] == [result.values for result in alone]
    assert change_of(calm, Part.FUSED) < 0.5 * change_of(alone, Part.FUSED)


async def test_a_history_that_cannot_be_read_is_left_out() -> None:
    (job,) = noisy_frames(1, b"of another release")
    async with working(FakeEngine()) as (queue, _):
        await queue.submit(job)
        (result,) = await results(queue, [job])
    (alone,) = await calmed([replace(job, history=b"", id=new_job_id())])
    assert (result.images, result.history) == (alone.images, alone.history)


@pytest.mark.parametrize("is_beside", [True, False])
@pytest.mark.redis
async def test_a_history_goes_over_redis(tmp_path: Path, is_beside: bool) -> None:
    with folder() as path:
        server = RedisServer(path)
        server.start()
        try:
            async with opened(server, shared_folder=str(tmp_path) if is_beside else "") as queue:
                shared = await calmed(noisy_frames(3, b""), queue)
        finally:
            server.kill()
    alone = await calmed(noisy_frames(3, b""))
    assert [result.history for result in shared] == [result.history for result in alone]
    assert [result.images for result in shared] == [result.images for result in alone]
