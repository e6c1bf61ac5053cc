"""The two streams of the command: results on standard output, progress and complaints on standard error.

And the words that several verbs print there.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SOURCES = {  # of infrared, in words
    "raw": "the camera's own values in the file",
    "palette": "a false-colour picture, turned back into intensity",
    "grey": "grey values",
}

out = Console(highlight=False, emoji=False)  # else :100: becomes a picture
err = Console(stderr=True, highlight=False, emoji=False)


def complain(message: str) -> None:
    """One line on standard error."""
    err.print(f"recofuse: {' '.join(message.split())}", markup=False, soft_wrap=True, style="red")


def progress_bar() -> Progress:
    """How far a long verb has come, on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
    )
