"""The backbones in timm, in segmentation-models-pytorch, and saved by huggingface_hub."""

import json
import warnings

import pytest
import segmentation_models_pytorch as smp
import timm
import torch

import hat_mm
import hat_mm.interop.timm
from hat_mm.interop.hub import HubBackbone

# The remaining arch is only a part of the authors' detector.
FASTERVIT = [arch for arch in hat_mm.FasterViT.archs if not arch.endswith('dino')]
NAMES = {
    **{f'fastervit_{arch.replace("-", "_")}': (hat_mm.FasterViT, arch) for arch in FASTERVIT},
    **{f'hat_net_{arch}': (hat_mm.HATNet, arch) for arch in hat_mm.HATNet.archs},
    **{f'swin_hat_{arch}': (hat_mm.SwinHAT, arch) for arch in hat_mm.SwinHAT.archs},
}


@pytest.fixture
def image():
    return torch.randn(1, 3, 70, 101)


@pytest.mark.parametrize('name', NAMES)
def test_timm_knows_every_arch(name):
    kind, arch = NAMES[name]
    assert timm.is_model(name)
    with torch.device('meta'):
        model = timm.create_model(name, features_only=True)
    assert type(model.backbone) is kind
    assert model.backbone.arch == arch
    assert model.feature_info.channels() == list(model.backbone.out_channels)
    assert model.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize(
    ('name', 'chosen', 'indices'),
    [
        ('fastervit_0', (1, 3), (1, 3)),
        ('hat_net_tiny', 2, (2, 3)),
        ('hat_net_tiny', (-1,), (3,)),
        ('swin_hat_tiny', None, (0, 1, 2, 3)),
    ],
)
def test_feature_info_describes_the_maps(name, chosen, indices, image):
    model = timm.create_model(name, features_only=True, out_indices=chosen).eval()
    assert model.feature_info.out_indices == indices
    with torch.inference_mode():
        maps = model(image)
    assert [x.shape[1] for x in maps] == model.feature_info.channels()
    sides = [tuple(-(-side // r) for side in (70, 101)) for r in model.feature_info.reduction()]
    assert [tuple(x.shape[2:]) for x in maps] == sides


def test_arguments_of_timm_and_of_the_backbone(image):
    model = timm.create_model(
        'fastervit_0', features_only=True, in_chans=5, window_size=(8, 8, 8, 8)
    )
    assert model.backbone.in_channels == 5
    assert set(model.backbone.spec.window_size) == {8}
    with pytest.raises(TypeError, match='output_stride'):
        timm.create_model('fastervit_0', features_only=True, output_stride=8)
    with pytest.raises(ValueError, match='features_only=True only'):
        timm.create_model('fastervit_0')
    for wrong in (0, 5, -1):
        with pytest.raises(ValueError, match=f'out_indices={wrong} must be .* 1 to 4'):
            timm.create_model('fastervit_0', features_only=True, out_indices=wrong)
    for foreign in (dict(pretrained_cfg='in1k'), dict(pretrained_cfg_overlay=dict(file='a.pth'))):
        with pytest.raises(ValueError, match=r'has no tags and takes no .*(in1k|a\.pth)'):
            timm.create_model('fastervit_0', features_only=True, pretrained=True, **foreign)
    with pytest.raises(ValueError, match='its authors publish no weights'):
        timm.create_model('swin_hat_tiny', features_only=True, pretrained=True)


def test_pretrained_loads_an_official_file(monkeypatch, tmp_path):
    native = hat_mm.HATNet('tiny').state_dict()
    torch.save(hat_mm.HATNet.name_map.to_official(native)[0], tmp_path / 'official.pth')
    urls = hat_mm.interop.timm.URLS
    assert urls['HATNet', 'tiny'].endswith('/HAT-Net_Tiny.pth')
    monkeypatch.setitem(urls, ('HATNet', 'tiny'), str(tmp_path / 'official.pth'))
    model = timm.create_model('hat_net_tiny', features_only=True, pretrained=True)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(native[name], value)


def test_a_segmentation_model_trains(image):
    model = smp.Unet('tu-fastervit_0', encoder_weights=None, classes=4)
    x = torch.randn(2, 3, 64, 96)
    model(x).square().mean().backward()
    assert model(x).shape == (2, 4, 64, 96)
    unused = [n for n, p in model.encoder.named_parameters() if p.grad is None]
    assert unused == []


@pytest.mark.parametrize(
    ('kind', 'settings'),
    [
        ('FasterViT', dict(arch=dict(depths=(1, 1, 2, 1)), out_indices=(1, 3))),
        ('HATNet', dict(arch='tiny', out_norm_cfg=dict(type='BN'))),
        ('SwinHAT', dict(arch=dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)))),
    ],
)
def test_saved_and_loaded_again(kind, settings, tmp_path, image):
    model = HubBackbone(kind, **settings).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['kind'] == kind
    again = HubBackbone.from_pretrained(tmp_path).eval()
    init = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'model.safetensors'), prefix='backbone.'
    )
    in_config = getattr(hat_mm, kind)(**settings, init_cfg=init)
    in_config.init_weights()
    with torch.inference_mode():
        for x, y, z in zip(model(image), again(image), in_config.eval()(image), strict=True):
            assert torch.equal(x, y)
            assert torch.equal(x, z)


@pytest.mark.parametrize(
    ('kind', 'settings', 'message'),
    [
        ('ResNet', {}, "one of FasterViT, HATNet, SwinHAT, not 'ResNet'"),
        ('HATNet', dict(init_cfg=dict(type='Pretrained')), 'init_cfg would be saved'),
        ('HATNet', dict(out_indices=range(1, 4)), 'out_indices=.* cannot be saved as JSON'),
    ],
)
def test_what_cannot_be_saved_is_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        HubBackbone(kind, **settings)


def test_a_file_of_another_network_is_refused(tmp_path):
    HubBackbone('HATNet', out_indices=(1, 2)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r'backbone\.stages\.3'):
        HubBackbone.from_pretrained(tmp_path, out_indices=(1, 3))


def test_each_name_is_a_function_of_the_module():
    module = hat_mm.interop.timm
    assert set(module.__all__) == set(NAMES)
    assert all(callable(getattr(module, name)) for name in NAMES)


def test_registering_overwrites_no_model_of_timm():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(timm.list_models('fastervit*')) == len(FASTERVIT)
