"""The loss against torch's and transformers' own, and that it never makes all the logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_gpt2, make_llama, save
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    PreTrainedModel,
)
from transformers.activations import NewGELUActivation

from lowvram import loss as module
from lowvram.adapters import plain_model
from lowvram.build import build
from lowvram.loss import IGNORED, head_is_plain, token_loss
from lowvram.model import fuse_gelu

VOCABULARY = 61


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda rows: monkeypatch.setattr(module, "chunk_rows", lambda vocabulary, all_rows: rows)


class HeadOnly(nn.Module):
    """A causal language model whose hidden states are given: b 3, s 9, d 16."""

    def __init__(
        self, *, bias: bool, vocabulary: int = VOCABULARY, shape: Any = (3, 9, 16)
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(shape[-1], vocabulary, bias=bias)
        self.hidden = nn.Parameter(2 * torch.randn(*shape))
        if bias:
            nn.init.normal_(self.head.bias)

    def base_model(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def rows(self) -> torch.Tensor:
        return self.hidden[:, :-1].reshape(-1, self.hidden.shape[-1])

    def gradients(self) -> list[torch.Tensor]:
        found = [p.grad for p in (self.hidden, self.head.weight, self.head.bias) if p is not None]
        assert all(gradient is not None for gradient in found)
        self.zero_grad()
        return [gradient for gradient in found if gradient is not None]


def make_labels(b: int = 3, s: int = 9, *, vocabulary: int = VOCABULARY, ignored: bool) -> Any:
    labels = torch.randint(0, vocabulary, (b, s), generator=torch.Generator().manual_seed(5))
    if ignored:
        labels[0, 3:6] = labels[1, 1:] = labels[2, -1] = IGNORED
    return labels


def count(labels: torch.Tensor) -> int:
    return int((labels[:, 1:] != IGNORED).sum())


def loss_of(model: Any, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    ids = labels.clamp(min=0)
    return token_loss(model, ids, labels, None, target_tokens=count(labels), **options)


def assert_near(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float) -> None:
    """Each within `tolerance` of its largest element."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("rows", [1, 5, 8, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_chunked_loss_is_cross_entropy(
    rows: int, bias: bool, ignored: bool, smoothing: float, chunks_of: Callable[[int], None]
) -> None:
    """Loss to 1e-6 and gradients to 1e-5, relative, whatever the size of the chunks."""
    chunks_of(rows)
    model, labels = HeadOnly(bias=bias), make_labels(ignored=ignored)
    found = loss_of(model, labels, label_smoothing=smoothing)
    (0.3 * found).backward()
    gradients = model.gradients()

    logits = F.linear(model.rows(), model.head.weight, model.head.bias)
    targets = labels[:, 1:].reshape(-1)
    wanted = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    (0.3 * wanted).backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert_near(gradients, model.gradients(), 1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_chunked_loss_is_torchs_chunked_loss(bias: bool, chunks_of: Callable[[int], None]) -> None:
    chunks_of(7)
    model, labels = HeadOnly(bias=bias), make_labels(ignored=True)
    found = loss_of(model, labels)
    found.backward()
    gradients = model.gradients()

    wanted = F.linear_cross_entropy(
        model.rows(),
        model.head.weight,
        labels[:, 1:].reshape(-1),
        linear_bias=model.head.bias,
        reduction="sum",
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=8),
    )
    wanted.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert_near(gradients, model.gradients(), 1e-5)


def test_frozen_weights_get_no_gradient() -> None:
    model, labels = HeadOnly(bias=True), make_labels(ignored=True)
    model.head.requires_grad_(False)
    loss_of(model, labels).backward()
    assert model.hidden.grad is not None
    assert model.head.weight.grad is model.head.bias.grad is None
    with torch.no_grad():
        assert not loss_of(model, labels).requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_no_worse_than_the_full_logits(
    precision: torch.dtype, smoothing: float, chunks_of: Callable[[int], None]
) -> None:
    """512 tokens, a third of them with one target, in 64 chunks.

    Measured as the distance to fp32, relative to the largest element: at most twice that of
    F.cross_entropy on autocast's logits, which is about 1e-2 (bf16) and 1e-3 (fp16).
    """
    chunks_of(8)
    model = HeadOnly(bias=True, shape=(4, 129, 16))
    labels = make_labels(4, 129, ignored=False)
    labels[torch.rand(4, 129, generator=torch.Generator().manual_seed(1)) < 0.33] = 7
    targets = labels[:, 1:].reshape(-1)

    def full(dtype: torch.dtype) -> tuple[float, list[torch.Tensor]]:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logits = F.linear(model.rows(), model.head.weight, model.head.bias).float()
            loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        (loss / len(targets)).backward()
        return loss.item(), model.gradients()

    exact, exact_gradients = full(torch.float32)
    theirs, their_gradients = full(precision)
    with torch.autocast("cpu", dtype=precision):
        found = loss_of(model, labels, label_smoothing=smoothing)
    (found / len(targets)).backward()
    assert found.dtype == torch.float32
    # With smoothing, theirs takes the mean over the vocabulary of rounded logits.
    assert found.item() == pytest.approx(theirs, rel=1e-4 if smoothing else 1e-5)
    assert found.item() == pytest.approx(exact, rel=1e-3)
    for ours, their, true in zip(model.gradients(), their_gradients, exact_gradients, strict=True):
        allowed = 2 * (their - true).abs().max() + 1e-4 * true.abs().max()
        assert (ours - true).abs().max() <= allowed


def test_a_sum_over_many_tokens_does_not_overflow_fp16(chunks_of: Callable[[int], None]) -> None:
    """The gradient of the mean is small, that of the sum is above 65504: 900 tokens times 100."""
    chunks_of(16)
    model = HeadOnly(bias=True, shape=(1, 901, 16))
    with torch.no_grad():
        model.hidden[..., 0] = 100.0
        model.head.weight[:, 0] = 0.0
    labels = torch.full((1, 901), 7)
    with torch.autocast("cpu", dtype=torch.float16):
        (loss_of(model, labels) / 900).backward()
    gradients = model.gradients()
    F.cross_entropy(
        F.linear(model.rows(), model.head.weight, model.head.bias), labels[0, 1:]
    ).backward()
    assert_near(gradients, model.gradients(), 2e-3)


def test_the_sum_comes_back_in_fp32(chunks_of: Callable[[int], None]) -> None:
    """About 5,000 nats: bf16 knows no number between 4,992 and 5,024."""
    chunks_of(100)
    model, labels = HeadOnly(bias=False, shape=(1, 901, 16)), make_labels(1, 901, ignored=False)
    model.bfloat16()
    found = loss_of(model, labels)
    logits = F.linear(model.rows(), model.head.weight).float()
    wanted = F.cross_entropy(logits, labels[0, 1:], reduction="sum")
    assert found.dtype == torch.float32
    assert abs(wanted.item() - wanted.bfloat16().item()) > 1
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


class Widest(TorchDispatchMode):
    """Rows of the largest tensor that is as wide as the vocabulary, the model's own aside."""

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.rows = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(tensor, torch.Tensor) or tensor.shape[-1:] != (self.vocabulary,):
                continue
            if tensor.untyped_storage().data_ptr() not in self.own:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("trained", ["adapter-like", "everything"])
def test_no_more_logits_than_a_chunk_are_made(
    smoothing: float, trained: str, chunks_of: Callable[[int], None]
) -> None:
    chunks_of(6)
    model = make_gpt2(vocab_size=397)
    if trained == "adapter-like":
        model.requires_grad_(False)
        model.transformer.h[0].attn.c_attn.requires_grad_(True)
    labels = make_labels(4, 16, vocabulary=397, ignored=False)
    with Widest(model, 397) as widest:
        loss_of(model, labels, label_smoothing=smoothing).backward()
    assert widest.rows == 6
    with Widest(model, 397) as widest:
        loss_of(model, labels, label_smoothing=smoothing, chunked=False).backward()
    assert widest.rows >= 60


def test_chunks_are_sized_by_the_vocabulary() -> None:
    """128 MiB of fp32 logits at most, even chunks, never less than 16 rows."""
    assert module.chunk_rows(50257, 2044) == 512  # four times 511 rather than three times 640 + 124
    assert module.chunk_rows(50257, 32 * 1022) == 640
    assert module.chunk_rows(50257, 100) == 128
    assert module.chunk_rows(10**9, 2044) == 16


def gptj() -> PreTrainedModel:
    """Its output head has a bias."""
    torch.manual_seed(3)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64}
    model = GPTJForCausalLM(GPTJConfig(vocab_size=97, initializer_range=0.3, **sizes))
    nn.init.normal_(model.lm_head.bias)
    return model.eval()


def llama_sizes() -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return {**sizes, **heads, **tokens, "initializer_range": 0.3}


def gemma2() -> PreTrainedModel:
    """Caps its logits at 2 with a tanh."""
    torch.manual_seed(4)
    config = Gemma2Config(**llama_sizes(), head_dim=8, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config).eval()


def cohere() -> PreTrainedModel:
    """Multiplies its logits by 1/16."""
    torch.manual_seed(4)
    return CohereForCausalLM(CohereConfig(**llama_sizes(), logit_scale=0.0625)).eval()


@pytest.mark.parametrize("make", [make_gpt2, make_llama, gptj])
def test_whole_models_have_the_loss_and_gradients_of_transformers(
    make: Callable[[], PreTrainedModel], chunks_of: Callable[[int], None]
) -> None:
    """Every weight is trained, a tied one through both of its uses; 1e-6 and 1e-5."""
    chunks_of(5)
    model = make()
    labels = make_labels(3, 9, ignored=True)
    found = loss_of(model, labels)
    found.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    wanted = model(labels.clamp(min=0), labels=labels, num_items_in_batch=1).loss
    wanted.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        gradient = gradients[name]
        assert gradient is not None, name
        assert parameter.grad is not None, name
        assert_near([gradient], [parameter.grad], 1e-5)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["fp32", "same"])
def test_under_autocast_it_is_transformers_loss(
    precision: torch.dtype, base: str, chunks_of: Callable[[int], None]
) -> None:
    """The same 16-bit logits raised to fp32, so the loss agrees to 1e-5; gradients to 2 %."""
    chunks_of(5)
    model = make_gpt2().to(torch.float32 if base == "fp32" else precision).requires_grad_(False)
    adapted = model.transformer.h[0].attn.c_proj.float().requires_grad_(True)
    labels = make_labels(3, 9, ignored=True)
    with torch.autocast("cpu", dtype=precision):
        found = loss_of(model, labels)
    found.backward()
    gradient = adapted.weight.grad
    assert gradient is not None
    adapted.weight.grad = None
    with torch.autocast("cpu", dtype=precision):
        wanted = model(labels.clamp(min=0), labels=labels, num_items_in_batch=1).loss
    wanted.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert_near([gradient], [adapted.weight.grad], 2e-2)


@pytest.mark.parametrize("make", [make_gpt2, make_llama, gemma2])
def test_unchunked_is_transformers_loss_to_the_bit(make: Callable[[], PreTrainedModel]) -> None:
    model, labels = make(), make_labels(3, 9, ignored=True)
    tokens = count(labels)
    found = loss_of(model, labels, chunked=False) / tokens
    found.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    wanted = model(labels.clamp(min=0), labels=labels, num_items_in_batch=tokens).loss
    wanted.backward()
    assert torch.equal(found, wanted)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.equal(gradient, parameter.grad)


def test_unchunked_label_smoothing_is_torchs() -> None:
    model, labels = gemma2(), make_labels(3, 9, ignored=True)
    found = loss_of(model, labels, chunked=False, label_smoothing=0.1)
    logits = model(labels.clamp(min=0)).logits[:, :-1].reshape(-1, 300)
    wanted = F.cross_entropy(
        logits, labels[:, 1:].reshape(-1), reduction="sum", label_smoothing=0.1
    )
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_a_head_is_plain_or_not() -> None:
    for make, plain in [
        (make_gpt2, True),
        (make_llama, True),
        (gptj, True),
        (gemma2, False),
        (cohere, False),
    ]:
        assert head_is_plain(make()) is plain, make.__name__
        assert head_is_plain(make().bfloat16()) is plain, make.__name__


def with_dropout() -> PreTrainedModel:
    return make_gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)


@pytest.mark.parametrize(
    ("make", "chunked"), [(gemma2, False), (make_llama, True), (with_dropout, True)]
)
def test_build_falls_back_to_the_models_own_loss(
    make: Callable[[], PreTrainedModel], chunked: bool, make_recipe: Any, tmp_path: Path
) -> None:
    directory = save(make(), tmp_path / "model")
    settings = {"model.name": str(directory), "model.attention": "eager", "method.dropout": 0.5}
    assert build(make_recipe(**settings), total_steps=3).chunked_loss is chunked


def test_it_is_differentiated_once_only() -> None:
    model, labels = HeadOnly(bias=False), make_labels(ignored=True)
    loss = loss_of(model, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="^the chunked loss can be differentiated once only$"):
        loss.backward()

    factor = torch.tensor(2.0, requires_grad=True)
    loss = loss_of(model, labels) * factor
    (gradient,) = torch.autograd.grad(loss, model.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient * model.hidden).sum().backward()


def test_the_fused_gelu_is_gelu_new() -> None:
    """Values to 1e-6 and derivatives to 2e-6 between -12 and 12."""
    fused = make_gpt2()
    assert fuse_gelu(fused) == 2
    assert fuse_gelu(fused) == 0
    x = torch.linspace(-12, 12, 4801, requires_grad=True)
    (gradient,) = torch.autograd.grad(fused.transformer.h[0].mlp.act(x).sum(), x)
    (wanted,) = torch.autograd.grad(NewGELUActivation()(x).sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        fused.transformer.h[0].mlp.act(x), NewGELUActivation()(x), rtol=0, atol=1e-6
    )


def test_with_both_off_the_forward_pass_is_hugging_faces(make_recipe: Any, gpt2_dir: Path) -> None:
    """A fresh adapter adds nothing, so logits and loss are the base's to the bit."""
    plain = {"model.attention": "sdpa", "model.fused_gelu": False, "train.chunked_loss": False}
    recipe = make_recipe(**plain, **{"method.folded": False})
    state = build(recipe, total_steps=3)
    reference = AutoModelForCausalLM.from_pretrained(gpt2_dir, dtype=torch.float32)
    labels = make_labels(3, 9, ignored=True)
    ids = labels.clamp(min=0)
    assert torch.equal(state.model(ids).logits, reference(ids).logits)
    found = loss_of(plain_model(state.model), labels, chunked=state.chunked_loss)
    assert state.chunked_loss is False
    assert torch.equal(found, reference(ids, labels=labels, num_items_in_batch=1).loss)

    fused = build(make_recipe(), total_steps=3)
    activations = [m for m in fused.model.modules() if isinstance(m, nn.GELU)]
    assert [m.approximate for m in activations] == ["tanh", "tanh"]
    torch.testing.assert_close(fused.model(ids).logits, reference(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 50257), (3, 4097), (700, 13)])
def test_softmax_in_place_is_softmax(shape: tuple[int, int]) -> None:
    """To the bit, for rows shorter and longer than a vector, a block and a cache."""
    torch.manual_seed(0)
    logits = 30 * torch.randn(shape)
    expected = torch.log_softmax(logits, 1)
    found = module.log_softmax(logits)
    assert found.data_ptr() == logits.data_ptr()
    assert torch.equal(found, expected)
