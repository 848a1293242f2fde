"""Any height and width: against a plainly written second implementation, and at odd sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hat_mm
from hat_mm.layers import average_windows
from test_backbones.archs import FAMILIES, tiny

# Sizes small enough for loops, large enough for several windows on an axis of stage 2.
SIZES = st.one_of(st.integers(1, 40), st.integers(41, 150))
VARIANTS = {
    'carriers': ('FasterViT', {}),
    'propagate': ('FasterViT', dict(propagate=True, layer_scale=0.5, window_size=(7, 7, 3, 2))),
    'three-carriers': (
        'FasterViT',
        dict(window_size=5, carrier_size=3, propagate=True, layer_scale=0.5),
    ),
    'carrier-bias': ('FasterViT', dict(carrier_bias=8.0, propagate=True)),
    'no-carriers': ('FasterViT', dict(carriers=False, layer_scale=0.5)),
    'dino': (
        'FasterViT',
        dict(
            carriers=False, layer_scale=0.5, window_size=(5, 3, 4, 2),
            pad_every_stage=True, positions_by_tokens=True,
        ),
    ),
    'dino-with-carriers': ('FasterViT', dict(pad_every_stage=True, positions_by_tokens=True)),
    'hat-net': ('HATNet', {}),
    'hat-net-published-grids': ('HATNet', dict(grids=(8, 7, 7, 1), ds_ratios=(8, 4, 2, 1))),
    'hat-net-mixed': (
        'HATNet',
        dict(grids=(5, 3, 1, 2), ds_ratios=(1, 7, 1, 3), kernels=(5, 3, 7, 1), head_dim=2),
    ),
    'swin-hat': ('SwinHAT', {}),
    'swin-hat-everywhere': (
        'SwinHAT',
        dict(hat_stages=(0, 1, 2, 3), window_size=(5, 4, 3, 2), carrier_size=(2, 1, 3, 1)),
    ),
    'swin-hat-mixed': ('SwinHAT', dict(hat_stages=(1,), window_size=(3, 4, 2, 1), mlp_ratio=2)),
    'swin': ('SwinHAT', dict(hat_stages=(), depths=(2, 2, 2, 2))),
    'hat-net-all-global': ('HATNet', dict(grids=(1, 1, 1, 1), ds_ratios=(1, 1, 1, 1))),
}  # fmt: skip


def pair(name, fields):
    """Our backbone and the plain one with the same weights, under official names.

    In float64: a norm over a map of a few pixels enlarges the rounding of float32 tenfold and more.
    """
    family = FAMILIES[name]
    state = family.state(family.tiny(**fields))
    ours = family.backbone(family.tiny(**fields), out_norm_cfg=None).eval()
    ours.load_state_dict(state)
    ours.double()
    state = {
        key: value.double() if value.is_floating_point() else value for key, value in state.items()
    }
    return ours, family.plain(state, ours)


PAIRS = {variant: pair(*what) for variant, what in VARIANTS.items()}


@pytest.mark.parametrize('variant', VARIANTS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(batch=st.integers(1, 3), height=SIZES, width=SIZES, seed=st.integers(0, 1000))
def test_equals_the_plain_implementation(variant, batch, height, width, seed):
    ours, plain = PAIRS[variant]
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        for mine, theirs in zip(ours(image), plain(image), strict=True):
            assert mine.shape == theirs.shape
            assert (mine - theirs).norm() <= 1e-9 * theirs.norm()


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.mark.parametrize('size', [(1, 1), (37, 911), (4000, 32), (2, 3), (225, 223)])
def test_extreme_sizes(family, size):
    backbone = family.backbone(family.tiny()).eval()
    with torch.inference_mode():
        maps = backbone(torch.randn(1, 3, *size))
    for out, channels, stride in zip(
        maps, backbone.out_channels, backbone.out_strides, strict=True
    ):
        assert out.shape == (1, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert out.isfinite().all()


def test_no_call_changes_a_later_one(family):
    backbone = family.backbone(family.tiny()).eval()
    images = [torch.randn(2, 3, *size) for size in ((64, 64), (97, 33), (40, 200), (64, 64))]

    def fresh():
        """A backbone with the same weights, which has never seen an input."""
        other = family.backbone(family.tiny()).eval()
        other.load_state_dict(backbone.state_dict())
        return other

    with torch.no_grad():
        alone = [fresh()(image) for image in images]
        together = [backbone(image) for image in images]
    for first, second in zip(alone, together, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


def test_window_averages_keep_double_precision():
    x = torch.rand(2, 3, 11, 9, dtype=torch.float64)
    pooled = average_windows(x, 7)
    rows, cols = [slice(0, 7), slice(7, 11)], [slice(0, 7), slice(7, 9)]
    expected = [[x[:, :, r, c].mean((2, 3)) for c in cols] for r in rows]
    expected = torch.stack([torch.stack(row, -1) for row in expected], -2)
    assert torch.allclose(pooled, expected, rtol=1e-14, atol=0)


def far_pixel_moves_stage_2(arch):
    """Whether the right end of a wide image changes the first token of stage 2."""
    torch.manual_seed(0)
    backbone = hat_mm.FasterViT(arch, out_norm_cfg=None).eval().double()
    image = torch.randn(1, 3, 64, 512, dtype=torch.float64)
    other = image.clone()
    # A single pixel would be lost where the few channels of the stem's ReLU are all off.
    other[..., -32:] = torch.randn(1, 3, 64, 32, dtype=torch.float64)
    with torch.inference_mode():
        a, b = backbone(image)[2], backbone(other)[2]
    return not torch.equal(a[..., 0, 0], b[..., 0, 0])


def test_carriers_reach_across_windows():
    assert far_pixel_moves_stage_2(tiny())
    assert not far_pixel_moves_stage_2(tiny(carriers=False))
