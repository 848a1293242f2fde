"""The form that only predicts: the same maps, nothing left of training."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import hat_mm
from hat_mm.layers import Deployable, DropPath, RelativePositionBias
from test_backbones.archs import FAMILIES

SIZES = [(64, 64), (97, 33), (40, 211), (1, 1)]
DINO = dict(carriers=False, pad_every_stage=True, positions_by_tokens=True)
VARIANTS = {
    'fastervit': ('FasterViT', {}, {}),
    'scaled': ('FasterViT', dict(layer_scale=0.3), {}),
    'propagate': ('FasterViT', dict(propagate=True, layer_scale=0.3, carriers=(2, 3)), {}),
    'propagate-unscaled': ('FasterViT', dict(propagate=True), {}),
    'no-carriers': ('FasterViT', dict(carriers=False, layer_scale=0.3), {}),
    'dino': ('FasterViT', DINO, {}),
    'group-norm': ('FasterViT', {}, dict(norm_cfg=dict(type='GN', num_groups=1))),
    'hat-net': ('HATNet', {}, {}),
    'hat-net-bn': ('HATNet', {}, dict(norm_cfg=dict(type='BN'))),
    'swin-hat': ('SwinHAT', {}, {}),
    'swin': ('SwinHAT', dict(hat_stages=()), {}),
}


def trained(variant):
    """A backbone in eval mode that no fold leaves alone: statistics and scales are not neutral."""
    name, fields, settings = VARIANTS[variant]
    family = FAMILIES[name]
    torch.manual_seed(0)
    backbone = family.backbone(family.tiny(drop_path_rate=0.5, **fields), **settings).double()
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    for name, parameter in backbone.named_parameters():
        if 'gamma' in name:
            nn.init.uniform_(parameter, 0.5, 2)
    return backbone.eval()


def maps(backbone, size=(64, 64), batch=2):
    generator = torch.Generator().manual_seed(1)
    dtype = next(backbone.parameters()).dtype
    with torch.inference_mode():
        return backbone(torch.randn(batch, 3, *size, generator=generator, dtype=dtype))


def assert_near(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_same_maps(variant):
    backbone = trained(variant)
    deployed = copy.deepcopy(backbone)
    assert hat_mm.switch_to_deploy(deployed) is deployed
    for size in SIZES:
        assert_near(maps(deployed, size), maps(backbone, size), 1e-9)


@pytest.mark.parametrize('variant', ['propagate', 'hat-net-bn', 'swin-hat'])
def test_the_same_maps_in_float32(variant):
    backbone = trained(variant).float()
    deployed = hat_mm.switch_to_deploy(copy.deepcopy(backbone))
    for size in [(64, 64), (97, 133)]:
        assert_near(maps(deployed, size), maps(backbone, size), 1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
def test_nothing_is_left_of_training(variant):
    backbone = trained(variant)
    before = sum(p.numel() for p in backbone.parameters())
    backbone.switch_to_deploy()
    assert backbone.deploy
    assert not any(isinstance(module, DropPath) for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any('gamma' in name for name, _ in backbone.named_parameters())
    norms = [name for name, m in backbone.named_modules() if isinstance(m, _BatchNorm)]
    # Output norms have no convolution before them, nor have those in front of an expansion.
    assert all(name.startswith('norm') or name.endswith(TO_KEEP) for name in norms), norms
    assert sum(p.numel() for p in backbone.parameters()) <= before
    if variant == 'no-carriers':
        assert not any(isinstance(m, RelativePositionBias) for m in backbone.modules())


TO_KEEP = ('.conv.norm1', '.attn.norm', '.attn.grid_norm', '.attn.ds_norm')


@pytest.mark.parametrize('variant', ['propagate', 'hat-net-bn', 'swin-hat'])
def test_a_second_call_changes_nothing(variant):
    backbone = trained(variant)
    backbone.switch_to_deploy()
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.switch_to_deploy()
    hat_mm.switch_to_deploy(backbone)
    assert list(state) == list(backbone.state_dict())
    assert all(torch.equal(state[name], value) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize('variant', ['propagate', 'hat-net-bn', 'swin-hat'])
def test_parts_may_be_switched_first(variant):
    backbone = trained(variant)
    expected = maps(backbone)
    backbone.apply(lambda m: m.switch_to_deploy() if isinstance(m, Deployable) else None)
    assert_near(maps(backbone), expected, 1e-9)


def test_switched_in_inference_mode():
    backbone = trained('propagate')
    with torch.inference_mode():
        backbone.switch_to_deploy()
    image = torch.rand(1, 3, 40, 40, dtype=torch.float64, requires_grad=True)
    backbone(image)[3].sum().backward()
    assert image.grad.isfinite().all()


@pytest.mark.parametrize('switch', ['method', 'function'])
@pytest.mark.parametrize('part', [False, True])
@pytest.mark.parametrize('family', FAMILIES)
def test_training_mode_ends_with_a_warning(family, part, switch):
    family = FAMILIES[family]
    backbone = family.backbone(family.tiny()).eval()
    expected = maps(backbone)
    (backbone.stages[1] if part else backbone).train()
    with pytest.warns(UserWarning, match='was in training mode and is in eval mode now') as said:
        backbone.switch_to_deploy() if switch == 'method' else hat_mm.switch_to_deploy(backbone)
    assert len(said) == 1
    assert not any(module.training for module in backbone.modules())
    assert_near(maps(backbone), expected, 1e-5)


@pytest.mark.parametrize('family', FAMILIES)
def test_stays_in_eval_mode_afterwards(family):
    family = FAMILIES[family]
    model = nn.ModuleDict({'backbone': family.backbone(family.tiny()), 'head': nn.Dropout()}).eval()
    hat_mm.switch_to_deploy(model)
    expected = maps(model.backbone)
    with pytest.warns(UserWarning, match='cannot train, and stays in eval mode') as said:
        model.train()
    assert len(said) == 1
    assert model.head.training
    assert not any(module.training for module in model.backbone.modules())
    assert_near(maps(model.backbone), expected, 0)
    assert not model.eval().head.training


@pytest.mark.parametrize('family', FAMILIES)
def test_cannot_load_afterwards(family):
    family = FAMILIES[family]
    backbone = family.backbone(family.tiny()).eval()
    state = backbone.state_dict()
    backbone.switch_to_deploy()
    with pytest.raises(ValueError, match='load it before'):
        backbone.load_state_dict(state)


def test_copies_and_moves():
    backbone = trained('propagate')
    backbone.switch_to_deploy()
    copied = copy.deepcopy(backbone)
    assert_near(maps(copied), maps(backbone), 0)
    assert maps(copied.float())[0].dtype == torch.float32
    half = copied.bfloat16()
    tensors = [*half.parameters(), *half.buffers()]
    assert all(t.dtype == torch.bfloat16 for t in tensors if t.is_floating_point())
    assert all(m.isfinite().all() for m in maps(half))


def test_built_and_switched_in_inference_mode():
    family = FAMILIES['FasterViT']
    with torch.inference_mode():
        backbone = family.backbone(family.tiny(layer_scale=0.3, propagate=True)).eval()
        expected = maps(backbone)
        backbone.switch_to_deploy()
        assert_near(maps(backbone), expected, 1e-5)


def test_folded_in_inference_mode_to_ordinary_tensors():
    backbone = trained('fastervit')
    with torch.inference_mode():
        backbone.switch_to_deploy()
    assert not any(value.is_inference() for value in backbone.state_dict().values())


def test_norms_without_statistics_stay():
    norm_cfg = dict(type='BN', track_running_stats=False)
    family = FAMILIES['FasterViT']
    backbone = family.backbone(family.tiny(), norm_cfg=norm_cfg).eval()
    deployed = hat_mm.switch_to_deploy(copy.deepcopy(backbone))
    assert_near(maps(deployed), maps(backbone), 1e-5)


@pytest.mark.parametrize('plugin', [hat_mm.HATPlugin, hat_mm.HMHSAPlugin])
def test_a_model_with_plugins_around(plugin):
    plugins = nn.Sequential(nn.Conv2d(3, 8, 1), plugin(8)).eval()
    for parameter in plugins.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = maps(plugins, (20, 31))
    hat_mm.switch_to_deploy(plugins)
    assert_near([maps(plugins, (20, 31))], [expected], 1e-5)
    assert plugins[0].weight.requires_grad  # not ours
    assert not any(p.requires_grad for p in plugins[1].parameters())
    plugins[1].switch_to_deploy()  # by itself, and again
    with pytest.raises(ValueError, match='takes no checkpoint'):
        plugins.load_state_dict(plugins.state_dict(), strict=False)


def test_a_model_without_anything_of_ours():
    with pytest.raises(ValueError, match='Conv2d has no backbone or plugin of hat_mm'):
        hat_mm.switch_to_deploy(nn.Conv2d(1, 1, 1).eval())
