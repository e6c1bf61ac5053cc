"""GPU metrics, read from the driver (NVML) when /metrics is asked for; nothing where there is no NVIDIA driver.

They describe every GPU of the host that the process can see, not only the one it uses: with several workers on a host
each tells the same, so take the maximum by `gpu`, not the sum.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable

import pynvml
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

GAUGES = {
    "recofuse_gpu_memory_used_bytes": "Memory of a GPU in use, by anyone.",
    "recofuse_gpu_memory_total_bytes": "Memory of a GPU.",
    "recofuse_gpu_utilisation_ratio": "Share of the last sampling period in which a GPU computed.",
    "recofuse_gpu_power_watts": "Power that a GPU draws.",
    "recofuse_gpu_temperature_celsius": "Temperature of a GPU.",
}

# The UUID is what nvidia-smi, DCGM and CUDA_VISIBLE_DEVICES know, too; numbers differ by who counts.
LABELS = ["gpu", "model", "uuid"]
MAX_AGE_S = 1.0


def watch_gpus(registry: CollectorRegistry) -> int:
    """Add the GPUs' metrics to a registry; returns how many GPUs there are. Without a driver: 0, and no metrics."""
    try:
        pynvml.nvmlInit()
        num_gpus = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError as error:
        logger.debug("there are no GPU metrics", extra={"reason": str(error)})
        return 0
    if num_gpus:
        registry.register(GpuCollector(num_gpus))
    return num_gpus


class GpuCollector(Collector):
    """Asks the driver, once a second at most. It may take tens of milliseconds: faces tell metrics on a thread."""

    def __init__(self, num_gpus: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_gpus = num_gpus
        self._clock = clock
        self._told: list[Metric] = []
        self._told_s = -math.inf

    def collect(self) -> Iterable[Metric]:
        """What each GPU can tell; what it cannot is left out."""
        if self._clock() >= self._told_s + MAX_AGE_S:
            self._told = list(self._ask())
            self._told_s = self._clock()
        return self._told

    def _ask(self) -> Iterable[Metric]:
        families = {name: GaugeMetricFamily(name, text, labels=LABELS) for name, text in GAUGES.items()}
        for index in range(self._num_gpus):
            with contextlib.suppress(pynvml.NVMLError):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                labels = [str(index), str(pynvml.nvmlDeviceGetName(handle)), str(pynvml.nvmlDeviceGetUUID(handle))]
                for name, value in _readings(handle).items():
                    families[name].add_metric(labels, value)
        return families.values()


def _readings(handle: object) -> dict[str, float]:
    found: dict[str, float] = {}
    with contextlib.suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        found["recofuse_gpu_memory_used_bytes"] = float(memory.used)
        found["recofuse_gpu_memory_total_bytes"] = float(memory.total)
    with contextlib.suppress(pynvml.NVMLError):
        found["recofuse_gpu_utilisation_ratio"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    with contextlib.suppress(pynvml.NVMLError):
        found["recofuse_gpu_power_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    with contextlib.suppress(pynvml.NVMLError):
        celsius = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        found["recofuse_gpu_temperature_celsius"] = float(celsius)
    return found
