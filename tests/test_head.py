from itertools import product

import pytest
import torch
from torch import Tensor, nn

from orpo_distill import head
from orpo_distill.head import Logits, label_logps, pick


def expected_logps(hidden: Tensor, layer: nn.Linear, labels: Tensor, softcap: float | None) -> Tensor:
    logits = hidden.double() @ layer.weight.double().T
    if layer.bias is not None:
        logits = logits + layer.bias.double()
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return logits.log_softmax(-1)[torch.arange(len(labels)), labels]


def gradients(found: Tensor, *of: Tensor) -> list[Tensor]:
    """Gradients of a sum whose weights differ."""
    return list(torch.autograd.grad((found * torch.linspace(-1, 2, len(found))).sum(), of))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("count", "vocabulary"), [(1, 7), (64, 7), (65, 7), (200, 300_000)])
def test_same_as_full_logits(softcap: float | None, recompute: bool, count: int, vocabulary: int) -> None:
    """300,000 words make chunks of 64 positions."""
    torch.manual_seed(0)
    hidden, layer = torch.randn(count, 8, requires_grad=True), nn.Linear(8, vocabulary)
    labels = torch.randint(vocabulary, (count,))
    of = hidden, layer.weight, layer.bias
    found = label_logps(Logits(hidden, layer, softcap), labels, recompute)
    expected = expected_logps(hidden, layer, labels, softcap)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-5)
    for one, other in zip(gradients(found, *of), gradients(expected, *of), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def kept_bytes(vocabulary: int, count: int, recompute: bool) -> int:
    """Bytes that the backward pass keeps, but for parameters and input."""
    hidden, layer = torch.randn(count, 4, requires_grad=True), nn.Linear(4, vocabulary, bias=False)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        label_logps(Logits(hidden, layer), torch.zeros(count, dtype=torch.long), recompute)
    for own in (hidden, layer.weight):
        kept.pop(own.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def test_logits_are_kept_only_where_they_may_be() -> None:
    logits = 200 * 5_000 * 4
    assert kept_bytes(5_000, 200, recompute=False) >= logits
    assert kept_bytes(5_000, 200, recompute=True) < logits / 50
    count = head.KEPT // (5_000 * 4)
    assert kept_bytes(5_000, count + 1, recompute=False) < head.KEPT / 50


def test_bfloat16_logits_are_summed_in_float32() -> None:
    """The exact log-softmax of the very logits that the layer gives."""
    torch.manual_seed(0)
    hidden, layer = torch.randn(70, 8, dtype=torch.bfloat16), nn.Linear(8, 5_000, bias=False, dtype=torch.bfloat16)
    labels = torch.randint(5_000, (70,))
    expected = layer(hidden).double().log_softmax(-1)[torch.arange(70), labels]
    assert torch.allclose(label_logps(Logits(hidden, layer), labels).double(), expected, atol=1e-5)


@pytest.mark.parametrize(("dtype", "count"), list(product([torch.float32, torch.bfloat16], [1, 64, 130])))
def test_pick(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(count, 50) * 5).to(dtype).requires_grad_()
    labels = torch.randint(50, (count,))
    found = pick(logits, labels)
    expected = logits.double().log_softmax(-1)[torch.arange(count), labels]
    assert torch.allclose(found.double(), expected, atol=1e-5)
    (one,), (other,) = gradients(found, logits), gradients(expected, logits)
    assert torch.allclose(one, other, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def test_pick_is_finite_at_certainty() -> None:
    logits = torch.tensor([[300.0, -300.0, 0.0], [-1e4, 0.0, 1e4]], requires_grad=True)
    found = pick(logits, torch.tensor([0, 0]))
    assert found.tolist() == [0.0, -2e4]
    assert torch.autograd.grad(found.sum(), logits)[0].tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]
