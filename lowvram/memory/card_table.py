"""The figures of the cards in `cards`, and who reported them. A table, no logic.

Memory. What a process sees on Linux differs with the driver: an RTX 3060 shows 12,037 MiB with
some and 11,906 MiB with others, an RTX 3090 24,238 and 24,123. The lower figures are the usual
ones of drivers from 2025 on, as current builds of PyTorch need them, and are taken here. Where
only a higher one is known, a sister card's is taken instead, which makes it an estimate.

Context. What a process with PyTorch takes beside the memory of its allocator: "this process has
A GiB in use" less "B allocated by PyTorch" and "C reserved by PyTorch but unallocated" of an
out-of-memory message, good to 10 MiB.

Speed. Multiplications and additions per second of 16-bit matrices, summed in 32 bits, dense, at
the boost clock: what a training step does. GeForce cards do 512 per clock and multiprocessor,
half of what they would if they summed in 16 bits. The GTX 16 cards have no tensor cores: theirs
is the plain 16-bit rate, 256 per clock and multiprocessor.
"""

from __future__ import annotations

from typing import NamedTuple

MIB = 2**20
GIB = 2**30


class Figure(NamedTuple):
    """A number of bytes, and who says so or, if `estimated`, how it was found."""

    size_bytes: int
    source: str
    estimated: bool = False


class Row(NamedTuple):
    name: str
    """As on the box; with the memory where the card comes with several."""
    nominal_gib: int
    """As on the box."""
    multiprocessors: int
    bandwidth: int
    """10**9 bytes per second."""
    tflops: float
    """10**12 operations per second."""
    total: Figure
    """Memory that a process sees on Linux."""


class Series(NamedTuple):
    capability: tuple[int, int]
    rows: tuple[Row, ...]


def _log(mib: int) -> Figure:
    return Figure(mib * MIB, f'a log of llama.cpp: "{mib} MiB"')


def _query(size_bytes: int, cuda: str) -> Figure:
    return Figure(size_bytes, f"deviceQuery of the CUDA samples, driver of CUDA {cuda}")


def _gib(gib: float, source: str) -> Figure:
    """As PyTorch's messages give it, with two decimals: good to 5 MiB."""
    return Figure(round(gib * GIB), source)


def _property(mib: int) -> Figure:
    return Figure(mib * MIB, f'PyTorch: "total_memory={mib}MB"')


def _as(name: str, mib: int, remark: str = "") -> Figure:
    return Figure(mib * MIB, f"as the {name}{remark}", estimated=True)


_OLD_DRIVER = "; {} MiB with an older driver"
_MESSAGE = 'an out-of-memory message: "total capacity of'

# With a driver of 2023; of sister cards, newer ones keep some 115 MiB more. Where the card is
# there, what its own driver says counts.
_RTX_4070_TI = Figure(int(11.70 * GIB), f'{_MESSAGE} 11.70 GiB", Kwai-Kolors/Kolors#11')
_RTX_2060 = Figure(
    5750 * MIB,
    "5,917 MiB with an older driver, less the 167 MiB that newer ones keep of an RTX 2060 Super",
    estimated=True,
)
_RTX_4090 = Figure(25_262_096_384, "Comfy-Org/ComfyUI#7063")
_A100 = Figure(42_298_834_944, "deviceQuery, bottlerocket-os/bottlerocket#3873")

GTX_16 = (
    Row("GTX 1660", 6, 22, 192, 10.1, _log(5754)),
    Row("GTX 1660 Super", 6, 22, 336, 10.1, _as("GTX 1660", 5754, _OLD_DRIVER.format(5943))),
    Row("GTX 1660 Ti", 6, 24, 288, 10.9, _as("GTX 1660", 5754, _OLD_DRIVER.format(5942))),
)
RTX_20 = (
    Row("RTX 2060 6GB", 6, 30, 336, 25.8, _RTX_2060),
    Row("RTX 2060 12GB", 12, 34, 336, 28.7, _log(11824)),
    Row("RTX 2060 Super", 8, 34, 448, 28.7, _log(7798)),
    Row("RTX 2070", 8, 36, 448, 29.9, _as("RTX 2070 Super", 7785, _OLD_DRIVER.format(7982))),
    Row("RTX 2070 Super", 8, 40, 448, 36.3, _query(8_164_081_664, "12.9")),
    Row("RTX 2080", 8, 46, 448, 40.3, _as("RTX 2080 Super", 7782, _OLD_DRIVER.format(7949))),
    Row("RTX 2080 Super", 8, 48, 496, 44.6, _gib(7.60, _MESSAGE + ' 7.60 GiB"')),
    Row("RTX 2080 Ti", 11, 68, 616, 53.8, Figure(10818 * MIB, 'a log of ollama: "10818 MiB"')),
)
RTX_30 = (
    Row("RTX 3050 8GB", 8, 20, 224, 18.2, _as("RTX 3070", 7819)),
    Row("RTX 3050 6GB", 6, 18, 168, 13.5, _query(6_085_214_208, "13.2")),
    Row("RTX 3060 12GB", 12, 28, 360, 25.5, _log(11906)),
    Row("RTX 3060 8GB", 8, 28, 240, 25.5, _as("RTX 3070", 7819)),
    Row("RTX 3060 Ti", 8, 38, 448, 32.4, _log(7840)),
    Row("RTX 3070", 8, 46, 448, 40.6, _log(7819)),
    Row("RTX 3070 Ti", 8, 48, 608, 43.5, _log(7840)),
    Row("RTX 3080 10GB", 10, 68, 760, 59.5, _gib(9.64, _MESSAGE + ' 9.64 GiB"')),
    Row("RTX 3080 12GB", 12, 70, 912, 61.3, _as("RTX 3080 Ti", 11899)),
    Row("RTX 3080 Ti", 12, 80, 912, 68.2, _gib(11.62, "attevon-llc/OpenTranscribe#608")),
    Row("RTX 3090", 24, 82, 936, 71.2, _log(24123)),
    Row("RTX 3090 Ti", 24, 84, 1008, 80.0, _as("RTX 3090", 24123, _OLD_DRIVER.format(24233))),
    Row("RTX 3060 Laptop", 6, 30, 336, 26.1, _as("RTX 3050 6GB", 5803, _OLD_DRIVER.format(5938))),
)
RTX_40 = (
    Row("RTX 4060", 8, 24, 272, 30.2, _gib(7.62, 'a comment in code: "7.62 GiB"')),
    Row("RTX 4060 Ti 8GB", 8, 34, 288, 44.1, _as("RTX 4060", 7803)),
    Row("RTX 4060 Ti 16GB", 16, 34, 288, 44.1, _query(16_722_821_120, "13.1")),
    Row("RTX 4070", 12, 46, 504, 58.3, _log(11866)),
    Row("RTX 4070 Super", 12, 56, 504, 71.0, _gib(11.58, 'a report: "11.58 GiB usable"')),
    Row("RTX 4070 Ti", 12, 60, 504, 80.2, _RTX_4070_TI),
    Row("RTX 4070 Ti Super", 16, 66, 672, 88.2, _log(15941)),
    Row("RTX 4080", 16, 76, 717, 97.5, _as("RTX 4080 Super", 15937, _OLD_DRIVER.format(16076))),
    Row("RTX 4080 Super", 16, 80, 736, 104.4, _log(15937)),
    Row("RTX 4090", 24, 128, 1008, 165.2, _RTX_4090),
    Row("RTX 4060 Laptop", 8, 24, 256, 27.6, _as("RTX 4060", 7803, _OLD_DRIVER.format(7940))),
)
RTX_50 = (
    Row("RTX 5060", 8, 30, 448, 38.4, _log(7708)),
    Row("RTX 5060 Ti 8GB", 8, 36, 448, 47.4, _as("RTX 5060", 7708)),
    Row("RTX 5060 Ti 16GB", 16, 36, 448, 47.4, _log(15850)),
    Row("RTX 5070", 12, 48, 672, 61.7, _gib(11.50, 'a report: "11.50 GiB reported by PyTorch"')),
    Row("RTX 5070 Ti", 16, 70, 896, 87.9, _log(15842)),
    Row("RTX 5080", 16, 84, 960, 112.6, _log(15880)),
    Row("RTX 5090", 32, 170, 1792, 209.5, _query(33_660_534_784, "13.0")),
)
# T4, A10 and L4 have error correction on, which takes a sixteenth of their memory.
T4 = (Row("T4", 16, 40, 320, 65.1, _query(15_642_329_088, "12.5")),)
A10 = (
    Row("A10", 24, 72, 600, 125.0, _query(23_696_375_808, "12.8")),
    Row("A10G", 24, 80, 600, 70.0, _property(22587)),
)
L4 = (Row("L4", 24, 58, 300, 121.0, _query(23_612_293_120, "12.0")),)
A100 = (
    Row("A100 40GB", 40, 108, 1555, 312.0, _A100),
    Row("A100 80GB", 80, 108, 2039, 312.0, _gib(79.25, "levihsu/OOTDiffusion#235")),
)
HOPPER = (
    Row("H100 PCIe", 80, 114, 2000, 756.0, _property(81008)),
    Row("H100 SXM", 80, 132, 3350, 989.0, _query(85_017_755_648, "13.0")),
    Row("H200", 141, 132, 4800, 989.0, _property(143156)),
)

# A name without its memory means the first row that it fits: the card that was sold first, or the
# smaller one where both were.
SERIES = (
    Series((12, 0), RTX_50),
    Series((8, 9), RTX_40),
    Series((8, 6), RTX_30),
    Series((7, 5), RTX_20),
    Series((7, 5), GTX_16),
    Series((7, 5), T4),
    Series((8, 6), A10),
    Series((8, 9), L4),
    Series((8, 0), A100),
    Series((9, 0), HOPPER),
)

CONTEXTS = {
    "RTX 3070": Figure(179 * MIB, "meta-llama/codellama#82"),
    "RTX 4060 Laptop": Figure(115 * MIB, "EdgeRegNet#2; 109 MiB in MagicQuill#126"),
    "RTX 4090": Figure(504 * MIB, "3DTopia/Phidias-Diffusion#8; 473 to 495 MiB in three others"),
    "RTX 5090": Figure(619 * MIB, "TrajectoryCrafter#20; 595 MiB in Wan-Video/Wan2.1#465"),
    "T4": Figure(147_718_144, "README of fitcheck, PyTorch 2.10 to 2.14: 140.875 MiB"),
    "A100 40GB": Figure(501 * MIB, "TianheWu/CoSeR#10"),
    "A100 80GB": _as("A100 40GB", 501),
}

ALIASES = {
    "A100 40GB": ("A100 PCIe 40GB",),
    "A100 80GB": ("A100 PCIe 80GB",),
    "H100 PCIe": ("H100",),
    "H100 SXM": ("H100 SXM5", "H100 HBM3"),
}

ESTIMATED = {
    # The clock of a laptop's card depends on the power that it is allowed.
    "RTX 3060 Laptop": ("flops_16_bit",),
    "RTX 4060 Laptop": ("flops_16_bit",),
    # NVIDIA publishes no sheet of it.
    "A10G": ("bandwidth", "flops_16_bit"),
}
