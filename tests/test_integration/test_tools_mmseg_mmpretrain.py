"""The same two tools train and test a segmentor and a classifier."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from hat_mm.engine import cli

ROOT = Path(__file__).resolve().parents[2]

TINY = dict(
    embed_dims=16, stem_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4), window_size=2,
    carriers=(2,),
)  # fmt: skip

RUN = """
backbone = dict(type='hat_mm.FasterViT', arch={arch}, out_indices=(3,))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
val_cfg = None
test_cfg = dict(type='TestLoop')
def loader(split):
    return dict(
        batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dataset,
    )
train_dataloader = loader('train')
test_dataloader = loader('test')
randomness = dict(seed=0)
"""

MMSEG = """
default_scope = 'mmseg'
dataset = dict(
    type='BaseSegDataset', data_root={root!r}, img_suffix='.png', seg_map_suffix='.png',
    data_prefix=dict(img_path='images', seg_map_path='maps'),
    metainfo=dict(classes=('dark', 'light'), palette=[[0, 0, 0], [255, 255, 255]]),
    pipeline=[
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs'),
    ],
)
"""
MMSEG_MODEL = """
backbone['out_indices'] = (0, 1, 2, 3)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[127.5] * 3, std=[127.5] * 3, size=(64, 64)
    ),
    backbone=backbone,
    decode_head=dict(
        type='UPerHead', in_channels=[16, 32, 64, 128], in_index=[0, 1, 2, 3], pool_scales=(1, 2),
        channels=8, num_classes=2, norm_cfg=dict(type='SyncBN'),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
default_hooks = dict(visualization=dict(type='SegVisualizationHook', interval=1))
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
"""

MMPRETRAIN = """
default_scope = 'mmpretrain'
dataset = dict(
    type='CustomDataset', data_root={root!r}, data_prefix='classes',
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
)
"""
MMPRETRAIN_MODEL = """
data_preprocessor = dict(num_classes=2, mean=[127.5] * 3, std=[127.5] * 3)
model = dict(
    type='ImageClassifier',
    backbone=backbone,
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', in_channels=128, num_classes=2,
              loss=dict(type='CrossEntropyLoss')),
)
test_evaluator = dict(type='Accuracy', topk=1)
default_hooks = dict(visualization=dict(type='VisualizationHook'))
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
custom_hooks = [dict(type='EMAHook', momentum=0.5)]
"""

pytestmark = pytest.mark.usefixtures('plain_dumps')


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """Four images, dark and light, as folders of two classes and with label maps."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for folder in ('images', 'maps', 'classes/dark', 'classes/light'):
        (root / folder).mkdir(parents=True)
    for index in range(4):
        label = index % 2
        image = rng.integers(0, 100, (64, 64, 3), dtype=np.uint8) + np.uint8(150 * label)
        cv2.imwrite(str(root / f'images/{index}.png'), image)
        cv2.imwrite(str(root / f'maps/{index}.png'), np.full((64, 64), label, np.uint8))
        cv2.imwrite(str(root / f'classes/{("dark", "light")[label]}/{index}.png'), image)
    return root


def trained(name, text, root, folder) -> tuple[str, str]:
    """Train one epoch; returns config and checkpoint."""
    config = folder / f'tiny_{name}.py'
    config.write_text(text.format(root=str(root), arch=TINY))
    cli.train([str(config), '--work-dir', str(folder / 'run')])
    return str(config), str(folder / 'run/epoch_1.pth')


@pytest.fixture(scope='module')
def segmentor(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('mmseg')
    return trained('mmseg', MMSEG + RUN + MMSEG_MODEL, images, folder)


@pytest.fixture(scope='module')
def classifier(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('mmpretrain')
    return trained('mmpretrain', MMPRETRAIN + RUN + MMPRETRAIN_MODEL, images, folder)


def test_mmseg_writes_prediction_maps_and_pictures(segmentor, tmp_path):
    metrics = cli.test(
        [*segmentor, '--work-dir', str(tmp_path), '--out', str(tmp_path / 'maps'),
         '--show-dir', str(tmp_path / 'painted')]
    )  # fmt: skip
    assert set(metrics) >= {'mIoU', 'aAcc'}
    assert len(list((tmp_path / 'maps').glob('*.png'))) == 4
    assert list((tmp_path / 'painted').rglob('*.png'))


def test_mmseg_tta(segmentor, tmp_path):
    assert 'mIoU' in cli.test([*segmentor, '--work-dir', str(tmp_path), '--tta'])


def test_mmseg_deploy_predicts_the_same(segmentor, forms, tmp_path):
    config, checkpoint = segmentor
    out = tmp_path / 'out.pkl'
    path = tmp_path / 'dumping.py'
    dump = f"dict(type='DumpResults', out_file_path={str(out)!r})"
    path.write_text(Path(config).read_text() + f'test_evaluator = [test_evaluator, {dump}]\n')

    def logits(*flags):
        cli.test([str(path), checkpoint, '--work-dir', str(tmp_path / 'run'), *flags])
        return torch.stack(
            [sample['seg_logits']['data'] for sample in pickle.loads(out.read_bytes())]
        )

    plain, deployed = logits(), logits('--deploy')
    assert forms == [False, False, True, True]
    assert plain.std() > 1e-2
    torch.testing.assert_close(deployed, plain, rtol=0, atol=1e-5)


# --- classification: the model's weights are an average -------------------------------------------


def scores(config, checkpoint, folder, *flags) -> np.ndarray:
    """What a classifier predicts for the images, (image, class)."""
    out = folder / 'scores.pkl'
    work_dir = str(folder / 'run')  # a run writes its config there
    cli.test([str(config), str(checkpoint), '--work-dir', work_dir, '--out', str(out), *flags])
    return np.stack([prediction['pred_score'] for prediction in pickle.loads(out.read_bytes())])


@pytest.fixture(scope='module')
def plain_scores(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp('plain')
    found = scores(*classifier, folder, '--show-dir', str(folder / 'painted'))
    assert list((folder / 'painted').rglob('*.png'))
    return found


def test_mmpretrain_dumps_metrics_and_flips(classifier, tmp_path):
    out = tmp_path / 'metrics.json'
    metrics = cli.test(
        [*classifier, '--work-dir', str(tmp_path), '--out', str(out), '--out-item', 'metrics',
         '--tta']
    )  # fmt: skip
    assert 'accuracy/top1' in metrics
    assert json.loads(out.read_text()) == pytest.approx(metrics)


def test_deploy_predicts_the_same(classifier, plain_scores, forms, tmp_path):
    deployed = scores(*classifier, tmp_path, '--deploy')
    assert forms == [True, True]
    assert deployed.shape == (4, 2)
    assert np.abs(deployed - plain_scores).max() <= 1e-5


def test_deploy_and_tta_keep_to_the_weights_of_the_hook(classifier, plain_scores, tmp_path):
    config, checkpoint = classifier
    average = torch.load(checkpoint, weights_only=True)['state_dict']
    raw = {k: v * 1.5 if k.endswith(('weight', 'bias')) else v for k, v in average.items()}
    others = {f'module.{key}': value for key, value in raw.items()}
    others['steps'] = torch.tensor(2)
    both, raw_alone, no_hook = tmp_path / 'both.pth', tmp_path / 'raw.pth', tmp_path / 'plain.py'
    torch.save({'state_dict': average, 'ema_state_dict': others}, both)
    torch.save({'state_dict': raw}, raw_alone)
    no_hook.write_text(Path(config).read_text() + 'custom_hooks = []\n')
    raw_scores = scores(no_hook, raw_alone, tmp_path)
    assert np.abs(raw_scores - plain_scores).max() > 1e-2
    flipped = scores(no_hook, checkpoint, tmp_path, '--tta')
    for settings, flags, expected in (
        ("type='mmengine.EMAHook', strict_load=True", ['--deploy'], plain_scores),
        ("type='EMAHook', strict_load=True", ['--tta', '--deploy'], flipped),
        ("type='EMAHook', evaluate_on_ema=False", ['--deploy'], raw_scores),
    ):
        path = tmp_path / 'averaged.py'
        path.write_text(Path(config).read_text() + f'custom_hooks = [dict({settings})]\n')
        found = scores(path, both, tmp_path, *flags)
        assert np.abs(found - expected).max() <= 1e-5, settings


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('config', 'folder'),
    [
        ('mask-rcnn_hat-net-tiny_fpn_1x_coco', 'data/coco/'),
        ('hat-net-tiny_fpn_4xb4-80k_ade20k-512x512', 'data/ade/ADEChallengeData2016'),
        ('hat-net-tiny_8xb128_in1k', 'data/imagenet'),
    ],
)
def test_missing_data_name_the_page_that_helps(config, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / f'configs/hat_net/{config}.py')
    assert cli.run_tool(lambda: cli.train([path]), 'train.py') == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if 'error: ' in line]
    assert f"data folder '{folder}' does not exist" in line
    assert 'docs/datasets.md says what belongs there' in line
