"""The study of global attention: its set-up trains, and its tool reads, averages and draws."""

import copy
import functools
import json
from pathlib import Path

import numpy as np
import plugin_study as study
import pytest
import shapes
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

import hat_mm

ROOT = Path(__file__).resolve().parents[2]

CATEGORIES = [{'id': i + 1, 'name': name} for i, name in enumerate(shapes.RELATION.classes)]


@functools.cache
def parsed(backbone: str) -> Config:
    return study.load_config(backbone, {})


def config(backbone: str) -> dict:
    return copy.deepcopy(parsed(backbone).to_dict())


# --- what is trained ------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def overrides(tmp_path_factory) -> dict:
    """Changes to the configs: four images of the relation set, two steps of two of them."""
    folder = tmp_path_factory.mktemp('data') / 'relation'
    shapes.make_dataset(folder, num_train=2, num_val=2, relation=True)
    return {
        'data_root': f'{folder}/',
        'train_dataloader.dataset.data_root': f'{folder}/',
        'train_dataloader.batch_size': 2,
        'val_dataloader.dataset.data_root': f'{folder}/',
        'val_evaluator.ann_file': f'{folder}/annotations/val.json',
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 2,
    }


def test_every_detector_trains_and_is_timed(overrides):
    found = study.costs(study.BACKBONES, overrides, rounds=1)
    shown = json.loads((ROOT / 'docs/plugin_study.json').read_text())['backbones']
    assert set(shown) <= set(found) == set(study.BACKBONES)
    assert all(0 < row['seconds'] < 60 for row in found.values())
    parameters = {name: row['parameters'] for name, row in found.items()}
    assert parameters['ResNet'] < parameters['ResNet + H-MHSA'] < parameters['ResNet + HAT']
    assert parameters['Swin'] < parameters['SwinHAT']
    assert parameters['FasterViT without carriers'] < parameters['FasterViT']


@pytest.mark.usefixtures('plain_dumps')
def test_a_run_is_not_repeated_unless_something_changes(overrides, tmp_path, monkeypatch):
    arguments = (tmp_path / 'run', 'resnet-hat-toy', 5)
    metrics = study.train(*arguments, overrides)
    assert metrics['mAP'] >= -1  # COCO's for nothing to find
    assert set(metrics) == {'mAP', 'recall', 'right'}
    log = (tmp_path / 'run/output.log').read_text()
    assert 'seed: 5\n' in log
    assert 'coco/bbox_mAP' in log
    monkeypatch.setattr(Runner, 'from_cfg', lambda cfg: pytest.fail('trained again'))
    assert str(study.train(*arguments, overrides)) == str(metrics)  # nan is unlike itself
    for seed, changes in ((6, {}), (5, {'train_cfg.max_iters': 3})):
        with pytest.raises(pytest.fail.Exception, match='trained again'):
            study.train(*arguments[:2], seed, overrides | changes)


def test_all_have_one_recipe():
    """Nothing but the backbone and the channels it gives differs."""
    recipes = []
    for backbone in study.BACKBONES.values():
        cfg = config(backbone)
        cfg['model']['backbone'] = cfg['model']['neck']['in_channels'] = None
        recipes.append({k: v for k, v in cfg.items() if k not in ('backbone', 'channels')})
    assert all(recipe == recipes[0] for recipe in recipes)
    assert tuple(recipes[0]['metainfo']['classes']) == shapes.RELATION.classes
    assert Path(recipes[0]['data_root']) == Path(shapes.RELATION_SET.folder)
    [resize] = [step for step in recipes[0]['test_pipeline'] if step['type'] == 'Resize']
    assert resize['scale'] == shapes.RELATION_SIZE[::-1]


def test_peers_differ_in_the_attention_alone():
    backbones = {
        name: config(backbone)['model']['backbone'] for name, backbone in study.BACKBONES.items()
    }
    for name in ('ResNet + HAT', 'ResNet + H-MHSA'):
        [plugin] = backbones[name].pop('plugins')
        assert plugin['cfg']['type'] in ('hat_mm.HATPlugin', 'hat_mm.HMHSAPlugin')
        assert backbones[name] == backbones['ResNet']
    for name, peer, fields in (
        ('SwinHAT', 'Swin', ('hat_stages',)),
        ('FasterViT', 'FasterViT without carriers', ('carriers', 'propagate')),
    ):
        for field in fields:
            assert backbones[name]['arch'].pop(field)
            assert not backbones[peer]['arch'].pop(field)
        assert backbones[name] == backbones[peer]


@pytest.mark.parametrize('name', study.BACKBONES)
def test_the_marker_is_in_reach_of_those_that_are_global(name):
    """Theirs alone change where objects are; the plugins' last layers are made other than zero."""
    cfg = config(study.BACKBONES[name])['model']['backbone']
    register_all_modules()
    torch.manual_seed(0)
    backbone = MODELS.build(cfg).double()
    backbone.eval()
    for module in backbone.modules():
        if isinstance(module, hat_mm.HATPlugin | hat_mm.HMHSAPlugin):
            torch.nn.init.normal_(module.expand.weight)
    scenes = [shapes.draw_relation(np.random.default_rng(0), mark, left=True) for mark in (0, 1)]
    first, second = (
        torch.from_numpy(scene.image).permute(2, 0, 1)[None].double() / 255 for scene in scenes
    )
    where = torch.from_numpy(scenes[0].masks.any(axis=0)).any(0).nonzero()
    with torch.inference_mode():
        maps = list(zip(backbone(first), backbone(second), strict=True))
    changed = []
    for stride, (a, b) in zip((4, 8, 16, 32), maps, strict=True):
        start = int(where.min()) // stride
        changed.append(not torch.equal(a[..., start:], b[..., start:]))
    assert any(changed) == (name in study.GLOBAL)


# --- the tool -------------------------------------------------------------------------------------


def box(image: int, name: str, x: float, score: float | None = None, y: float = 0) -> dict:
    """A box of 20 pixels a side in COCO's form, of the truth or, with a score, predicted."""
    record = {'image_id': image, 'category_id': shapes.RELATION.classes.index(name) + 1}
    record['bbox'] = [x, y, 20, 20]
    return record if score is None else {**record, 'score': score}


def truth(*objects: dict) -> dict:
    return {'categories': CATEGORIES, 'annotations': list(objects)}


def test_the_best_box_of_the_outline_says_the_kind():
    objects = truth(
        *(box(1, 'circle-a', 0), box(1, 'square-b', 40), box(2, 'circle-b', 0)),
        *(box(2, 'circle-b', 80), box(2, 'triangle-a', 120)),
    )
    predictions = [
        # Right: the highest score at the place counts, whatever lies elsewhere or in other images.
        *(box(1, 'circle-a', 1, 0.6), box(1, 'circle-b', 0, 0.4), box(1, 'circle-b', 90, 0.9)),
        # Wrong.
        *(box(1, 'square-a', 42, 0.3), box(1, 'square-b', 40, 0.2)),
        # Wrong: another outline at the same place has no say.
        *(box(2, 'circle-a', 0, 0.3), box(2, 'square-b', 0, 0.9)),
        # Not found: too far off, or of another outline; neither right nor wrong.
        *(box(2, 'circle-b', 95, 0.9), box(2, 'square-a', 120, 0.9)),
    ]
    assert study.marker_right(objects, predictions) == pytest.approx(1 / 3)


def test_nothing_found_is_no_number():
    assert str(study.marker_right(truth(box(1, 'circle-a', 0)), [])) == 'nan'


def test_the_results_of_the_docs_are_rendered_again(tmp_path, capsys):
    """Table and plot come from the file of results alone."""
    paths = ['--out', str(ROOT / 'docs/plugin_study.json'), '--plot', str(tmp_path / 'a/study.png')]
    study.main(['--render', *paths])
    *lines, command = capsys.readouterr().out.splitlines()
    page = (ROOT / 'docs/plugins/study.md').read_text().splitlines()
    rows = [' | '.join(cell.strip() for cell in line.split('|')).strip() for line in lines[2:-1]]
    assert [row.split(' | ')[0].strip('| ') for row in rows] == list(
        json.loads((ROOT / 'docs/plugin_study.json').read_text())['backbones']
    )
    assert set(rows) <= set(page)
    assert command.startswith('`python tools/analysis_tools/plugin_study.py`; 400 steps')
    with Image.open(tmp_path / 'a/study.png') as picture:
        assert picture.width > picture.height > 300
        reds = [
            count
            for count, colour in picture.convert('RGB').getcolors(1 << 20)
            if colour == (214, 39, 40)
        ]
    assert sum(reds) > 100  # those with global attention


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--seeds', '0'], '--seeds must be two or more different ones'),
        (['--seeds', '1', '1'], '--seeds must be two or more different ones'),
        (['--seeds', '0', '-1'], '--seeds at least 0'),
        (['--jobs', '0'], '--jobs must be at least 1'),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        study.parse_args(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
