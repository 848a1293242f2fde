"""mmpretrain's classifiers, filled with official files, compute the published logits."""

import copy
from pathlib import Path

import pytest
import torch
from golden import Golden, official_state
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import load_state_dict
from test_backbones.test_loading import training_file

import hat_mm
from hat_mm.weights.convert import Source, from_official

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
# Leaf, golden file and its official names.
FASTERVIT = ('fastervit/fastervit-0_32xb128_in1k', 'fastervit_0_224', 'fastervit_0')
HAT_NET = ('hat_net/hat-net-tiny_8xb128_in1k', 'hat_net_tiny_224', 'hat_net_tiny')
SLOW = [
    FASTERVIT,
    (FASTERVIT[0], 'fastervit_0_anyres_256', 'fastervit_0'),
    (FASTERVIT[0], 'fastervit_0_anyres_512', 'fastervit_0'),
    ('fastervit/fastervit-2_32xb128_in1k', 'fastervit_2_anyres_w7-7-12-6_576', 'fastervit_2'),
    ('fastervit/fastervit-3_32xb128_in1k', 'fastervit_3_224', 'fastervit_3'),
    ('fastervit/fastervit-4_32xb128_in1k', 'fastervit_4_224', 'fastervit_4'),
    ('fastervit/fastervit-4-21k-224_8xb128_in1k', 'fastervit_4_21k_224', 'fastervit_4_21k'),
    (HAT_NET[0], 'hat_net_tiny_448x672', 'hat_net_tiny'),
    ('hat_net/hat-net-small_8xb128_in1k', 'hat_net_small_224', 'hat_net_small'),
    ('hat_net/hat-net-medium_8xb128_in1k', 'hat_net_medium_224', 'hat_net_medium'),
]


def classifier(leaf, **backbone):
    """mmpretrain's classifier of a leaf."""
    cfg = Config.fromfile(CONFIGS / f'{leaf}.py')
    cfg.merge_from_dict({'model': {'backbone': {'init_cfg': None, **backbone}}})
    hat_mm.compat.require('mmpretrain.models')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model).eval()
    assert type(model).__module__.startswith('mmpretrain.')
    return model


def error(golden, model):
    with torch.inference_mode():
        return golden.error('logits', model(golden.image(), mode='tensor'))


@pytest.mark.parametrize(
    ('leaf', 'file', 'keys'),
    [HAT_NET, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda value: value if '/' not in value else '',
)
def test_logits_of_a_converted_classifier_are_the_published_ones(leaf, file, keys):
    source = Source('x.pth', '0')
    made = from_official({'state_dict': official_state(keys)}, source, with_head=True, ema=False)
    model = classifier(leaf, **({'window_size': (7, 7, 12, 6)} if 'w7-7-12-6' in file else {}))
    missing, unexpected = model.load_state_dict(made['state_dict'], strict=False)
    assert not unexpected
    assert all('num_batches_tracked' in name for name in missing)
    assert error(Golden(file), model) <= 1e-5


@pytest.mark.parametrize(('leaf', 'file', 'keys'), [FASTERVIT, HAT_NET], ids=['FasterViT', 'HAT'])
def test_an_official_file_is_a_classifier_as_it_is(leaf, file, keys, tmp_path):
    """Packed as FasterViT's authors pack theirs, and as HAT-Net's do."""
    state = official_state(keys)
    content = training_file(state, window=7) if keys == 'fastervit_0' else {'model': state}
    torch.save(content, tmp_path / 'official.pth.tar')
    model = classifier(leaf)
    copied = copy.deepcopy(model)
    load_checkpoint(model, str(tmp_path / 'official.pth.tar'), map_location='cpu')
    assert error(Golden(file), model) <= 1e-5
    # The EMA hook copies the model and hands on the file's names.
    load_state_dict(copied, training_file(state, window=7)['state_dict'])
    for name, value in model.state_dict().items():
        assert torch.equal(copied.state_dict()[name], value), name
