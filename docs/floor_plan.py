"""The floor plan of the code: which rooms there are, one above the other, and what is in them.

A room is a package or, where a name says more, one of its folders. It may import from the floors below it, and within
itself; never from its own floor or from above. `tests/test_architecture.py` holds the code to this plan, and
`python -m docs.floor_plan` writes the picture of it into docs/architecture.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).parent / "architecture.md"
BEGIN, END = "<!-- floor plan, by make docs -->\n", "<!-- end of floor plan -->\n"


@dataclass(frozen=True)
class Room:
    """A package or folder. holds: what one finds there, in a few words."""

    name: str
    holds: str

    @property
    def folder(self) -> str:
        """Where it is, from the root of the repository."""
        return self.name.replace(".", "/")


FLOORS: tuple[tuple[Room, ...], ...] = (  # from the roof to the ground
    (Room("service.command", "the recofuse command: verbs, and the processes that they put together"),),
    (Room("service.faces.oip", "the Open Inference Protocol, over both"),),
    (
        Room("service.faces.http", "routes, uploads, problem documents, the page"),
        Room("service.faces.grpc", "calls, streams, health"),
    ),
    (
        Room("service.faces.gateway", "admits a job, waits for its result"),
        Room("service.work", "worker, batcher, engine"),
    ),
    (
        Room("service.access", "who may call, how often, and how much at once"),
        Room("service.watch", "metrics, logs, traces, GPUs"),
    ),
    (Room("service.queue", "where jobs wait: the contract, in memory, on Redis"),),
    (Room("service.terms", "what all of these speak in: jobs, errors, settings, images"),),
    (
        Room("recofuse_core", "the model, its training and its measures"),
        Room("recofuse_client", "what programs call servers with"),
        Room("recofuse_rigs", "how two cameras lie to each other: found, kept in a file, applied"),
    ),
    (
        Room("recofuse_host", "what a process may use of its host, how its threads wait, and what it gives back"),
        Room("recofuse_images", "files to pixels and back, and how names pair"),
        Room("recofuse_protos", "messages generated from proto/"),
    ),
)

# Who may name a package that is somebody's trade: rooms, or single modules of one.
TRADES: dict[str, tuple[str, ...]] = {
    "torch": ("recofuse_core", "service.work.torch_engine", "service.command"),
    "onnxruntime": ("recofuse_core.graphs",),
    "recofuse_core": (
        "service.work.engines",
        "service.work.graph_engine",
        "service.work.torch_engine",
        "service.command",
    ),
    "recofuse_client": ("service.command",),
    "recofuse_protos": ("recofuse_client", "service.faces.grpc", "service.faces.oip", "service.command"),
    "fastapi": ("service.faces.http", "service.faces.oip"),
    "starlette": ("service.faces.http", "service.faces.oip", "service.command"),
    "uvicorn": ("service.faces.http", "service.command"),
    "grpc": ("recofuse_client", "service.faces.grpc", "service.faces.oip", "service.command"),
    "redis": ("service.queue", "service.access"),
    "prometheus_client": ("service.watch", "service.command"),
    "opentelemetry": ("service.watch",),
    "pynvml": ("service.watch",),
    "typer": ("service.command",),
    "rich": ("service.command",),
    "safetensors": ("recofuse_core",),
    "imagecodecs": ("recofuse_images",),
    "tifffile": ("recofuse_images",),
}


def picture() -> str:
    """The plan as lines of text, indented as Markdown's code."""
    width = max(len(room.folder) for floor in FLOORS for room in floor)
    lines = []
    for height, floor in zip(range(len(FLOORS) - 1, -1, -1), FLOORS, strict=True):
        for index, room in enumerate(floor):
            lines.append(f"    {'' if index else height:>1}  {room.folder:<{width}}  {room.holds}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replace what stands between the marks."""
    text = DOCUMENT.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(before + BEGIN + "\n" + picture() + "\n" + END + after, "utf-8")


if __name__ == "__main__":
    main()
