"""The model itself, where the servers of tests expect a fake."""

from __future__ import annotations

from service.terms.jobs import Part
from service.terms.settings import EngineSettings
from service.work.engine import EngineInfo, PassOptions, Pixels
from service.work.torch_engine import TorchEngine
from tests.fakes import FakeEngine


class RealEngine(FakeEngine):
    """Runs weights on the CPU."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.core = TorchEngine(EngineSettings(model=weights, device="cpu", num_threads=1, warm_up_sizes=("96x64",)))

    @property
    def info(self) -> EngineInfo:
        return self.core.info

    def load(self) -> None:
        self.core.load()

    def warm_up(self) -> None:
        self.core.warm_up()

    def fuse(
        self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int], overlap: Pixels | None = None
    ) -> dict[Part, Pixels]:
        return self.core.fuse(vis, ir, options, seeds, overlap)
