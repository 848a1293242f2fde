"""Plugins: the identity at first, then attention across windows, in any network."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn

import hat_mm
from hat_mm.layers import HierarchicalMHSA, SelfAttention

PLUGINS = {
    'HATPlugin': dict(type='hat_mm.HATPlugin', window_size=4),
    'HMHSAPlugin': dict(type='hat_mm.HMHSAPlugin', grid=4, ds_ratio=2),
}
STAGES = (False, False, True, True)


@pytest.fixture(params=PLUGINS)
def plugin(request):
    """Config of a plugin with small windows."""
    return copy.deepcopy(PLUGINS[request.param])


def build(plugin, in_channels=12, **arguments):
    torch.manual_seed(0)
    return MODELS.build({**plugin, 'in_channels': in_channels, **arguments})


def train_one_step(module, x):
    """One optimizer step towards another output."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (module(x) * torch.linspace(-1, 1, x.numel()).view_as(x)).sum().backward()
    optimizer.step()


def far_pixel_matters(module, x):
    """Whether the last pixel of a map, several windows away, moves the first of the result."""
    other = x.clone()
    other[..., -1, -1] += 1
    with torch.no_grad():
        return not torch.equal(module(x)[..., 0, 0], module(other)[..., 0, 0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 300),
    batch=st.integers(1, 2),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    last=st.booleans(),
)
@pytest.mark.parametrize('name', PLUGINS)
def test_is_the_identity_at_first(name, channels, batch, height, width, last):
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(batch, channels, height, width).contiguous(memory_format=layout)
    for module in (getattr(hat_mm, name)(channels), build(PLUGINS[name], channels)):
        y = module(x)
        assert torch.equal(y, x)
        assert y.is_contiguous(memory_format=layout)
        assert y.data_ptr() != x.data_ptr()


def test_attends_across_windows_after_one_step(plugin):
    module = build(plugin)
    x = torch.randn(2, 12, 9, 33)
    assert not far_pixel_matters(module, x)
    train_one_step(module, x)
    assert not torch.equal(module(x), x)
    assert far_pixel_matters(module, x)


@pytest.mark.parametrize('name', PLUGINS)
@pytest.mark.parametrize('size', [(28, 28), (50, 84)])
def test_far_pixels_count_with_the_defaults(name, size):
    torch.manual_seed(0)
    module = getattr(hat_mm, name)(64)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    x = torch.randn(2, 64, *size)
    (module(x) * torch.randn(x.shape)).mean().backward()
    optimizer.step()
    other = x.clone()
    other[..., -1, -1] += 1
    with torch.no_grad():
        change = (module(x) - module(other)).abs()
        # In the precision of training as well.
        assert change[..., 0, 0].max() > 0
        change = (module.double()(x.double()) - module(other.double())).abs()
    # Not just by rounding: within the window it counts not a thousand times as much.
    assert change[..., 0, 0].max() > 1e-7
    assert change[..., 0, 0].max() > 1e-3 * change[..., -2, -2].max()


def test_every_parameter_learns(plugin):
    module = build(plugin)
    x = torch.randn(2, 12, 9, 13)
    train_one_step(module, x)
    module.zero_grad()
    (module(x) * torch.randn(x.shape)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    idle = [name for name, p in module.named_parameters() if not p.grad.any()]
    assert not idle


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
class TestResNet:
    """ResNets of mmdet and mmseg take a plugin from their config."""

    @staticmethod
    def resnet(scope, plugins=None, **arguments):
        registry = pytest.importorskip(f'{scope}.registry').MODELS
        torch.manual_seed(0)
        return registry.build(
            dict(type='ResNet', depth=50, base_channels=4, plugins=plugins, **arguments)
        )

    @pytest.mark.parametrize('position', ['after_conv2', 'after_conv3'])
    def test_output_is_exactly_unchanged_until_it_is_trained(self, scope, plugin, position):
        plain = self.resnet(scope)
        with torch.no_grad():
            for name, p in plain.named_parameters():
                if 'bn' in name:  # their initialization silences every block
                    nn.init.uniform_(p, 0.5, 1)
        where = dict(stages=(False, False, False, True), position=position)
        network = self.resnet(scope, [dict(cfg=plugin, **where)])
        missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected
        assert all('_plugin.' in name for name in missing)
        # Each block of the last stage has one of its own.
        assert sum(isinstance(m, type(build(plugin))) for m in network.modules()) == 3
        image = torch.randn(2, 3, 97, 130)
        for mode in (True, False):
            plain.train(mode)
            network.train(mode)
            with torch.no_grad():
                for ours, theirs in zip(network(image), plain(image), strict=True):
                    assert torch.equal(ours, theirs)
                    assert ours.stride() == theirs.stride()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        sum(out.square().mean() for out in network(image)).backward()
        optimizer.step()
        plain.load_state_dict(network.state_dict(), strict=False)
        with torch.no_grad():
            assert not torch.equal(network(image)[3], plain(image)[3])

    def test_start_values_of_the_host_leave_it_the_identity(self, scope, plugin):
        # Both fill every convolution of the network, ours inside it included.
        everything = dict(
            type='Normal', layer=['Conv2d', 'Linear', 'Conv1d'], mean=1.0, std=1.0, bias=1.0
        )
        for init_cfg in (None, everything):
            network = self.resnet(
                scope, [dict(cfg=plugin, stages=STAGES, position='after_conv3')], init_cfg=init_cfg
            )
            network.init_weights()
            for module in network.modules():
                if isinstance(module, type(build(plugin))):
                    x = torch.randn(1, module.in_channels, 5, 9)
                    assert torch.equal(module(x), x)

    def test_checkpoints_and_freezes_with_the_host(self, scope, plugin):
        plugins = [dict(cfg=plugin, stages=STAGES, position='after_conv3')]
        network = self.resnet(scope, plugins, with_cp=True, frozen_stages=3)
        network.train()
        sum(out.sum() for out in network(torch.randn(2, 3, 64, 64))).backward()
        for name, p in network.named_parameters():
            if '_plugin' in name:
                assert (p.grad is None) is name.startswith('layer3')


def test_stands_in_a_sequential_and_in_a_neck(plugin):
    net = nn.Sequential(nn.Conv2d(3, 20, 3), build(plugin, 20), nn.ReLU(inplace=True))
    x = torch.randn(1, 3, 20, 31)
    assert torch.equal(net(x), net[2](net[0](x)))

    class Neck(BaseModule):
        """A neck of a user: a plugin on each map."""

        def __init__(self, in_channels, plugin):
            super().__init__(init_cfg=dict(type='Kaiming', layer='Conv2d'))
            self.convs = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in in_channels)
            self.plugins = nn.ModuleList(
                MODELS.build({**plugin, 'in_channels': 16}) for _ in in_channels
            )

        def forward(self, maps):
            pairs = zip(self.convs, self.plugins, maps, strict=True)
            return tuple(plugin(conv(x)) for conv, plugin, x in pairs)

    neck = Neck((8, 24), plugin)
    neck.init_weights()
    maps = (torch.randn(1, 8, 25, 14), torch.randn(1, 24, 13, 7))
    for out, conv, x in zip(neck(maps), neck.convs, maps, strict=True):
        assert torch.equal(out, conv(x))


def test_is_built_from_the_layers_of_the_backbones():
    hat, hmhsa = (build(plugin) for plugin in PLUGINS.values())
    tiny = hat_mm.FasterViT(dict(embed_dims=4, num_heads=(1, 1, 1, 1), window_size=4))
    assert type(hat.attn) is type(tiny.stages[2])
    assert sum(isinstance(m, SelfAttention) for m in hat.modules()) == 2
    assert isinstance(hmhsa.attn, HierarchicalMHSA)
    assert type(hmhsa.attn) is type(hat_mm.HATNet().stages[0].blocks[0].attn)


def test_arguments_reach_the_attention():
    hat = hat_mm.HATPlugin(
        10, num_heads=3, window_size=5, carrier_size=3, mlp_ratio=2, embed_dims=24
    )
    [block] = hat.attn.blocks
    assert (block.window_size, block.carrier_size) == (5, 3)
    for layer in (block.window_attn, block.carrier_attn):
        assert layer.attn.num_heads == 3
        assert (layer.mlp.fc1.in_features, layer.mlp.fc1.out_features) == (24, 48)
    hmhsa = hat_mm.HMHSAPlugin(10, head_dim=6, grid=5, ds_ratio=3, embed_dims=24)
    assert (hmhsa.attn.num_heads, hmhsa.attn.window_size, hmhsa.attn.ds_ratio) == (4, 5, 3)


@pytest.mark.parametrize(
    ('channels', 'width', 'heads'),
    [(1, 1, 1), (7, 7, 1), (64, 64, 2), (67, 67, 1), (96, 96, 3), (256, 256, 8), (2048, 256, 8)],
)
def test_defaults_follow_the_channels(channels, width, heads):
    hat, hmhsa = hat_mm.HATPlugin(channels), hat_mm.HMHSAPlugin(channels)
    assert hat.reduce.out_channels == hmhsa.reduce.out_channels == width
    assert hat.attn.blocks[0].window_attn.attn.num_heads == hmhsa.attn.num_heads == heads


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('HATPlugin', dict(in_channels=0), 'in_channels must be a positive int, not 0'),
        ('HATPlugin', dict(num_heads=5), 'num_heads = 5 does not divide the 12 channels'),
        ('HATPlugin', dict(num_heads=0), 'num_heads must be a positive int, not 0'),
        ('HATPlugin', dict(window_size=(7, 7)), r'window_size.*not \(7, 7\)'),
        ('HATPlugin', dict(carrier_size=0), 'carrier_size must be a positive int, not 0'),
        ('HATPlugin', dict(window_size=1), 'window_size = 1 is smaller than carrier_size = 2'),
        ('HATPlugin', dict(mlp_ratio=0.01), 'mlp_ratio must .* at least 1/12, .* not 0.01'),
        ('HATPlugin', dict(mlp_ratio='4'), "mlp_ratio must be a finite number .*not '4'"),
        (
            'HATPlugin',
            dict(mlp_ratio=float('inf')),
            'mlp_ratio must be a finite number .*not inf',
        ),
        ('HATPlugin', dict(embed_dims=1.5), 'embed_dims must be a positive int, not 1.5'),
        ('HMHSAPlugin', dict(in_channels='12'), "in_channels must be a positive int, not '12'"),
        ('HMHSAPlugin', dict(head_dim=5), 'head_dim = 5 does not divide the 12 channels'),
        ('HMHSAPlugin', dict(grid=0), 'grid must be a positive int, not 0'),
        ('HMHSAPlugin', dict(ds_ratio=0), 'ds_ratio must be a positive int, not 0'),
        ('HMHSAPlugin', dict(grid=1), 'ds_ratio must be 1, not 4'),
        ('HMHSAPlugin', dict(embed_dims=0), 'embed_dims must be a positive int, not 0'),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(hat_mm, name)(**{'in_channels': 12, **arguments})


@pytest.mark.parametrize('shape', [(12, 8, 8), (1, 11, 8, 8), (1, 12, 0, 8)])
def test_bad_inputs(plugin, shape):
    with pytest.raises(
        ValueError, match=r'Plugin takes maps of shape \(batch, 12, height, width\)'
    ):
        build(plugin)(torch.zeros(shape))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision(plugin, dtype):
    module = build(plugin)
    x = torch.randn(2, 12, 9, 13)
    train_one_step(module, x)
    module.eval()
    with torch.no_grad():
        expected = module(x)
        with torch.autocast('cpu', dtype=dtype):
            mixed = module(x)
            half = module(x.to(dtype))
    assert mixed.dtype == x.dtype
    assert half.dtype == dtype
    for y in (mixed, half):
        assert (y.float() - expected).norm() <= 2e-2 * expected.norm()


def test_loads_what_it_saved(plugin):
    module, other = build(plugin), build(plugin)
    x = torch.randn(1, 12, 9, 13)
    train_one_step(module, x)
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(module(x), other(x))
        # Nothing that is stored depends on the size of the map.
        other(torch.randn(1, 12, 30, 7))
    assert {k: v.shape for k, v in other.state_dict().items()} == {
        k: v.shape for k, v in module.state_dict().items()
    }
