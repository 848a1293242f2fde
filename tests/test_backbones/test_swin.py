"""SwinHAT without carriers is Swin, as mmpretrain computes it, and takes Swin's files."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.runner import load_checkpoint

import hat_mm
from hat_mm.weights.names import SWIN_NAMES
from test_backbones.archs import FAMILIES

MODELS = pytest.importorskip('mmpretrain.registry').MODELS
ARCH = dict(embed_dims=8, depths=[2, 2, 4, 2], num_heads=[1, 2, 2, 4])
BLOCKS = sum(ARCH['depths'])


def mmpretrain_swin(**arguments):
    """mmpretrain's Swin with weights that show every part, all maps normalized."""
    torch.manual_seed(0)
    config = dict(type='SwinTransformer', arch=ARCH, out_indices=(0, 1, 2, 3))
    model = MODELS.build({**config, **arguments})
    randomise(model)
    model.eval()  # returns nothing
    return model


def mmdet_swin(**arguments):
    registry = pytest.importorskip('mmdet.registry').MODELS
    config = dict(type='SwinTransformer', **ARCH, out_indices=(0, 1, 2, 3))
    torch.manual_seed(0)
    model = registry.build({**config, **arguments})
    randomise(model)
    model.eval()
    return model


@torch.no_grad()
def randomise(model):
    for name, p in model.named_parameters():
        p.normal_(0, 0.5 if 'table' in name else 0.3)
        if 'norm' in name and name.endswith('weight'):
            p.add_(1)


def swin(**arguments):
    """Ours without carriers."""
    return hat_mm.SwinHAT(ARCH, hat_stages=(), **arguments).eval()


def assert_same_maps(ours, theirs, image, norms):
    with torch.no_grad():
        pairs = zip(ours(image), theirs(image), norms, strict=True)
        for mine, reference, norm in pairs:
            if norm is not None:
                mine = F.layer_norm(
                    mine.permute(0, 2, 3, 1), norm.normalized_shape, norm.weight, norm.bias
                ).permute(0, 3, 1, 2)
            assert mine.shape == reference.shape
            assert (mine - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize('size', [(224, 224), (256, 352), (170, 301), (84, 130), (40, 64)])
@pytest.mark.parametrize('window', [7, 12])
def test_equals_mmpretrain(size, window):
    # Theirs pads maps that are smaller than a window only if it is told to.
    theirs = mmpretrain_swin(window_size=window, pad_small_map=min(size) < 32 * window)
    ours = swin(window_size=window, out_norm_cfg=None)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, *size)
    assert_same_maps(ours, theirs, image, [getattr(theirs, f'norm{i}') for i in range(4)])


def test_map_of_one_window_is_not_shifted():
    theirs = mmpretrain_swin(window_size=7)
    for size in ((224, 224), (224, 500)):
        ours = swin(out_norm_cfg=None)
        ours.load_state_dict(theirs.state_dict())
        norms = [getattr(theirs, f'norm{i}') for i in range(4)]
        assert_same_maps(ours, theirs, torch.randn(1, 3, *size), norms)


def test_equals_mmdet():
    theirs = mmdet_swin()
    for i in range(4):  # a detector's file has the norms of all maps
        torch.nn.init.uniform_(getattr(theirs, f'norm{i}').weight, 0.5, 2)
    ours = swin()
    ours.load_state_dict(theirs.state_dict())
    assert_same_maps(ours, theirs, torch.randn(2, 3, 180, 270), [None] * 4)


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_archs_are_mmpretrains(arch):
    ours, theirs = hat_mm.SwinHAT.archs[arch], MODELS.get('SwinTransformer').arch_zoo[arch]
    assert ours.embed_dims == theirs['embed_dims']
    assert ours.depths == tuple(theirs['depths'])
    assert ours.num_heads == tuple(theirs['num_heads'])


def official_file(model):
    """What Swin's authors publish, written from mmpretrain's tensors: other names and orders."""
    renamed = {}
    for name, value in model.state_dict().items():
        name = name.replace('patch_embed.projection', 'patch_embed.proj')
        name = name.replace('stages.', 'layers.').replace('attn.w_msa.', 'attn.')
        name = name.replace('ffn.layers.0.0', 'mlp.fc1').replace('ffn.layers.1', 'mlp.fc2')
        if name.startswith('norm'):
            if not name.startswith('norm3'):
                continue
            name = name.replace('norm3', 'norm')
        if '.downsample.' in name:
            # Theirs: (0, 0), (1, 0), (0, 1), (1, 1) as row and column, each with all channels.
            inputs = value.view(*value.shape[:-1], -1, 2, 2)
            parts = [inputs[..., r, c] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
            value = torch.cat(parts, -1)
        renamed[name] = value
    renamed['layers.0.blocks.1.attn_mask'] = torch.zeros(64, 49, 49)
    renamed |= {'head.weight': torch.zeros(10, 64), 'head.bias': torch.zeros(10)}
    return {'model': renamed}


def test_all_names_give_the_same_network(tmp_path, log):
    model = mmpretrain_swin(out_indices=(3,))
    files = {
        'official': official_file(model),
        'mmpretrain': {
            'state_dict': {f'backbone.{k}': v for k, v in model.state_dict().items()}
            | {'head.fc.weight': torch.zeros(10, 64)}
        },
    }
    loaded = []
    for name, content in files.items():
        path = str(tmp_path / f'{name}.pth')
        torch.save(content, path)
        init_cfg = dict(type='Pretrained', checkpoint=path)
        if name == 'mmpretrain':
            init_cfg['prefix'] = 'backbone.'
        backbone = hat_mm.SwinHAT(ARCH, init_cfg=init_cfg)
        own = copy.deepcopy(backbone.state_dict())
        backbone.init_weights()
        new = {k for k in own if '.tokenizer.' in k or '.carrier_attn.' in k}
        # Four tensors in the stem and thirteen in a block, three a down-sampler, a norm.
        shared = 4 + 13 * BLOCKS + 3 * 3 + 2
        assert f'{shared} of {len(own)} tensors loaded' in log.getvalue()
        assert f'{len(new)} new (' in log.getvalue()
        loaded.append({k: v for k, v in backbone.state_dict().items() if k not in new})
        for key, value in loaded[-1].items():
            kept = key.startswith(('norm0', 'norm1', 'norm2'))
            assert torch.equal(value, own[key]) is kept, key
    assert all(torch.equal(loaded[0][k], loaded[1][k]) for k in loaded[0])
    image = torch.randn(1, 3, 224, 256)
    ours = swin(out_indices=(3,))
    load_checkpoint(ours, str(tmp_path / 'official.pth'))
    assert_same_maps(ours, model, image, [None])


def test_official_values_come_back():
    state = FAMILIES['SwinHAT'].state(FAMILIES['SwinHAT'].tiny())
    backbone = hat_mm.SwinHAT(FAMILIES['SwinHAT'].tiny())
    backbone.load_state_dict(state)
    official, unknown = SWIN_NAMES.to_official(backbone.state_dict())
    assert all(torch.equal(official[k], v) for k, v in state.items() if 'head' not in k)
    assert set(official) == {k for k in state if 'head' not in k}
    assert all(
        name.startswith('norm') or '.tokenizer.' in name or '.carrier_attn.' in name
        for name in unknown
    )


def test_tables_of_another_window_are_interpolated(log):
    theirs = mmpretrain_swin(out_indices=(3,))
    ours = hat_mm.SwinHAT(ARCH, window_size=(12, 12, 12, 7))
    ours.load_state_dict(theirs.state_dict())
    assert f'{BLOCKS - 2} position tables interpolated' in log.getvalue()
    before = theirs.stages[0].blocks[0].attn.w_msa.relative_position_bias_table
    after = ours.stages[0].blocks[0].attn.bias.relative_position_bias_table
    assert after.shape == (23 * 23, 1)
    expected = F.interpolate(before.t().view(1, 1, 13, 13), (23, 23), mode='bicubic')
    assert torch.equal(after, expected.view(1, -1).t())
    last = ours.stages[3].blocks[0].attn.bias.relative_position_bias_table
    assert torch.equal(last, theirs.stages[3].blocks[0].attn.w_msa.relative_position_bias_table)
    # A native file of one window in a network of another.
    native = hat_mm.SwinHAT(ARCH, window_size=5)
    native.load_state_dict(ours.state_dict())
    assert native.stages[3].blocks[0].attn.bias.relative_position_bias_table.shape == (81, 4)


def test_swin_trained_here_starts_a_network_with_carriers(log):
    plain, hat = hat_mm.SwinHAT(ARCH, hat_stages=()), hat_mm.SwinHAT(ARCH)
    randomise(plain)
    hat.load_state_dict(plain.state_dict())
    new = [k for k in hat.state_dict() if '.tokenizer.' in k or '.carrier_attn.' in k]
    assert f'{len(new)} new (' in log.getvalue()
    state = hat.state_dict()
    assert all(torch.equal(state[k], v) for k, v in plain.state_dict().items())
    # Carriers in part are no such start, and none may be lost without a word.
    with pytest.raises(RuntimeError, match='Missing key'):
        hat_mm.SwinHAT(ARCH).load_state_dict(hat_mm.SwinHAT(ARCH, hat_stages=(0,)).state_dict())
    with pytest.raises(RuntimeError, match='Unexpected key'):
        plain.load_state_dict(hat.state_dict())


@pytest.mark.parametrize('more', [None, dict(type='Constant', layer='Linear', val=3.0, bias=2.0)])
def test_carriers_start_as_from_scratch_beside_a_pretrained_file(more, tmp_path):
    path = str(tmp_path / 'swin.pth')
    torch.save(official_file(mmpretrain_swin(out_indices=(3,))), path)
    pretrained = dict(type='Pretrained', checkpoint=path)
    backbone = hat_mm.SwinHAT(ARCH, init_cfg=[pretrained, more] if more else pretrained)
    backbone.init_weights()
    plain = swin(init_cfg=pretrained)
    plain.init_weights()
    loaded = {k: v for k, v in plain.state_dict().items() if not k.startswith('norm')}
    assert all(torch.equal(backbone.state_dict()[k], v) for k, v in loaded.items())
    new = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, torch.nn.Linear) and f'{name}.weight' not in loaded
    }
    assert any('carrier_attn.mlp' in name for name in new)
    for name, module in new.items():
        if more:
            assert (module.weight == 3).all(), name
        else:
            assert 0.015 < module.weight.std() < 0.025, name
        assert module.bias is None or (module.bias == (2 if more else 0)).all(), name
    before = copy.deepcopy(backbone.state_dict())
    backbone.init_weights()  # a second time changes nothing, as everywhere in mmengine
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_mlp_ratio_is_that_of_all_mlps():
    stages = hat_mm.SwinHAT(dict(ARCH, mlp_ratio=2)).stages
    for stage, dim in zip(stages, (8, 16, 32, 64), strict=True):
        for block in stage.blocks:
            layers = [block] if block.carrier_attn is None else [block, block.carrier_attn]
            assert all(layer.mlp.fc1.out_features == 2 * dim for layer in layers)


def far_pixel_moves(backbone, stage):
    """Whether the last pixel of a wide image changes the first token of a stage."""
    backbone = backbone.eval().double()
    image = torch.randn(1, 3, 32, 640, dtype=torch.float64)
    other = image.clone()
    other[..., -1, -1] += 1
    with torch.no_grad():
        a, b = backbone(image)[stage], backbone(other)[stage]
    return not torch.equal(a[..., 0, 0], b[..., 0, 0])


def test_carriers_reach_where_shifted_windows_do_not():
    arch = dict(ARCH, window_size=4)
    assert far_pixel_moves(hat_mm.SwinHAT(arch, out_norm_cfg=None), 0)
    assert not far_pixel_moves(hat_mm.SwinHAT(arch, hat_stages=(), out_norm_cfg=None), 2)


@pytest.mark.parametrize(
    ('hat_stages', 'carriers', 'shifts'),
    [
        (None, [1, 1, 2, 0], [0, 0, 0, 1]),
        ((), [0] * 4, [1, 1, 2, 1]),
        ([], [0] * 4, [1, 1, 2, 1]),
        ((3,), [0, 0, 0, 1], [1, 1, 2, 0]),
    ],
)
def test_what_the_stages_are_made_of(hat_stages, carriers, shifts):
    stages = hat_mm.SwinHAT(ARCH, hat_stages=hat_stages).stages
    for stage, exchanges, shifted in zip(stages, carriers, shifts, strict=True):
        assert (stage.tokenizer is not None) is (exchanges > 0)
        assert sum(block.carrier_attn is not None for block in stage.blocks) == exchanges
        assert sum(block.shift == 3 for block in stage.blocks) == shifted
        assert all(block.shift in (0, 3) for block in stage.blocks)
        assert stage.blocks[0].shift == 0
        assert stage.blocks[0].carrier_attn is None
