"""What an engine tells of its work, beside the pictures."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineActivity:
    """What an engine with recordings has done so far, and holds now."""

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
