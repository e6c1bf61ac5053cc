"""Rigs that requests may ask for: a name from the operator's folder, the text of a rig file, or a bare matrix.

A front end makes a `Rig` of what was asked, and the job carries it whole, so that any worker can do the job, whatever
its own folder holds or comes to hold meanwhile. What comes is trusted in nothing: a name is a plain word and never a
path, and every rig is checked as `recofuse_rigs.rig` has it before a worker sees it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from recofuse_rigs.errors import BadRigError
from recofuse_rigs.rig import Rig, Size, check_name, flat, from_file, from_json, matrix_of
from service.terms.errors import InvalidInputError
from service.terms.settings import RigSettings, SettingsError

logger = logging.getLogger(__name__)

SUFFIX = ".json"
MAX_LISTED = 1000
MAX_NAMED = 8  # in a message

_Stamp = tuple[int, int, int]


class Rigs:
    """The operator's folder of rigs, NAME.json each, and what else a request may name. Safe to use from threads.

    Files are read again when they have changed, so that a new calibration needs no restart. Raises SettingsError for a
    folder that is none.
    """

    def __init__(self, settings: RigSettings) -> None:
        self._folder = Path(settings.directory) if settings.directory else None
        if self._folder is not None and not self._folder.is_dir():
            raise SettingsError(f"rigs.directory: {settings.directory} is no folder")
        self._known: dict[str, tuple[_Stamp, Rig | BadRigError]] = {}

    def asked(self, text: str, vis_size: Size, ir_size: Size, *, is_ir_sure: bool = True) -> Rig:
        """What `rig` of a request stands for, for pictures of these sizes.

        text: a rig's name; or the content of a rig file; or nine numbers with commas, row by row, the matrix from
        infrared pixels to visible ones of these very pictures. is_ir_sure: the infrared size is that of the values that
        will be read, and not that of a picture beside them. Reads a file. Raises InvalidInputError.
        """
        text = text.strip()
        try:
            if text.startswith("{"):
                rig = from_json(text)
            elif "," in text:
                rig = Rig(vis_size, ir_size, flat(matrix_of(text)))
            else:
                rig = self._named(text)
            rig.resized(vis_size, ir_size if is_ir_sure else rig.ir_size)
        except BadRigError as error:
            raise InvalidInputError(f"rig: {error}") from error
        return rig

    @staticmethod
    def name_in(text: str) -> str:
        """The name that an accepted `rig` of a request is; empty for one that came with the request."""
        text = text.strip()
        return "" if text.startswith("{") or "," in text else text

    def listed(self) -> list[Rig]:
        """The folder's rigs by name, each under its file's; those that cannot be used are left out and logged."""
        rigs = []
        for name in self._names():
            try:
                rigs.append(self._named(name))
            except BadRigError as error:
                logger.warning("a rig cannot be used", extra={"rig": name, "error": str(error)})
        return rigs

    def _names(self) -> list[str]:
        if self._folder is None:
            return []
        names = []
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            try:
                check_name(path.stem)
            except BadRigError:
                continue
            names.append(path.stem)
        return names[:MAX_LISTED]

    def _named(self, name: str) -> Rig:
        """Raises BadRigError for what is no name, is not there, or cannot be used."""
        check_name(name)
        path = None if self._folder is None else self._folder / f"{name}{SUFFIX}"
        try:
            stamp = None if path is None or not path.is_file() else _stamp_of(path)
            if path is None or stamp is None:
                names = self._names()
                more = ", ..." if len(names) > MAX_NAMED else ""
                there = ", ".join(names[:MAX_NAMED]) + more or "none here"
                raise BadRigError(f"there is no rig {name}; there are {there}")
            known = self._known.get(name)
            if known is None or known[0] != stamp:
                known = self._known[name] = stamp, _read(path, name)
        except OSError as error:
            raise BadRigError(f"the file of {name} cannot be read here") from error
        if isinstance(known[1], BadRigError):
            raise BadRigError(f"the file of {name} cannot be used: {known[1]}")
        return known[1]


def _stamp_of(path: Path) -> _Stamp:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path, name: str) -> Rig | BadRigError:
    try:
        return replace(from_file(path), name=name)
    except BadRigError as error:
        return error
