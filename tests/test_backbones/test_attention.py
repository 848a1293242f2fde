"""Attention takes PyTorch's fused kernels: no tensor of all queries by all keys exists.

In training that holds for HAT-Net only: on a CPU, PyTorch has no fused kernel for FasterViT's
biases, which need a gradient.
"""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hat_mm
from hat_mm.layers import RelativePositionBias, RelativePositionTable, SelfAttention
from test_backbones.archs import FAMILIES

FUSED = 'aten._scaled_dot_product_flash_attention_for_cpu.default'
# What unfused attention would be made of.
UNFUSED = ('aten._softmax.default', 'aten._safe_softmax.default')


class Operators(TorchDispatchMode):
    """Counts the operators that run and the elements of the largest tensor that they return."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = collections.Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls[str(function)] += 1
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def run(backbone, image):
    with Operators() as operators:
        maps = backbone(image)
    return operators, maps


def attentions(backbone):
    """Attention calls of a forward pass: for HAT-Net one, or two with windows, for each block."""
    if isinstance(backbone, hat_mm.SwinHAT):
        exchanges = sum(backbone.depths[i] // 2 for i in backbone.spec.hat_stages)
        return sum(backbone.depths) + exchanges
    if isinstance(backbone, hat_mm.HATNet):
        grids, depths = backbone.spec.grids, backbone.depths
        return sum(depth * (1 + (grid > 1)) for depth, grid in zip(depths, grids, strict=True))
    carriers = sum(backbone.depths[i] for i in backbone.spec.carriers)
    return sum(backbone.depths[2:]) + carriers


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('size', [(192, 192), (100, 161), (1, 1), (4, 64)])
@pytest.mark.parametrize('batch', [1, 2])
def test_prediction_is_fused(family, layout, size, batch):
    family = FAMILIES[family]
    backbone = family.backbone(family.tiny()).eval()
    image = torch.randn(batch, 3, *size).contiguous(memory_format=layout)
    with torch.no_grad():
        operators, _ = run(backbone, image)
    assert operators.calls[FUSED] == attentions(backbone)
    assert not any(operators.calls[name] for name in UNFUSED)


@pytest.mark.parametrize('size', [(192, 192), (100, 161)])
def test_training_of_hat_net_is_fused(size):
    backbone = hat_mm.HATNet(FAMILIES['HATNet'].tiny()).train()
    operators, maps = run(backbone, torch.randn(2, 3, *size))
    assert operators.calls[FUSED] == attentions(backbone)
    assert not any(operators.calls[name] for name in UNFUSED)
    with Operators() as operators:
        sum(m.sum() for m in maps).backward()
    assert operators.calls[FUSED.replace('.default', '_backward.default')] == attentions(backbone)


def test_hat_net_makes_no_tensor_of_queries_by_keys():
    arch = FAMILIES['HATNet'].tiny(grids=(8, 7, 7, 1), ds_ratios=(8, 4, 2, 1))
    backbone = hat_mm.HATNet(arch).eval()
    largest = []
    for height, width in ((512, 512), (1024, 1024), (1000, 1044)):
        with torch.no_grad():
            operators, _ = run(backbone, torch.randn(1, 3, height, width))
        tokens = -(-height // 4) * -(-width // 4)
        # The stem's first map: 16 channels at four times the tokens.
        assert operators.largest <= 1.1 * 16 * 4 * tokens
        assert operators.largest < tokens * (tokens // 64) / 3
        largest.append(operators.largest)
    assert largest[1] == 4 * largest[0]


def test_many_tokens_attend_in_chunks_of_queries():
    # 66 million pairs, whose bias would take 262 MB.
    torch.manual_seed(0)
    grid_size, tokens = (90, 90), 8100
    layer = SelfAttention(4, 1, RelativePositionBias(1)).eval()
    x = torch.randn(1, tokens, 4)
    with torch.no_grad(), Operators() as operators:
        attended = layer(x, grid_size)
    assert operators.largest <= tokens**2 / 1.9
    some = torch.tensor([0, 1, 4049, 4050, 8099])
    with torch.no_grad():
        q, k, v = layer.qkv(x)[0].chunk(3, 1)
        bias = torch.cat([layer.bias(grid_size, slice(i, i + 1)) for i in some.tolist()], 1)[0]
        expected = layer.proj(torch.softmax(q[some] @ k.T / 2 + bias, 1) @ v)
    torch.testing.assert_close(attended[0, some], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('prefix', [0, 3])
@pytest.mark.parametrize('kind', ['mlp', 'table'])
def test_bias_of_some_queries(kind, prefix):
    bias = RelativePositionBias(2, prefix) if kind == 'mlp' else RelativePositionTable(2, 5, prefix)
    whole = bias((5, 5))
    for queries in (slice(0, 4), slice(2, 20), slice(25, None), slice(None)):
        assert torch.equal(bias((5, 5), queries), whole[:, queries])
    assert not whole[:, :prefix].any()
    assert not whole[:, :, :prefix].any()
