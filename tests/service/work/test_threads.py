"""How many threads a worker starts, for the codec and for the model, and that its log says so and why."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recofuse_core import save_checkpoint, threads
from recofuse_host.processors import Processors
from recofuse_host.waiting import sleep_while_waiting
from service.command.processes import new_metrics
from service.queue.memory import MemoryQueue
from service.terms.settings import EngineSettings, Settings
from service.work import worker as workers
from service.work.engines import build_engine
from service.work.torch_engine import TorchEngine
from service.work.worker import Worker
from tests.core.tiny import GATED, tiny_model
from tests.fakes import FakeEngine

CONTAINER = Processors(64, 6.5)


@pytest.mark.parametrize(("codec_threads", "per_host", "expected"), [(0, 1, 6), (0, 4, 1), (0, 99, 1), (5, 4, 5)])
async def test_codec_threads(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    codec_threads: int,
    per_host: int,
    expected: int,
) -> None:
    monkeypatch.setattr(workers, "read_processors", lambda: CONTAINER)
    settings = Settings.from_values({"worker": {"codec_threads": codec_threads, "per_host": per_host}})
    with caplog.at_level(logging.INFO):
        worker = Worker(MemoryQueue(settings.queue), FakeEngine(), settings, new_metrics())
        running = asyncio.create_task(worker.run())
        await asyncio.wait_for(worker.warm.wait(), 5)
        worker.stop()
        await asyncio.wait_for(running, 10)
    assert worker._codecs.num == expected
    (said,) = [record for record in caplog.records if record.message == "threads that decode and encode"]
    assert said.__dict__["threads"] == expected
    assert said.__dict__["processors"] == "64 allowed, cgroup quota 6.5"


@pytest.mark.parametrize(
    ("num_threads", "per_host", "expected", "why"),
    [
        (0, 1, 6, "torch's 32, 64 allowed, cgroup quota 6.5"),
        (0, 2, 3, "torch's 32, 64 allowed, cgroup quota 6.5, 2 share them"),
        (2, 1, 2, "as asked"),
    ],
)
def test_threads_of_the_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_threads: int,
    per_host: int,
    expected: int,
    why: str,
) -> None:
    weights = tmp_path / "tiny.safetensors"
    save_checkpoint(weights, tiny_model().state_dict(), GATED, name="tiny", version="1")
    monkeypatch.setattr(threads, "_TORCHS_OWN", 32)
    monkeypatch.setattr(threads, "read_processors", lambda: CONTAINER)
    engine = {"model": str(weights), "device": "cpu", "num_threads": num_threads}
    settings = Settings.from_values({"engine": engine, "worker": {"per_host": per_host}})
    with caplog.at_level(logging.INFO):
        build_engine(settings).load()
    assert torch.get_num_threads() == expected
    (said,) = [record for record in caplog.records if record.message == "threads of the model"]
    assert (said.__dict__["threads"], said.__dict__["why"]) == (expected, why)
    assert said.__dict__["waiting"] == sleep_while_waiting().told()


@pytest.mark.parametrize(("asked", "expected"), [(0, 4), (9, 9)])
def test_a_worker_with_a_gpu_needs_few_threads_waits_for_none_and_makes_no_context_on_another(
    monkeypatch: pytest.MonkeyPatch, asked: int, expected: int
) -> None:
    """The GPU is there by name alone: what would use it is replaced."""
    used: list[object] = []
    set_threads: list[int] = []
    intervals_s: list[float] = []
    monkeypatch.setattr(threads, "_TORCHS_OWN", 32)
    monkeypatch.setattr(threads, "read_processors", lambda: Processors(64, None))
    monkeypatch.setattr(torch, "set_num_threads", set_threads.append)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(sys, "setswitchinterval", intervals_s.append)
    monkeypatch.setattr("recofuse_core.devices.named_device", lambda name: name)
    monkeypatch.setattr("recofuse_core.load_pretrained", lambda name, device: used.append(device), raising=False)
    runtime = SimpleNamespace(dtype=torch.float16, why_dtype="closer", kernels="eager")
    monkeypatch.setattr("recofuse_core.Runtime", lambda model, **options: runtime, raising=False)
    TorchEngine(EngineSettings(device="cuda:1", num_threads=asked)).load()
    assert used == ["cuda:1", "cuda:1"]  # first this thread's device, then the model
    assert set_threads[-1] == expected
    (interval_s,) = intervals_s  # for which a thread that is busy in Python may keep the model's waiting; else 5 ms
    assert interval_s <= 0.5e-3
