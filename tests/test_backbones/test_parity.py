"""The backbones compute what the published models compute."""

import pytest
import torch
import torch.nn.functional as F
from golden import FASTERVIT, HAT_NET, Golden, official_state

import hat_mm


@pytest.mark.parametrize(
    ('file', 'names', 'arguments'), FASTERVIT, ids=[case[0] for case in FASTERVIT]
)
def test_fastervit_equals_the_published_model(file, names, arguments):
    golden = Golden(file)
    state = official_state(names)
    # Raw maps for the stages and the norm of the last map beside them.
    backbone = hat_mm.FasterViT(**arguments, out_norm_cfg=None).eval()
    backbone.load_state_dict(state)
    with torch.inference_mode():
        maps = backbone(golden.image())
        norm = [state[f'norm.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')]
        features = F.batch_norm(maps[-1], *norm)
        logits = F.linear(features.mean((2, 3)), state['head.weight'], state['head.bias'])
    outputs = {f'stage{i}': out for i, out in enumerate(maps)}
    outputs |= {'norm': features, 'logits': logits}
    errors = {name: golden.error(name, ours) for name, ours in outputs.items()}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize(('file', 'arch'), HAT_NET, ids=[case[0] for case in HAT_NET])
def test_hat_net_equals_the_published_model(file, arch):
    golden = Golden(file)
    state = official_state(f'hat_net_{arch}')
    backbone = hat_mm.HATNet(arch).eval()
    backbone.load_state_dict(state)
    with torch.inference_mode():
        maps = backbone(golden.image())
        features = maps[-1].mean((2, 3))
        logits = F.linear(features, state['classifier.1.weight'], state['classifier.1.bias'])
    outputs = {f'stage{i}': out for i, out in enumerate(maps)} | {'logits': logits}
    errors = {name: golden.error(name, ours) for name, ours in outputs.items()}
    assert max(errors.values()) <= 1e-5, errors


def test_the_norm_of_the_last_map_is_the_published_one():
    golden = Golden('fastervit_0_224')
    backbone = hat_mm.FasterViT('0').eval()
    backbone.load_state_dict(official_state('fastervit_0'))
    with torch.inference_mode():
        assert golden.error('norm', backbone(golden.image())[-1]) <= 1e-5
