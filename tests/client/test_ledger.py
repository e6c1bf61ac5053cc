"""The books of a stream, against a server that only pretends: every frame is accounted for, whatever breaks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import recofuse_client as rc
from recofuse_client.retries import Retry
from recofuse_client.streams.ledger import Ledger
from recofuse_client.streams.options import StreamOptions
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from tests.client.frames import IR, VIS

EAGER = Retry(first_pause_s=1e-9, max_pause_s=1e-9)


class PretendServer:
    """Answers as fusion.proto promises, and breaks when told to."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.arrived: list[int] = []
        self.last = -1

    def open(self) -> None:
        opening = self.ledger.opening().options
        self.arrived = []
        self.last = opening.resume_after if opening.HasField("resume_after") else -1

    def receive(self) -> None:
        sequence = self.ledger.take().frame.sequence
        if sequence > self.last and (not self.arrived or sequence > self.arrived[-1]):
            self.arrived.append(sequence)

    def answer(self, *, skip: bool) -> pb.FuseStreamResponse:
        """The answer to the oldest frame, or in mode latest to the newest."""
        sequence = self.arrived.pop() if skip else self.arrived.pop(0)
        self.arrived = [number for number in self.arrived if number > sequence]
        self.last = sequence
        return pb.FuseStreamResponse(sequence=sequence, fusion=pb.Fusion())


@given(
    mode=st.sampled_from(["all", "latest"]),
    window=st.integers(1, 6),
    steps=st.lists(st.sampled_from(["offer", "offer", "send", "send", "answer", "break", "refuse"]), max_size=120),
)
# 2 is dropped before 0 is: the answer to 1 tells of 0 alone
@example(mode="latest", window=1, steps=["offer", "send", "offer", "send", "offer", "offer", "answer"])
def test_every_frame_is_accounted_for(mode: Any, window: int, steps: list[str]) -> None:
    ledger = Ledger(StreamOptions(mode=mode, window=window, retry=EAGER, reconnect_s=1000))
    server = PretendServer(ledger)
    results: list[rc.FrameResult] = []
    offered = 0
    tiny = np.zeros((1, 1), np.uint8)

    def take_answer() -> None:
        outcome = ledger.answer(server.answer(skip=mode == "latest"))
        assert isinstance(outcome, rc.FrameResult)
        results.append(outcome)

    def reconnect() -> None:
        ledger.reopen()
        server.open()

    server.open()
    for step in steps:
        if step == "offer" and ledger.can_offer:
            ledger.offer((tiny, tiny))
            offered += 1
        elif step == "send" and ledger.has_next:
            server.receive()
        elif step == "answer" and server.arrived:
            take_answer()
        elif step == "break":
            assert ledger.break_off(rc.ConnectionLostError("gone")) >= 0
            reconnect()
        elif step == "refuse" and server.arrived and mode == "all":
            detail = pb.ErrorDetail(code="unavailable", message="stopping")
            pause_s = ledger.answer(pb.FuseStreamResponse(sequence=server.arrived[0], error=detail))
            assert isinstance(pause_s, float)
            reconnect()
    ledger.is_ended = True
    while ledger.has_next:
        server.receive()
    while server.arrived:
        take_answer()
    assert ledger.break_off(None) == 0
    assert ledger.is_done
    stats, sequences = ledger.stats, [result.sequence for result in results]
    assert sequences == sorted(set(sequences))
    assert stats.offered == offered
    assert stats.fused + stats.failed + stats.dropped + stats.lost == offered
    assert stats.fused == len(results)
    if mode == "all":
        assert sequences == list(range(offered))
        assert not any(result.num_missed for result in results)
    else:
        for before, after in itertools.pairwise([-1, *sequences]):
            missed = next(result.num_missed for result in results if result.sequence == after)
            assert missed == after - before - 1


def test_a_server_that_stays_away_costs_no_memory() -> None:
    ledger = Ledger(StreamOptions(mode="latest", retry=EAGER, reconnect_s=1e9))
    tiny = np.zeros((1, 1), np.uint8)
    for _ in range(50):
        for _ in range(4):
            ledger.offer((tiny, tiny))
        ledger.take()
        ledger.offer((tiny, tiny))
        ledger.offer((tiny, tiny))
        ledger.break_off(rc.ConnectionLostError("gone"))
        ledger.reopen()
        assert len(ledger._missed) <= 1
    ledger.take()
    answer = ledger.answer(pb.FuseStreamResponse(sequence=299, fusion=pb.Fusion()))
    assert isinstance(answer, rc.FrameResult)
    assert answer.num_missed == 299 == answer.stats.dropped + answer.stats.lost


def test_attempts_to_reconnect_are_no_reconnections() -> None:
    ledger = Ledger(StreamOptions(retry=EAGER, reconnect_s=1000))
    gone = rc.ConnectionFailedError("nobody listens")
    for number in range(3):
        for _ in range(number + 4):
            ledger.opening()
            ledger.break_off(gone)
            ledger.reopen()
        assert ledger.stats.reconnects == max(0, number - 1)
        ledger.offer((VIS, IR))
        ledger.opening()
        ledger.take()
        ledger.answer(pb.FuseStreamResponse(sequence=number, fusion=pb.Fusion()))
        assert ledger.stats.reconnects == number


def test_sequence_numbers_ascend_and_may_leave_gaps() -> None:
    ledger = Ledger(StreamOptions(mode="latest"))
    ledger.offer(rc.Frame(VIS, IR, sequence=5))
    ledger.offer((VIS, IR))
    ledger.offer(rc.Frame(VIS, IR, sequence=9))
    assert ledger.take().frame.sequence == 9
    with pytest.raises(ValueError, match="9 came after 9"):
        ledger.offer(rc.Frame(VIS, IR, sequence=9))
    answer = ledger.answer(pb.FuseStreamResponse(sequence=9, fusion=pb.Fusion()))
    assert isinstance(answer, rc.FrameResult)
    assert answer.num_missed == 2  # a number that the source left out is no frame


def test_patience_with_a_server_that_is_gone_ends() -> None:
    lost = rc.ConnectionLostError("gone")
    ledger = Ledger(StreamOptions(reconnect_s=0))
    ledger.offer((VIS, IR))
    ledger.take()
    with pytest.raises(rc.ConnectionLostError):
        ledger.break_off(lost)
    hasty = Ledger(StreamOptions(reconnect_s=0))
    hasty.offer((VIS, IR))
    hasty.take()
    refused = pb.ErrorDetail(code="rate_limited", message="slowly", retry_after_s=5)
    outcome = hasty.answer(pb.FuseStreamResponse(sequence=0, error=refused))
    assert isinstance(outcome, rc.FrameResult)
    assert isinstance(outcome.error, rc.RateLimitedError)
    with pytest.raises(rc.RateLimitedError):
        outcome.unwrap()
    with pytest.raises(rc.InvalidInputError):
        Ledger(StreamOptions()).break_off(rc.InvalidInputError("options in the middle"))
    idle = Ledger(StreamOptions(reconnect_s=0))
    assert idle.break_off(rc.TimedOutError("no frame came for 60 s")) == 0


def test_impossible_options() -> None:
    for wrong in ({"mode": "some"}, {"window": 0}, {"max_in_flight": -1}, {"reconnect_s": -1}):
        with pytest.raises(ValueError, match=r"mode|window"):
            StreamOptions(**wrong)


def test_the_server_is_told_whether_to_hold_levels_steady() -> None:
    for is_steady in (True, False):
        opening = Ledger(StreamOptions(steady=is_steady)).opening()
        assert opening.options.HasField("steady")
        assert opening.options.steady is is_steady


def test_the_server_is_told_whether_to_average_noise_away() -> None:
    assert Ledger(StreamOptions(calm=True)).opening().options.calm
    assert not Ledger(StreamOptions()).opening().options.calm
