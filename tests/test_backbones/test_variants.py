"""The published variants and arch dictionaries."""

import pytest
import torch

import hat_mm

# Millions of parameters with the 1000-class head, counted from the released models.
PARAMETERS = {
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
}


def test_every_variant_is_listed():
    assert set(hat_mm.FasterViT.archs) == set(PARAMETERS)


@pytest.mark.parametrize('arch', PARAMETERS)
def test_parameter_count(arch):
    with torch.device('meta'):
        # Norms of the maps before the last one are not in the classifier.
        backbone = hat_mm.FasterViT(arch, out_indices=(3,))
    head = 1000 * (backbone.out_channels[-1] + 1)
    count = sum(p.numel() for p in backbone.parameters()) + head
    digits = len(str(PARAMETERS[arch]).split('.')[1])
    assert round(count / 1e6, digits) == PARAMETERS[arch]


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


def test_drop_path_grows_linearly_over_all_blocks():
    with torch.device('meta'):
        backbone = hat_mm.FasterViT('0', drop_path_rate=0.3)
    blocks = [block for stage in backbone.stages for block in stage.blocks]
    rates = [
        (block.window if hasattr(block, 'window') else block).drop_path.rate for block in blocks
    ]
    assert rates == pytest.approx([0.3 * i / 15 for i in range(16)])
    assert hat_mm.FasterViT.archs['0'].drop_path_rate == 0.2


def test_missing_arch_fields_have_defaults():
    with torch.device('meta'):
        assert hat_mm.FasterViT({}).spec == hat_mm.FasterViT.archs['0']
