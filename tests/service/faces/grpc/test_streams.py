"""Streams of frames: their order, what is left out, a full queue, resuming, and silence."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import cv2
import grpc
import numpy as np
import pytest

from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from service.access.held import Held, Holding
from service.faces.grpc import streams
from service.faces.grpc.streams import Stream, _Arrived
from service.terms.errors import ErrorCode, OverloadedError
from service.terms.images import Pixels
from service.terms.jobs import Part
from service.work.engine import PassOptions
from tests.fakes import FakeEngine, file_of, pair, picture
from tests.service.error_cases import IR, VIS
from tests.service.faces.grpc.face import (
    Face,
    Facing,
    counts,
    detail_of,
    eventually,
    frame,
    grey,
    one_by_one,
    pixels_of,
    raw_frame,
    request,
)

# order and rules


async def test_a_stream_keeps_its_order(face: Face) -> None:
    sizes = [(64, 48), (48, 64), (96, 64), (33, 47)]
    files = [pair(*size, seed=index) for index, size in enumerate(sizes)]
    bad = {7: (b"nonsense", IR), 20: (VIS, file_of(picture(64, 64, channels=1)))}
    sent = [frame(10 + 3 * number, *bad.get(number, files[number % 4]), timestamp_ns=-number) for number in range(60)]
    face.engine.gate.clear()  # the first pass waits, so that frames gather behind it
    asyncio.get_running_loop().call_later(0.5, face.engine.gate.set)
    answers = [answer async for answer in face.stub.FuseStream(one_by_one(sent))]
    assert [answer.sequence for answer in answers] == [10 + 3 * number for number in range(60)]
    assert [answer.timestamp_ns for answer in answers] == [-number for number in range(60)]
    for number, answer in enumerate(answers):
        if number in bad:
            assert answer.error.code in (ErrorCode.UNSUPPORTED_MEDIA, ErrorCode.INVALID_INPUT)
            continue
        encoded = answer.fusion.pictures[0].image.encoded
        decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_array_equal(decoded, picture(*sizes[number % 4], seed=number % 4))
    assert counts(answers[-1].stats) == {"received": 60, "fused": 58, "failed": 2, "missing": 118}
    assert [answer.previous_sequence for answer in answers[1:]] == [answer.sequence for answer in answers[:-1]]
    assert not answers[0].HasField("previous_sequence")
    assert all(0 < answer.age_s < 60 for answer in answers)
    assert answers[-1].stats.fused_per_s > 0
    assert 0 < answers[-1].stats.age_p50_s <= answers[-1].stats.age_p99_s <= max(answer.age_s for answer in answers)
    assert max(map(len, face.engine.batches)) > 1  # frames of one stream share passes


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([frame(2), frame(2)], "ascending"),
        ([frame(2), frame(1)], "ascending"),
        ([frame(0), pb.FuseStreamRequest(options=pb.StreamOptions())], "first message"),
        ([frame(0), pb.FuseStreamRequest()], "neither"),
        ([frame(0), frame(1), frame(0)], "ascending"),
    ],
)
async def test_a_stream_that_breaks_its_rules_ends_after_its_answers(
    face: Face, messages: list[pb.FuseStreamRequest], words: str
) -> None:
    call = face.stub.FuseStream(one_by_one(messages))
    for message in messages[:-1]:
        answer = await call.read()
        assert isinstance(answer, pb.FuseStreamResponse)
        assert (answer.sequence, answer.WhichOneof("outcome")) == (message.frame.sequence, "fusion")
    assert words in (await detail_of(call.read(), ErrorCode.INVALID_INPUT)).message


@pytest.mark.parametrize(
    "options",
    [
        pb.StreamOptions(max_in_flight=9),
        pb.StreamOptions(flow_control=99),  # type: ignore[arg-type]
        pb.StreamOptions(fuse=pb.FuseOptions(steps=0)),
    ],
)
async def test_a_stream_of_bad_options_ends(face: Face, options: pb.StreamOptions) -> None:
    call = face.stub.FuseStream(one_by_one([pb.FuseStreamRequest(options=options), frame(0)]))
    await detail_of(call.read(), ErrorCode.INVALID_INPUT)


async def test_an_empty_stream_ends_well(face: Face) -> None:
    call = face.stub.FuseStream(one_by_one([]))
    assert [answer async for answer in call] == []
    assert await call.code() is grpc.StatusCode.OK


# flow control


async def test_mode_all_slows_the_sender_and_loses_nothing(face: Face) -> None:
    face.engine.gate.clear()
    total, num_sent = 80, 0

    async def sending() -> AsyncIterator[pb.FuseStreamRequest]:
        nonlocal num_sent
        plane = grey(1280, 960)  # 2.4 MB a pair: the kernel's buffers alone may take tens of megabytes
        yield pb.FuseStreamRequest(options=pb.StreamOptions(fuse=pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW)))
        for number in range(total):
            yield raw_frame(number, plane, plane)
            num_sent += 1

    answers = face.stub.FuseStream(sending())
    while True:  # until the sender stands still
        before = num_sent
        await asyncio.sleep(0.4)
        if num_sent and num_sent == before:
            break
    assert num_sent < total / 2
    face.engine.gate.set()
    assert [answer.sequence async for answer in answers] == list(range(total))


async def test_a_client_that_does_not_read_is_not_read_from(face: Face) -> None:
    num_sent = 0

    async def sending() -> AsyncIterator[pb.FuseStreamRequest]:
        nonlocal num_sent
        plane = grey(1280, 960)
        options = pb.StreamOptions(fuse=pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW))
        yield pb.FuseStreamRequest(options=options)
        for number in range(120):
            yield raw_frame(number, plane, plane)
            num_sent += 1

    call = face.stub.FuseStream(sending())
    await call.read()
    while True:
        before = num_sent
        await asyncio.sleep(0.4)
        if num_sent and num_sent == before:
            break
    assert num_sent < 80
    assert sum(map(len, face.engine.batches)) < 80
    call.cancel()


async def test_mode_latest_skips_what_is_stale_and_says_so(face: Face) -> None:
    face.engine.gate.clear()
    call = face.stub.FuseStream()
    options = pb.StreamOptions(flow_control=pb.FLOW_CONTROL_LATEST)
    await call.write(pb.FuseStreamRequest(options=options))
    for number in range(40):
        await call.write(frame(number))
    await call.done_writing()
    assert await eventually(face, 'recofuse_stream_frames_total{mode="latest",outcome="dropped"} 37.0')
    face.engine.gate.set()
    answers = [answer async for answer in call]
    first, second, last = (answer.sequence for answer in answers)  # the second began once the first was in the queue
    assert (first, last) == (0, 39)
    assert [answer.previous_sequence for answer in answers[1:]] == [first, second]
    assert counts(answers[-1].stats) == {"received": 40, "fused": 3, "dropped": 37}
    assert await eventually(face, 'recofuse_stream_frames_total{mode="latest",outcome="fused"} 3.0')


# the line before a full queue


@pytest.mark.parametrize("mode", [pb.FLOW_CONTROL_ALL, pb.FLOW_CONTROL_LATEST])
async def test_a_full_queue_does_not_fail_a_stream(facing: Facing, mode: pb.FlowControl.ValueType) -> None:
    async with facing(queue={"max_jobs": 1}) as face:

        async def sending() -> AsyncIterator[pb.FuseStreamRequest]:
            yield pb.FuseStreamRequest(options=pb.StreamOptions(flow_control=mode, max_in_flight=4))
            for number in range(12):
                yield frame(number)

        answers = [answer async for answer in face.stub.FuseStream(sending())]
        assert {answer.WhichOneof("outcome") for answer in answers} == {"fusion"}
        sequences = [answer.sequence for answer in answers]
        assert sequences == sorted(sequences)
        stats = answers[-1].stats
        assert stats.fused == len(answers)
        if mode == pb.FLOW_CONTROL_ALL:
            assert sequences == list(range(12))
        else:
            assert sequences[-1] == 11
            assert stats.dropped == 12 - len(answers)


async def test_mode_latest_does_not_queue_up_for_a_full_queue(facing: Facing) -> None:
    async with facing(queue={"max_jobs": 1}) as face:
        face.engine.gate.clear()
        held = asyncio.ensure_future(face.stub.Fuse(request()))
        await asyncio.to_thread(face.engine.started.wait, 5)
        call = face.stub.FuseStream()
        options = pb.StreamOptions(flow_control=pb.FLOW_CONTROL_LATEST, max_in_flight=1)
        await call.write(pb.FuseStreamRequest(options=options))
        for number in range(3):  # each finds its predecessor still without a place in the queue
            await call.write(frame(number))
            dropped = f'recofuse_stream_frames_total{{mode="latest",outcome="dropped"}} {number}.0'
            assert await eventually(face, dropped)
        await call.done_writing()
        face.engine.gate.set()
        await held
        (answer,) = [answer async for answer in call]
        assert (answer.sequence, counts(answer.stats)) == (2, {"received": 3, "fused": 1, "dropped": 2})


class Turnstile(threading.Event):
    """A gate that lets one pass through each time it is set."""

    def wait(self, timeout: float | None = None) -> bool:
        is_open = super().wait(timeout)
        self.clear()
        return is_open


@pytest.mark.parametrize("mode", [pb.FLOW_CONTROL_ALL, pb.FLOW_CONTROL_LATEST])
async def test_a_full_queue_serves_streams_in_turn(
    facing: Facing, monkeypatch: pytest.MonkeyPatch, mode: pb.FlowControl.ValueType
) -> None:
    """One place in the queue, three streams that always have something newer: nobody is left behind."""
    num_lined_up, num_turns = 0, 12
    stand_in_line = Stream._stand_in_line

    async def counted(stream: Stream, arrived: _Arrived) -> None:
        nonlocal num_lined_up
        num_lined_up += 1
        await stand_in_line(stream, arrived)

    monkeypatch.setattr(Stream, "_stand_in_line", counted)
    async with facing(FakeEngine(gate=Turnstile()), queue={"max_jobs": 1}) as face:
        face.engine.gate.clear()

        async def stream(index: int) -> None:
            call = face.stub.FuseStream()
            fuse = pb.FuseOptions(seed=index)
            options = pb.StreamOptions(fuse=fuse, flow_control=mode, max_in_flight=1)
            await call.write(pb.FuseStreamRequest(options=options))
            for number in range(num_turns):
                await call.write(frame(number))
                assert isinstance(await call.read(), pb.FuseStreamResponse)

        streams = [asyncio.create_task(stream(index)) for index in range(3)]
        end = time.monotonic() + 60
        for turn in range(num_turns):
            # One frame is in the pass, the other streams' stand in line; so who is next is decided.
            while len(face.engine.batches) <= turn or num_lined_up < turn + 2:
                assert time.monotonic() < end
                await asyncio.sleep(0.005)
            face.engine.gate.set()
        turnstile, face.engine.gate = face.engine.gate, threading.Event()
        face.engine.gate.set()  # for whatever is still under way
        turnstile.set()
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    served = [seeds[0] for seeds in face.engine.batches[:num_turns]]
    assert set(served[:3]) == {0, 1, 2}
    assert served[3:] == served[:-3]


async def test_a_frame_that_is_too_large_for_now_holds_up_no_smaller_one(facing: Facing) -> None:
    """The queue has room for bytes of small frames: the large one waits without standing in their way."""
    large, small = grey(64, 48), grey(32, 32)
    async with facing(queue={"max_bytes": 9000}) as face:
        face.engine.gate.clear()
        held = face.stub.FuseStream(one_by_one([raw_frame(0, large, large)]))
        await asyncio.to_thread(face.engine.started.wait, 5)
        waiting = face.stub.FuseStream(one_by_one([raw_frame(0, large, large)]))
        reading = asyncio.ensure_future(waiting.read())
        await asyncio.sleep(0.2)  # until it has been refused, or else this shows nothing
        passing = face.stub.FuseStream(one_by_one([raw_frame(0, small, small)]))
        assert await eventually(face, 'recofuse_jobs_accepted_total{priority="normal"} 2.0', 20)
        face.engine.gate.set()
        for answer in (await held.read(), await reading, await passing.read()):
            assert isinstance(answer, pb.FuseStreamResponse)
            assert answer.WhichOneof("outcome") == "fusion"


async def test_a_frame_that_can_never_fit_is_refused_at_once(facing: Facing) -> None:
    large = grey(64, 48)
    async with facing(queue={"max_bytes": 6000}) as face:
        (answer,) = [answer async for answer in face.stub.FuseStream(one_by_one([raw_frame(0, large, large)]))]
        assert answer.error.code == ErrorCode.PAYLOAD_TOO_LARGE


async def test_a_deadline_passes_in_the_line_too(facing: Facing) -> None:
    async with facing(queue={"max_jobs": 1}) as face:
        face.engine.gate.clear()
        held = asyncio.ensure_future(face.stub.Fuse(request()))
        await asyncio.to_thread(face.engine.started.wait, 5)
        options = pb.FuseStreamRequest(options=pb.StreamOptions(fuse=pb.FuseOptions(timeout_ms=300)))
        # The second stands behind the first; neither holds up who comes after them.
        late = [
            answer
            async for answer in face.stub.FuseStream(one_by_one([options, *(frame(number) for number in range(3))]))
        ]
        assert [answer.error.code for answer in late] == [ErrorCode.TIMED_OUT] * 3
        face.engine.gate.set()
        await held
        (answer,) = [answer async for answer in face.stub.FuseStream(one_by_one([frame(0)]))]
        assert answer.WhichOneof("outcome") == "fusion"


# deadlines, stopping, resuming


async def test_frames_have_deadlines_of_their_own(facing: Facing) -> None:
    async with facing(queue={"max_jobs": 1}) as face:
        face.engine.gate.clear()
        options = pb.StreamOptions(fuse=pb.FuseOptions(timeout_ms=60_000))
        sent = [frame(0), frame(1, timeout_ms=200), frame(2, timeout_ms=0), frame(3, timeout_ms=2**32 - 1), frame(4)]
        call = face.stub.FuseStream(one_by_one([pb.FuseStreamRequest(options=options), *sent]))
        await asyncio.to_thread(face.engine.started.wait, 5)
        await asyncio.sleep(0.4)
        face.engine.gate.set()
        codes = [answer.error.code async for answer in call]
        assert codes == ["", ErrorCode.TIMED_OUT, ErrorCode.INVALID_INPUT, ErrorCode.INVALID_INPUT, ""]


async def test_stopping_answers_a_streams_frames_and_ends_it(face: Face) -> None:
    face.engine.gate.clear()
    call = face.stub.FuseStream()
    for number in range(4):
        await call.write(frame(number))
    assert await eventually(face, "recofuse_queue_leased 4.0")
    face.server.stop.set()
    await asyncio.sleep(0.1)
    await detail_of(face.stub.Fuse(request()), ErrorCode.UNAVAILABLE)
    face.engine.gate.set()
    for number in range(4):
        answer = await call.read()
        assert isinstance(answer, pb.FuseStreamResponse)
        assert (answer.sequence, answer.WhichOneof("outcome")) == (number, "fusion")
    await detail_of(call.read(), ErrorCode.UNAVAILABLE)
    await asyncio.wait_for(face.server.running, 8)


async def test_stopping_leaves_frames_that_were_never_queued_to_the_next_server(face: Face) -> None:
    face.engine.gate.clear()
    call = face.stub.FuseStream()
    await call.write(pb.FuseStreamRequest(options=pb.StreamOptions(max_in_flight=1)))
    for number in range(3):
        await call.write(frame(number))
    await asyncio.to_thread(face.engine.started.wait, 10)
    await asyncio.sleep(0.2)  # in which the next frame is read, and waits
    face.server.stop.set()
    await detail_of(face.stub.Fuse(request()), ErrorCode.UNAVAILABLE)
    face.engine.gate.set()
    answer = await call.read()
    assert isinstance(answer, pb.FuseStreamResponse)
    assert (answer.sequence, answer.WhichOneof("outcome")) == (0, "fusion")
    await detail_of(call.read(), ErrorCode.UNAVAILABLE)


async def test_a_stream_resumes_where_its_answers_ended(face: Face) -> None:
    first = face.stub.FuseStream()
    for number in range(6):
        await first.write(frame(number))
    for number in range(3):
        answer = await first.read()
        assert isinstance(answer, pb.FuseStreamResponse)
        assert answer.sequence == number
    first.cancel()  # 3 to 5 were fused or not: their sender cannot know
    resumed = pb.FuseStreamRequest(options=pb.StreamOptions(resume_after=2))
    sent = [resumed, *(frame(number) for number in (1, 2, 3, 4, 8))]
    answers = [answer async for answer in face.stub.FuseStream(one_by_one(sent))]
    assert [(answer.previous_sequence, answer.sequence) for answer in answers] == [(2, 3), (3, 4), (4, 8)]
    assert counts(answers[-1].stats) == {"received": 3, "fused": 3, "missing": 3, "skipped": 2}
    assert await eventually(face, 'recofuse_stream_frames_total{mode="all",outcome="skipped"} 2.0')


async def test_a_resumed_stream_says_what_it_never_got(face: Face) -> None:
    for resume_after, first, missing in ((0, 1, 0), (0, 4, 3), (2**64 - 3, 2**64 - 1, 1)):
        options = pb.FuseStreamRequest(options=pb.StreamOptions(resume_after=resume_after))
        (answer,) = [answer async for answer in face.stub.FuseStream(one_by_one([options, frame(first)]))]
        assert (answer.previous_sequence, answer.stats.missing) == (resume_after, missing)


# silence


async def test_a_stream_without_frames_is_ended(facing: Facing) -> None:
    async with facing(grpc={"stream_idle_s": 0.5}) as face:
        face.engine.gate.clear()
        call = face.stub.FuseStream()
        await call.write(frame(1))
        await asyncio.sleep(1.0)  # a frame that is being fused is no silence
        face.engine.gate.set()
        answer = await call.read()
        assert isinstance(answer, pb.FuseStreamResponse)
        assert answer.WhichOneof("outcome") == "fusion"
        assert "no frame came" in (await detail_of(call.read(), ErrorCode.TIMED_OUT)).message
        empty = face.stub.FuseStream()
        await detail_of(empty.read(), ErrorCode.TIMED_OUT)


async def test_silence_may_be_allowed(facing: Facing) -> None:
    async with facing(grpc={"stream_idle_s": 0.0}) as face:
        call = face.stub.FuseStream()
        await asyncio.sleep(0.3)
        await call.write(frame(1))
        assert isinstance(await call.read(), pb.FuseStreamResponse)
        call.cancel()


async def test_a_client_that_takes_no_answers_is_given_up(facing: Facing) -> None:
    async with facing(grpc={"stream_idle_s": 0.5}) as face:
        plane = grey(1280, 960)
        options = pb.StreamOptions(fuse=pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW))
        messages = [pb.FuseStreamRequest(options=options), *(raw_frame(number, plane, plane) for number in range(60))]
        call = face.stub.FuseStream(one_by_one(messages))
        assert isinstance(await call.read(), pb.FuseStreamResponse)
        assert await eventually(face, "recofuse_queue_leased 0.0")
        assert await eventually(face, 'recofuse_errors_total{code="timed_out"} 1.0')  # its frames are let go of
        num_fused = sum(map(len, face.engine.batches))
        assert num_fused < 60
        await asyncio.sleep(0.3)
        assert sum(map(len, face.engine.batches)) == num_fused
        call.cancel()


# steady levels


class WanderingEngine(FakeEngine):
    """As NullEngine, every second pass a little brighter."""

    def fuse(
        self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int], overlap: Pixels | None = None
    ) -> dict[Part, Pixels]:
        pictures = super().fuse(vis, ir, options, seeds, overlap)
        more = 9 * (len(self.batches) % 2)
        return {
            part: np.minimum(picture.astype(np.uint16) + more, 255).astype(np.uint8)
            for part, picture in pictures.items()
        }


def smooth_pair(phase: float) -> tuple[bytes, bytes]:
    y, x = np.mgrid[:64, :96] / 15 + phase
    plane = (110 + 70 * np.sin(x) * np.cos(y)).astype(np.uint8)
    return file_of(np.stack([plane, plane // 2, plane // 3], axis=-1)), file_of(plane)


async def levels_of(face: Face, phases: list[float], **options: Any) -> list[float]:
    """The mean of every answer's picture, frame by frame."""
    opening = pb.StreamOptions(fuse=pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW), max_in_flight=1, **options)
    frames = (frame(number, *smooth_pair(phase)) for number, phase in enumerate(phases))
    messages = one_by_one([pb.FuseStreamRequest(options=opening), *frames])
    return [float(pixels_of(answer.fusion.pictures[0].image).mean()) async for answer in face.stub.FuseStream(messages)]


async def test_levels_are_held_from_frame_to_frame(facing: Facing) -> None:
    async with facing(WanderingEngine()) as face:
        alone = np.diff(await levels_of(face, [0.0] * 12, steady=False))
        steady = np.diff(await levels_of(face, [0.0] * 12))
    assert np.abs(alone).min() > 8
    assert np.abs(steady[4:]).max() < 3


async def test_a_cut_is_shown_as_it_is(facing: Facing) -> None:
    async with facing(WanderingEngine()) as face:
        alone = await levels_of(face, [0.0, 0.0, 0.0, 2.0], steady=False)
        steady = await levels_of(face, [0.0, 0.0, 0.0, 2.0], steady=True)
    assert steady[0] == alone[0]
    assert steady[1] != alone[1]
    assert steady[3] == alone[3]


async def test_streams_do_not_share_what_they_remember(facing: Facing) -> None:
    async with facing(WanderingEngine()) as face:
        first = await levels_of(face, [0.0] * 4)
        second = await levels_of(face, [0.0] * 4)
    assert first == second


# calm pixels


def noisy_pair(seed: int) -> tuple[bytes, bytes]:
    y, x = np.mgrid[:96, :128] / 20
    plane = 120 + 60 * np.sin(x) * np.cos(y)
    generator = np.random.default_rng(seed)
    vis, ir = ((plane[..., None] + generator.normal(0, 6, (96, 128, n))).astype(np.uint8) for n in (3, 1))
    return file_of(vis), file_of(ir[..., 0])


async def pixels_by_frame(face: Face, count: int, **options: Any) -> list[Pixels]:
    opening = pb.StreamOptions(fuse=pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW), **options)
    frames = (frame(number, *noisy_pair(number)) for number in range(count))
    messages = one_by_one([pb.FuseStreamRequest(options=opening), *frames])
    return [pixels_of(answer.fusion.pictures[0].image) async for answer in face.stub.FuseStream(messages)]


def change_at_the_end(frames: list[Pixels]) -> float:
    return float(np.mean([np.abs(np.subtract(*two, dtype=float)).mean() for two in itertools.pairwise(frames[-4:])]))


async def test_noise_is_averaged_away_in_a_calm_stream(face: Face) -> None:
    alone, calm = await pixels_by_frame(face, 12), await pixels_by_frame(face, 12, calm=True)
    np.testing.assert_array_equal(calm[0], alone[0])
    assert change_at_the_end(calm) < 0.25 * change_at_the_end(alone)
    again = await pixels_by_frame(face, 12, calm=True)  # of streams none knows another
    for one, other in zip(calm, again, strict=True):
        np.testing.assert_array_equal(one, other)


async def test_a_calm_stream_without_steady_levels(face: Face) -> None:
    alone, calm = [await pixels_by_frame(face, 12, steady=False, calm=is_calm) for is_calm in (False, True)]
    assert change_at_the_end(calm) < 0.25 * change_at_the_end(alone)


async def test_several_calm_frames_at_work_know_those_that_are_back(face: Face) -> None:
    alone, calm = await pixels_by_frame(face, 24), await pixels_by_frame(face, 24, calm=True, max_in_flight=3)
    assert change_at_the_end(calm) < 0.7 * change_at_the_end(alone)


async def test_a_history_that_is_too_large_for_the_queue_is_let_go_of(
    face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the next frame would never have a place in it."""
    alone = await pixels_by_frame(face, 4, steady=False)
    monkeypatch.setattr(streams, "HISTORY_SHARE", 1 << 20)
    for one, other in zip(alone, await pixels_by_frame(face, 4, steady=False, calm=True), strict=True):
        np.testing.assert_array_equal(one, other)


async def test_a_history_for_which_there_is_no_room_is_let_go_of(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames go on, as they are."""
    add = Holding.add

    def full(holding: Holding, num_bytes: int) -> None:
        if num_bytes > 5000:
            raise OverloadedError("full", retry_after_s=1.0)
        add(holding, num_bytes)

    alone = await pixels_by_frame(face, 4, steady=False)
    monkeypatch.setattr(Holding, "add", full)
    for one, other in zip(alone, await pixels_by_frame(face, 4, steady=False, calm=True), strict=True):
        np.testing.assert_array_equal(one, other)


def noisy_raw(number: int) -> pb.FuseStreamRequest:
    generator = np.random.default_rng(number)
    y, x = np.mgrid[:96, :128] / 20
    plane = 120 + 60 * np.sin(x) * np.cos(y)
    vis, ir = ((plane[..., None] + generator.normal(0, 6, (96, 128, n))).astype(np.uint8) for n in (3, 1))
    images = [
        pb.Image(raw=pb.RawImage(pixel_format=pixel_format, width=128, height=96, data=image.tobytes()))
        for image, pixel_format in ((vis, pb.PIXEL_FORMAT_RGB8), (ir, pb.PIXEL_FORMAT_MONO8))
    ]
    return pb.FuseStreamRequest(frame=pb.Frame(sequence=number, vis=images[0], ir=images[1], timeout_ms=60_000))


async def test_histories_hold_up_no_frame(facing: Facing) -> None:
    """Together they would take more than the process may hold, and nobody asks for them before frames are read."""
    limits = {"max_image_bytes": 3 * 96 * 128, "max_held_bytes": 8 * 4 * 96 * 128}
    opening = pb.StreamOptions(fuse=pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW), calm=True, steady=False)
    async with facing(limits=limits, grpc={"stream_idle_s": 0}) as face:

        async def outcomes() -> list[str | None]:
            sent = [pb.FuseStreamRequest(options=opening), *map(noisy_raw, range(6))]
            return [answer.WhichOneof("outcome") async for answer in face.stub.FuseStream(one_by_one(sent))]

        async with asyncio.timeout(60):
            assert await asyncio.gather(*(outcomes() for _ in range(24))) == [["fusion"] * 6] * 24


@pytest.mark.parametrize("share", [1, 3])
async def test_a_frame_that_has_no_place_with_its_history_goes_without(
    facing: Facing, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    monkeypatch.setattr(streams, "HISTORY_SHARE", share)
    opening = pb.StreamOptions(fuse=pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW), calm=True, steady=False)
    sent = [pb.FuseStreamRequest(options=opening), *map(noisy_raw, range(4))]
    async with facing(queue={"max_bytes": 128 * 96 * 4 + 12_000}) as face:
        answers = [answer async for answer in face.stub.FuseStream(one_by_one(sent))]
    assert [answer.error.message for answer in answers] == [""] * 4


async def test_a_frame_that_fails_takes_its_history_along(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it was, no frame after it can fail for the same history."""
    brought: list[int] = []
    request_of = Stream._request

    def noted(stream: Stream, arrived: _Arrived) -> Any:
        made = request_of(stream, arrived)
        brought.append(len(made.history or b""))
        return made

    monkeypatch.setattr(Stream, "_request", noted)
    pairs = [noisy_pair(0), noisy_pair(1), (b"nonsense", IR), noisy_pair(3), noisy_pair(4)]
    opening = pb.StreamOptions(fuse=pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW), calm=True)
    sent = [pb.FuseStreamRequest(options=opening), *(frame(n, *files) for n, files in enumerate(pairs))]
    answers = [answer async for answer in face.stub.FuseStream(one_by_one(sent))]
    assert [answer.WhichOneof("outcome") for answer in answers] == ["fusion", "fusion", "error", "fusion", "fusion"]
    assert [size > 0 for size in brought] == [False, True, True, False, True]


async def test_every_frame_at_work_is_counted_with_its_history(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, int]] = []
    request_of = Stream._request

    def noted(stream: Stream, arrived: _Arrived) -> Any:
        before = arrived.holding._arrived - len(arrived.history or b"")
        made = request_of(stream, arrived)
        counted.append((arrived.holding._arrived - before, len(made.history or b"")))
        return made

    monkeypatch.setattr(Stream, "_request", noted)
    await pixels_by_frame(face, 12, calm=True, max_in_flight=3)
    assert [count for count, _ in counted] == [size for _, size in counted]
    assert sum(size > 5000 for _, size in counted) > 4


async def test_what_a_calm_stream_kept_is_given_back(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    most: dict[Held, int] = {}
    take = Held.take

    def counted(held: Held, num_bytes: int) -> None:
        take(held, num_bytes)
        most[held] = max(num_bytes, most.get(held, 0))

    monkeypatch.setattr(Held, "take", counted)
    await pixels_by_frame(face, 4, calm=True)
    (held,) = most
    assert most[held] > 5000  # frames are counted elsewhere
    assert held._arrived == 0
