"""Memory that kernels on the CPU share."""

from __future__ import annotations

import threading

import torch

from lowvram.scratch import scratch


def span(tensor: torch.Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def test_shapes_asked_for_together_are_apart_and_on_cache_lines() -> None:
    one, two, three = scratch((3, 5), (7,), (2, 1, 4))

    assert [tuple(x.shape) for x in (one, two, three)] == [(3, 5), (7,), (2, 1, 4)]
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in (one, two, three))
    assert span(one).stop <= span(two).start < span(two).stop <= span(three).start
    assert all(x.data_ptr() % 64 == 0 for x in (one, two, three))


def test_the_next_gets_the_same_memory_unless_it_needs_more() -> None:
    (large,) = scratch((100, 1000))
    (small,) = scratch((10,))
    assert small.data_ptr() == large.data_ptr()
    (larger,) = scratch((large.numel() * 50,))
    larger.fill_(1.0)
    (again,) = scratch((large.numel() * 50,))
    assert again.data_ptr() == larger.data_ptr()


def test_every_thread_has_its_own() -> None:
    (here,) = scratch((1000,))
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(scratch((1000,))))
    thread.start()
    thread.join()
    elsewhere = span(found[0])
    assert elsewhere.stop <= span(here).start or span(here).stop <= elsewhere.start


def test_neither_inference_mode_nor_another_default_dtype_gets_into_it() -> None:
    found: list[torch.Tensor] = []

    def ask() -> None:  # in a thread that has no scratch memory yet
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.inference_mode():
                found.extend(scratch((8,)))
        finally:
            torch.set_default_dtype(torch.float32)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found[0].dtype == torch.float32
    assert not found[0].is_inference()
