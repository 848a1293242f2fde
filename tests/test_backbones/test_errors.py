"""Bad arguments and inputs: a clear error that names the value and the choices."""

import pytest
import torch

from test_backbones.archs import FAMILIES

# What every family refuses, and what only one knows.
COMMON = [
    (dict(arch=True), TypeError, 'arch must be a name'),
    (dict(arch=None), TypeError, 'not None'),
    (dict(arch=dict(depth=(1, 1, 1, 1))), ValueError, "'depth'.*did you mean 'depths'"),
    (dict(arch=dict(depths=(1, 1, 1))), ValueError, r'depths.*4 positive ints.*\(1, 1, 1\)'),
    (dict(out_indices=(0, 4)), ValueError, r'out of 0 to 3, not \(0, 4\)'),
    (dict(out_indices=True), ValueError, r'out_indices.*not \(True,\)'),
    (dict(out_indices=()), ValueError, 'out_indices'),
    (dict(out_indices=(1, 1)), ValueError, 'out_indices'),
    (dict(in_channels=0), ValueError, 'in_channels must be a positive int, not 0'),
    (dict(drop_path_rate='high'), ValueError, "drop_path_rate.*not 'high'"),
    (dict(drop_path_rate=1.5), ValueError, r'drop_path_rate must be in \[0, 1\), not 1.5'),
    (dict(frozen_stages=5), ValueError, 'frozen_stages.*not 5'),
    (dict(frozen_stages=-2), ValueError, 'frozen_stages.*not -2'),
    (dict(frozen_stages=True), ValueError, 'frozen_stages.*not True'),
    (dict(frozen_stages=1.0), ValueError, 'frozen_stages.*not 1.0'),
    (dict(out_indices=None), ValueError, 'out_indices.*not None'),
    (dict(norm_cfg='BN'), TypeError, "norm_cfg must be a dict .*not 'BN'"),
    (dict(out_norm_cfg='BN'), TypeError, "out_norm_cfg must be a dict .*not 'BN'"),
    (dict(norm_cfg=dict(type='LN')), ValueError, "norm_cfg = .*last axis.*'hat_mm.LayerNorm2d'"),
    (dict(out_norm_cfg=dict(type='LN')), ValueError, 'out_norm_cfg = .*normalizes the last axis'),
    (dict(norm_cfg=dict(type='GN')), ValueError, "norm_cfg = .*'GN'.*makes no norm"),
    (dict(out_norm_cfg=dict(type='Nope')), ValueError, "out_norm_cfg = .*'Nope'.*makes no norm"),
    (
        dict(norm_cfg=dict(type='BN', groups=2)),
        ValueError,
        "norm_cfg = .*'groups': 2.*makes no norm",
    ),
    (dict(windowsize=7), TypeError, 'windowsize'),
]
OWN = {
    'FasterViT': [
        (dict(arch='7'), ValueError, "unknown arch '7'.*4-21k-224"),
        (dict(arch='4-21k-225'), ValueError, "did you mean '4-21k-224'"),
        (dict(arch='tiny'), ValueError, "unknown arch 'tiny'.*choices: 0, 1"),
        (dict(arch=dict(embed_dims=(64, 128))), ValueError, 'embed_dims must be a positive int'),
        (dict(arch=dict(num_heads=(2, 4, 7, 16))), ValueError, r'num_heads\[2\] = 7.*256 channels'),
        (dict(arch=dict(carriers=(1,))), ValueError, r'carriers.*\(1,\)'),
        (dict(arch=dict(carriers=None)), ValueError, 'carriers.*not None'),
        (dict(arch=dict(carrier_bias='8')), ValueError, "carrier_bias must be a number, not '8'"),
        (dict(arch=dict(layer_scale='1e-5')), ValueError, "layer_scale must be a number, not '1e"),
        (dict(arch=dict(carriers=[[2]])), ValueError, r'carriers.*\[\[2\]\]'),
        (dict(arch=dict(carriers=(2.0,))), ValueError, r'carriers.*\(2\.0,\)'),
        (dict(window_size=1), ValueError, 'window_size.2. = 1 is smaller than the carrier_size 2'),
        (dict(window_size=(7, 7)), ValueError, r'window_size must be 4 positive ints'),
        (dict(window_size=0), ValueError, 'window_size'),
    ],
    'HATNet': [
        (dict(arch=0), ValueError, "unknown arch '0'; choices: tiny, small, medium, large"),
        (dict(arch='midium'), ValueError, "did you mean 'medium'"),
        (dict(arch=dict(embed_dims=64)), ValueError, 'embed_dims must be 4 positive ints.*not 64'),
        (dict(arch=dict(head_dim=(48,) * 4)), ValueError, 'head_dim must be a positive int'),
        (dict(arch=dict(head_dim=32)), ValueError, r'head_dim = 32.*embed_dims\[0\] = 48'),
        (dict(arch=dict(kernels=(3, 4, 3, 3))), ValueError, r'kernels\[1\] must be odd, not 4'),
        (dict(arch=dict(grids=(8, 7, 0, 1))), ValueError, r'grids.*\(8, 7, 0, 1\)'),
        (dict(arch=dict(grids=(8, 7, 1, 1))), ValueError, r'ds_ratios\[2\] must be 1, not 2'),
        (dict(window_size=7), TypeError, 'window_size'),
    ],
}
OWN['SwinHAT'] = [
    (dict(arch='large'), ValueError, "unknown arch 'large'; choices: tiny, small, base"),
    (dict(arch=0), ValueError, "unknown arch '0'"),
    (dict(arch=dict(embed_dims=(96,))), ValueError, 'embed_dims must be a positive int'),
    (dict(arch=dict(num_heads=(3, 6, 11, 24))), ValueError, r'num_heads\[2\] = 11.*384 channels'),
    (dict(arch=dict(carrier_size=0)), ValueError, 'carrier_size must be 4 positive ints'),
    (dict(arch=dict(mlp_ratio=0)), ValueError, 'mlp_ratio must be a finite number.*not 0'),
    (
        dict(arch=dict(mlp_ratio=0.001)),
        ValueError,
        'at least 1/96, which leaves a channel, not 0.001',
    ),
    (dict(arch=dict(mlp_ratio=float('nan'))), ValueError, 'mlp_ratio.*not nan'),
    (dict(hat_stages=(4,)), ValueError, r'hat_stages must be different stages out of 0 to 3.*4'),
    (dict(hat_stages=(0, 0)), ValueError, r'hat_stages must be different stages.*\(0, 0\)'),
    (dict(hat_stages=(True,)), ValueError, 'hat_stages.*True'),
    (dict(hat_stages=([0],)), ValueError, 'hat_stages'),
    (dict(hat_stages=''), ValueError, "hat_stages.*not ''"),
    (dict(hat_stages=2), ValueError, 'hat_stages.*not 2'),
    (
        dict(window_size=1),
        ValueError,
        r'window_size\[1\] = 1 is smaller than the carrier_size 2',
    ),
    (dict(window_size=(7, 7)), ValueError, 'window_size must be 4 positive ints'),
]
ARGUMENTS = [(family, *case) for family in FAMILIES for case in [*COMMON, *OWN[family]]]


@pytest.mark.parametrize(('family', 'arguments', 'error', 'message'), ARGUMENTS)
def test_arguments(family, arguments, error, message):
    with torch.device('meta'), pytest.raises(error, match=message):
        FAMILIES[family].backbone(**arguments)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32), (1, 1, 3, 32, 32)])
def test_inputs(family, shape):
    family = FAMILIES[family]
    backbone = family.backbone(family.tiny()).eval()
    with pytest.raises(ValueError, match=r'images of shape \(batch, 3, height, width\)'):
        backbone(torch.zeros(shape))
