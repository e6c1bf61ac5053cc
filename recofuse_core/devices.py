"""Which device a model runs on, and why not on the one that was asked for, in one line of words.

torch tells of a driver that is too old, a card that it has no kernels for, or a GPU that a container was not given with
a warning, a traceback or nothing at all, and a model that runs on the CPU unnoticed is a hundred times slower. So
`observe` looks at what there is, and `choose` judges it without looking at anything itself.
"""

import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from recofuse_core.errors import DeviceError

logger = logging.getLogger(__name__)

# The oldest driver that runs what a release of CUDA has built, by its first number (CUDA's own release notes).
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}

_DEVICE = re.compile(r"auto|cpu|cuda(?::(?P<index>\d{1,3}))?")
_ARCHITECTURE = re.compile(r"(?P<kind>sm|compute)_(?P<major>\d+)(?P<minor>\d)(?P<only>[af]?)")
_DRIVER = re.compile(r"\b\d{3,4}\.\d+(?:\.\d+)?\b")


@dataclass(frozen=True)
class Card:
    """A GPU that torch sees. capability: its compute capability, such as (7, 5)."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {_dotted(self.capability)})"


@dataclass(frozen=True)
class Sight:
    """What can be seen of GPUs.

    torch: its version. cuda: what it was built for, empty in a build for the CPU. architectures: what it has kernels
    for, as sm_75 or, to be compiled for later cards, compute_120. cards: what it sees. driver: the version of the one
    that is loaded, empty for none; a container sees it, too, but no device files of a GPU that it was not given.
    is_hidden: CUDA_VISIBLE_DEVICES leaves none. complaint: torch's own words.
    """

    torch: str
    cuda: str = ""
    architectures: tuple[str, ...] = ()
    cards: tuple[Card, ...] = ()
    driver: str = ""
    has_device_files: bool = False
    is_hidden: bool = False
    complaint: str = ""

    @property
    def build(self) -> str:
        """Which torch this is, in words."""
        return f"torch {self.torch}, {f'built for CUDA {self.cuda}' if self.cuda else 'a build for the CPU'}"


@dataclass(frozen=True)
class Choice:
    """A device by torch's name. doubt: why the one that auto stands for cannot be had, though there is a GPU."""

    device: str
    doubt: str = ""


def observe(root: Path = Path("/")) -> Sight:
    """Look. root: where the files of the system are."""
    version = root / "proc/driver/nvidia/version"
    driver = _DRIVER.search(version.read_text(errors="replace")) if version.is_file() else None
    has_device_files = any((root / "dev").glob("nvidia[0-9]*")) or (root / "usr/lib/wsl/lib/libcuda.so.1").exists()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        architectures = tuple(torch.cuda.get_arch_list())
        cards: tuple[Card, ...] = ()
        complaint = ""
        try:
            if torch.cuda.is_available():
                cards = tuple(_card(index) for index in range(torch.cuda.device_count()))
        except RuntimeError as error:  # a card that fails as soon as it is spoken to
            complaint = str(error)
    return Sight(
        torch=str(torch.__version__),
        cuda=torch.version.cuda or torch.version.hip or "",
        architectures=architectures,
        cards=cards,
        driver=driver[0] if driver else "",
        has_device_files=has_device_files,
        is_hidden=not torch.cuda._parse_visible_devices(),  # what torch made of the variable; the library reads none
        complaint=_first_line(complaint or str(caught[0].message if caught else "")),
    )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _card(index: int) -> Card:
    found = torch.cuda.get_device_properties(index)
    return Card(found.name, (found.major, found.minor))


def choose(asked: str, sight: Sight) -> Choice:
    """The device that auto, cpu, cuda or cuda:N stands for. Raises DeviceError if it is none, or cannot be had."""
    match = _DEVICE.fullmatch(asked)
    if match is None:
        raise DeviceError(f"device must be auto, cpu, cuda or cuda:N, got {asked!r}")
    if asked == "cpu":
        return Choice("cpu")
    reason = obstacle(sight, int(match["index"] or 0))
    if not reason:
        return Choice("cuda" if asked == "auto" else asked)
    if asked != "auto":
        raise DeviceError(f"device {asked}: {reason}")
    is_meant = sight.is_hidden or not (sight.has_device_files or sight.driver)
    return Choice("cpu", "" if is_meant else reason)


def told(sight: Sight) -> dict[str, str]:
    """What a person wants to know of it, in words: torch, driver, GPUs, and what auto stands for."""
    choice = choose("auto", sight)
    return {
        "torch": sight.build.removeprefix("torch "),
        "driver": sight.driver or "none",
        **{f"cuda:{number}": str(card) for number, card in enumerate(sight.cards)},
        "auto": f"{choice.device}, since {choice.doubt}" if choice.doubt else choice.device,
    }


def obstacle(sight: Sight, index: int = 0) -> str:
    """Why torch cannot run a model on this GPU, as far as it can be seen; empty if it can."""
    if not sight.cuda:
        return f"this is {sight.build}; a GPU needs another"
    if sight.is_hidden:
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    if not sight.cards:
        return _why_no_card(sight)
    if index >= len(sight.cards):
        seen = ", ".join(f"cuda:{number} is {card.name}" for number, card in enumerate(sight.cards))
        return f"there is no GPU of that number: {seen}"
    card = sight.cards[index]
    if not has_kernels(sight.architectures, card.capability):
        known = ", ".join(sorted(set(map(_in_words, sight.architectures)), key=lambda word: float(word.split()[0])))
        return f"{card} has no kernels in {sight.build}, which has them for {known}"
    return ""


def _why_no_card(sight: Sight) -> str:
    oldest = OLDEST_DRIVERS.get(int(sight.cuda.split(".")[0]))
    if sight.driver and oldest is not None and int(sight.driver.split(".")[0]) < oldest:
        return f"{sight.build}, needs an NVIDIA driver of {oldest} or newer, and {sight.driver} is loaded"
    if sight.has_device_files:
        with_driver = f" (driver {sight.driver})" if sight.driver else ""
        return f"torch cannot use the GPU{with_driver}: {sight.complaint or 'it does not say why'}"
    if sight.driver:
        return (
            f"NVIDIA driver {sight.driver} is loaded, but no GPU is given to this process: a container must ask for one"
        )
    return "there is no GPU here: no NVIDIA driver is loaded"


def has_kernels(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a card can run what was compiled for these; True if they say nothing about NVIDIA's cards.

    Kernels run on later cards of the same major version; what is compiled on the card itself, on all later ones.
    """
    found = [match for match in map(_ARCHITECTURE.fullmatch, architectures) if match is not None]
    return not found or any(_suits(match, capability) for match in found)


def _suits(match: re.Match[str], capability: tuple[int, int]) -> bool:
    own = int(match["major"]), int(match["minor"])
    if match["only"] == "a":  # one architecture's own features
        return own == capability
    is_compiled_on_card = match["kind"] == "compute" and not match["only"]
    return own <= capability and (is_compiled_on_card or own[0] == capability[0])


def _in_words(architecture: str) -> str:
    match = _ARCHITECTURE.fullmatch(architecture)
    assert match is not None  # has_kernels has found some
    return _dotted((int(match["major"]), int(match["minor"])))


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def named_device(name: str) -> str:
    """A device's name as torch has it: for "auto" the first GPU if torch can use it, else the CPU.

    Warns if there is a GPU that "auto" cannot take. Raises DeviceError for one that was asked for and cannot be had.
    """
    if name == "cpu":
        return name
    choice = choose(name, observe())
    if choice.doubt:
        logger.warning("the model runs on the CPU, since %s; device cpu says that it is meant", choice.doubt)
    return choice.device
