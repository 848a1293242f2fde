"""mmdet's own config takes our backbones in place of its ResNet through the command line alone."""

from pathlib import Path

import mmdet
import pytest
import torch

import hat_mm

CONFIG = Path(mmdet.__file__).parent / '.mim/configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

SWAPS = {
    'FasterViT': ('arch=0', '[64,128,256,512]'),
    'HATNet': ('arch=tiny', '[48,96,240,384]'),
}


@pytest.mark.parametrize('name', SWAPS)
def test_one_step_of_mmdets_mask_rcnn(name, run_python, shapes, tmp_path):
    arch, channels = SWAPS[name]
    swap = (
        'model.backbone._delete_=True',
        f'model.backbone.type=hat_mm.{name}',
        f'model.backbone.{arch}',
        f'model.neck.in_channels={channels}',
    )
    data = 'train_dataloader.dataset'
    small = (
        f'{data}.data_root={shapes}/',
        f'{data}.ann_file=annotations/train.json',
        f'{data}.data_prefix.img=train/',
        f'{data}.metainfo.classes=circle,square,triangle',
        f'{data}.pipeline.2.scale=(256,192)',
        'train_dataloader.batch_size=4',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'train_cfg.max_epochs=1',
        'default_hooks.logger.interval=1',
        'param_scheduler=[]',  # the first step would have next to no learning rate
        *('val_cfg=None', 'val_dataloader=None', 'val_evaluator=None'),
    )
    done = run_python(
        *('tools/train.py', str(CONFIG), '--work-dir', str(tmp_path)),
        *('--cfg-options', *swap, *small),
    )
    assert done.returncode == 0, done.stderr
    assert 'Epoch(train) [1][1/1]' in done.stdout + done.stderr
    state = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['state_dict']
    trained = {k.removeprefix('backbone.'): v for k, v in state.items() if 'backbone.' in k}
    backbone = getattr(hat_mm, name)(arch.removeprefix('arch='))
    backbone.load_state_dict(trained)
    # A step of SGD moved its norms away from their start.
    norms = [v for k, v in trained.items() if 'norm' in k and k.endswith('.weight')]
    assert norms
    assert not any(torch.equal(norm, torch.ones_like(norm)) for norm in norms)
