"""Large tensors are computed in parts on the CPU: the same numbers, in less memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backbones.archs import FAMILIES
from torch import nn
from torch.nn.utils import prune

from hat_mm.layers import (
    ConvBlock,
    ConvStem,
    EvalCache,
    InvertedResidual,
    LayerNorm2d,
    RelativePositionBias,
    RelativePositionTable,
    SelfAttention,
    attention,
    common,
    contiguous_norm,
    convs,
    position,
)

SIDES = st.integers(1, 70)


@pytest.fixture(params=[300, 2000])
def parts(request, monkeypatch):
    """Lets a cache hold next to nothing; the numbers of parts that were made since."""
    made = []
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    monkeypatch.setattr(common, '_CACHED', request.param)
    num_parts = common.num_parts

    def count(elements):
        made.append(num_parts(elements))
        return made[-1]

    for module in (common, convs, attention):
        monkeypatch.setattr(module, 'num_parts', count)
    return made


def assert_parts_equal_the_whole(module, x):
    whole = module(x)
    with torch.no_grad():
        split = module(x)
    for a, b in zip(*((m if isinstance(m, tuple) else (m,)) for m in (split, whole)), strict=True):
        assert a.shape == b.shape
        assert not a.requires_grad
        assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize('name', FAMILIES)
def test_backbones(name, parts):
    torch.manual_seed(0)
    backbone = FAMILIES[name].backbone(FAMILIES[name].tiny()).eval().double()
    for size in [(64, 64), (97, 33), (5, 130)]:
        assert_parts_equal_the_whole(backbone, torch.randn(2, 3, *size, dtype=torch.float64))
    assert max(parts) > 1


def batch_norm(dim, eps):
    norm = nn.BatchNorm2d(dim, eps)
    norm.running_mean.normal_()
    return norm


STEM = ConvStem(3, 4, 6, batch_norm).eval().double()
RESIDUALS = {
    kernel: InvertedResidual(4, 3, kernel, batch_norm).eval().double() for kernel in (1, 3, 5, 7)
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES, batch=st.integers(1, 2), held=st.integers(1, 3000))
def test_stem_by_strips_of_rows(height, width, batch, held):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, '_CACHED', held)
        assert_parts_equal_the_whole(
            STEM, torch.randn(batch, 3, height, width, dtype=torch.float64)
        )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES, kernel=st.sampled_from([*RESIDUALS]), held=st.integers(1, 3000))
def test_inverted_residual_by_strips_of_rows(height, width, kernel, held):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, '_CACHED', held)
        assert_parts_equal_the_whole(
            RESIDUALS[kernel], torch.randn(1, 4, height, width, dtype=torch.float64)
        )


BLOCK = ConvBlock(4, 0.5, batch_norm).eval().double()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES, batch=st.integers(1, 2), held=st.integers(1, 3000))
def test_conv_block_by_strips_of_rows(height, width, batch, held):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, '_CACHED', held)
        assert_parts_equal_the_whole(
            BLOCK, torch.randn(batch, 4, height, width, dtype=torch.float64)
        )


def test_conv_block_in_training_mode_drops_whole_images(parts):
    block = ConvBlock(4, 0.5, batch_norm).double().train()
    block.norm1.eval()
    block.norm2.eval()
    x = torch.randn(16, 4, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        dropped = (block(x) == x).flatten(1)
    assert torch.equal(dropped.any(1), dropped.all(1))
    assert dropped.any()
    assert not dropped.all()


def test_conv_block_under_autocast(parts):
    block = ConvBlock(4, 0.0, batch_norm).eval()
    x = torch.randn(1, 4, 40, 40)
    with torch.autocast('cpu', torch.bfloat16):
        whole = block(x)
        with torch.no_grad():
            split = block(x)
    assert split.dtype == whole.dtype == torch.float32
    torch.testing.assert_close(split, whole, rtol=0.02, atol=0.02)


NORMS = [None, nn.Identity(), batch_norm(4, 1e-5).eval(), LayerNorm2d(4), nn.GroupNorm(2, 4)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    norm=st.sampled_from(NORMS),
    height=SIDES,
    width=SIDES,
    held=st.integers(1, 3000),
    last=st.booleans(),
)
def test_norm_of_a_returned_map(norm, height, width, held, last):
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 4, height, width).contiguous(memory_format=layout)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(common, '_CACHED', held)
        y = contiguous_norm(norm, x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, x if norm is None else norm(x))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(a=st.integers(1, 9), b=st.integers(1, 9), batch=st.integers(1, 2), held=st.integers(1, 500))
def test_attention_by_rows_of_queries(a, b, batch, held):
    torch.manual_seed(0)
    layer = SelfAttention(8, 2, RelativePositionBias(2)).eval().double()
    x = torch.randn(batch, a * b, 8, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, '_CACHED', held)
        assert_parts_equal_the_whole(lambda x: layer(x, (a, b)), x)


def attention_of_windows(cache, prefix=0):
    """Attention in windows of 6x6 tokens behind a prefix, and tokens of three of them."""
    torch.manual_seed(0)
    table = RelativePositionTable(2, 6, prefix, cache)
    layer = SelfAttention(8, 2, table).eval().double()
    return layer, torch.randn(3, prefix + 36, 8, dtype=torch.float64)


def test_attention_by_rows_keeps_no_number_for_each_pair(parts):
    cache = EvalCache()
    layer, x = attention_of_windows(cache)
    assert_parts_equal_the_whole(lambda x: layer(x, (6, 6)), x)
    assert max(parts) > 1
    assert 0 < cache.nbytes <= 8 * 2 * 11 * 11


def test_the_bias_of_tokens_behind_a_prefix_is_whole(parts):
    cache = EvalCache()
    layer, x = attention_of_windows(cache, prefix=4)
    assert_parts_equal_the_whole(lambda x: layer(x, (6, 6)), x)
    assert cache.nbytes == 8 * 2 * 40 * 40


def test_a_mask_needs_the_whole_bias(parts):
    layer, x = attention_of_windows(EvalCache())
    mask = torch.rand(3, 1, 36, 36) < 0.5
    mask |= torch.eye(36, dtype=torch.bool)
    assert_parts_equal_the_whole(lambda x: layer(x, (6, 6), mask), x)


@pytest.mark.parametrize('whole', [1, 10**6])
@pytest.mark.parametrize('held', [1, 10**6])
@pytest.mark.parametrize('prefix', [0, 4])
def test_fixed_bias(prefix, held, whole, monkeypatch):
    cache = EvalCache()
    layer, x = attention_of_windows(cache, prefix)
    monkeypatch.setattr(common, '_CACHED', held)
    monkeypatch.setattr(position, '_WHOLE', whole)
    with torch.no_grad():
        before = layer(x, (6, 6))
        layer.bias = layer.bias.fixed((6, 6))
        assert cache.nbytes == 0
        assert (layer(x, (6, 6)) - before).norm() <= 1e-9 * before.norm()
    assert not [*layer.bias.parameters()]
    if (prefix, held, whole) == (0, 1, 1):
        assert cache.nbytes == 8 * 2 * 11 * 11
    numbers = layer.bias.state_dict().popitem()[1].numel()
    assert numbers == 2 * (11 * 11 if whole == 1 and not prefix else (36 + prefix) ** 2)


def test_a_hook_on_the_bias_is_called(parts):
    layer, x = attention_of_windows(EvalCache())
    layer.bias.register_forward_hook(lambda module, args, bias: bias * 0)
    assert_parts_equal_the_whole(lambda x: layer(x, (6, 6)), x)


def test_a_bias_of_another_kind_is_called(parts, monkeypatch):
    class Doubled(RelativePositionTable):
        def _compute(self, a, b):
            return 2 * super()._compute(a, b)

    layer, x = attention_of_windows(EvalCache())
    layer.bias = Doubled(2, 6).eval().double()
    assert_parts_equal_the_whole(lambda x: layer(x, (6, 6)), x)
    monkeypatch.setattr(position, '_WHOLE', 1)
    with torch.no_grad():
        before = layer(x, (6, 6))
        layer.bias = layer.bias.fixed((6, 6))
        assert (layer(x, (6, 6)) - before).norm() <= 1e-9 * before.norm()


@pytest.mark.parametrize('name', FAMILIES)
def test_hooks_keep_what_a_module_returned(name, parts):
    torch.manual_seed(0)
    backbone = FAMILIES[name].backbone(FAMILIES[name].tiny()).eval().double()
    image = torch.randn(1, 3, 160, 160, dtype=torch.float64)

    def record():
        kept = {}
        hooks = [
            module.register_forward_hook(lambda m, i, out, n=name: kept.update({n: out}))
            for name, module in backbone.named_modules()
            if isinstance(module, nn.Conv2d | nn.modules.batchnorm._BatchNorm | ConvBlock)
        ]
        backbone(image)
        for hook in hooks:
            hook.remove()
        return kept

    whole = record()
    with torch.no_grad():
        predicted = record()
    assert predicted.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(predicted[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', FAMILIES)
def test_the_default_device_is_of_no_importance(name, parts):
    backbone = FAMILIES[name].backbone(FAMILIES[name].tiny()).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.device('meta'):
        maps = backbone(image)
    assert {m.device.type for m in maps} == {'cpu'}


CONVS = {
    'reflect': lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'),
    'dilated': lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    'same': lambda: nn.Conv2d(4, 4, 3, padding='same'),
    'identity': nn.Identity,
    'one row': lambda: nn.Conv2d(4, 4, (1, 3), padding=(0, 1), stride=1),
}


def test_a_stem_that_makes_patches(parts):
    stem = ConvStem(3, 4, 6, batch_norm)
    stem.conv1 = nn.Conv2d(3, 4, 4, stride=4)
    stem.eval().double()
    assert_parts_equal_the_whole(stem, torch.randn(1, 3, 42, 43, dtype=torch.float64))


def test_a_stem_with_one_more_module(parts):
    stem = ConvStem(3, 4, 6, batch_norm)
    stem.append(nn.Softplus())
    stem.eval().double()
    assert_parts_equal_the_whole(stem, torch.randn(1, 3, 40, 40, dtype=torch.float64))


def test_drop_path_that_is_left_on(parts):
    block = ConvBlock(4, 0.5, batch_norm).eval().double()
    block.drop_path.train()
    x = torch.randn(16, 4, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        dropped = (block(x) == x).flatten(1).all(1)
    assert dropped.any()
    assert not dropped.all()


@pytest.mark.parametrize('conv', CONVS)
def test_convolutions_that_strips_cannot_do(conv, parts):
    block = ConvBlock(4, 0.0, batch_norm)
    block.conv1 = CONVS[conv]()
    x = torch.randn(1, 4, 40, 40, dtype=torch.float64)
    assert_parts_equal_the_whole(block.eval().double(), x)


def test_a_stem_whose_norm_sees_the_map_is_not_split(parts):
    stem = ConvStem(3, 4, 6, lambda dim, eps: nn.GroupNorm(1, dim, eps)).eval().double()
    assert_parts_equal_the_whole(stem, torch.randn(1, 3, 40, 40, dtype=torch.float64))
    assert not parts


def test_gradients_and_traces_get_the_whole(parts):
    residual = RESIDUALS[3]
    residual(torch.randn(1, 4, 40, 40, dtype=torch.float64))
    with torch.no_grad():
        torch.jit.trace(residual, torch.randn(1, 4, 40, 40, dtype=torch.float64), check_trace=False)
    assert not parts


def test_hooks_see_whole_maps(parts):
    residual = InvertedResidual(4, 3, 3, batch_norm).eval().double()
    seen = []
    residual.conv2.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        residual(torch.randn(1, 4, 40, 30, dtype=torch.float64))
    assert seen == [(1, 12, 40, 30)]
    assert not parts


def test_weights_that_a_hook_makes():
    residual = InvertedResidual(4, 3, 3, batch_norm).eval().double()
    prune.identity(residual.conv1, 'weight')
    with torch.no_grad():
        residual.conv1.weight_orig.mul_(3)
    assert_parts_equal_the_whole(residual, torch.randn(1, 4, 40, 30, dtype=torch.float64))


@pytest.mark.parametrize('name', FAMILIES)
def test_export_with_a_dynamic_batch(name):
    backbone = FAMILIES[name].backbone(FAMILIES[name].tiny()).eval()
    batch = torch.export.Dim('batch', min=2, max=64)
    image = torch.randn(3, 3, 64, 64)
    exported = torch.export.export(
        backbone, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},), strict=False
    )
    for a, b in zip(exported.module()(image), backbone(image), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
