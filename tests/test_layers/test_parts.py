"""Large tensors are computed in parts on the CPU: the same numbers, in less memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backbones.archs import FAMILIES
from torch import nn
from torch.nn.utils import prune

from hat_mm.layers import ConvStem, InvertedResidual, common, convs

SIDES = st.integers(1, 70)


@pytest.fixture(params=[300, 2000])
def parts(request, monkeypatch):
    """Lets a cache hold next to nothing; the numbers of parts that were made since."""
    made = []
    monkeypatch.setattr(common, '_CACHED', request.param)
    num_parts = common.num_parts

    def count(elements):
        made.append(num_parts(elements))
        return made[-1]

    monkeypatch.setattr(common, 'num_parts', count)
    monkeypatch.setattr(convs, 'num_parts', count)
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
