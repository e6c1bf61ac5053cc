"""The two files of each scene, found in folders by their names.

What names.py says of names is done here to files: two of them, two folders with what lies below, or one folder that
holds both sides. A file is never paired with itself, under whichever name (links). The exception is a packed file
(`is_packed`).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from recofuse_images import png
from recofuse_images.names import (
    READABLE_SUFFIXES,
    Name,
    PairingError,
    Role,
    Unmatched,
    listed,
    match_names,
    match_within,
    stem_of,
)

NOT_AN_IMAGE = "not an image"


@dataclass(frozen=True, slots=True)
class FoundPair:
    """The two files of a pair. A packed file is both sides: colour, and infrared as the fourth channel."""

    name: str
    vis: Path
    ir: Path
    is_packed: bool = False


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A file that is in no pair, and why."""

    path: Path
    reason: str


def pair_paths(vis: Path, ir: Path, *, leave_out: Path | None = None) -> tuple[list[FoundPair], list[PassedOver]]:
    """The pairs of two files, of two folders with what lies below, or of one folder given for both; and what is left.

    Pairs come sorted by name. `leave_out` is a folder that is not searched (the output's). Hidden files are not seen.
    Raises PairingError for a missing path, a file beside a folder, one file as both sides, names that are ambiguous,
    and where nothing pairs.
    """
    for role, path in (("vis", vis), ("ir", ir)):
        if not path.exists():
            raise PairingError(f"{role}: there is no file or folder {path}")
    if vis.is_dir() != ir.is_dir():
        raise PairingError(f"vis and ir must be two files or two folders, not {vis} and {ir}")
    if not vis.is_dir():
        return [_checked(FoundPair(stem_of(vis.name), vis, ir))], []
    return _within(vis, leave_out) if vis.samefile(ir) else _between(vis, ir, leave_out)


def _between(vis: Path, ir: Path, leave_out: Path | None) -> tuple[list[FoundPair], list[PassedOver]]:
    names: dict[Role, dict[str, Path]] = {}
    passed_over = []
    sides: tuple[tuple[Role, Path, Path], ...] = (("vis", vis, ir), ("ir", ir, vis))
    for role, folder, other in sides:
        # A folder within the other one (thermal/ beside the pictures it belongs to) is one side only.
        names[role], others = _files_in(folder, (leave_out, other))
        passed_over += others
    matches, unmatched = match_names(names["vis"], names["ir"])
    if not matches:
        raise PairingError(_nothing_in_common(vis, ir, unmatched))
    passed_over += [PassedOver(names[item.role][item.name], item.reason) for item in unmatched if item.role]
    return [
        _checked(FoundPair(match.name, names["vis"][match.vis], names["ir"][match.ir])) for match in matches
    ], passed_over


def _within(folder: Path, leave_out: Path | None) -> tuple[list[FoundPair], list[PassedOver]]:
    names, passed_over = _files_in(folder, (leave_out,))
    matches, unmatched = match_within(names)
    pairs = [_checked(FoundPair(match.name, names[match.vis], names[match.ir])) for match in matches]
    taken = {pair.name for pair in pairs}
    roleless: dict[str, str] = {}
    for item in unmatched:
        name = Name(item.name)
        scene = name.without(frozenset())
        if not name.roles:
            if scene in roleless:
                raise PairingError(
                    f"{roleless[scene]} and {item.name} in {folder} share one name, and nothing says which one is "
                    "infrared: name them such as 0001_vis.png and 0001_ir.png, or give two folders"
                )
            roleless[scene] = item.name
        if not name.roles and scene not in taken and is_packed(names[item.name]):
            pairs.append(FoundPair(scene, names[item.name], names[item.name], is_packed=True))
        else:
            passed_over.append(PassedOver(names[item.name], item.reason))
    if not pairs:
        raise PairingError(
            f"{folder} is given for both sides ({len(names)} images), but no two names in it are a pair: name files "
            "such as 0001_vis.png and 0001_ir.png, or give two folders" + _told_of(unmatched)
        )
    return sorted(pairs, key=lambda pair: pair.name), passed_over


def _files_in(folder: Path, leave_out: Iterable[Path | None]) -> tuple[dict[str, Path], list[PassedOver]]:
    """The images below a folder by name relative to it, and its other files. A folder is entered once, links or not."""
    images: dict[str, Path] = {}
    others = []
    seen = {os.path.realpath(path) for path in leave_out if path is not None} - {os.path.realpath(folder)}
    for directory, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(directory))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(directory, name)) not in seen
        )
        for file in sorted(files):
            path = Path(directory, file)
            if file.startswith("."):
                continue
            if path.suffix.lower() in READABLE_SUFFIXES:
                images[path.relative_to(folder).as_posix()] = path
            else:
                others.append(PassedOver(path, NOT_AN_IMAGE))
    return images, others


def _checked(pair: FoundPair) -> FoundPair:
    """The pair, unless its files are one: then only a packed file will do."""
    if not pair.vis.samefile(pair.ir):
        return pair
    if is_packed(pair.vis):
        return FoundPair(pair.name, pair.vis, pair.vis, is_packed=True)
    raise PairingError(
        f"vis and ir are one file, {pair.vis}"
        + (f" (also {pair.ir})" if pair.ir != pair.vis else "")
        + ": a pair is two images, or a PNG of four channels whose fourth is infrared"
    )


def is_packed(path: Path) -> bool:
    """Whether a file may be both sides of a pair, as in MFNet: a PNG of 8-bit RGBA, whose alpha is infrared."""
    with path.open("rb") as file:
        return png.is_rgba(file.read(33))


def _nothing_in_common(vis: Path, ir: Path, unmatched: Sequence[Unmatched]) -> str:
    num_vis = sum(item.role == "vis" for item in unmatched)
    text = (
        f"{vis} ({num_vis} images) and {ir} ({len(unmatched) - num_vis} images) have no file name in common; pairs "
        f"carry one name, such as {vis}/001.png and {ir}/001.jpg, or 001_vis.png and 001_ir.png"
    )
    given = {role: [item.name for item in unmatched if item.role == role] for role in ("vis", "ir")}
    with suppress(PairingError):
        if match_names(given["ir"], given["vis"])[0]:
            text += "; by their names the two are swapped"
    return text + _told_of(unmatched)


def _told_of(unmatched: Sequence[Unmatched]) -> str:
    return f"; found {listed([item.name for item in unmatched])}" if unmatched else ""


def told(passed_over: Sequence[PassedOver]) -> str:
    """One line about files in no pair: how many, which and why, a few of each kind."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for item in passed_over:
        by_reason[item.reason].append(f"{item.path.parent.name}/{item.path.name}")
    kinds = "; ".join(f"{reason}: {listed(names)}" for reason, names in sorted(by_reason.items()))
    return f"{len(passed_over)} file{'s are' if len(passed_over) > 1 else ' is'} passed over ({kinds})"
