"""Scores of detections, whole pictures beside tiles, and the study on real pictures."""

import json

import coco_scores
import numpy as np
import pytest
import real_study as study
import shapes
import whole_and_tiles
from mmengine.config import Config

BOX = [10.0, 10.0, 20.0, 20.0]


def truth(path, boxes):
    coco = dict(
        images=[dict(id=0, file_name='a.png', height=100, width=2000)],
        categories=[dict(id=3, name='thing')],
        annotations=[
            dict(id=i, image_id=0, category_id=3, bbox=box, area=box[2] * box[3], iscrowd=0)
            for i, box in enumerate(boxes, 1)
        ],
    )
    path.write_text(json.dumps(coco))
    return path


def found(boxes, scores):
    return [
        dict(image_id=0, category_id=3, bbox=box, score=score)
        for box, score in zip(boxes, scores, strict=True)
    ]


def test_scores(tmp_path):
    path = truth(tmp_path / 'truth.json', [BOX, [50.0, 10.0, 20.0, 20.0]])
    perfect = coco_scores.score(path, found([BOX, [50.0, 10.0, 20.0, 20.0]], [0.9, 0.8]))
    assert (perfect.ap, perfect.ap50, perfect.ap75) == (1, 1, 1)
    assert perfect.precision.shape == (101,)
    half = coco_scores.score(path, found([BOX], [0.9]))
    assert half.ap50 == pytest.approx(51 / 101)
    loose = coco_scores.score(path, found([[10.0, 10.0, 20.0, 12.0]], [0.9]))  # IoU 0.6
    assert loose.ap50 == pytest.approx(51 / 101)
    assert loose.ap75 == 0
    assert coco_scores.score(path, []).ap == 0


def test_more_than_a_hundred_objects_count(tmp_path):
    boxes = [[12.0 * i, 5.0, 10.0, 10.0] for i in range(150)]
    path = truth(tmp_path / 'truth.json', boxes)
    assert coco_scores.score(path, found(boxes, np.linspace(1, 0.5, 150).tolist())).ap == 1


# --- trained for a moment -------------------------------------------------------------------------


@pytest.fixture(scope='module')
def result(tmp_path_factory):
    """A run of one epoch on a few shapes, in the place of the trees."""
    folder = tmp_path_factory.mktemp('study')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shapes.make_dataset('data/trees', num_train=4, num_val=2)
        annotations = folder / 'data/trees/annotations'
        (annotations / 'test.json').write_text((annotations / 'val.json').read_text())
        (folder / 'data/trees/test').symlink_to(folder / 'data/trees/val')
        words = ['--data', 'trees', '--backbones', 'resnet-wide-toy', '--seeds', '3']
        words += ['--epochs', '1', '--jobs', '1', '--work-dir', 'work']
        words += ['--out', 'results', '--plot', 'plot.png']
        study.main(words)
        made = (folder / 'results/trees_resnet-wide-toy_3.json').read_text()
        patch.setattr(study, 'train', lambda **_: pytest.fail('trained again'))
        study.main(words)
        with pytest.raises(study.UserError, match='was made with --epochs 1'):
            study.main([*words, '--epochs', '2', '--seeds', '4', '3'])
        yield folder, json.loads(made)


@pytest.mark.slow
def test_a_run_is_measured(result, capsys):
    folder, run = result
    assert run['steps'] == 1
    assert run['seed'] == 3
    assert set(run['val']) == {'0.5', '1.0', '2.0'}
    for scores in (run['test'], *run['val'].values()):
        assert set(scores) == {'ap', 'ap50', 'ap75'}
        assert all(0 <= value <= 1 for value in scores.values())
    assert 2e6 < run['parameters'] < 3e6
    assert run['macs'] > 1e9
    study.main(['--render', '--out', f'{folder}/results', '--plot', f'{folder}/plot.png'])
    assert '| ResNet ' in capsys.readouterr().out
    assert (folder / 'plot.png').stat().st_size > 5000


@pytest.mark.slow
def test_time_is_measured_apart(result, capsys, monkeypatch):
    monkeypatch.chdir(result[0])
    words = ['--data', 'trees', '--backbones', 'resnet-wide-toy', '--out', 'results']
    study.measure_seconds(study.parse_args(words), rounds=1)
    seconds = json.loads((result[0] / 'results/seconds.json').read_text())
    assert set(seconds['trees']) == {'resnet-wide-toy'}
    step, picture = (seconds['trees']['resnet-wide-toy'][k] for k in ('training_step', 'picture'))
    assert step > 0
    assert picture > 0
    assert 'torch' in seconds['trees']['resnet-wide-toy']['measured']
    study.main(['--render', '--out', 'results', '--plot', 'plot.png'])
    assert f'| {step:.2f}' in capsys.readouterr().out


@pytest.mark.slow
def test_all_have_one_recipe(tmp_path, monkeypatch, result):
    monkeypatch.chdir(result[0])
    recipes = []
    for name in study.BACKBONES.values():
        folder = tmp_path / name
        folder.mkdir()
        cfg = study.make_config('trees', name, seed=0, epochs=2, folder=folder).to_dict()
        cfg['model']['backbone'] = cfg['model']['neck']['in_channels'] = cfg['work_dir'] = None
        recipes.append({k: v for k, v in cfg.items() if k not in ('backbone', 'channels')})
    assert all(recipe == recipes[0] for recipe in recipes)


@pytest.mark.slow
def test_whole_and_tiles(result, capsys, tmp_path, monkeypatch):
    folder, _ = result
    monkeypatch.chdir(folder)
    run = folder / 'work/trees_resnet-wide-toy_3_1'
    words = [str(run / 'config.py'), str(run / 'epoch_1.pth'), '--out', str(tmp_path / 'out')]
    whole_and_tiles.main([*words, '--tile', '64'])
    table = capsys.readouterr().out
    assert 'AP50' in table
    assert 'whole' in table
    assert 'tiles' in table
    assert (tmp_path / 'out/precision_recall.png').stat().st_size > 5000
    coco = json.loads((folder / 'data/trees/annotations/val.json').read_text())
    ids = {image['id'] for image in coco['images']}
    for way in whole_and_tiles.WAYS:
        measured = json.loads((tmp_path / f'out/{way}.json').read_text())
        assert measured['seconds'] > 0
        assert {one['image_id'] for one in measured['detections']} <= ids
        assert {one['category_id'] for one in measured['detections']} <= {1, 2, 3}


def test_whole_and_tiles_refuses_other_configs(tmp_path):
    path = tmp_path / 'seg.py'
    Config(dict(default_scope='mmseg', model=dict(type='X'))).dump(path)
    with pytest.raises(whole_and_tiles.UserError, match='no config of mmdet'):
        whole_and_tiles.main([str(path), 'x.pth', '--out', str(tmp_path)])


@pytest.mark.parametrize('change', [['--jobs', '0'], ['--epochs', '0'], ['--seeds', '-1']])
def test_wrong_arguments(change, capsys):
    with pytest.raises(SystemExit):
        study.parse_args(change)
    assert 'at least' in capsys.readouterr().err
