"""Weights of one window at another: positions are functions, and agree where offsets coincide."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.runner import load_checkpoint

import hat_mm
from hat_mm.layers.position import AbsolutePositionEmbedding, RelativePositionBias
from test_backbones.archs import FAMILIES


def bias_by_offset(module, side):
    """Bias (G, 2 * side - 1, 2 * side - 1) by row and column offset, query minus key."""
    p = module.num_prefix
    bias = module((side, side))[:, p:, p:].view(-1, side, side, side, side)
    offset = torch.arange(1 - side, side)
    query = offset.clamp(min=0)
    key = query - offset
    return bias[:, query[:, None], query, key[:, None], key]


def shared(one, other):
    """Pairs of offsets, from -one to one and from -other to other, that are the same share."""
    return [
        (i, j)
        for i in range(-one, one + 1)
        for j in range(-other, other + 1)
        if i * other == j * one
    ]


def assert_functions_agree(one, other, side, other_side):
    """Two position modules with the same weights at windows of two sizes."""
    if isinstance(one, RelativePositionBias):
        reach, other_reach = side - 1, other_side - 1
        a, b = bias_by_offset(one, side), bias_by_offset(other, other_side)
    else:
        reach, other_reach = side // 2, other_side // 2
        a, b = (
            m((s, s)).view(s, s, -1).permute(2, 0, 1) for m, s in ((one, side), (other, other_side))
        )
    pairs = [
        (i + reach, j + other_reach)
        for i, j in shared(reach, other_reach)
        if i + reach < a.shape[1] and j + other_reach < b.shape[1]
    ]
    assert len(pairs) >= 2
    i, j = (torch.tensor(index) for index in zip(*pairs, strict=True))
    torch.testing.assert_close(a[:, i][:, :, i], b[:, j][:, :, j], rtol=1e-5, atol=1e-5)
    assert a[:, i][:, :, i].std() > 0


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20))
def test_offsets_are_in_order(side, offset):
    """The table of the helper above has at (r, c) what any pair with these offsets has."""
    module = RelativePositionBias(2)
    table, bias = bias_by_offset(module, side), module((side, side)).view(2, *[side] * 4)
    q, k = (offset % side, (3 * offset) % side), ((7 * offset) % side, (5 * offset) % side)
    assert torch.equal(
        bias[:, q[0], q[1], k[0], k[1]],
        table[:, q[0] - k[0] + side - 1, q[1] - k[1] + side - 1],
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 24), st.integers(2, 24))
@pytest.mark.parametrize('kind', [RelativePositionBias, AbsolutePositionEmbedding])
def test_any_two_windows_agree_at_shared_offsets(kind, side, other_side):
    module = kind(3)
    assert_functions_agree(module, module, side, other_side)


# Windows of the file and of the model, carriers.
CHANGES = {
    '21K-384 in 21K-512': ((7, 7, 24, 12), (7, 7, 32, 16), False),
    '21K-768 in 21K-224': ((7, 7, 48, 24), (7, 7, 14, 7), False),
    '224 with windows 7, 7, 12, 6': ((7, 7, 7, 7), (7, 7, 12, 6), True),
}


@pytest.mark.parametrize('change', CHANGES)
def test_a_file_of_one_window_in_a_model_of_another(change, tmp_path):
    before, after, carriers = CHANGES[change]
    family = FAMILIES['FasterViT']
    arch = family.tiny(carriers=carriers)
    path = str(tmp_path / 'official.pth')
    torch.save({'state_dict': family.state({**arch, 'window_size': before})}, path)
    models = [hat_mm.FasterViT(arch, window_size=w, out_norm_cfg=None) for w in (before, after)]
    for model in models:
        load_checkpoint(model.eval(), path, map_location='cpu')
    one, other = (dict(model.named_modules()) for model in models)
    compared = 0
    for name, module in one.items():
        if not isinstance(module, (RelativePositionBias, AbsolutePositionEmbedding)):
            continue
        for key, value in module.state_dict().items():
            assert torch.equal(other[name].state_dict()[key], value)
        stage = int(name.split('.')[1])
        assert_functions_agree(module, other[name], before[stage], after[stage])
        compared += 1
    assert compared == (10 if carriers else 6)


def test_all_windows_of_a_variant_have_the_same_tensors():
    with torch.device('meta'):
        shapes = [
            {k: v.shape for k, v in hat_mm.FasterViT(f'4-21k-{side}').state_dict().items()}
            for side in (224, 384, 512, 768)
        ]
    assert all(other == shapes[0] for other in shapes[1:])
