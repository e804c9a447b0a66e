"""Rounding to bf16 by chance, so that updates smaller than a unit of bf16 are not lost.

Next to a weight w, bf16 has numbers 2**-8 |w| to 2**-7 |w| apart. An update of 1e-5 |w| rounded to
the nearest never moves it. Rounded up with the probability of its share of the way, it moves by the
right amount on average.
"""

from __future__ import annotations

import torch

# Elements rounded at a time: the random numbers of all weights of an embedding would be larger
# than the weights.
_SLICE = 2**22
_LOW_BITS = 2**16
_LARGEST = torch.finfo(torch.bfloat16).max


@torch.no_grad()
def stochastic_round_(target: torch.Tensor, source: torch.Tensor) -> None:
    """Put `source` (fp32, contiguous; spoilt) into `target` (bf16, contiguous), rounded by chance.

    The result is one of the two numbers of bf16 around an element, and its mean is the element;
    beyond the largest number of bf16, 3.39e38, it is that.
    A bf16 number is the upper half of an fp32 number, so adding a random number of 16 bits carries
    into the upper half as often as the lower half asks. What is no finite number stays what it is.
    Random numbers are drawn from torch's default generator of the device.
    """
    parts = zip(target.view(-1).split(_SLICE), source.view(-1).split(_SLICE), strict=True)
    for rounded, exact in parts:
        finite, below = exact.isfinite(), exact.abs() < _LARGEST
        bits = exact.view(torch.int32)
        bits += torch.empty_like(bits).random_(0, _LOW_BITS).mul_(below)
        bits -= bits.bitwise_and(_LOW_BITS - 1).mul_(finite)
        rounded.copy_(exact)
