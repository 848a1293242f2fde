"""Where attention looks: weights against the modules, steps against the influence of tokens."""

import pytest
import torch
from torch import nn

import hat_mm
from hat_mm.engine.attention import attention_weights, recorded, trace_attention
from hat_mm.layers import HierarchicalMHSA, SelfAttention

FASTERVIT = dict(embed_dims=16, stem_dims=8, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 4))
HAT_NET = dict(embed_dims=(16, 16, 32, 32), head_dim=16, depths=(1, 1, 2, 1))
SWIN = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), window_size=(4, 4, 4, 7))
# Map sizes that windows do not divide.
MODELS = {
    'FasterViT': lambda: hat_mm.FasterViT(arch={**FASTERVIT, 'layer_scale': 0.5}),
    'FasterViT, propagation': lambda: hat_mm.FasterViT(arch={**FASTERVIT, 'propagate': True}),
    'FasterViT without carriers': lambda: hat_mm.FasterViT(arch={**FASTERVIT, 'carriers': False}),
    'HAT-Net': lambda: hat_mm.HATNet(arch=HAT_NET),
    'SwinHAT': lambda: hat_mm.SwinHAT(arch=SWIN),
    'Swin': lambda: hat_mm.SwinHAT(arch={**SWIN, 'hat_stages': ()}),
    'plugins': lambda: nn.Sequential(
        nn.Conv2d(3, 32, 8, 8), hat_mm.HATPlugin(32), hat_mm.HMHSAPlugin(32, grid=4)
    ),
}


def build(name: str) -> nn.Module:
    """A model whose position MLPs and zero layers count, too."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def trace(model: nn.Module, size: tuple[int, int] = (300, 200)):
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    return trace_attention(model, lambda: model(images))


def one_token(stage, row: int, col: int) -> torch.Tensor:
    tokens = torch.zeros(stage.map_size)
    tokens[row, col] = 1
    return tokens


@pytest.mark.parametrize('name', MODELS)
def test_weights_times_values_are_the_output(name):
    model = build(name)
    kinds = (SelfAttention, HierarchicalMHSA)
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    with recorded(modules) as seen, torch.no_grad():
        model(torch.rand(2, 3, 300, 200))
    assert seen
    for module, (inputs, output) in seen.items():
        weights, again = attention_weights(module, *inputs)
        assert torch.allclose(again, output, rtol=1e-5, atol=1e-5 * output.abs().max())
        for part in weights:
            assert torch.allclose(part.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
def test_nothing_stays_on_the_model(name):
    model = build(name)
    images = torch.rand(1, 3, 100, 100)
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    with torch.no_grad():
        before = model(images)
        trace(model)
        after = model(images)
    assert hooks == [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('name', MODELS)
def test_shares_sum_to_one(name):
    """Over all tokens of a map without padding, and over tokens and summaries of a block."""
    model = build(name)
    # 448 pixels are whole windows of 7 or 4 tokens at all strides, and of HAT-Net's 8.
    for stage in trace(model, (448, 448)):
        tokens = one_token(stage, 0, stage.map_size[1] - 1)
        assert stage.rollout(tokens).sum() == pytest.approx(1)
        for block in stage.blocks:
            near, far = stage.look(block, tokens)
            assert near.shape == stage.map_size
            if far is None:
                assert near.sum() == pytest.approx(1)
            elif block.skip:  # H-MHSA's two attentions are apart
                assert far.sum() == pytest.approx(1)
            else:
                assert near.sum() + far.sum() == pytest.approx(1)


def test_a_block_shows_the_weights_of_its_attention():
    model = build('FasterViT')
    [stage, _] = trace(model)
    attention = model.stages[2].blocks[1].window_attn.attn
    with recorded([attention]) as seen, torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        model(torch.rand(1, 3, 300, 200, generator=generator))
    [weights], _ = attention_weights(attention, *seen[attention][0])
    # The map has 19 x 13 tokens in 3 x 2 windows; this one is in window 1, at 3, 2.
    near, far = stage.look(stage.blocks[1], one_token(stage, 3, 9))
    expected = weights[1].mean(0)[4 + 3 * 7 + 2].double()
    assert torch.allclose(near[:7, 7:13], expected[4:].view(7, 7)[:, :6])
    assert near[:, :7].count_nonzero() == near[7:].count_nonzero() == 0
    assert far.shape == (6, 4)
    assert far.sum() == pytest.approx(float(expected[:4].sum()))
    assert (far > 0).all()  # through the carriers of the window, whole picture


@pytest.mark.parametrize('name', ['FasterViT without carriers', 'Swin', 'FasterViT', 'SwinHAT'])
def test_rollout_is_where_tokens_have_an_influence(name):
    """A token without a share changes nothing; with carriers all have one, else few."""
    model = build(name)
    stages = trace(model)
    [stage] = [one for one in stages if one.name == 'stages.2']
    module = model.stages[2]
    module.downsample = nn.Identity()
    row, col = 8, 5
    shares = stage.rollout(one_token(stage, row, col))
    dim = module.blocks[0].window_attn.attn.proj.out_features if 'Faster' in name else 64
    x = torch.rand(1, dim, *stage.map_size)
    with torch.no_grad():
        before = module(x)[..., row, col]
        for i, j in [(0, 0), (8, 6), (9, 5), (6, 5), (18, 12), (8, 9), (3, 3)]:
            changed = x.clone()
            changed[..., i, j] += 1
            same = torch.equal(module(changed)[..., row, col], before)
            assert same == (shares[i, j] == 0), (i, j)
    assert bool((shares > 0).all()) == (name in ('FasterViT', 'SwinHAT'))


@pytest.mark.parametrize('name', ['Swin', 'SwinHAT'])
def test_padding_of_swin_passes_nothing_on(name):
    """Each block pads with new zeros; a share that reached the padding is lost there."""
    for stage in trace(build(name)):
        rows, cols = stage.padded_size
        inside = torch.zeros(rows, cols, dtype=torch.bool)
        inside[: stage.map_size[0], : stage.map_size[1]] = True
        shares = stage.shares(one_token(stage, stage.map_size[0] - 1, stage.map_size[1] - 1))
        for block in reversed(stage.blocks):
            shares = block.back(shares)
            assert shares[: rows * cols].view(rows, cols)[~inside].sum() == 0
        assert bool(shares.sum() < 0.999) == bool((~inside).any())


def test_hat_net_reaches_the_whole_map():
    for stage in trace(build('HAT-Net')):
        assert (stage.rollout(one_token(stage, 0, 0)) > 0).all()


def test_errors():
    model = build('FasterViT')
    [stage, _] = trace(model)
    with pytest.raises(ValueError, match='at least one must be chosen'):
        stage.rollout(torch.zeros(stage.map_size))
    with pytest.raises(ValueError, match=r'\(19, 13\)'):
        stage.rollout(torch.ones(3, 3))
    conv = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match='no attention of hat_mm'):
        trace_attention(conv, lambda: conv(torch.rand(1, 3, 4, 4)))
