"""The toolboxes' own configs take our backbones by the command of tools/misc/swap_backbone.py.

Each is trained for a step and tested: half of them with FasterViT by our tools, the others with
HAT-Net by the toolbox's own.
"""

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import shapes
import swap_backbone
import torch

import hat_mm
from hat_mm import __main__ as program
from hat_mm.engine import cli
from hat_mm.engine.edits import configs_of

ROOT = Path(__file__).resolve().parents[2]
RUNS = itertools.count()

pytestmark = pytest.mark.usefixtures('plain_dumps')


class Swap(NamedTuple):
    """A config in a toolbox's wheel."""

    config: str
    small: tuple[str, ...]  # what makes it small
    metric: str


COCO_SMALL = (
    'train_cfg.max_epochs=1',
    'train_dataloader.dataset.ann_file=annotations/train.json',
    'train_dataloader.dataset.data_prefix.img=train/',
    'test_dataloader.dataset.ann_file=annotations/val.json',
    'test_dataloader.dataset.data_prefix.img=val/',
    'test_evaluator.ann_file={root}/annotations/val.json',
    'test_dataloader.dataset.pipeline.1.scale=(128,96)',
    *('{split}_dataloader.dataset.metainfo.classes=circle,square,triangle',),
)
SWAPS = {
    'mmdet-cascade': Swap(
        'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
        (
            *COCO_SMALL,
            'train_dataloader.dataset.pipeline.2.scale=(128,96)',
            'model.test_cfg.rpn.max_per_img=20',
            'model.test_cfg.rcnn.max_per_img=5',
            'model.test_cfg.rcnn.score_thr=0',
            *(f'model.roi_head.bbox_head.{stage}.num_classes=3' for stage in range(3)),
            'model.roi_head.mask_head.num_classes=3',
            *(f'model.train_cfg.rcnn.{stage}.sampler.num=32' for stage in range(3)),
        ),
        'coco/segm_mAP',
    ),
    'mmdet-dino': Swap(
        'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
        (
            *COCO_SMALL,
            *(
                f'train_dataloader.dataset.pipeline.3.transforms.{step}.scales=[(96,128)]'
                for step in ('0.0', '1.0', '1.2')
            ),
            'train_dataloader.dataset.pipeline.3.transforms.1.1.crop_size=(64,80)',
            'model.num_queries=20',
            'model.bbox_head.num_classes=3',
            'model.test_cfg.max_per_img=10',
        ),
        'coco/bbox_mAP',
    ),
    'mmseg-upernet': Swap(
        'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py',
        (
            'train_cfg.max_iters=1',
            'default_hooks.checkpoint.interval=1',
            'train_dataloader.dataset.pipeline.2.scale=(256,96)',
            'train_dataloader.dataset.pipeline.3.crop_size=(96,96)',
            'model.data_preprocessor.size=(96,96)',
            'test_dataloader.dataset.pipeline.1.scale=(256,96)',
            '{split}_dataloader.dataset.img_suffix=.png',
        ),
        'mIoU',
    ),
    'mmpretrain-resnet50': Swap(
        'mmpretrain::resnet/resnet50_8xb32_in1k.py',
        (
            'train_cfg.max_epochs=1',
            'train_dataloader.dataset.pipeline.1.scale=96',
            'test_dataloader.dataset.pipeline.1.scale=96',
            'test_dataloader.dataset.pipeline.2.crop_size=96',
            '{split}_dataloader.dataset.metainfo.classes=circle,square,triangle',
        ),
        'accuracy/top1',
    ),
}
LAYOUTS = {'mmdet': 'instances', 'mmseg': 'semantic', 'mmpretrain': 'classes'}
BACKBONES = {'FasterViT': 'fastervit-0', 'HATNet': 'hat-net-tiny'}


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """A tiny set in the layout of each toolbox."""
    folder = tmp_path_factory.mktemp('sets')
    for toolbox, layout in LAYOUTS.items():
        shapes.make_dataset(folder / toolbox, layout=layout, num_train=4, num_val=2)
    return folder


def options(swap: Swap, root: Path) -> list[str]:
    """The ``--cfg-options`` that put a config on a tiny set."""
    given = []
    for split in ('train', 'test'):
        given += [
            f'{split}_dataloader.dataset.data_root={root}/',
            f'{split}_dataloader.batch_size={4 if split == "train" else 1}',
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
        ]
        given += [text.format(split=split, root=root) for text in swap.small if '{split}' in text]
    given += [text.format(root=root) for text in swap.small if '{split}' not in text]
    # The first step of a warm-up would have next to no learning rate.
    given += ['param_scheduler=[]', 'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']
    given.append('default_hooks.checkpoint.save_optimizer=False')
    return [*given, f'experiment_name=swap{next(RUNS)}']


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    """Give back what a program changes."""
    monkeypatch.setattr(sys, 'argv', sys.argv)
    monkeypatch.setattr(sys, 'path', [*sys.path])


@pytest.mark.parametrize(
    ('name', 'tools', 'backbone'),
    [
        ('mmdet-cascade', 'ours', 'FasterViT'),
        ('mmdet-dino', 'its own', 'HATNet'),
        ('mmseg-upernet', 'its own', 'HATNet'),
        ('mmpretrain-resnet50', 'ours', 'FasterViT'),
    ],
)
def test_one_step_and_one_test(name, tools, backbone, sets, tmp_path):
    swap, toolbox = SWAPS[name], name.partition('-')[0]
    config = str(tmp_path / 'swapped.py')
    words = ['--no-pretrained', '--no-check', '--out', config]
    swap_backbone.main([swap.config, BACKBONES[backbone], *words])
    own = configs_of(toolbox).parent / 'tools'
    work_dir = ['--work-dir', str(tmp_path)]
    changes = ['--cfg-options', *options(swap, sets / toolbox)]
    if tools == 'ours':
        cli.train([config, *work_dir, *changes])
    else:
        program.main([str(own / 'train.py'), config, *work_dir, *changes])
    [checkpoint] = tmp_path.glob('*_1.pth')
    state = torch.load(checkpoint, weights_only=True)['state_dict']
    trained = {k.removeprefix('backbone.'): v for k, v in state.items() if 'backbone.' in k}
    arch = BACKBONES[backbone].rpartition('-')[2]
    out_indices = [int(k[4]) for k in trained if k.startswith('norm') and k.endswith('.weight')]
    getattr(hat_mm, backbone)(arch, out_indices=out_indices or (0, 1, 2, 3)).load_state_dict(
        trained
    )
    # A step moved its norms away from their start.
    norms = [v for k, v in trained.items() if 'norm' in k and k.endswith('.weight')]
    assert norms
    assert not any(torch.equal(norm, torch.ones_like(norm)) for norm in norms)

    changes = ['--cfg-options', *options(swap, sets / toolbox)]
    test = [config, str(checkpoint), *work_dir, *changes]
    if tools == 'ours':
        assert swap.metric in cli.test(test)
    else:
        program.main([str(own / 'test.py'), *test])
        assert [p for p in tmp_path.glob('*/*.json') if swap.metric in p.read_text()]


def test_the_program_runs_as_if_called_by_itself(run_python, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('import sys, helper\nprint(__name__, sys.argv[1:], helper.value)\n')
    (tmp_path / 'helper.py').write_text('value = 7\n')
    done = run_python('-m', 'hat_mm', str(script), '--a', 'b')
    assert done.stdout == "__main__ ['--a', 'b'] 7\n", done.stderr
    assert run_python('-m', 'hat_mm', 'no.py').stderr.startswith('usage: python -m hat_mm PROGRAM')
