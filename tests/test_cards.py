"""Profiles of cards: spellings, figures that agree, budgets, and the card of a machine."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from lowvram.errors import DeviceError
from lowvram.memory import card_table
from lowvram.memory.cards import (
    Card,
    System,
    card_in_machine,
    card_of_size,
    find_card,
    list_cards,
)

MIB = 2**20
GIB = 2**30
SYSTEMS = get_args(System)
FIGURES = {
    "nominal_bytes",
    "total_bytes",
    "context_bytes",
    "compute_capability",
    "multiprocessors",
    "bandwidth",
    "flops_16_bit",
}

CONSUMER = """
    gtx-1660 gtx-1660-super gtx-1660-ti
    rtx-2060-6gb rtx-2060-12gb rtx-2060-super rtx-2070 rtx-2070-super rtx-2080 rtx-2080-super
    rtx-2080-ti
    rtx-3050-6gb rtx-3050-8gb rtx-3060-8gb rtx-3060-12gb rtx-3060-ti rtx-3070 rtx-3070-ti
    rtx-3080-10gb rtx-3080-12gb rtx-3080-ti rtx-3090 rtx-3090-ti
    rtx-4060 rtx-4060-ti-8gb rtx-4060-ti-16gb rtx-4070 rtx-4070-super rtx-4070-ti
    rtx-4070-ti-super rtx-4080 rtx-4080-super rtx-4090
    rtx-5060 rtx-5060-ti-8gb rtx-5060-ti-16gb rtx-5070 rtx-5070-ti rtx-5080 rtx-5090
    rtx-3060-laptop rtx-4060-laptop
""".split()
DATA_CENTER = "t4 a10 a10g l4 a100-40gb a100-80gb h100-pcie h100-sxm h200".split()

# As PyTorch gives them.
DRIVER_NAMES = {
    "NVIDIA GeForce RTX 4070 Ti": "rtx-4070-ti",
    "NVIDIA GeForce RTX 4070 Ti SUPER": "rtx-4070-ti-super",
    "NVIDIA GeForce GTX 1660 SUPER": "gtx-1660-super",
    "NVIDIA GeForce RTX 4060 Laptop GPU": "rtx-4060-laptop",
    "Tesla T4": "t4",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "a10g",
    "NVIDIA L4": "l4",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H200": "h200",
}

every_card = pytest.mark.parametrize("card", list_cards(), ids=lambda card: card.slug)


# Finding


def test_the_list() -> None:
    slugs = [card.slug for card in list_cards()]
    assert sorted(slugs) == sorted(CONSUMER + DATA_CENTER)
    assert slugs[:3] == ["rtx-4070-ti", "rtx-5060", "rtx-5060-ti-8gb"]
    assert slugs.index("rtx-5090") < slugs.index("rtx-4060") < slugs.index("rtx-3050-8gb")
    assert slugs.index("gtx-1660-ti") < slugs.index("t4")


@every_card
def test_spellings(card: Card) -> None:
    size = card.nominal_bytes // GIB
    bare = card.name.removeprefix("RTX ").removeprefix("GTX ")
    spellings = [
        card.name,
        card.slug,
        card.slug.upper(),
        card.slug.replace("-", "_"),
        f"  {card.name}  ",
        f"NVIDIA GeForce {card.name}",
        f"nvidia_{card.slug}",
        f"{card.name} {size} GB",
        f"{card.slug}-{size}gib",
        bare,
        card.name.replace("RTX ", "RTX").replace("GTX ", "gtx"),
        bare.replace(" Ti", "ti").replace(" Super", "SUPER").replace(" Laptop", "laptop"),
        bare.replace("GB", "G"),
    ]
    assert [find_card(spelling).slug for spelling in spellings] == [card.slug] * len(spellings)


@pytest.mark.parametrize(("name", "slug"), DRIVER_NAMES.items())
def test_names_of_drivers(name: str, slug: str) -> None:
    assert find_card(name).slug == slug


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("4070ti", "rtx-4070-ti"),
        ("rtx4070ti", "rtx-4070-ti"),
        ("1660 super", "gtx-1660-super"),
        ("1660ti", "gtx-1660-ti"),
        ("2070S", "rtx-2070-super"),
        ("rtx 4060 mobile", "rtx-4060-laptop"),
        ("2060", "rtx-2060-6gb"),
        ("3050", "rtx-3050-8gb"),
        ("rtx-3060", "rtx-3060-12gb"),
        ("3060 8 GB", "rtx-3060-8gb"),
        ("3080", "rtx-3080-10gb"),
        ("3080-12gb", "rtx-3080-12gb"),
        ("4060 Ti", "rtx-4060-ti-8gb"),
        ("4060ti16gb", "rtx-4060-ti-16gb"),
        ("5060 ti", "rtx-5060-ti-8gb"),
        ("a100", "a100-40gb"),
        ("H100", "h100-pcie"),
        ("h100-sxm5-80gb", "h100-sxm"),
    ],
)
def test_short_names(name: str, slug: str) -> None:
    assert find_card(name).slug == slug


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("RTX 4075 Ti", "Did you mean rtx-4070-ti or rtx-5070-ti or rtx-3070-ti?"),
        ("rtx-4070-ti-16gb", "Did you mean rtx-4060-ti-16gb or rtx-4070-ti or rtx-5060-ti-16gb?"),
        (
            "Radeon",
            "Known are rtx-4070-ti, rtx-5060, rtx-5060-ti-8gb, rtx-5060-ti-16gb and 47 more.",
        ),
        ("", "Known are rtx-4070-ti, rtx-5060, rtx-5060-ti-8gb, rtx-5060-ti-16gb and 47 more."),
    ],
)
def test_unknown_names(name: str, advice: str) -> None:
    with pytest.raises(DeviceError) as caught:
        find_card(name)
    assert str(caught.value) == (
        f"unknown card {name!r}. {advice} Or say how much memory may be used, "
        "in place of a card: --vram 12GiB"
    )


# Figures


@every_card
def test_memory(card: Card) -> None:
    """T4, A10 and L4 lose a sixteenth to error correction."""
    least = 0.90 if card.slug in ("t4", "a10", "a10g", "l4") else 0.93
    assert least * card.nominal_bytes < card.total_bytes < 0.995 * card.nominal_bytes
    assert card.nominal_bytes % GIB == 0


@every_card
def test_context(card: Card) -> None:
    """80 to 640 MiB, and more where there are more multiprocessors."""
    assert 80 * MIB < card.context_bytes < 640 * MIB
    per_multiprocessor = (card.context_bytes - 26 * MIB) / card.multiprocessors / MIB
    assert 2.8 < per_multiprocessor < 4.5


@every_card
def test_budgets(card: Card) -> None:
    headless, desktop, windows = (card.budget(system) for system in SYSTEMS)
    assert card.total_bytes > headless > desktop > windows > 0.75 * card.total_bytes
    assert card.budget() == headless


def test_budgets_of_the_reference_card() -> None:
    card = find_card("rtx-4070-ti")
    assert [card.budget(system) // MIB for system in SYSTEMS] == [11718, 11238, 10915]


@every_card
def test_speed(card: Card) -> None:
    """The rate gives back a clock between 1.4 and 2.7 GHz, the bandwidth a known bus."""
    per_clock = {"a100-40gb": 2048, "a100-80gb": 2048, "h100-pcie": 4096, "h100-sxm": 4096}
    per_clock |= {"h200": 4096, "t4": 1024, "a10": 1024, "l4": 1024}
    usual = 256 if card.slug.startswith("gtx") else 512
    clock = card.flops_16_bit / card.multiprocessors / per_clock.get(card.slug, usual)
    assert 1.4e9 < clock < 2.7e9
    assert 7e9 < card.bandwidth / card.multiprocessors < 40e9 or card.slug == "l4"


@every_card
def test_what_follows_from_the_capability(card: Card) -> None:
    major = card.compute_capability[0]
    assert major in (7, 8, 9, 12)
    assert card.supports_bf16 is (major != 7)


@every_card
def test_every_figure_has_a_source(card: Card) -> None:
    assert card.estimated <= FIGURES
    assert set(card.sources) == FIGURES
    assert all(card.sources.values())
    assert card.held_bytes is None


def test_what_is_estimated() -> None:
    """Half of the totals at most, and never without saying how."""
    guessed = [card for card in list_cards() if "total_bytes" in card.estimated]
    assert 0 < len(guessed) < len(list_cards()) / 2
    for card in guessed:
        assert card.sources["total_bytes"].startswith(("as the ", "5,917 MiB", "11.70 GiB"))
    assert not find_card("4090").estimated
    assert not find_card("t4").estimated


def test_tables_name_only_cards() -> None:
    names = {card.name for card in list_cards()}
    tables = (card_table.CONTEXTS, card_table.ALIASES, card_table.ESTIMATED)
    assert all(table.keys() <= names for table in tables)


def test_a_card_can_be_sent_to_another_process() -> None:
    card = find_card("rtx-4070-ti")
    assert pickle.loads(pickle.dumps(card)) == card
    assert len({card, dataclasses.replace(card)}) == 1


# A size in place of a card


@pytest.mark.parametrize("size", [1, 6 * GIB, 12 * GIB + 1])
def test_a_card_of_a_size_has_that_budget_on_every_system(size: int) -> None:
    card = card_of_size(size)
    assert [card.budget(system) for system in SYSTEMS] == [size] * 3
    assert card.total_bytes == size
    assert card.compute_capability == (8, 9)
    assert card.estimated >= {"compute_capability", "bandwidth", "flops_16_bit"}
    assert set(card.sources) == FIGURES


def test_the_name_of_a_size() -> None:
    assert (card_of_size(12 * GIB).name, card_of_size(12 * GIB).slug) == ("12 GiB", "12gib")
    assert card_of_size(int(7.5 * GIB)).name == "7.5 GiB"


def test_no_card_is_of_no_size() -> None:
    with pytest.raises(DeviceError) as caught:
        card_of_size(0)
    assert str(caught.value) == "no card has 0 bytes of memory. Give its size: --vram 12GiB"


# The card in this machine


@pytest.fixture
def fake_card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """fake_card(free_bytes=..., reserved_bytes=..., name=..., ...) puts a card into the machine."""

    def put(*, free_bytes: int, reserved_bytes: int = 0, **changes: Any) -> None:
        properties = {
            "name": "NVIDIA GeForce RTX 4070 Ti",
            "total_memory": 11_900 * MIB,
            "major": 8,
            "minor": 9,
            "multi_processor_count": 60,
        }
        described = SimpleNamespace(**(properties | changes))
        at = {0: (1, None, 0), 1: (free_bytes, described, reserved_bytes)}
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: at[index][1])
        monkeypatch.setattr(
            "torch.cuda.mem_get_info", lambda index: (at[index][0], described.total_memory)
        )
        monkeypatch.setattr("torch.cuda.memory_reserved", lambda index: at[index][2])

    return put


def test_a_machine_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert card_in_machine() is None


def test_a_known_card(fake_card: Any) -> None:
    """The driver's figures win, and the table gives the rest."""
    fake_card(free_bytes=10_000 * MIB, multi_processor_count=58)
    card, known = card_in_machine(), find_card("rtx-4070-ti")
    assert card is not None
    assert (card.name, card.slug) == ("RTX 4070 Ti", "rtx-4070-ti")
    assert (card.total_bytes, card.multiprocessors) == (11_900 * MIB, 58)
    assert (card.bandwidth, card.flops_16_bit) == (known.bandwidth, known.flops_16_bit)
    assert (card.context_bytes, card.nominal_bytes) == (known.context_bytes, 12 * GIB)
    assert card.estimated == {"context_bytes"}
    assert card.sources["total_bytes"] == "the driver of this machine"
    assert known.sources["total_bytes"] != "the driver of this machine"


def test_its_budget_is_what_is_free(fake_card: Any) -> None:
    """Less a fifth of the context, for modules to be loaded yet; on every system."""
    fake_card(free_bytes=10_000 * MIB)
    card = card_in_machine(1)
    assert card is not None
    growth = 0.2 * card.context_bytes
    for system in SYSTEMS:
        assert card.budget(system) == pytest.approx(10_000 * MIB - growth, abs=2)


def test_memory_of_this_process_is_its_own(fake_card: Any) -> None:
    fake_card(free_bytes=10_000 * MIB)
    before = card_in_machine()
    fake_card(free_bytes=7_000 * MIB, reserved_bytes=3_000 * MIB)
    assert card_in_machine() == before


def test_an_idle_card_is_not_larger_than_it_is(fake_card: Any) -> None:
    fake_card(free_bytes=11_900 * MIB)
    card = card_in_machine()
    assert card is not None
    assert card.held_bytes == 0
    assert card.budget() == card.total_bytes - card.context_bytes


def test_a_card_that_is_full(fake_card: Any) -> None:
    fake_card(free_bytes=0)
    card = card_in_machine()
    assert card is not None
    assert card.budget("windows") == 0


@pytest.mark.parametrize(
    ("name", "mib", "slug", "bandwidth"),
    [
        ("NVIDIA GeForce RTX 3060", 11_910, "rtx-3060-12gb", 360),
        ("NVIDIA GeForce RTX 3060", 12_287, "rtx-3060-12gb", 360),
        ("NVIDIA GeForce RTX 3060", 7_900, "rtx-3060-8gb", 240),
        ("NVIDIA GeForce RTX 4060 Ti", 16_379, "rtx-4060-ti-16gb", 288),
        ("NVIDIA A100-SXM4-80GB", 81_100, "a100-80gb", 2039),
    ],
)
def test_the_memory_tells_which(
    fake_card: Any, name: str, mib: int, slug: str, bandwidth: int
) -> None:
    fake_card(free_bytes=GIB, name=name, total_memory=mib * MIB)
    card = card_in_machine()
    assert card is not None
    assert (card.slug, card.bandwidth) == (slug, bandwidth * 10**9)


def test_a_card_with_more_memory_than_its_like(fake_card: Any) -> None:
    fake_card(free_bytes=GIB, name="NVIDIA GeForce RTX 3080", total_memory=20_079 * MIB)
    card = card_in_machine()
    assert card is not None
    assert (card.name, card.nominal_bytes) == ("RTX 3080", 20 * GIB)


def test_an_unknown_card(fake_card: Any) -> None:
    """An RTX A2000: 26 multiprocessors at 1.2 GHz, 192 bits at 6 GHz and two transfers a clock."""
    fake_card(
        free_bytes=11_000 * MIB,
        name="NVIDIA RTX A2000 12GB",
        minor=6,
        multi_processor_count=26,
        clock_rate=1_200_000,
        memory_clock_rate=6_001_000,
        memory_bus_width=192,
    )
    card = card_in_machine()
    assert card is not None
    assert (card.name, card.slug) == ("RTX A2000 12GB", "rtx-a2000-12gb")
    assert (card.compute_capability, card.total_bytes) == ((8, 6), 11_900 * MIB)
    assert card.bandwidth == 288_048_000_000
    assert card.flops_16_bit == 26 * 512 * 1_200_000_000
    assert card.context_bytes // MIB == 119
    assert card.estimated == FIGURES - {"total_bytes", "compute_capability", "multiprocessors"}
    assert set(card.sources) == FIGURES


def test_an_unknown_card_without_clocks(fake_card: Any) -> None:
    fake_card(free_bytes=GIB, name="NVIDIA Marvel", major=10, minor=0)
    card = card_in_machine()
    assert card is not None
    assert (card.bandwidth, card.flops_16_bit) == (540 * 10**9, 60 * 8192 * 1_700_000_000)


# Imports


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lowvram.memory.cards import card_of_size, find_card\n"
        "print(find_card('4070ti').slug, card_of_size(2**30).budget())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True
    )
    assert result.stdout.split() == ["rtx-4070-ti", str(2**30)]
