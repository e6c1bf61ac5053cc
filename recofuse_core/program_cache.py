"""Which recorded runs are kept: bounded in number and bytes, admitted by use."""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from recofuse_core.faults import Fault, fault_of, let_go
from recofuse_core.programs import Program, ProgramKey

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Activity:
    """What a runtime has done so far, and holds now. Runs are of batches; programs hold host memory, too."""

    recorded_runs: int = 0
    eager_runs: int = 0
    recordings: int = 0
    failed_recordings: int = 0
    evictions: int = 0
    recording_s: float = 0.0
    programs: int = 0
    program_bytes: int = 0
    allocated_bytes: int = 0
    reserved_bytes: int = 0


class ProgramCache:
    """Recorded runs, bounded in number and bytes, admitted by use.

    A shape is due when it was met twice; so one that comes once costs one eager run, not a recording. Where there is no
    room, a new shape takes the place of the one used least, if it is used more: 17 shapes in turn on 16 places are 16
    programs and one that stays eager, not a recording each. Uses fade, so that what was hot yesterday gives way. Shapes
    recorded by name (`record`), which somebody vouched for, are always admitted and count as used `VOUCHED` times.
    Those that are wanted (`want`) count so, too, and are due.

    A deferred cache leaves what is due to idle moments (`record_due`), and beyond `OVERDUE` uses to `get` after all; it
    records for at most a tenth of the time, whatever callers ask for.

    What cannot be recorded is refused for good and runs eagerly; after `MAX_FAILED_CAPTURES` of them, everything does.
    """

    VOUCHED = 16
    HALF_LIFE = 1024  # lookups after which a use counts half
    RECORDING_SHARE = 0.1
    OVERDUE = 64  # uses after which a due shape does not wait for an idle moment any longer
    MAX_FAILED_CAPTURES = 3

    def __init__(
        self,
        max_programs: int,
        build: Callable[[ProgramKey], Program],
        *,
        max_bytes: int = 0,
        is_deferred: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_bytes: of all programs, 0: no bound. is_deferred: what is due waits for `record_due`."""
        self._max_programs = max_programs
        self._max_bytes = max_bytes
        self._build = build
        self._is_deferred = is_deferred
        self._clock = clock
        self._programs: OrderedDict[ProgramKey, Program] = OrderedDict()  # used longest ago first
        self._uses: OrderedDict[ProgramKey, float] = OrderedDict()
        self._refused: set[ProgramKey] = set()
        self._due: OrderedDict[ProgramKey, None] = OrderedDict()
        self._num_lookups = 0
        self._num_failed_captures = 0
        self._record_from_s = -math.inf
        self._num_recordings = 0
        self._num_failures = 0
        self._num_evictions = 0
        self._recording_s = 0.0

    def __len__(self) -> int:
        return len(self._programs)

    def __contains__(self, key: ProgramKey) -> bool:
        return key in self._programs

    @property
    def size_bytes(self) -> int:
        """Bytes that all programs hold."""
        return sum(program.size_bytes for program in self._programs.values())

    @property
    def activity(self) -> Activity:
        """What was recorded, and what is held."""
        return Activity(
            recordings=self._num_recordings,
            failed_recordings=self._num_failures,
            evictions=self._num_evictions,
            recording_s=self._recording_s,
            programs=len(self),
            program_bytes=self.size_bytes,
        )

    @property
    def is_off(self) -> bool:
        """Whether recording was given up."""
        return self._num_failed_captures >= self.MAX_FAILED_CAPTURES

    def get(self, key: ProgramKey, *, record: bool = False) -> Program | None:
        """The program for a key; None where the run is to be eager. record: make it now, whoever has to go."""
        self._count(key, self.VOUCHED if record else 1)
        if (program := self._programs.get(key)) is not None:
            self._programs.move_to_end(key)
            return program
        if key in self._refused or self.is_off:
            return None
        if record:
            return self._record(key)
        if self._uses[key] < 2 or not self._is_worth_it(key):
            return None
        if not self._is_deferred or (self._uses[key] >= self.OVERDUE and self._may_record()):
            return self._record(key)
        self._due[key] = None
        return None

    def want(self, key: ProgramKey) -> None:
        """Vouch for a key that is to be recorded by `record_due`, if there is room then or something is used less."""
        self._count(key, self.VOUCHED)
        if key not in self._programs and key not in self._refused and not self.is_off:
            self._due[key] = None

    @property
    def due_in_s(self) -> float | None:
        """Seconds until `record_due` may record what is due; 0 for now, None if nothing is."""
        if not self._due or self.is_off:
            return None
        return max(0.0, self._record_from_s - self._clock())

    def record_due(self) -> bool:
        """Record the one of the due shapes that is used most; False if there was none, or it is too soon."""
        if not self._may_record():
            return False
        while self._due:
            key = max(self._due, key=lambda due: self._uses.get(due, 0))
            del self._due[key]
            if key not in self._programs and key not in self._refused and self._is_worth_it(key):
                return self._record(key) is not None
        return False

    def clear(self) -> None:
        """Give up all programs, once what is under way in them has ended."""
        for program in self._programs.values():
            program.settle()
        for key in list(self._programs):
            self._evict(key)

    def _may_record(self) -> bool:
        return not self.is_off and self._clock() >= self._record_from_s

    def _is_worth_it(self, key: ProgramKey) -> bool:
        """Whether there is room, or a program that is used clearly less."""
        if not self._is_full():
            return True
        return self._uses[key] > self._uses.get(self._victim(), 0) + 1

    def _is_full(self) -> bool:
        return len(self._programs) >= self._max_programs or 0 < self._max_bytes <= self.size_bytes

    def _victim(self) -> ProgramKey:
        return min(self._programs, key=lambda key: self._uses.get(key, 0))  # the one used longest ago of several

    def _record(self, key: ProgramKey) -> Program | None:
        while self._programs and self._is_full():
            self._evict(self._victim())  # before the recording, which takes over its memory
        self._due.pop(key, None)
        started_s = self._clock()
        try:
            program = self._build(key)
        except (RuntimeError, MemoryError) as error:
            fault = fault_of(error)
            if fault is Fault.BROKEN:
                raise
            let_go(error)
            self._num_failures += 1
            self._refused.add(key)
            self._num_failed_captures += fault is not Fault.MEMORY
            reason = str(error).partition("\n")[0]
            logger.warning("a run cannot be recorded and stays eager", extra={"key": str(key), "error": reason})
            if self.is_off:
                logger.error("recording is given up: all runs are eager from now on", extra={"error": reason})
            return None
        finally:
            ended_s = self._clock()
            self._recording_s += ended_s - started_s
            self._record_from_s = ended_s + (ended_s - started_s) * (1 / self.RECORDING_SHARE - 1)
        self._programs[key] = program
        self._num_recordings += 1
        # What is too large for all others together stays: it was worth it.
        while len(self._programs) > 1 and 0 < self._max_bytes < self.size_bytes:
            self._evict(min((k for k in self._programs if k != key), key=lambda k: self._uses.get(k, 0)))
        return program

    def _evict(self, key: ProgramKey) -> None:
        del self._programs[key]
        self._num_evictions += 1

    def _count(self, key: ProgramKey, uses: int) -> None:
        self._uses[key] = self._uses.get(key, 0) + uses
        self._uses.move_to_end(key)
        while len(self._uses) > 8 * self._max_programs:
            gone, _ = self._uses.popitem(last=False)
            self._due.pop(gone, None)
        self._num_lookups += 1
        if self._num_lookups % self.HALF_LIFE == 0:
            for known in self._uses:
                self._uses[known] /= 2
