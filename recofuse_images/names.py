"""Which visible and which infrared name belong together, as data sets have them.

A file's name, with the folders below the one that was given, says which scene it shows and often which camera took it.
Two files are a pair if their names are equal once the word for the camera (the role word) is left out:

    vis/0001.png                ir/0001.jpg                 0001            whatever the suffix, and its case
    0001_vis.png                0001-IR.tiff                0001            after, before, between: VIS1, scene_VIS_12
    FLIR_0001_RGB.jpg           FLIR_0001.jpeg              FLIR_0001       one role word is enough
    vis/day/1.png               ir/day/1.png                day/1           folders count,
    set00/V000/visible/I01.jpg  set00/V000/lwir/I01.jpg     set00/V000/I01  and may be role words too
    fl_rgb_12_34.png            fl_ir_aligned_12_34.png     fl_12_34        `aligned` and the like beside a role word
    00001v.jpg                  00001i.jpg                  00001           short words, where longer ones do not decide
    1.png                       01.png                      1               leading zeros, where nothing else fits
    DJI_..120000_0007_W.JPG     DJI_..120001_0007_T.JPG     DJI_.._0007     the number counts; times may differ a little

What a newcomer would get wrong:

- Rules are tried from the surest to the loosest, over all files each, and a file that has its partner is out. So equal
  names outweigh short words (`T_1.png` in both folders is a scene called T_1), and a rule that finds two candidates
  for one file is an error that names them, never a choice.
- One folder may hold both sides; then role words have to tell them apart, in names or in folders. A name is never
  paired with itself.
- Names are compared in Unicode's composed form (NFC): file systems differ in how they store accents.

`match_names` and `match_within` work on names alone; pairs.py reads folders.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Literal

Role = Literal["vis", "ir"]

READABLE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".webp", ".tif", ".tiff", ".bmp", ".avif"})

# Role words of folders; those of files hold more. `color` is but a weak one there: FMB keeps coloured labels in it.
FOLDER_WORDS: Mapping[Role, frozenset[str]] = {
    "vis": frozenset({"vis", "vi", "visible", "visual", "rgb"}),
    "ir": frozenset({"ir", "inf", "infrared", "thermal", "therm", "lwir", "mwir", "swir", "nir", "fir", "tir"}),
}
STRONG_WORDS: Mapping[Role, frozenset[str]] = {
    "vis": FOLDER_WORDS["vis"] | {"color", "colour", "eo", "ccd", "optical"},
    # PreviewData: FLIR ADAS, aligned; THRM: early DJI H20T; IRX: Autel. `flir` is a maker, `fl` means front left.
    "ir": FOLDER_WORDS["ir"] | {"infra", "thermo", "ther", "thrm", "previewdata", "irx"},
}
# Words that are more often something else: they count only where nothing above decides.
WEAK_WORDS: Mapping[Role, frozenset[str]] = {
    "vis": frozenset({"v", "w", "z", "wide", "zoom", "tv", "co"}),
    "ir": frozenset({"t", "i", "th"}),
}
# Words beside a role word that say how the image was made, not what it shows.
FILLER_WORDS = frozenset(
    {"aligned", "align", "registered", "reg", "rectified", "warped", "image", "images", "img", "imgs", "camera", "cam"}
)
DJI_MAX_APART_S = 3.0  # between the time stamps of one exposure; real ones differ by up to a second
MAX_NAMED = 5  # names listed of one kind in a message
NO_NAME = "fused"  # of a pair whose files are called by role words alone

NO_PARTNER = "no partner"

BOTH_SIDES = "named for both sides"
WRONG_SIDE = "named for the other side"

_TOKEN = re.compile(r"[0-9]+|[^0-9\s_.,;+=~&#@'()\[\]{}-]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_DRONE_VEHICLE = re.compile(r"(train|val|test)(imgr?)", re.IGNORECASE)
_DJI = re.compile(r"dji_([0-9]{14})_([0-9]+)_([a-z]+)(.*)", re.IGNORECASE | re.DOTALL)


class PairingError(ValueError):
    """Names that cannot be paired, or not without guessing; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class Match:
    """Two names of one scene; `name` is what they have in common, with folders, without role words and suffix."""

    name: str
    vis: str
    ir: str


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A name without partner and why. `role` is the side it was given for, None where one folder holds both."""

    name: str
    role: Role | None
    reason: str


# --- what a name says -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Word:
    """A run of letters or of digits: where it stands, and the role it may name."""

    part: int  # 0: the stem, 1: the folder it lies in, 2: the one above; counted so because depths differ
    index: int  # within its part
    start: int
    end: int
    folded: str
    role: Role | None = None
    is_strong: bool = False


_Cut = frozenset[tuple[int, int]]  # words left out, as (part, index)


class Name:
    """A name taken apart: its words, and what is left of it without its role words."""

    def __init__(self, text: str) -> None:
        self.text = text
        *folders, file = unicodedata.normalize("NFC", text).split("/")
        self.parts = [stem_of(file), *reversed(folders)]
        self.words = [_words(part, text) for part, text in enumerate(self.parts)]

    @cached_property
    def roles(self) -> frozenset[Role]:
        """The roles that strong words name."""
        return frozenset(word.role for words in self.words for word in words if word.role and word.is_strong)

    def of_role(self, role: Role, is_strong: bool) -> list[_Word]:
        return [word for words in self.words for word in words if word.role == role and word.is_strong is is_strong]

    def without(self, cut: _Cut) -> str:
        """The name without some words and their separators; parts of which nothing is left go."""
        kept = [self._part_without(part, cut) for part in range(len(self.parts))]
        return "/".join(text for text in reversed(kept) if text)

    def _part_without(self, part: int, cut: _Cut) -> str:
        text, words = self.parts[part], self.words[part]
        kept = [word for word in words if (part, word.index) not in cut]
        if len(kept) == len(words):
            return text
        if not kept:
            return ""
        pieces = [text[: kept[0].start] if kept[0].index == 0 else "", text[kept[0].start : kept[0].end]]
        for left, right in pairwise(kept):
            between = text[left.end : right.start]
            if right.index > left.index + 1:  # of the separators around what is left out, the first stays
                between = next((sign for sign in between if not sign.isalnum()), "_")
            pieces += [between, text[right.start : right.end]]
        pieces.append(text[kept[-1].end :] if kept[-1].index == len(words) - 1 else "")
        return "".join(pieces)

    def loose(self, cut: _Cut) -> str:
        """A key for what is left: words alone, without separators, leading zeros and fillers beside a role word."""
        kept = []
        for part, words in enumerate(self.words):
            gone = {word.index for word in words if (part, word.index) in cut}
            for step in (1, -1):
                for word in words[::step]:
                    if word.index - step in gone and _is_filler(words, word.index):
                        gone.add(word.index)
            left = [word.folded.lstrip("0") or word.folded[-1:] for word in words if word.index not in gone]
            if left:
                kept.append("_".join(left))
        return "/".join(reversed(kept))


def stem_of(file: str) -> str:
    """A file's name without its suffix, if that is the suffix of an image."""
    stem, suffix = os.path.splitext(file)
    return stem if suffix.lower() in READABLE_SUFFIXES else file


def _words(part: int, text: str) -> list[_Word]:
    if part and (match := _DRONE_VEHICLE.fullmatch(text)):  # DroneVehicle: trainimg and trainimgr
        role: Role = "ir" if match[2].lower() == "imgr" else "vis"
        split = _Word(part, 0, *match.span(1), match[1].casefold())
        return [split, _Word(part, 1, *match.span(2), match[2].casefold(), role, is_strong=True)]
    spans = []
    for run in _TOKEN.finditer(text):
        is_word = any(run[0].casefold() in STRONG_WORDS[role] for role in STRONG_WORDS)  # PreviewData
        inner = () if is_word else (run.start() + cut.start() for cut in _CAMEL.finditer(run[0]))
        cuts = [run.start(), *inner, run.end()]
        spans += list(pairwise(cuts))
    words = []
    for index, (start, end) in enumerate(spans):
        folded = _folded(text[start:end])
        strong = _role_in(FOLDER_WORDS if part else STRONG_WORDS, folded)
        weak = _role_in(WEAK_WORDS, folded) if part == 0 else None
        if part and len(spans) == 1:  # a folder called T, not day_t
            weak = _role_in(WEAK_WORDS, folded) or _role_in(STRONG_WORDS, folded)
        words.append(_Word(part, index, start, end, folded, strong or weak, strong is not None))
    return words


def _role_in(words: Mapping[Role, frozenset[str]], folded: str) -> Role | None:
    return next((role for role, known in words.items() if folded in known), None)


def _is_filler(words: Sequence[_Word], index: int) -> bool:
    here = words[index].folded
    if here in ("8", "14", "16"):  # as in thermal_8_bit; a number alone is a frame's
        return index + 1 < len(words) and words[index + 1].folded in ("bit", "bits")
    return here in FILLER_WORDS or (here in ("bit", "bits") and index > 0 and words[index - 1].folded.isdecimal())


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text.casefold())


# --- readings: what a name is called without its role words -----------------------------------------------------------


_Reading = Callable[["Name", Role, bool], Iterable[tuple[_Cut, str]]]  # what is cut, and where, as text for the key


def _cut(words: Iterable[_Word]) -> _Cut:
    return frozenset((word.part, word.index) for word in words)


def _where(name: Name, word: _Word) -> tuple[str, str]:
    """A word's place, counted from both ends of its part."""
    return f"{word.part}<{word.index}", f"{word.part}>{len(name.words[word.part]) - word.index}"


def _strong_at(name: Name, role: Role, shared: bool) -> Iterator[tuple[_Cut, str]]:
    for word in name.of_role(role, True):
        for place in _where(name, word):
            yield _cut([word]), place


def _strong(name: Name, role: Role, shared: bool) -> Iterator[tuple[_Cut, str]]:
    for word in name.of_role(role, True):
        yield _cut([word]), ""


def _all_strong(name: Name, role: Role, shared: bool) -> Iterator[tuple[_Cut, str]]:
    if words := name.of_role(role, True):
        yield _cut(words), ""


def _bare(name: Name, role: Role, shared: bool) -> Iterator[tuple[_Cut, str]]:
    """The name as it is. In a shared folder it may not name a role, elsewhere not the other one alone."""
    if not name.roles or (not shared and role in name.roles):
        yield frozenset(), ""


def _whole(name: Name, role: Role, shared: bool) -> Iterator[tuple[_Cut, str]]:
    yield frozenset(), ""


def _weak_at(name: Name, role: Role, shared: bool) -> Iterator[tuple[_Cut, str]]:
    strong = name.of_role(role, True)
    if not name.roles or strong:
        for word in name.of_role(role, False):
            for place in _where(name, word):
                yield _cut([*strong, word]), place
    yield from _strong_at(name, role, shared)


def _weak(name: Name, role: Role, shared: bool) -> Iterator[tuple[_Cut, str]]:
    for cut, _ in _weak_at(name, role, shared):
        yield cut, ""
    yield from _all_strong(name, role, shared)


def _all_words(name: Name, role: Role, shared: bool) -> Iterator[tuple[_Cut, str]]:
    strong, weak = name.of_role(role, True), name.of_role(role, False)
    if (strong or weak) and (strong or not name.roles):
        yield _cut([*strong, *weak]), ""


def _edge_weak(name: Name, role: Role, shared: bool) -> Iterator[tuple[_Cut, str]]:
    """A short word that stands apart, first or last: enough beside a name without any."""
    for word in [] if name.roles else name.of_role(role, False):
        words, text = name.words[word.part], name.parts[word.part]
        is_first, is_last = word.index == 0, word.index == len(words) - 1
        if word.part == 0 and len(words) > 1 and (is_first or is_last):
            neighbour = words[1] if is_first else words[-2]
            if text[min(word.end, neighbour.end) : max(word.start, neighbour.start)]:
                yield _cut([word]), ""


@dataclass(frozen=True, slots=True)
class _Rule:
    """Readings that have to agree, of the visible and of the infrared name; `is_loose` compares words alone."""

    readings: tuple[tuple[_Reading, _Reading], ...]
    for_shared: bool = True
    is_loose: bool = False


_RULES = (
    _Rule(((_strong_at, _strong_at),)),
    _Rule(((_strong, _strong),)),
    _Rule(((_all_strong, _all_strong),)),
    _Rule(((_whole, _whole),), for_shared=False),
    _Rule(((_strong, _bare), (_bare, _strong))),
    _Rule(((_all_strong, _bare), (_bare, _all_strong))),
    _Rule(((_weak_at, _weak_at),)),
    _Rule(((_weak, _weak),)),
    _Rule(((_all_words, _all_words),)),
    _Rule(((_edge_weak, _bare), (_bare, _edge_weak)), for_shared=False),
    _Rule(((_all_strong, _all_strong),), is_loose=True),
    _Rule(((_whole, _whole),), for_shared=False, is_loose=True),
    _Rule(((_all_strong, _bare), (_bare, _all_strong)), is_loose=True),
    _Rule(((_weak, _weak),), is_loose=True),
)
_IS_EQUAL = _RULES[3]  # equal names: no other candidate is as good


# --- matching names ---------------------------------------------------------------------------------------------------


def match_names(
    vis: Iterable[str], ir: Iterable[str], *, roles: tuple[Role, Role] = ("vis", "ir")
) -> tuple[list[Match], list[Unmatched]]:
    """The pairs of two lists of names (relative paths with suffix and `/`), by name, and what is left.

    `roles` are those of the lists: two lists of one role are clean and degraded files of one camera.
    Raises PairingError if a name has several candidates, or if two pairs would have one name.
    """
    return _Matching(_taken_apart(vis), _taken_apart(ir), roles, shared=False).run()


def match_within(names: Iterable[str]) -> tuple[list[Match], list[Unmatched]]:
    """The pairs in one list that holds both sides, told apart by role words; raises PairingError as `match_names`."""
    everything = _taken_apart(names)
    return _Matching(everything, everything, ("vis", "ir"), shared=True).run()


def _taken_apart(names: Iterable[str]) -> list[Name]:
    ordered = sorted(set(names), key=lambda name: (unicodedata.normalize("NFC", name), name))
    return [Name(name) for name in ordered]


def names_a_role(text: str) -> bool:
    """Whether a name or its folders hold a word that nearly always names a camera."""
    return bool(Name(text).roles)


class _Matching:
    """One search: rules from the surest to the loosest, over the names that have no partner yet."""

    def __init__(self, vis: list[Name], ir: list[Name], roles: tuple[Role, Role], *, shared: bool) -> None:
        self.sides = (vis, ir)
        self.roles = roles
        self.shared = shared
        self.matches: list[Match] = []
        self.taken: tuple[set[str], set[str]] = (set(), set())
        self.claimed: dict[str, Match] = {}  # folded names of pairs that other candidates may contest

    def run(self) -> tuple[list[Match], list[Unmatched]]:
        self._take(self._dji_candidates(), is_contestable=False)
        for rule in _RULES:
            if self.shared and not rule.for_shared:
                continue
            for fold in (_folded,) if rule.is_loose else (str, _folded):
                if not (self._left(0) and self._left(1)):
                    break
                self._take(self._candidates(rule, fold), is_contestable=rule is not _IS_EQUAL)
        self._refuse_contests()
        self._refuse_equal_names()
        return sorted(self.matches, key=lambda match: match.name), self._unmatched()

    def _left(self, side: int) -> list[Name]:
        return [name for name in self.sides[side] if name.text not in self.taken[side]]

    def _candidates(self, rule: _Rule, fold: Callable[[str], str]) -> dict[tuple[str, str], str]:
        """Candidates for pairs by one rule, with the name that they would have."""
        found: dict[tuple[str, str], str] = {}
        for readings in rule.readings:
            keys: list[dict[str, dict[str, str]]] = []  # by side: key -> name -> what is left of it
            for side, (read, role) in enumerate(zip(readings, self.roles, strict=True)):
                # Leading zeros must not hide that a number exists: loose rules look at names with a partner too.
                names = self.sides[side] if rule.is_loose else self._left(side)
                keys.append(self._keys(names, read, role, rule.is_loose, fold))
            for key in sorted(keys[0].keys() & keys[1].keys()):
                vis, ir = keys[0][key], keys[1][key]
                if rule.is_loose and not (vis.keys() - self.taken[0] and ir.keys() - self.taken[1]):
                    continue
                for name, scene in vis.items():
                    for other in ir:
                        if not (self.shared and name == other):
                            # Of several readings the one that leaves most of the name.
                            found[name, other] = max(
                                found.get((name, other), ""), scene, key=lambda text: (len(text), text)
                            )
        return found

    def _keys(
        self, names: Iterable[Name], read: _Reading, role: Role, is_loose: bool, fold: Callable[[str], str]
    ) -> dict[str, dict[str, str]]:
        keys: dict[str, dict[str, str]] = defaultdict(dict)
        for name in names:
            for cut, place in read(name, role, self.shared):
                scene = name.without(cut)
                keys[f"{place}:{name.loose(cut) if is_loose else fold(scene)}"][name.text] = scene
        return keys

    def _dji_candidates(self) -> dict[tuple[str, str], str]:
        """DJI's names: the running number is the key, and the times of one exposure may lie a second apart."""
        numbered: tuple[dict[str, list[_Dji]], dict[str, list[_Dji]]] = (defaultdict(list), defaultdict(list))
        for side, role in enumerate(self.roles):
            for name in self.sides[side]:
                if (dji := _as_dji(name, role)) is not None:
                    numbered[side][dji.key].append(dji)
        return {
            (vis.text, ir.text): vis.scene
            for key, candidates in numbered[0].items()
            for vis in candidates
            for ir in numbered[1].get(key, ())
            if vis.text != ir.text and abs((vis.taken - ir.taken).total_seconds()) <= DJI_MAX_APART_S
        }

    def _take(self, found: Mapping[tuple[str, str], str], *, is_contestable: bool) -> None:
        partners: tuple[dict[str, set[str]], dict[str, set[str]]] = (defaultdict(set), defaultdict(set))
        for vis, ir in found:
            partners[0][vis].add(ir)
            partners[1][ir].add(vis)
            if self.shared:  # a name is in both lists, and has one place only
                partners[0][ir].add(vis)
                partners[1][vis].add(ir)
        for side in (1, 0):
            for name, others in sorted(partners[side].items()):
                if len(others) > 1:
                    raise self._ambiguous(1 - side, sorted(others), name)
        for (vis, ir), scene in found.items():
            match = Match(scene or NO_NAME, vis, ir)
            self.matches.append(match)
            for side, names in ((0, (vis, ir) if self.shared else (vis,)), (1, (vis, ir) if self.shared else (ir,))):
                self.taken[side].update(names)
            if is_contestable:
                self.claimed[_folded(scene)] = match

    def _ambiguous(self, side: int, candidates: Sequence[str], partner: str) -> PairingError:
        few = f"{listed(candidates, last=' and ')} {'both' if len(candidates) == 2 else 'all'} fit"
        if not self.shared:
            few, partner = f"{self.roles[side]}: {few}", f"{self.roles[1 - side]} {partner}"
        return PairingError(f"{few} {partner}; leave one of them there, or give each a name of its own")

    def _refuse_contests(self) -> None:
        """A pair found by role words is contested by an image of the same name without one, or with another one."""
        for side, role in enumerate(self.roles):
            for name in self._left(side):
                cuts = [cut for cut, _ in _strong(name, role, self.shared)]
                if not self.shared:  # there, one without may be what an earlier run has made of the two
                    cuts += [cut for cut, _ in _bare(name, role, self.shared)]
                for cut in cuts:
                    if (match := self.claimed.get(_folded(name.without(cut)))) is not None:
                        rival, partner = (match.vis, match.ir) if side == 0 else (match.ir, match.vis)
                        raise self._ambiguous(side, sorted((rival, name.text)), partner)

    def _refuse_equal_names(self) -> None:
        by_name: dict[str, list[Match]] = defaultdict(list)
        for match in self.matches:
            by_name[match.name].append(match)
        for name, matches in sorted(by_name.items()):
            if len(matches) > 1:
                both = " and ".join(sorted(f"{match.vis} with {match.ir}" for match in matches)[:2])
                raise PairingError(f"two pairs would be called {name}: {both}; rename one of them")

    def _unmatched(self) -> list[Unmatched]:
        if self.shared:
            return [
                Unmatched(name.text, None, BOTH_SIDES if len(name.roles) > 1 else NO_PARTNER) for name in self._left(0)
            ]
        left = []
        for side, role in enumerate(self.roles):
            for name in self._left(side):
                reason = NO_PARTNER
                if len(name.roles) > 1:
                    reason = BOTH_SIDES
                elif name.roles and role not in name.roles:
                    reason = WRONG_SIDE
                left.append(Unmatched(name.text, role, reason))
        return left


@dataclass(frozen=True, slots=True)
class _Dji:
    text: str
    key: str  # folder, number, and what follows the role word
    taken: datetime
    scene: str


def _as_dji(name: Name, role: Role) -> _Dji | None:
    """A name such as DJI_20240101120000_0007_W, if it is one and its word is of that role."""
    match = _DJI.fullmatch(name.parts[0])
    if match is None:
        return None
    word = next(word for word in name.words[0] if word.start == match.start(3))
    try:
        taken = datetime.strptime(match[1], "%Y%m%d%H%M%S")
    except ValueError:
        return None
    if word.role != role:
        return None
    folders = [other for part in range(1, len(name.parts)) for other in name.words[part] if other.role == role]
    cut = _cut([*folders, word])
    folder, _, _ = name.without(cut).rpartition("/")
    return _Dji(name.text, _folded(f"{folder}/{match[2]}{match[4]}"), taken, name.without(cut))


def listed(names: Sequence[str], last: str = ", ") -> str:
    """The first names and how many more there are."""
    if len(names) > MAX_NAMED:
        return f"{', '.join(names[:MAX_NAMED])} and {len(names) - MAX_NAMED} more"
    return last.join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
