"""What every backbone promises, checked on a tiny arch of each family."""

import copy
import io
import pickle

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import hat_mm
from hat_mm.layers import DropPath
from test_backbones.archs import FAMILIES, tiny

# Configs of tiny backbones, each family and what branches its code.
CONFIGS = {
    'fastervit': dict(type='hat_mm.FasterViT', arch=tiny(drop_path_rate=0.0)),
    'fastervit-propagate': dict(
        type='hat_mm.FasterViT',
        arch=tiny(drop_path_rate=0.0, propagate=True, layer_scale=1e-5),
    ),
    'fastervit-21k': dict(
        type='hat_mm.FasterViT',
        arch=tiny(drop_path_rate=0.0, carriers=False, layer_scale=1e-5, window_size=(7, 7, 6, 3)),
    ),
    'fastervit-dino': dict(
        type='hat_mm.FasterViT',
        arch=tiny(
            drop_path_rate=0.0,
            carriers=False,
            window_size=(7, 7, 6, 3),
            pad_every_stage=True,
            positions_by_tokens=True,
        ),
    ),
    'hat-net': dict(type='hat_mm.HATNet', arch=FAMILIES['HATNet'].tiny(drop_path_rate=0.0)),
    'hat-net-batch-norm': dict(
        type='hat_mm.HATNet',
        arch=FAMILIES['HATNet'].tiny(drop_path_rate=0.0),
        norm_cfg=dict(type='BN'),
        out_norm_cfg=dict(type='BN'),
    ),
}
for _name, _stages in (('swin-hat', (0, 1, 2)), ('swin-hat-shifted', ())):
    CONFIGS[_name] = dict(
        type='hat_mm.SwinHAT',
        arch=FAMILIES['SwinHAT'].tiny(drop_path_rate=0.0),
        hat_stages=_stages,
    )
NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
SIZE = (2, 3, 96, 150)


@pytest.fixture(params=CONFIGS)
def config(request):
    return copy.deepcopy(CONFIGS[request.param])


@pytest.fixture
def image():
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0))


def build(config, **arguments):
    torch.manual_seed(0)
    backbone = MODELS.build({**config, **arguments})
    # Small published layer scales would hide branches that do not take part.
    for name, parameter in backbone.named_parameters():
        if 'gamma' in name:
            nn.init.constant_(parameter, 0.5)
    return backbone


def difference(maps, others):
    pairs = zip(maps, others, strict=True)
    return max(float(((a.float() - b).norm() / b.norm()).detach()) for a, b in pairs)


def loss_of(maps):
    return sum((m * torch.linspace(-1, 1, m.numel()).view_as(m)).sum() for m in maps)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_builds_in_every_scope_with_nothing_imported(config, scope):
    registry = pytest.importorskip(f'{scope}.registry').MODELS
    assert registry.build(config).out_strides == (4, 8, 16, 32)


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (3, 1), (2,), 1])
def test_outputs_follow_out_indices(config, image, out_indices):
    every = build(config, out_norm_cfg=None).eval()
    some = build(config, out_norm_cfg=None, out_indices=out_indices).eval()
    some.load_state_dict(every.state_dict(), strict=False)
    indices = (out_indices,) if isinstance(out_indices, int) else out_indices
    with torch.no_grad():
        maps, expected = some(image), every(image)
    assert isinstance(maps, tuple)
    assert len(maps) == len(indices) == len(some.out_channels) == len(some.out_strides)
    for out, i, channels, stride in zip(
        maps, indices, some.out_channels, some.out_strides, strict=True
    ):
        assert torch.equal(out, expected[i])
        assert out.shape == (2, channels, -(-96 // stride), -(-150 // stride))
        assert out.is_contiguous()


def test_every_parameter_gets_a_gradient(config, image):
    for out_indices in ((0, 1, 2, 3), (0, 1)):
        backbone = build(config, out_indices=out_indices).train()
        loss_of(backbone(image)).backward()
        idle = [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
        # A bias before a batch norm has a gradient of zero up to rounding; None would be unused.
        assert not [n for n in idle if not n.endswith(('conv1.bias', 'conv2.bias'))]


def test_gradients_have_the_layout_of_their_parameters(config, image):
    backbone = build(config).train()
    loss_of(backbone(image)).backward()
    # DistributedDataParallel warns of the others and copies them in every step.
    for name, parameter in backbone.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


def test_output_norms(config):
    backbone = build(config, out_norm_cfg=dict(type='SyncBN', eps=0.01), out_indices=(0, 2))
    assert isinstance(backbone.norm0, nn.SyncBatchNorm)
    assert backbone.norm2.eps == 0.01
    assert not hasattr(backbone, 'norm1')


def test_norm_cfg_changes_the_type_and_keeps_eps(config, image):
    plain, sync = build(config, norm_cfg=dict(type='BN')), build(config, norm_cfg={})
    published = [(type(m), m.eps) for m in sync.stem.modules() if isinstance(m, NORMS)]
    assert [m.eps for m in plain.stem.modules() if isinstance(m, NORMS)] == [
        eps for _, eps in published
    ]
    given = build(config, norm_cfg=dict(eps=0.5))
    assert [(type(m), m.eps) for m in given.stem.modules() if isinstance(m, NORMS)] == [
        (kind, 0.5) for kind, _ in published
    ]
    sync = build(config, norm_cfg=dict(type='SyncBN'))
    assert [m.eps for m in sync.stem.modules() if isinstance(m, nn.SyncBatchNorm)] == [
        eps for _, eps in published
    ]
    sync.load_state_dict(plain.state_dict())
    with torch.no_grad():
        reverted = revert_sync_batchnorm(sync).eval()
        assert difference(reverted(image), plain.eval()(image)) == 0
    build(config, norm_cfg=dict(type='GN', num_groups=2))(image)


@pytest.mark.parametrize('frozen_stages', range(5))
def test_frozen_stages(config, image, frozen_stages):
    backbone = build(config, frozen_stages=frozen_stages, out_norm_cfg=dict(type='BN'))
    frozen = ['stem.'] + [f'stages.{i}.' for i in range(frozen_stages)]
    frozen += [f'norm{i}.' for i in range(frozen_stages)]

    def check():
        for name, parameter in backbone.named_parameters():
            assert parameter.requires_grad is not name.startswith(tuple(frozen)), name

    check()  # From construction on: DDP looks at parameters before the first train().
    before = copy.deepcopy(backbone.state_dict())
    backbone.train()
    check()
    maps = backbone(image)
    if frozen_stages < 4:
        loss_of(maps).backward()
    for name, value in backbone.state_dict().items():
        if 'running' in name:
            assert torch.equal(value, before[name]) is name.startswith(tuple(frozen)), name


def test_norm_eval(config, image):
    backbone = build(config, norm_eval=True, norm_cfg=dict(type='BN')).train()
    assert any('running' in name for name in backbone.state_dict())
    before = copy.deepcopy(backbone.state_dict())
    backbone(image)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert backbone.stages[0].training


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('norm', [None, dict(type='GN', num_groups=2)])
def test_norms_train_behind_frozen_layers(config, image, norm, layout):
    # Group norm of torch 2.13 would end the process here.
    backbone = build(config, norm_cfg=norm, out_norm_cfg=dict(type='GN', num_groups=1)).train()
    image = image.contiguous(memory_format=layout)
    norms = [module for module in backbone.modules() if isinstance(module, NORMS)]
    for module in [*norms[:1], norms[len(norms) // 2], *norms[-1:]]:
        backbone.requires_grad_(False)
        module.requires_grad_(True)
        loss_of(backbone(image)).backward()
        assert module.weight.grad.any()


def test_drop_path_of_a_sample():
    x = torch.ones(4000, 2, 3)
    drop = DropPath(0.25)
    assert drop.eval()(x) is x
    out = drop.train()(x)
    kept = out[:, 0, 0] != 0
    assert torch.equal(out, kept[:, None, None] * x / 0.75)
    assert 0.7 < kept.float().mean() < 0.8


def test_drop_path_drops_in_training(config, image):
    same = image[:1].repeat(6, 1, 1, 1)
    for rate in (0.0, 0.9):
        maps = build(config, drop_path_rate=rate).train()(same)
        differs = [not torch.allclose(m, m[:1].expand_as(m), rtol=1e-3, atol=1e-3) for m in maps]
        # The first block never drops.
        assert differs == [False, rate > 0, rate > 0, rate > 0]


def test_checkpointing_runs_blocks_again(config, image):
    for with_cp, runs in ((False, 1), (True, 2)):
        backbone = build(config, with_cp=with_cp).train()
        calls = []
        blocks = [block for stage in backbone.stages for block in stage.blocks]
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i, calls=calls: calls.append(i))
        loss_of(backbone(image)).backward()
        assert sorted(calls) == sorted([*range(len(blocks))] * runs)


def test_checkpointing_changes_nothing(config, image):
    results = []
    for with_cp in (False, True):
        backbone = build(config, with_cp=with_cp, drop_path_rate=0.3).train()
        torch.manual_seed(1)
        maps = backbone(image)
        loss_of(maps).backward()
        state = {k: v for k, v in backbone.state_dict().items() if 'running' in k or 'num_' in k}
        results.append((maps, [p.grad for p in backbone.parameters()], state))
    (maps, grads, state), (maps_cp, grads_cp, state_cp) = results
    assert difference(maps_cp, maps) == 0
    for a, b in zip(grads_cp, grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    # The second forward pass must not count its batch again.
    assert all(torch.equal(state[k], state_cp[k]) for k in state)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_autocast_is_close_to_float32(config, image, dtype, tolerance):
    backbone = build(config).eval()
    with torch.no_grad():
        expected = backbone(image)
        with torch.autocast('cpu', dtype=dtype):
            maps = backbone(image)
    assert all(m.isfinite().all() for m in maps)
    assert difference(maps, expected) <= tolerance
    backbone.train()
    with torch.autocast('cpu', dtype=dtype):
        maps = backbone(image)
    loss_of([m.float() for m in maps]).backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters())


def test_position_tensors_stay_float32_under_autocast():
    backbone = build(CONFIGS['fastervit']).eval()
    bias = backbone.stages[2].blocks[0].carrier_attn.attn.bias
    with torch.no_grad():
        expected = bias((6, 5))
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert torch.equal(bias((6, 5)), expected)


def test_copies_and_pickles(config, image):
    backbone = build(config).eval()
    with torch.no_grad():
        expected = backbone(image)
        pickled = pickle.loads(pickle.dumps(backbone))
        for clone in (copy.deepcopy(backbone), pickled):
            assert difference(clone(image), expected) == 0
        buffer = io.BytesIO()
        torch.save(backbone.state_dict(), buffer)
        buffer.seek(0)
        build(config).load_state_dict(torch.load(buffer, weights_only=True))


def test_nothing_that_is_stored_depends_on_the_input_size(config, image):
    backbone = build(config).eval()
    before = {k: v.shape for k, v in backbone.state_dict().items()}
    with torch.no_grad():
        backbone(image)
    assert {k: v.shape for k, v in backbone.state_dict().items()} == before


def test_initialization(config):
    backbone = MODELS.build(config)
    backbone.init_weights()
    # Layers that the recipe fills; the other convolutions are initialized by PyTorch.
    [rule] = backbone.from_scratch
    filled = [m for m in backbone.modules() if isinstance(m, getattr(nn, rule['layer']))]
    spread = torch.cat([m.weight.detach().flatten() for m in filled]).std()
    assert float(spread) == pytest.approx(0.02, rel=0.05)
    assert all(m.bias is None or not m.bias.any() for m in filled)
    for m in backbone.modules():
        if isinstance(m, NORMS):
            assert (m.weight == 1).all()
            assert not m.bias.any()
        if isinstance(m, nn.Conv2d) and m not in filled:
            bound = 1 / (m.weight[0].numel() ** 0.5)
            assert m.weight.abs().max() <= bound
    scale = config['arch'].get('layer_scale')
    for name, parameter in backbone.named_parameters():
        if 'gamma' in name:
            assert (parameter == scale).all()


def test_layer_depths_rise_through_the_network(config):
    backbone = build(config, out_norm_cfg=dict(type='BN'))
    prefix = 'backbone.'
    depths = {}
    for name, _ in backbone.named_parameters():
        depth, total = backbone.get_layer_depth(prefix + name, prefix)
        assert total == sum(backbone.depths) + 2
        depths.setdefault(depth, set()).add(name.split('.blocks.')[0].split('.')[0])
    assert sorted(depths) == list(range(sum(backbone.depths) + 2))
    assert depths[0] == {'stem'}
    assert depths[max(depths)] == {'norm0', 'norm1', 'norm2', 'norm3'}
    assert backbone.get_layer_depth('head.fc.weight', prefix) == (max(depths), max(depths) + 1)
    assert backbone.get_layer_depth('backbone.stages.1.downsample.conv.weight', prefix)[0] == 2


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_traces(config, image):
    backbone = build(config).eval()
    with torch.no_grad():
        expected = backbone(image)
        traced = torch.jit.trace(backbone, image)
        assert difference(traced(image), expected) <= 1e-6


def test_public_names():
    assert all(family.backbone.__name__ in hat_mm.__all__ for family in FAMILIES.values())
    assert all(getattr(hat_mm, name) for name in hat_mm.__all__)
    with pytest.raises(AttributeError, match='FasterVit'):
        _ = hat_mm.FasterVit
