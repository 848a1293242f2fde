"""mmdet's own config takes FasterViT in place of its ResNet through the command line alone."""

from pathlib import Path

import mmdet
import torch

import hat_mm

CONFIG = Path(mmdet.__file__).parent / '.mim/configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

SWAP = (
    'model.backbone._delete_=True',
    'model.backbone.type=hat_mm.FasterViT',
    'model.backbone.arch=0',
    'model.neck.in_channels=[64,128,256,512]',
)


def test_one_step_of_mmdets_mask_rcnn_with_fastervit_0(run_python, shapes, tmp_path):
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
        *('val_cfg=None', 'val_dataloader=None', 'val_evaluator=None'),
    )
    done = run_python(
        *('tools/train.py', str(CONFIG), '--work-dir', str(tmp_path)),
        *('--cfg-options', *SWAP, *small),
    )
    assert done.returncode == 0, done.stderr
    assert 'Epoch(train) [1][1/1]' in done.stdout + done.stderr
    state = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['state_dict']
    backbone = hat_mm.FasterViT(arch=0)
    trained = {k.removeprefix('backbone.'): v for k, v in state.items() if 'backbone.' in k}
    backbone.load_state_dict(trained)
    # A step of SGD moved it away from its start: a fresh norm has weight 1 and counted no batch.
    assert trained['norm0.num_batches_tracked'] == 1
    assert not torch.equal(trained['norm0.weight'], torch.ones(64))
