"""The published variants and arch dictionaries."""

import pytest
import torch

import hat_mm
from test_backbones.archs import FAMILIES

# Millions of parameters with the 1000-class head, counted from the released models.
PARAMETERS = {
    'FasterViT': {
        '0': 31.405,
        '1': 53.37,
        '2': 75.92,
        '3': 159.55,
        '4': 365.56,
        '5': 957.5,
        '6': 1360.3,
        '4-21k-224': 271.94,
        '4-21k-384': 271.94,
        '4-21k-512': 271.94,
        '4-21k-768': 271.94,
        '4-21k-224-dino': 271.94,
    },
    'HATNet': {'tiny': 12.656, 'small': 25.748, 'medium': 42.942, 'large': 63.132},
    # Swin's.
    'SwinHAT': {'tiny': 28.288, 'small': 49.606, 'base': 87.768},
}
PUBLISHED = {'FasterViT': {}, 'HATNet': {}, 'SwinHAT': dict(hat_stages=())}


@pytest.mark.parametrize('family', FAMILIES)
def test_every_variant_is_listed(family):
    assert set(FAMILIES[family].backbone.archs) == set(PARAMETERS[family])


@pytest.mark.parametrize(
    ('family', 'arch'), [(family, arch) for family, row in PARAMETERS.items() for arch in row]
)
def test_parameter_count(family, arch):
    with torch.device('meta'):
        # Norms of the maps before the last one are not in the classifier.
        backbone = FAMILIES[family].backbone(arch, out_indices=(3,), **PUBLISHED[family])
    count = sum(p.numel() for p in backbone.parameters())
    count += 1000 * (backbone.out_channels[-1] + 1)
    if family == 'HATNet':
        # The released model has a norm with weight and bias in each block that it never uses.
        dims, depths = backbone.spec.dims, backbone.spec.depths
        count += sum(2 * dim * depth for dim, depth in zip(dims, depths, strict=True))
    digits = len(str(PARAMETERS[family][arch]).split('.')[1])
    assert round(count / 1e6, digits) == PARAMETERS[family][arch]


@pytest.mark.parametrize('arch', range(7))
def test_a_number_is_a_name(arch):
    with torch.device('meta'):
        assert hat_mm.FasterViT(arch).spec == hat_mm.FasterViT.archs[str(arch)]


@pytest.mark.parametrize(
    ('arch', 'windows'),
    [
        ('4', (7, 7, 7, 7)),
        ('4-21k-224', (7, 7, 14, 7)),
        ('4-21k-384', (7, 7, 24, 12)),
        ('4-21k-512', (7, 7, 32, 16)),
        ('4-21k-768', (7, 7, 48, 24)),
    ],
)
def test_windows_and_their_override(arch, windows):
    with torch.device('meta'):
        assert hat_mm.FasterViT(arch).spec.window_size == windows
        assert hat_mm.FasterViT(arch, window_size=8).spec.window_size == (8, 8, 8, 8)
        overridden = hat_mm.FasterViT(arch, window_size=(7, 7, 12, 6))
    assert [stage.window_size for stage in overridden.stages[2:]] == [12, 6]


@pytest.mark.parametrize(
    ('arch', 'rate'), [('tiny', 0.1), ('small', 0.1), ('medium', 0.3), ('large', 0.3)]
)
def test_hat_net_variants(arch, rate):
    spec = hat_mm.HATNet.archs[arch]
    assert spec.drop_path_rate == rate
    assert spec.grids == (8, 7, 7, 1)
    with torch.device('meta'):
        backbone = hat_mm.HATNet(arch)
    for stage, kernel in zip(backbone.stages, spec.kernels, strict=True):
        assert {block.conv.conv2.kernel_size for block in stage.blocks} == {(kernel, kernel)}


@pytest.mark.parametrize(
    ('family', 'arch', 'rate'),
    [('FasterViT', '0', 0.2), ('HATNet', 'tiny', 0.1), ('SwinHAT', 'tiny', 0.2)],
)
def test_drop_path_grows_linearly_over_all_blocks(family, arch, rate):
    family = FAMILIES[family].backbone
    with torch.device('meta'):
        backbone = family(arch, drop_path_rate=0.3)
    blocks = [block for stage in backbone.stages for block in stage.blocks]
    rates = [getattr(block, 'window_attn', block).drop_path.rate for block in blocks]
    steps = len(rates) - 1
    assert rates == pytest.approx([0.3 * i / steps for i in range(steps + 1)])
    assert family.archs[arch].drop_path_rate == rate


@pytest.mark.parametrize(
    ('family', 'arch'), [('FasterViT', '0'), ('HATNet', 'tiny'), ('SwinHAT', 'tiny')]
)
def test_missing_arch_fields_have_defaults(family, arch):
    family = FAMILIES[family].backbone
    with torch.device('meta'):
        assert family({}).spec == family().spec == family.archs[arch]
