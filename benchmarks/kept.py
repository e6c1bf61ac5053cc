"""How much of the engine's throughput the service keeps with the real model: `recofuse bench kept`.

The same 640x480 pair, the same number of times: through the engine alone (decoded arrays in, arrays out, in a process
that does nothing else), and through `recofuse serve` over loopback as PNG files, from several clients at once. On a CPU
the processor time of an answer decides, that of the whole server, since on a small machine the clients would take from
the clock's share; the engine runs before and after the service, so that a drifting machine does not decide. On a GPU,
where the service's work overlaps the model's, the clock decides, and what is to be kept is the throughput of whatever
is slowest: the engine, the codec on all processors but one, or the one process that reads and answers requests.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.load import ask, fuse_request, picture_pair
from benchmarks.processes import Stack, all_in_one, machine
from recofuse_host.processors import read_processors

TARGET = 0.95
LONGEST_S = 3000.0
REQUEST_S = 2.8e-3  # what a request costs the front end's process beside the codec (docs/performance.md)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds of one image, processor time on a CPU, by the clock on a GPU.

    attainable_s: of the slowest part. kept: that over the service's.
    """

    device: str
    batch: int
    engine_s: float
    service_s: float
    codec_s: float
    attainable_s: float
    kept: float
    line: str


def run(
    *,
    num_images: int = 12,
    num_clients: int = 4,
    device: str = "auto",
    num_threads: int = 1,
    json_path: Path | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Measure both; say the summary as the last line."""
    import torch

    from recofuse_core.devices import named_device
    from service.terms.settings import EngineSettings
    from service.work.torch_engine import TorchEngine

    chosen = named_device(device)
    on_gpu = chosen.startswith("cuda")
    where = machine()
    engine = TorchEngine(EngineSettings(device=chosen, num_threads=num_threads))
    engine.load()
    batch = 8 if on_gpu else 1  # what the engine runs best
    files = picture_pair()
    values: dict[str, dict[str, Any]] = {
        "engine": {"device": chosen, "num_threads": num_threads},
        "grpc": {"port": -1},
        "jobs": {"default_timeout_s": LONGEST_S, "max_timeout_s": LONGEST_S},
        "log": {"level": "WARNING"},
    }
    values["batch"] = {"max_batch": batch}
    before_s = _engine_s(engine, files, batch, num_images, on_gpu)
    say(f"engine alone, batches of {batch}: {1e3 * before_s:.1f} ms an image")
    with all_in_one(values) as stack:
        asyncio.run(_load(stack, files, batch, num_clients))
        spent = [asyncio.run(_served_s(stack, files, num_images, num_clients, on_gpu)) for _ in range(2)]
    service_s = statistics.fmean(spent)
    say(f"recofuse serve, {num_clients} clients: {1e3 * service_s:.1f} ms an image")
    after_s = _engine_s(engine, files, batch, num_images, on_gpu)
    say(f"engine alone again: {1e3 * after_s:.1f} ms an image")
    engine_s = (before_s + after_s) / 2
    codec_s = _codec_s(files)
    attainable_s = slowest_s(engine_s, codec_s, read_processors().usable) if on_gpu else engine_s
    kept = attainable_s / service_s
    name = torch.cuda.get_device_name(chosen) if on_gpu else f"{where['cpu']}, {num_threads} thread"
    clock = "by the clock" if on_gpu else "processor time"
    verdict = "" if kept >= TARGET else ", MISSED"
    owner = "the engine's throughput" if attainable_s == engine_s else "what its processors allow"
    line = (
        f"kept: {100 * kept:.1f} % of {owner} (>=95 %{verdict}) on {name}: "
        f"{1e3 * engine_s:.1f} ms an image alone, {1e3 * service_s:.1f} ms through the service ({clock}; PNG alone "
        f"takes {1e3 * codec_s:.1f} ms)"
    )
    if not on_gpu and where["load_average"] > 0.5:
        line += f"; the machine was busy (load average {where['load_average']})"
    outcome = Outcome(chosen, batch, engine_s, service_s, codec_s, attainable_s, kept, line)
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": where, **asdict(outcome)}, indent=2) + "\n", encoding="utf-8")
    say(line)
    return outcome


def slowest_s(engine_s: float, codec_s: float, num_processors: int) -> float:
    """Seconds of one image where engine, codec and requests overlap. A processor more than these two is the model's."""
    return max(engine_s, codec_s / max(1, num_processors - 1), REQUEST_S)


def _engine_s(engine: Any, files: tuple[bytes, bytes], batch: int, num_images: int, on_gpu: bool) -> float:
    from service.terms.jobs import FusionOptions
    from service.work.engine import PassOptions

    colour, grey = (cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED) for file in files)
    vis, ir = np.stack([np.asarray(colour, np.uint8)] * batch), np.stack([np.asarray(grey, np.uint8)] * batch)
    options = PassOptions.of(FusionOptions(), engine.info)
    clock = time.perf_counter if on_gpu else time.process_time
    for _ in range(3 if on_gpu else 1):
        engine.fuse(vis, ir, options, [0] * batch)
    started = clock()
    for _ in range(-(-num_images // batch)):
        engine.fuse(vis, ir, options, [0] * batch)
    return (clock() - started) / (-(-num_images // batch) * batch)


async def _load(stack: Stack, files: tuple[bytes, bytes], batch: int, num_clients: int) -> None:
    """Warm: every batch size that the measurement may meet has run."""
    for count in {1, batch, num_clients}:
        await _send(stack, files, 2 * count, count)


async def _served_s(stack: Stack, files: tuple[bytes, bytes], num_images: int, num_clients: int, on_gpu: bool) -> float:
    """Seconds of one answer; all that was begun has ended when the clocks are read."""
    cpu_s, started = sum(stack.cpu_s().values()), time.perf_counter()
    await _send(stack, files, num_images, num_clients)
    seconds = time.perf_counter() - started
    return (seconds if on_gpu else sum(stack.cpu_s().values()) - cpu_s) / num_images


async def _send(stack: Stack, files: tuple[bytes, bytes], count: int, num_clients: int) -> None:
    request = fuse_request(*files)
    free = asyncio.Semaphore(num_clients)

    async def one() -> int:
        async with free:
            return (await ask(stack.address, request, timeout_s=LONGEST_S)).status

    statuses = await asyncio.gather(*(one() for _ in range(count)))
    if set(statuses) != {200}:
        raise RuntimeError(f"not every request was answered: {statuses}")


def _codec_s(files: tuple[bytes, bytes], repeats: int = 5) -> float:
    """Processor time of decoding both files and encoding one answer as the service does."""
    from recofuse_images.writer import png_bytes

    spent = []
    for _ in range(repeats):
        started = time.process_time()
        colour = cv2.imdecode(np.frombuffer(files[0], np.uint8), cv2.IMREAD_UNCHANGED)
        cv2.imdecode(np.frombuffer(files[1], np.uint8), cv2.IMREAD_UNCHANGED)
        png_bytes(np.asarray(colour))
        spent.append(time.process_time() - started)
    return statistics.median(spent)
