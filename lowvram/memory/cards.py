"""Profiles of graphics cards: how much of a card's memory a training step may have.

    >>> find_card("RTX 4070 Ti").budget("headless")   # bytes that the allocator may reserve

The figures and their sources are in `card_table`. Needs no PyTorch, except to look at a card of
this machine.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lowvram.errors import DeviceError
from lowvram.memory.card_table import ALIASES, CONTEXTS, ESTIMATED, GIB, MIB, SERIES, Row

System = Literal["headless", "desktop", "windows"]

REFERENCE = "RTX 4070 Ti"

# What others hold of a card, beside the process that trains. On an RTX 4070 Ti that leaves
# 11,600, 11,100 and 10,800 MiB.
#
# Linux without a display: 1 to 20 MiB are in use on an idle card.
IDLE_BYTES = 20 * MIB
# Linux with a desktop on the card: 50 MiB with a bare X server, up to 700 with windows open, and
# 1.6 GB with KDE and a browser (ollama/ollama#8723).
DESKTOP_BYTES = 500 * MIB
# Windows shows 300 to 450 MiB more in total than Linux, but its display driver model (WDDM) gives
# each process a budget below that, by what the desktop has and by what it keeps free. PyTorch
# found 15,089 MiB free of an RTX 4070 Ti Super (EvilBT/ComfyUI_SLK_joy_caption_two#55) and 14,921
# of an RTX 5070 Ti (OpenImagingLab/FlashVSR#24), some 600 MiB less than Linux would leave of them.
# The rest is for a browser and for larger screens on larger cards. It pays to be careful: beyond
# the budget nothing fails, memory moves to the host, and steps take many times as long.
WINDOWS_BYTES = 500 * MIB
WINDOWS_SHARE = 0.027

# The share of a context that there is once a process has one. The rest are modules, loaded when
# a kernel is first used: llama.cpp found 392 MiB gone of an RTX 4090 at its start, where PyTorch
# has taken 473 to 504 by the time it runs out of memory.
BARE_CONTEXT_SHARE = 0.8

# 16-bit operations per clock and multiprocessor, for cards that are not in the table.
_FLOPS_PER_CLOCK = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}
_GEFORCE_FLOPS_PER_CLOCK = 512
_USUAL_CLOCK = 1.7e9  # Hz
_USUAL_BANDWIDTH_PER_MULTIPROCESSOR = 9e9  # bytes/s; 8 to 15 in the table

_SPECIFICATION = "NVIDIA's specification"
_DRIVER = "the driver of this machine"


@dataclass(frozen=True, kw_only=True)
class Card:
    name: str
    """"RTX 4070 Ti"; with the memory where the card comes with several."""
    slug: str
    """The name on a command line: "rtx-4070-ti"."""
    nominal_bytes: int
    """The memory as on the box, in GiB (2**30 bytes)."""
    total_bytes: int
    """The memory that a process sees on Linux: `get_device_properties().total_memory`."""
    context_bytes: int
    """What one process takes beside its allocator: the CUDA context with its modules."""
    compute_capability: tuple[int, int]
    multiprocessors: int
    bandwidth: int
    """Of the card's memory, in bytes per second."""
    flops_16_bit: int
    """Dense 16-bit matrix operations per second with sums in 32 bits, at the boost clock.

    Consumer cards are at half their rate here; the GTX 16 cards have no tensor cores.
    """
    held_bytes: int | None = None
    """What others hold now, of a card that was looked at; None: reckon with the system's usual."""
    estimated: frozenset[str] = frozenset()
    """Names of the figures that nobody reported."""
    sources: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)
    """By the name of the figure: who reported it, or how it was estimated."""

    def budget(self, system: System = "headless") -> int:
        """Bytes that the caching allocator of one process may reserve.

        memory seen - context - what others hold. The last is as measured if the card was looked
        at, and then `system` changes nothing.
        """
        held = self.held_bytes if self.held_bytes is not None else _usually_held(self, system)
        return max(0, self.total_bytes - self.context_bytes - held)

    @property
    def supports_bf16(self) -> bool:
        return self.compute_capability[0] >= 8


def _usually_held(card: Card, system: System) -> int:
    if system == "headless":
        return IDLE_BYTES
    if system == "desktop":
        return DESKTOP_BYTES
    return WINDOWS_BYTES + int(WINDOWS_SHARE * card.total_bytes)


def usual_context_bytes(multiprocessors: int) -> int:
    """26 MiB + 3.6 MiB per multiprocessor.

    Within 10 % of what is known of GeForce cards from Ampere on, of 24 to 170 multiprocessors;
    20 % above what is known of the T4, and below the A100's.
    """
    return int((26 + 3.6 * multiprocessors) * MIB)


# Finding


@functools.cache
def list_cards() -> tuple[Card, ...]:
    """All known cards: the reference card, then the rest from the newest series to the oldest."""
    cards = [_card(row, series.capability) for series in SERIES for row in series.rows]
    return tuple(sorted(cards, key=lambda card: card.name != REFERENCE))


def _card(row: Row, capability: tuple[int, int]) -> Card:
    estimated = set(ESTIMATED.get(row.name, ()))
    sources = dict.fromkeys(
        ("nominal_bytes", "compute_capability", "multiprocessors", "bandwidth", "flops_16_bit"),
        _SPECIFICATION,
    )
    sources |= dict.fromkeys(estimated, "as far as known")
    context_bytes = usual_context_bytes(row.multiprocessors)
    if figure := CONTEXTS.get(row.name):
        context_bytes = figure.size_bytes
    for name, reported in (("total_bytes", row.total), ("context_bytes", figure)):
        if reported is None or reported.estimated:
            estimated.add(name)
        sources[name] = reported.source if reported else "26 MiB + 3.6 MiB per multiprocessor"
    return Card(
        name=row.name,
        slug=row.name.lower().replace(" ", "-"),
        nominal_bytes=row.nominal_gib * GIB,
        total_bytes=row.total.size_bytes,
        context_bytes=context_bytes,
        compute_capability=capability,
        multiprocessors=row.multiprocessors,
        bandwidth=row.bandwidth * 10**9,
        flops_16_bit=round(row.tflops * 1e12),
        estimated=frozenset(estimated),
        sources=sources,
    )


def find_card(name: str) -> Card:
    """The card of a name in any usual spelling: "rtx-4070-ti", "NVIDIA GeForce RTX 4070 Ti".

    Where a card comes with several sizes of memory, the name without one means the card that was
    sold first, and the smaller one where both were.
    """
    card = _cards_by_words().get(frozenset(_words(name)))
    if card is None:
        raise DeviceError(
            f"unknown card {name!r}. {_closest(name)} Or say how much memory may be used, "
            "in place of a card: --vram 12GiB"
        )
    return card


# Words that tell no card from another.
_FILLERS = {"nvidia", "geforce", "tesla", "rtx", "gtx", "gpu", "graphics", "card"}
_FILLERS |= {"gb", "gib", "g", "sxm4", "hbm2", "hbm2e"}
_SYNONYMS = {"s": "super", "mobile": "laptop"}


def _words(name: str) -> list[str]:
    """What a name says: ["4070", "ti"] of "NVIDIA GeForce RTX4070Ti", ["3060", "12"] with 12 GB."""
    name = re.sub(r"(?<![a-z])(rtx|gtx|ti)(?=\d|super|laptop)", r"\1 ", name.lower())
    found = re.findall(r"\d+(?:\.\d+)?|[a-z][a-z0-9]*", name)
    return [_SYNONYMS.get(word, word) for word in found if word not in _FILLERS]


@functools.cache
def _cards_by_words() -> dict[frozenset[str], Card]:
    found: dict[frozenset[str], Card] = {}
    for card in list_cards():
        for words in _spellings(card):
            found.setdefault(words, card)
    return found


def _spellings(card: Card) -> Iterator[frozenset[str]]:
    """Each name with and without the size of the memory."""
    size = str(card.nominal_bytes // GIB)
    for name in (card.name, *ALIASES.get(card.name, ())):
        words = frozenset(_words(name))
        yield words | {size}
        yield words - {size}


def _closest(name: str) -> str:
    """A sentence with the known cards whose names are the most like this one."""
    slugs = {"-".join(_words(card.slug)): card.slug for card in list_cards()}
    close = difflib.get_close_matches("-".join(_words(name)), slugs, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(slugs[words] for words in close)}?"
    examples = ", ".join(card.slug for card in list_cards()[:4])
    return f"Known are {examples} and {len(slugs) - 4} more."


def card_of_size(total_bytes: int) -> Card:
    """A card with exactly this budget, on every system, for where only a size was given.

    All else is as of the reference card.
    """
    if total_bytes <= 0:
        raise DeviceError(f"no card has {total_bytes} bytes of memory. Give its size: --vram 12GiB")
    size = f"{total_bytes / GIB:.4g}"
    assumed = ("compute_capability", "multiprocessors", "bandwidth", "flops_16_bit")
    return dataclasses.replace(
        find_card(REFERENCE),
        name=f"{size} GiB",
        slug=f"{size}gib",
        nominal_bytes=total_bytes,
        total_bytes=total_bytes,
        context_bytes=0,
        held_bytes=0,
        estimated=frozenset(assumed),
        sources=dict.fromkeys(("nominal_bytes", "total_bytes", "context_bytes"), "as given")
        | dict.fromkeys(assumed, f"as the {REFERENCE}"),
    )


# The card in this machine


def card_in_machine(index: int | None = None) -> Card | None:
    """The card that PyTorch uses, as its driver describes it now; None where there is none.

    Makes a CUDA context in this process if it has none yet.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    number = torch.cuda.current_device() if index is None else index
    properties = torch.cuda.get_device_properties(number)
    free_bytes, _ = torch.cuda.mem_get_info(number)
    card = _described(properties)
    # Neither this process's context nor the memory of its allocator is anyone else's. Its context
    # may still grow by the modules that it has not loaded.
    own_bytes = torch.cuda.memory_reserved(number) + int(BARE_CONTEXT_SHARE * card.context_bytes)
    return dataclasses.replace(card, held_bytes=max(0, card.total_bytes - free_bytes - own_bytes))


def _described(properties: Any) -> Card:
    """What the driver says, which comes first, and the table or a guess where it says nothing."""
    card = _of_name(properties.name, properties.total_memory) or _guessed(properties)
    said = {
        "total_bytes": properties.total_memory,
        "compute_capability": (properties.major, properties.minor),
        "multiprocessors": properties.multi_processor_count,
    }
    return dataclasses.replace(
        card,
        **said,
        name=_short(properties.name),
        nominal_bytes=max(card.nominal_bytes, _whole_gib(properties.total_memory)),
        estimated=card.estimated - said.keys(),
        sources=dict(card.sources) | dict.fromkeys(said, _DRIVER),
    )


def _of_name(name: str, total_bytes: int) -> Card | None:
    """The card of a driver's name, which leaves out the memory of most."""
    words = frozenset(_words(name))
    known = [card for card in list_cards() if words in _spellings(card)]
    return min(known, key=lambda card: abs(card.total_bytes - total_bytes), default=None)


def _guessed(properties: Any) -> Card:
    capability = (properties.major, properties.minor)
    count = properties.multi_processor_count
    # In kHz and bits, where this version of PyTorch has them; two transfers a clock.
    memory_clock = getattr(properties, "memory_clock_rate", 0) * 1000
    bus_bytes = getattr(properties, "memory_bus_width", 0) // 8
    bandwidth = 2 * memory_clock * bus_bytes
    clock = getattr(properties, "clock_rate", 0) * 1000 or _USUAL_CLOCK
    per_clock = _FLOPS_PER_CLOCK.get(capability, _GEFORCE_FLOPS_PER_CLOCK)
    name = _short(properties.name)
    return Card(
        name=name,
        slug=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        nominal_bytes=_whole_gib(properties.total_memory),
        total_bytes=properties.total_memory,
        context_bytes=usual_context_bytes(count),
        compute_capability=capability,
        multiprocessors=count,
        bandwidth=int(bandwidth or count * _USUAL_BANDWIDTH_PER_MULTIPROCESSOR),
        flops_16_bit=int(clock * count * per_clock),
        estimated=frozenset({"nominal_bytes", "context_bytes", "bandwidth", "flops_16_bit"}),
        sources={
            "nominal_bytes": "the memory seen, in whole GiB",
            "context_bytes": "26 MiB + 3.6 MiB per multiprocessor",
            "bandwidth": f"the clocks that {_DRIVER} gives, or as of cards of its size",
            "flops_16_bit": f"the clocks that {_DRIVER} gives, or as of cards of its size",
        },
    )


def _whole_gib(size_bytes: int) -> int:
    return -(-size_bytes // GIB) * GIB


def _short(name: str) -> str:
    """The driver's name without the vendor's."""
    return re.sub(r"^(NVIDIA |GeForce |Tesla )+", "", name)
