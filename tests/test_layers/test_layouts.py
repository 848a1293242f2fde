"""Memory layouts that a CPU computes fast with."""

import pytest
import torch

from hat_mm.layers import Downsample


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_maps_and_gradients_of_training_are_contiguous(layout):
    downsample = Downsample(4, 8)
    x = torch.randn(2, 4, 9, 7).contiguous(memory_format=layout).requires_grad_()
    strides = []
    before = x * 1
    before.register_hook(lambda gradient: strides.append(gradient.stride()))
    after = downsample(before)
    assert after.is_contiguous()
    after.square().sum().backward()
    if layout == torch.contiguous_format:
        assert strides == [(4 * 9 * 7, 9 * 7, 7, 1)]
    plain = torch.autograd.grad(
        downsample.conv(downsample.norm(x)).square().sum(), [x, *downsample.parameters()]
    )
    for a, b in zip([x, *downsample.parameters()], plain, strict=True):
        torch.testing.assert_close(a.grad, b, rtol=1e-4, atol=1e-4)


def test_maps_of_prediction_have_their_channels_last():
    with torch.no_grad():
        y = Downsample(4, 8)(torch.randn(2, 4, 9, 7))
    assert y.is_contiguous(memory_format=torch.channels_last)
