"""LoRA in a detector: of the backbone only adapters train and are saved, and merge exactly."""

import itertools
import json
from pathlib import Path

import merge_lora
import pytest
import torch
from mmengine.config import Config

from hat_mm.engine import cli
from hat_mm.engine.build import build_model
from hat_mm.engine.export import load_weights
from hat_mm.weights import fileio
from hat_mm.zoo.publish import publish

ROOT = Path(__file__).resolve().parents[2]
TOY_CONFIG = str(ROOT / 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py')
LORA = """
_base_ = ['{config}']
custom_imports = dict(imports=['mmpretrain.models'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.LoRAModel',
        module=dict(
            **_base_.model.backbone,
            norm_eval=True,
            init_cfg=dict(type='Pretrained', checkpoint='{weights}', prefix='backbone.'),
        ),
        rank=4,
        alpha=8,
        targets=[dict(type='qkv'), dict(type='proj')],
    )
)
"""
RUNS = itertools.count()

pytestmark = pytest.mark.usefixtures('plain_dumps')


def state_of(path):
    return torch.load(path, weights_only=True)['state_dict']


@pytest.fixture(scope='module')
def trained(tmp_path_factory, toy_options):
    """Folder with a pretrained backbone, the config and the work dir of one epoch of adapters."""
    folder = tmp_path_factory.mktemp('lora')
    model = build_model(Config.fromfile(TOY_CONFIG))
    model.init_weights()
    fileio.write(folder / 'start.pth', {'state_dict': dict(model.state_dict())})
    config = folder / 'lora.py'
    config.write_text(LORA.format(config=TOY_CONFIG, weights=folder / 'start.pth'))
    cli.train(
        [str(config), '--work-dir', str(folder / 'run'), '--cfg-options', *toy_options]
        + [f'experiment_name=lora{next(RUNS)}']
    )
    return folder


def test_only_adapters_of_the_backbone_train(trained):
    cfg = Config.fromfile(trained / 'lora.py')
    model = build_model(cfg)
    load_weights(model, trained / 'run/epoch_1.pth')
    start = state_of(trained / 'start.pth')
    backbone = model.backbone.module
    assert {n for n, p in backbone.named_parameters() if p.requires_grad} == {
        name for name, _ in backbone.named_parameters() if '.lora_' in name
    }
    # What the adapters are added to is what the training started from, statistics included.
    plain = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    for name, tensor in plain.items():
        if '.lora_' not in name:
            before = start[f'backbone.{name.replace(".original_layer", "")}']
            torch.testing.assert_close(tensor, before, rtol=0, atol=0)
        elif name.endswith('lora_up.weight'):
            assert tensor.any()  # it starts at zero


def test_a_published_file_holds_adapters_alone(trained):
    done = publish(trained / 'run/epoch_1.pth', trained / 'published.pth')
    names = [name for name in state_of(done.path) if name.startswith('backbone.')]
    assert names
    assert all('.lora_' in name for name in names)
    assert any(name.startswith('roi_head.') for name in state_of(done.path))


def test_adapters_are_tested_as_they_are(trained, toy_options, tmp_path):
    words = [
        str(trained / 'lora.py'),
        str(trained / 'run/epoch_1.pth'),
        '--work-dir',
        str(tmp_path),
    ]
    cli.test([*words, '--cfg-options', *toy_options, f'experiment_name=lora{next(RUNS)}'])
    [metrics] = tmp_path.glob('*/*.json')
    assert 'coco/segm_mAP' in json.loads(metrics.read_text())


def test_merged_equals_unmerged(trained, capsys):
    out = trained / 'merged.pth'
    merge_lora.main([str(trained / 'lora.py'), str(trained / 'run/epoch_1.pth'), str(out)])
    assert '14 adapters merged' in capsys.readouterr().out
    unmerged = build_model(Config.fromfile(trained / 'lora.py')).eval()
    load_weights(unmerged, trained / 'run/epoch_1.pth')
    plain = build_model(Config.fromfile(TOY_CONFIG)).eval()
    meta = load_weights(plain, out)  # complains of any tensor that is missing or left over
    assert 'cfg' not in meta  # it would have LoRAModel
    assert meta['dataset_meta']['classes'] == ('circle', 'square', 'triangle')
    images = torch.rand(1, 3, 96, 128)
    with torch.inference_mode():
        for ours, theirs in zip(plain.backbone(images), unmerged.backbone(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_nothing_to_merge(trained, tmp_path):
    out = tmp_path / 'out.pth'
    with pytest.raises(cli.UserError, match='has no LoRAModel'):
        merge_lora.main([TOY_CONFIG, str(trained / 'start.pth'), str(out)])
    words = [str(trained / 'lora.py'), str(trained / 'run/epoch_1.pth'), str(out)]
    for setting in ('init_cfg=None', 'init_cfg.checkpoint=None'):
        unknown = ['--cfg-options', f'model.backbone.module.{setting}']
        with pytest.raises(cli.UserError, match='does not say which weights LoRAModel started'):
            merge_lora.main([*words, *unknown])
    assert not out.exists()
