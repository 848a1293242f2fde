"""Memory layouts that a CPU computes fast with."""

import pytest
import torch

from hat_mm.backbones.fastervit import Downsample


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_down_samplers_keep_the_layout_of_maps_and_gradients(layout):
    downsample = Downsample(4, 8).to(memory_format=layout)
    x = torch.randn(2, 4, 9, 7).contiguous(memory_format=layout).requires_grad_()
    strides = []
    before = x * 1
    before.register_hook(lambda gradient: strides.append(gradient.stride()))
    after = downsample(before)
    assert after.is_contiguous(memory_format=layout)
    after.square().sum().backward()
    assert strides == [before.stride()]
    plain = torch.autograd.grad(
        downsample.conv(downsample.norm(x)).square().sum(), [x, *downsample.parameters()]
    )
    for a, b in zip([x, *downsample.parameters()], plain, strict=True):
        torch.testing.assert_close(a.grad, b, rtol=1e-4, atol=1e-4)
