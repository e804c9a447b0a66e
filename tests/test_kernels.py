"""Temporaries of CUDA kernels, against numbers worked out by hand from PyTorch's sources.

Sizes marked "recorded" are also in allocator traces taken on real cards.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowvram.memory.kernels import (
    KERNELS,
    NOTHING,
    Scratch,
    Target,
    lt_workspace_bytes,
    output_bytes,
    output_order,
    replay,
    scratch,
    workspace_bytes,
)

RTX_4070_TI = Target(compute_capability=(8, 9), multiprocessors=60)
A100 = Target(compute_capability=(8, 0), multiprocessors=108)
V100 = Target(compute_capability=(7, 0), multiprocessors=80)
H100 = Target(compute_capability=(9, 0), multiprocessors=132)

F32, F16, BF16, I64 = torch.float32, torch.float16, torch.bfloat16, torch.int64
aten = torch.ops.aten


def empty(*shape: int, dtype: torch.dtype = F32, device: str = "meta") -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def take(op: Any, *args: Any, card: Target = RTX_4070_TI, **kwargs: Any) -> Scratch:
    """Run an operator on the meta device and ask for its temporaries on a card."""
    result = op(*args, **kwargs)
    results = result if isinstance(result, (tuple, list)) else (result,)
    outputs = [output for output in results if isinstance(output, torch.Tensor)]
    return scratch(op, args, kwargs, outputs, card)


def test_every_name_is_an_operator() -> None:
    for name in KERNELS:
        assert hasattr(aten, name.removeprefix("aten::")), name


def test_other_operators_take_nothing() -> None:
    for op in (aten.gelu.default, aten.silu.default, aten.exp.default):
        assert take(op, empty(4, 8)) is NOTHING
    assert take(aten.native_dropout.default, empty(4, 8), 0.1, True) is NOTHING
    assert take(aten.cat.default, [empty(4, 8), empty(4, 8)]) is NOTHING


def test_peak_counts_early_frees() -> None:
    assert Scratch((10, 20, ~1, ~0), (25, 0, 1)).peak_bytes == 30
    assert Scratch((10,), (20, 5, ~1)).peak_bytes == 35
    assert NOTHING.peak_bytes == 0


def test_replay_allocates_and_frees_in_order() -> None:
    done: list[str] = []

    def allocate(size: int) -> int:
        done.append(f"+{size}")
        return size

    live: list[int | None] = []
    replay((10, 0, 20, ~0), live, allocate, lambda block: done.append(f"-{block}"))
    replay((30, ~2, ~1), live, allocate, lambda block: done.append(f"-{block}"))
    assert done == ["+10", "+20", "-10", "+30", "-20"]
    assert live == [None, None, None, 30]


# Sorting


def test_embedding_with_few_indices_takes_nothing() -> None:
    """cuda/Embedding.cu: up to 3072 indices there is no sort."""
    indices = empty(3, 1024, dtype=I64)
    grad = empty(3, 1024, 768)
    assert take(aten.embedding_dense_backward.default, grad, indices, 50257, -1, False) is NOTHING


def test_embedding_backward() -> None:
    """cuda/EmbeddingBackwardKernel.cu: 8192 indices of 8 bytes, rows of 768 numbers in fp32."""
    indices = empty(8, 1024, dtype=I64)
    grad = empty(8, 1024, 768, dtype=BF16)
    taken = take(aten.embedding_dense_backward.default, grad, indices, 50257, -1, False)
    sort = 8 * 256 * 8 + 3 * 256 * 4 + 2 * 65536 + 256 + 255
    scan = (10 + 32) * 16 + 96 + 255
    assert taken.before == (65536, 65536, 65536, sort, ~3, ~2)
    assert taken.after == (
        *(65536, 8, 65536, scan, ~7, ~6),
        *(65536, 65536, scan, ~10, 8, 65536, 8192 * 768 * 4),
    )


def test_embedding_backward_copies_what_is_not_contiguous() -> None:
    indices = empty(1024, 2, dtype=I64).t()
    grad = empty(1024, 2, 16).transpose(0, 1)
    taken = take(aten.embedding_dense_backward.default, grad, indices, 100, -1, False)
    assert taken.before == (2048 * 8, 2048 * 16 * 4)


def test_embedding_bag_backward_sorts_and_sums_segments() -> None:
    """cuda/EmbeddingBag.cu: every number of indices is sorted, except for the maximum."""
    indices, bags = empty(100, dtype=I64), empty(100, dtype=I64)
    grad = empty(10, 16)
    for mode, count in ((0, 4), (2, 0)):
        arguments = (grad, indices, bags, bags, bags, 50, False, mode, None, -1)
        taken = scratch(
            aten._embedding_bag_dense_backward.default,
            arguments,
            {},
            [empty(50, 16)],
            RTX_4070_TI,
        )
        assert len([size for size in taken.before if size > 0]) == count


def test_index_put_that_accumulates() -> None:
    """cuda/Indexing.cu and cub's dispatch_radix_sort.cuh: recorded, in this order, for a table of
    10000 rows and 4096 indices (14 bits, two passes)."""
    table, values = empty(10000, 1024), empty(4, 1024, 1024)
    index = empty(4, 1024, dtype=I64)
    taken = take(aten._index_put_impl_.default, table, [index], values, True, True)
    assert taken.before == ()
    assert taken.after == (32768, 32768, ~0, 32768, 32768, 32768, 72191, ~5)
    assert take(aten.index_put_.default, table, [index], values, False) is NOTHING


def test_index_put_with_two_indices_and_broadcast_values() -> None:
    table, values = empty(100, 50, 8), empty(8)
    rows, columns = empty(30, dtype=I64), empty(30, dtype=torch.int32)
    taken = take(aten.index_put.default, table, [rows, columns], values, True)
    assert taken.after[:8] == (240, 240, ~0, 240, 240, 240, ~3, ~4)
    assert taken.after[8:] == (30 * 8 * 4, 240, 240, 240, 1, ~9)


def test_index_put_of_a_mask_is_not_known() -> None:
    mask = empty(10, dtype=torch.bool)
    assert take(aten.index_put_.default, empty(10), [mask], empty(), True) is NOTHING


def test_sort() -> None:
    assert take(aten.sort.default, empty(8, 4096)) is NOTHING
    taken = take(aten.sort.default, empty(8192))
    assert taken.after[0] == 8192 * 8
    across = take(aten.sort.default, empty(8192, 2), 0)
    assert across.after[0] == 8192 * 2 * 4
    assert take(aten.sort.default, empty()) is NOTHING


def test_multinomial_draws_a_number_per_weight() -> None:
    assert take(aten.multinomial.default, empty(2, 50257), 1).before == (2 * 50257 * 4,)
    assert take(aten.multinomial.default, empty(2, 50257), 5, True) is NOTHING


# Attention


def heads_last(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """(b, h, l, d) in the memory of a projection: (b, l, h, d)."""
    batch, heads, length, size = shape
    return empty(batch, length, heads, size, dtype=dtype).transpose(1, 2)


def flash_backward(
    query: torch.Tensor, key: torch.Tensor, card: Target = RTX_4070_TI, dropout: float = 0.0
) -> Scratch:
    batch, heads, length, _ = query.shape
    out = torch.empty_like(query)
    sums = empty(batch, heads, length)
    seed, unused = empty(2, dtype=torch.uint64), empty(dtype=torch.uint64)
    op = aten._scaled_dot_product_flash_attention_backward.default
    arguments = (out, query, key, key, out, sums, None, None, length, key.size(2))
    return take(op, *arguments, dropout, True, seed, unused, card=card)


def test_flash_backward() -> None:
    """flash_api.cpp, mha_bwd: 1000 queries become 1024, heads of 80 become 96."""
    taken = flash_backward(heads_last(2, 4, 1000, 80), heads_last(2, 4, 1000, 80))
    assert taken == Scratch((), (2 * 4 * 1024 * 4, 2 * 4 * 1024 * 96 * 4))
    wide = flash_backward(heads_last(1, 2, 128, 160), heads_last(1, 2, 128, 160))
    assert wide.after == (2 * 128 * 4, 2 * 128 * 192 * 4)


def test_flash_backward_copies_output_and_gradient_that_are_heads_first() -> None:
    query = empty(2, 4, 128, 64, dtype=BF16)
    assert flash_backward(query, query).before == (131072, 131072)


def test_flash_backward_of_grouped_heads() -> None:
    taken = flash_backward(heads_last(2, 4, 128, 64), heads_last(2, 2, 128, 64))
    assert taken.after[2:] == (2 * 128 * 4 * 64 * 2,) * 2


def test_flash_backward_when_deterministic() -> None:
    """One accumulator of dQ per multiprocessor that batch and heads leave idle."""
    query = heads_last(2, 4, 128, 64)
    torch.use_deterministic_algorithms(True)
    try:
        taken = flash_backward(query, query)
    finally:
        torch.use_deterministic_algorithms(False)
    assert taken.after == (4096, 8 * (2 * 4 * 128 * 64 * 4))


def test_varlen_flash_backward() -> None:
    """flash_api.cpp, mha_varlen_bwd: 128 rows more per sequence."""
    packed, lengths = empty(300, 4, 64, dtype=BF16), empty(4, dtype=torch.int32)
    sums = empty(4, 300)
    state = empty(2, dtype=torch.uint64)
    taken = take(
        aten._flash_attention_backward.default,
        *(packed, packed, packed, packed, packed, sums, lengths, lengths, 100, 100),
        *(0.0, True, state, state),
    )
    rows = 300 + 128 * 3
    assert taken == Scratch((), (rows * 4 * 4, rows * 4 * 64 * 4))


def test_flash_forward() -> None:
    """flash_api.cpp, set_params_splitkv: 4 blocks for 120 places, keys in 16 blocks of 256."""
    op = aten._scaled_dot_product_flash_attention.default
    query, key = heads_last(8, 12, 1024, 64), heads_last(8, 12, 1024, 64)
    assert take(op, query, key, key) is NOTHING
    assert take(op, query, key, key, 0.1) == Scratch((), (16, ~0))
    one, cache = heads_last(1, 4, 1, 64), heads_last(1, 4, 4096, 64)
    assert take(op, one, cache, cache).after == (16 * 4 * 4, 16 * 4 * 64 * 4)
    grouped = heads_last(1, 2, 4096, 64)
    assert take(op, one, grouped, grouped).after == (16 * 4 * 4, 16 * 4 * 64 * 4)


def test_efficient_forward() -> None:
    """attention.cu: 16-bit outputs of heads above 128 are added up in fp32."""
    op = aten._scaled_dot_product_efficient_attention.default
    for dtype, size, expected in (
        (BF16, 128, ()),
        (BF16, 136, (2 * 4 * 8 * 136 * 4,)),
        (F32, 256, ()),
    ):
        query = heads_last(2, 4, 8, size, dtype=dtype)
        assert take(op, query, query, query, None, True).after == expected


def efficient_backward(query: torch.Tensor, card: Target, dropout: float = 0.0) -> Scratch:
    batch, heads, length, _ = query.shape
    seed = empty(dtype=I64)
    sums = empty(batch, heads, length)
    op = aten._scaled_dot_product_efficient_attention_backward.default
    arguments = (query, query, query, query, None, query, sums, seed, seed)
    return take(op, *arguments, dropout, [True, True, True, False], card=card)


def test_efficient_backward_in_fp32() -> None:
    """kernel_backward.h, workspace_size: per head 16 tiles of 64 x 64 and 4 words of state; the
    sums of dO * O come from operators (attention_backward.cu)."""
    taken = efficient_backward(heads_last(8, 12, 1024, 64, dtype=F32), RTX_4070_TI)
    rows = 8 * 12 * 1024
    assert taken.before == ()
    assert taken.after == (rows * 64 * 4, rows * 4, rows * 4, ~1, ~0, 96 * 16 * (64 * 64 + 4) * 4)


def test_efficient_backward_in_16_bits() -> None:
    taken = efficient_backward(heads_last(8, 12, 1024, 64), RTX_4070_TI)
    assert taken.after == (8 * 12 * 1024 * 4, 96 * 16 * (64 * 64 + 4) * 4)


@pytest.mark.parametrize(
    ("size", "card", "dropout", "floats"),
    [
        (96, RTX_4070_TI, 0.0, 8 * 2 * (128 * 64 + 4)),
        (96, RTX_4070_TI, 0.1, 2 * (2 * 64 * 128) + 16 * 2 * (64 * 64 + 4)),
        (128, RTX_4070_TI, 0.0, 2 * (2 * 64 * 128) + 16 * 2 * (64 * 64 + 4)),
        (128, A100, 0.0, 8 * 1 * (128 * 128 + 4)),
        (256, A100, 0.0, 2 * (2 * 64 * 256) + 8 * 4 * (128 * 64 + 4)),
    ],
)
def test_efficient_backward_of_larger_heads(
    size: int, card: Target, dropout: float, floats: int
) -> None:
    """kernels/cutlassB.h; with 96 heads in the grid keys are split in 200 // 96."""
    taken = efficient_backward(heads_last(8, 12, 1024, size), card, dropout)
    assert taken.after[-1] == 96 * floats * 4


def test_efficient_backward_copies_a_gradient_that_is_heads_first() -> None:
    query = empty(2, 4, 8, 64)
    assert efficient_backward(query, RTX_4070_TI).before == (2 * 4 * 8 * 64 * 4,)


def test_efficient_backward_on_volta() -> None:
    """kKernelComputesDelta: not on compute capability 7.0 unless results stay in registers."""
    assert len(efficient_backward(heads_last(2, 4, 64, 64, dtype=F16), V100).after) == 2
    taken = efficient_backward(heads_last(2, 4, 64, 256, dtype=F16), V100)
    assert taken.after[:4] == (131072 * 4,) * 3 + (512 * 4,)


def test_cudnn_backward_is_an_estimate() -> None:
    query = heads_last(2, 4, 128, 64)
    sums, seed = empty(2, 4, 128, 1), empty(dtype=I64)
    arguments = (query, query, query, query, query, sums, seed, seed, None, None, None, 128, 128)
    op = aten._scaled_dot_product_cudnn_attention_backward.default
    taken = scratch(op, (*arguments, 0.0, True), {}, [query, query, query], H100)
    assert taken.after == (1024 * 4, 1024 * 64 * 4)


# Matrix products


def test_matrix_products_take_rows_and_columns_as_they_are() -> None:
    """cuda/cuBlasCommonArgs.h, prepare_matrix_for_cublas."""
    left, right = empty(16, 32), empty(32, 64)
    for one in (left, empty(32, 16).t(), empty(16, 100)[:, :32], empty(100, 16)[:32].t()):
        assert take(aten.mm.default, one, right) is NOTHING
    assert take(aten.addmm.default, empty(64), left, right) is NOTHING
    assert take(aten.addmm.default, empty(16, 64), left, right, beta=0.5) is NOTHING


def test_matrix_products_clone_other_layouts() -> None:
    right = empty(32, 64)
    expanded = empty(1).expand(16, 32)
    spread = empty(16, 64)[:, ::2]
    for one in (expanded, spread):
        assert take(aten.mm.default, one, right) == Scratch((), (16 * 32 * 4,))
        assert take(aten.addmm.default, empty(64), one, right) == Scratch((), (16 * 32 * 4,))
    assert take(aten.mm.default, empty(0, 32), right) is NOTHING


def test_batched_products() -> None:
    """cuda/Blas.cpp, prepare_batch_matrix_for_cublas."""
    left, right = empty(6, 16, 32), empty(6, 32, 64)
    assert take(aten.bmm.default, left, right) is NOTHING
    assert take(aten.bmm.default, empty(6, 32, 16).transpose(1, 2), right) is NOTHING
    assert take(aten.bmm.default, empty(1, 16, 32).expand(6, 16, 32), right) is NOTHING
    assert take(aten.baddbmm.default, empty(6, 16, 64), left, right) is NOTHING
    expanded = empty(6, 1, 1).expand(6, 16, 32)
    assert take(aten.bmm.default, expanded, right).after == (6 * 16 * 32 * 4,)
    heads = empty(16, 6, 32).transpose(0, 1)
    assert take(aten.bmm.default, heads, right) is NOTHING


def test_cublaslt_had_a_workspace_per_call() -> None:
    old = Target(compute_capability=(8, 0), multiprocessors=108, torch_version=(2, 6))
    left, right = empty(16, 32), empty(32, 64)
    assert take(aten.addmm.default, empty(64), left, right, card=old).after == (2**20,)
    assert take(aten.addmm.default, empty(64), left, right, beta=0.5, card=old) is NOTHING
    assert take(aten.addmm.default, empty(16, 64), left, right, card=old) is NOTHING
    assert take(aten.mm.default, left, right, card=old) is NOTHING


@pytest.mark.parametrize(
    ("card", "version", "cublas", "cublaslt"),
    [
        ((8, 9), (2, 6), 8_519_680, 0),
        ((8, 9), (2, 11), 8_519_680, 2**20),  # the first is recorded
        ((8, 9), (2, 13), 8_519_680, 0),
        ((9, 0), (2, 6), 2**25, 0),
        ((12, 0), (2, 11), 8_519_680, 2**20),
        ((12, 0), (2, 13), 2**25, 0),
    ],
)
def test_workspaces(
    card: tuple[int, int], version: tuple[int, int], cublas: int, cublaslt: int
) -> None:
    """cuda/CublasHandlePool.cpp."""
    target = Target(compute_capability=card, multiprocessors=60, torch_version=version)
    assert (workspace_bytes(target), lt_workspace_bytes(target)) == (cublas, cublaslt)


def test_a_configured_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(compute_capability=(8, 9), multiprocessors=60)
    for setting, size in ((":4096:8", 32 * 2**20), (":16:8", 2**17), (":4096:2:16:8", 8_519_680)):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", setting)
        assert workspace_bytes(target) == size


# Reductions


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sum_over_rows_recorded(dtype: torch.dtype) -> None:
    """cuda/Reduce.cuh: 8 blocks of 4 x 32 threads with 4 columns each, rows in 64 parts."""
    taken = take(aten.sum.dim_IntList, empty(4, 1024, 1024, dtype=dtype), [0, 1], card=A100)
    assert taken == Scratch((), (4 * 1024 * 64 * (32 * 4), 8 * 4, ~1, ~0))
    assert take(aten.sum.dim_IntList, empty(4, 128, 1024, dtype=dtype), [0, 1]) is NOTHING


def test_gradient_of_a_bias() -> None:
    """60 multiprocessors hold 720 blocks of 128 threads; 6 cover the columns, so 120 parts."""
    taken = take(aten.sum.dim_IntList, empty(8192, 768), [0], True)
    assert taken.after[:2] == (4 * 768 * 120 * (32 * 4), 6 * 4)
    wide = take(aten.sum.dim_IntList, empty(8192, 3072), [0], True)
    assert wide.after[:2] == (4 * 3072 * 30 * (32 * 4), 24 * 4)


def test_sum_of_everything() -> None:
    """512 threads read 4 numbers at once; a part is at most 256 loads per thread long."""
    count = 50257 * 768
    taken = take(aten.sum.default, empty(50257, 768))
    assert taken.after[:2] == (-(-count // 512 // 256) * 4, 4)
    assert take(aten.sum.default, empty(4096)) is NOTHING
    assert take(aten.sum.default, empty()) is NOTHING


def test_sum_along_rows_needs_no_staging() -> None:
    assert take(aten.sum.dim_IntList, empty(8192, 768), [1]) is NOTHING
    assert take(aten.mean.dim, empty(8, 1024, 768), [-1], True) is NOTHING


def test_layout_counts_not_the_order_of_dimensions() -> None:
    """TensorIterator.cpp sorts dimensions by stride before Reduce.cuh looks at them."""
    rows = take(aten.sum.dim_IntList, empty(8192, 768), [0])
    turned = take(aten.sum.dim_IntList, empty(8192, 768).t(), [1])
    assert rows == turned


def test_odd_columns_are_taken_one_by_one() -> None:
    """get_output_vec_size: 50257 columns of a tensor that starts at an odd place."""
    taken = take(aten.sum.dim_IntList, empty(8192, 1001), [0])
    places = 32  # no vector of columns
    grid, wanted = -(-1001 // 32), 60 * 3
    parts = -(-wanted // grid)
    assert taken.after[:2] == (4 * 1001 * parts * places, 4 * grid)


def test_sum_of_another_dtype_converts_first() -> None:
    """ReduceOpsUtils.h, make_reduction_from_out_ty: all but 16 bits to fp32."""
    counted = take(aten.sum.default, empty(4, 8, dtype=torch.bool))
    assert counted.after == (32 * 8,)
    assert take(aten.sum.dim_IntList, empty(4, 8, dtype=BF16), [0], dtype=F32) is NOTHING
    assert take(aten.sum.dim_IntList, empty(4, 8), [0], dtype=torch.float64).after == (32 * 8,)


def test_sum_beyond_32_bits_is_done_in_pieces() -> None:
    """Reduce.cuh, AccumulationBuffer: 16-bit results of pieces meet in fp32."""
    taken = take(aten.sum.dim_IntList, empty(2**21, 1024, dtype=BF16), [0])
    assert taken.after[0] == 1024 * 4
    assert len([size for size in taken.after if size > 0]) == 1 + 2 * 2
    plain = take(aten.sum.dim_IntList, empty(2**20, 1024), [0])
    assert len([size for size in plain.after if size > 0]) == 2 * 2


@pytest.mark.parametrize(
    ("op", "entry"),
    [
        (aten.amax.default, 2),  # in the dtype of the input
        (aten.linalg_vector_norm.default, 4),
        (aten.mean.default, 4),
        (aten.max.default, 2),
        (aten.argmax.default, 16),  # a value and a position
        (aten.any.default, 1),
        (aten.var.correction, 16),  # mean, squares and counts
    ],
)
def test_bytes_of_an_accumulator(op: Any, entry: int) -> None:
    """2048 loads of 512 threads are split in parts of 16."""
    taken = take(op, empty(2**20, dtype=BF16))
    assert taken.after == (128 * entry, 4, ~1, ~0)


def test_maximum_along_a_dimension_finds_positions() -> None:
    full = take(aten.max.dim, empty(8192, 64), 0)
    plain = take(aten.amax.default, empty(8192, 64), [0])
    assert full.after[0] == 4 * plain.after[0]
    assert take(aten.max.dim, empty(64, 64), 0) is NOTHING


def test_log_sum_exp() -> None:
    """ReduceOps.cpp: maxima, their absolute values and which are infinite, exp(self - maxima)."""
    taken = take(aten.logsumexp.default, empty(8, 50257), [-1])
    assert taken == Scratch((), (32, 32, 8, ~2, ~1, 8 * 50257 * 4))


def test_foreach_norm() -> None:
    """cuda/ForeachReduceOp.cu: as many places per tensor as the largest one has chunks."""
    tensors = [empty(50257, 768, dtype=BF16), empty(768, dtype=BF16)]
    assert take(aten._foreach_norm.Scalar, tensors).before == (2 * 589 * 4,)


# Softmax, norms, copies


def test_softmax_backward_keeps_a_product() -> None:
    """cuda/SoftMax.cu, softmax_backward_cuda_out."""
    grad = empty(2, 12, 64, 64, dtype=BF16)
    op = aten._softmax_backward_data.default
    assert take(op, grad, grad, -1, BF16) == Scratch((), (2 * 12 * 64 * 64 * 2,))
    turned = grad.transpose(1, 2)
    assert len(take(op, turned, turned, -1, BF16).after) == 3
    assert take(aten._log_softmax_backward_data.default, grad, grad, -1, BF16) is NOTHING


def test_softmax_copies_what_is_not_contiguous() -> None:
    assert take(aten._softmax.default, empty(8, 4), -1, False) is NOTHING
    assert take(aten._log_softmax.default, empty(8, 4).t(), -1, False).after == (128,)


def test_safe_softmax() -> None:
    """transformers/attention.cpp: one byte per element, one per row, and a zero."""
    assert take(aten._safe_softmax.default, empty(2, 8, 16), -1).after == (256, 16, 4)


def test_layer_norm() -> None:
    """cuda/layer_norm_kernel.cu."""
    tensor, weight = empty(8, 1024, 768), empty(768)
    op = aten.native_layer_norm.default
    assert take(op, tensor, [768], weight, weight, 1e-5) is NOTHING
    turned = tensor.transpose(0, 1)
    assert take(op, turned, [768], weight, weight, 1e-5).before == (8 * 1024 * 768 * 4,)


def norm_backward(rows: int, columns: int, card: Target) -> Scratch:
    tensor, weight, mean = empty(rows, columns), empty(columns), empty(rows, 1)
    arguments = (tensor, tensor, [columns], mean, mean, weight, weight, [True, True, True])
    return take(aten.native_layer_norm_backward.default, *arguments, card=card)


def test_layer_norm_backward_of_many_rows() -> None:
    """Above 65536 rows, if 32 columns a block leave half of the card idle: 1024 parts of rows."""
    assert norm_backward(8192, 768, RTX_4070_TI) is NOTHING
    assert norm_backward(2**17, 768, RTX_4070_TI).after == (1365 * 768 * 4,) * 2
    small = Target(compute_capability=(8, 6), multiprocessors=28)
    assert norm_backward(2**17, 768, small) is NOTHING


def test_group_norm() -> None:
    """cuda/group_norm_kernel.cu: two numbers per channel, and on the way back three and two."""
    tensor, weight = empty(4, 8, 5), empty(8)
    forward = take(aten.native_group_norm.default, tensor, weight, weight, 4, 8, 5, 2, 1e-5)
    assert forward.after == (4 * 8 * 4,) * 2
    mean = empty(4, 2)
    backward = take(
        aten.native_group_norm_backward.default,
        *(tensor, tensor, mean, mean, weight, 4, 8, 5, 2, [True, True, True]),
    )
    assert backward.after == (128, 128, 128, 32, 32)


def test_cumulative_sums() -> None:
    """ReduceOps.cpp converts first; cuda/ScanUtils.cuh leaves one dimension to cub."""
    assert take(aten.cumsum.default, empty(4, 8), 1) is NOTHING
    assert take(aten.cumsum.default, empty(4, 8, dtype=torch.bool), 1).after == (32 * 8,)
    assert take(aten.cumsum.default, empty(8, 4).t(), 1).after == (32 * 4,)
    alone = take(aten.cumsum.default, empty(1000, dtype=I64), 0)
    assert alone.after == ((2 + 32) * 16 + 224 + 255, ~0)


def test_where_converts_operands() -> None:
    """TensorCompare.cpp, where_self_out."""
    condition = empty(4, 8, dtype=torch.bool)
    assert take(aten.where.self, condition, empty(4, 8), empty(4, 8)) is NOTHING
    taken = take(aten.where.self, condition, empty(4, 8, dtype=BF16), empty(4, 8))
    assert taken.after == (32 * 4,)


def test_copies_between_devices() -> None:
    """cuda/Copy.cu: rows that are not contiguous, or another dtype, go through a copy."""
    here, there = empty(4, 8, device="cpu"), empty(4, 8)
    assert take(aten.copy_.default, there, here) is NOTHING
    assert take(aten.copy_.default, there, here.to(F16)) is NOTHING
    assert take(aten.copy_.default, empty(8, 4).t(), here).after == (128,)
    assert scratch(aten.copy_.default, (here, empty(8, 4).t()), {}, [here], A100).after == (128,)
    halved = (here.to(F16), there, True)
    assert scratch(aten.copy_.default, halved, {}, [halved[0]], A100).after == (64,)
    assert take(aten.copy_.default, there, empty(8, 4).t()) is NOTHING
    assert take(aten._to_copy.default, there, dtype=F16) is NOTHING


# Outputs


def test_random_state_of_flash_attention_is_on_the_card() -> None:
    sizes = output_bytes(aten._scaled_dot_product_flash_attention.default)
    assert sizes == {6: 16, 7: 8, 8: 0}
    assert output_bytes(aten.mm.default) == {}


def test_dropout_makes_its_mask_first() -> None:
    assert output_order(aten.native_dropout.default) == (1, 0)
    assert output_order(aten.mm.default) == ()
