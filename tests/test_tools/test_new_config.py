"""Configs for a user's own data: what is wrong is reported, what is written trains."""

import copy
import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import cv2
import new_config
import numpy as np
import PIL.Image
import pytest
import shapes
from mmengine.config import Config

from hat_mm.engine import cli, own_data
from hat_mm.engine.cli import UserError

DETECTORS = ['faster-rcnn', 'mask-rcnn', 'cascade-mask-rcnn', 'retinanet', 'dino']
SMALL = ['faster-rcnn', 'mask-rcnn', 'retinanet', 'upernet']


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """Shapes in all three layouts of the toolboxes."""
    folder = tmp_path_factory.mktemp('data')
    for layout in ('instances', 'semantic', 'classes'):
        shapes.make_dataset(folder / layout, layout=layout, num_train=8, num_val=3)
    # ADE20K counts its classes from 1, other label maps from 0.
    for path in folder.glob('semantic/annotations/*/*.png'):
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), np.where(labels > 0, labels - 1, own_data.IGNORED))
    (folder / 'names.txt').write_text('background\ncircle\nsquare\ntriangle\n')
    return folder


def arguments(data: Path, model: str) -> list[str]:
    if model == 'classifier':
        return ['--train', f'{data}/classes/train', '--val', f'{data}/classes/val']
    if model == 'upernet':
        pairs = [
            [f'--{split}', f'{data}/semantic/annotations/{name}', f'{data}/semantic/images/{name}']
            for split, name in (('train', 'training'), ('val', 'validation'))
        ]
        return [*pairs[0], *pairs[1], '--classes', f'{data}/names.txt']
    pairs = [
        [f'--{split}', f'{data}/instances/annotations/{split}.json', f'{data}/instances/{split}']
        for split in ('train', 'val')
    ]
    return [*pairs[0], *pairs[1]]


def write(data: Path, model: str, backbone: str, out: Path, *more: str) -> Config:
    words = [*arguments(data, model), '--model', model, '--backbone', backbone]
    new_config.main([*words, '--out', str(out), *more])
    return Config.fromfile(out)


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize('backbone', ['fastervit-0', 'hat-net-tiny', 'fastervit-4-21k-384'])
@pytest.mark.parametrize('model', new_config.MODELS)
def test_every_model_is_written_for_published_weights(data, tmp_path, model, backbone):
    cfg = write(data, model, backbone, tmp_path / 'own.py', '--batch-size', '4')
    classes = 4 if model == 'upernet' else 3
    assert len(cfg.classes) == classes
    assert cfg.model.backbone.type.startswith('hat_mm.')
    text = json.dumps(cfg.model.to_dict(), default=str)
    assert f'"num_classes": {classes}' in text
    assert '"num_classes": 80' not in text
    assert '"num_classes": 150' not in text
    assert '"num_classes": 1000' not in text
    assert cfg.model.backbone.init_cfg.checkpoint.startswith('https://')
    maps = cfg.model.get('neck', {}).get('in_channels')
    if model in DETECTORS:
        assert len(maps) == len(cfg.model.backbone.get('out_indices', (0, 1, 2, 3)))
    published = Config.fromfile(next(new_config.BASES.glob(f'recipes/{cfg_recipe(model)}.py')))
    if model != 'classifier':
        base = published.optim_wrapper.optimizer.lr / published.auto_scale_lr.base_batch_size
        assert cfg.optim_wrapper.optimizer.lr == pytest.approx(4 * base)


def cfg_recipe(model: str) -> str:
    return new_config.MODELS[model].recipe


@pytest.mark.parametrize('model', SMALL)
def test_what_is_written_for_small_backbones_trains(data, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / 'configs' / 'own.py'
    cfg = write(data, model, 'fastervit-toy', out, '--epochs', '1', '--batch-size', '2')
    assert cfg.model.backbone.get('init_cfg', {}).get('type') != 'Pretrained'
    assert (cfg.get('max_epochs'), cfg.get('max_iters')) in ((1, None), (None, 4))
    workers = ['train_dataloader.num_workers=0', 'val_dataloader.num_workers=0']
    workers += [f'{word[: -len("num_workers=0")]}persistent_workers=False' for word in workers]
    cli.train([str(out), '--work-dir', str(tmp_path / 'run'), '--cfg-options', *workers])
    assert list((tmp_path / 'run').glob('*_[14].pth'))


def test_the_scale_follows_the_objects():
    def scale(sides, sizes):
        split = own_data.Split(Path(), Path(), ())
        split.sides, split.sizes = np.array(sides, float), sizes
        return new_config.choose_scale(split)

    assert scale([40, 50], [(600, 800)]) == 1
    assert scale([400, 500], [(1333, 2666)]) == 0.5
    assert scale([40], [(2666, 1333)]) == 0.8  # not below 32 pixels
    assert scale([16], [(500, 500)]) == 2
    assert scale([4], [(500, 500)]) == 2
    assert scale([], [(1333, 2666)]) == 0.5
    assert scale([100], [(480, 640)] * 99 + [(6000, 4000)]) == 1  # one large picture


def test_many_objects_raise_the_limits(data, tmp_path):
    few = write(data, 'retinanet', 'fastervit-toy', tmp_path / 'few.py')
    assert few.model.test_cfg.max_per_img == 100
    assert 'metric_items' not in few.val_evaluator
    crowded = tmp_path / 'crowded'
    shutil.copytree(data / 'instances', crowded / 'instances')
    path = crowded / 'instances/annotations/val.json'
    coco = json.loads(path.read_text())
    coco['annotations'] = [dict(coco['annotations'][0], id=i) for i in range(1, 151)]
    path.write_text(json.dumps(coco))
    many = write(crowded, 'retinanet', 'fastervit-toy', tmp_path / 'many.py')
    assert many.model.test_cfg.max_per_img == 300
    assert 'mAP' not in many.val_evaluator.metric_items
    two = write(crowded, 'faster-rcnn', 'fastervit-0', tmp_path / 'two.py')
    assert two.model.test_cfg.rcnn.max_per_img == 300
    assert two.model.test_cfg.rpn.max_per_img >= 600


# --- other formats --------------------------------------------------------------------------------


def as_voc(coco: dict, folder: Path) -> None:
    folder.mkdir(parents=True)
    names = {c['id']: c['name'] for c in coco['categories']}
    for image in coco['images']:
        root = ET.Element('annotation')
        for a in coco['annotations']:
            if a['image_id'] == image['id']:
                entry = ET.SubElement(root, 'object')
                ET.SubElement(entry, 'name').text = names[a['category_id']]
                box = ET.SubElement(entry, 'bndbox')
                x, y, w, h = a['bbox']
                corners = dict(xmin=x + 1, ymin=y + 1, xmax=x + w, ymax=y + h)
                for name, value in corners.items():
                    ET.SubElement(box, name).text = str(round(value))
        ET.ElementTree(root).write(folder / f'{Path(image["file_name"]).stem}.xml')


def as_yolo(coco: dict, folder: Path) -> None:
    folder.mkdir(parents=True)
    order = [c['id'] for c in coco['categories']]
    for image in coco['images']:
        lines = []
        for a in coco['annotations']:
            if a['image_id'] == image['id']:
                x, y, w, h = a['bbox']
                numbers = [(x + w / 2) / image['width'], (y + h / 2) / image['height']]
                numbers += [w / image['width'], h / image['height']]
                number = order.index(a['category_id'])
                lines.append(' '.join(map(str, [number, *numbers])))
        (folder / f'{Path(image["file_name"]).stem}.txt').write_text('\n'.join(lines))


@pytest.mark.parametrize('write_as', [as_voc, as_yolo])
def test_other_formats_give_the_same_boxes(data, tmp_path, write_as):
    pytest.importorskip('supervision')
    truth = {}
    words = []
    for split in ('train', 'val'):
        truth[split] = json.loads((data / f'instances/annotations/{split}.json').read_text())
        write_as(truth[split], tmp_path / 'labels' / split)
        words += [f'--{split}', str(tmp_path / 'labels' / split), f'{data}/instances/{split}']
    if write_as is as_yolo:
        names = tmp_path / 'data.yaml'
        names.write_text(f'names: {[c["name"] for c in truth["train"]["categories"]]}')
        words += ['--classes', str(names)]
    out = tmp_path / 'own.py'
    model = ['--model', 'faster-rcnn', '--backbone', 'fastervit-toy']
    new_config.main([*words, *model, '--out', str(out)])

    def boxes(coco):
        names = {c['id']: c['name'] for c in coco['categories']}
        files = {i['id']: i['file_name'] for i in coco['images']}
        return sorted(
            (files[a['image_id']], names[a['category_id']], *np.round(a['bbox']))
            for a in coco['annotations']
        )

    order = set()
    for split in ('train', 'val'):
        found = json.loads((tmp_path / f'own_{split}.json').read_text())
        assert boxes(found) == boxes(truth[split])
        order.add(tuple(c['name'] for c in found['categories']))
    assert order == {tuple(Config.fromfile(out).classes)}
    again = [*words, *model, '--out', str(out)]
    out.unlink()
    with pytest.raises(UserError, match=r'own_train\.json exists'):
        new_config.main(again)
    new_config.main([*again, '--force'])
    before = {path: path.read_bytes() for path in tmp_path.glob('own*')}
    assert len(before) == 3
    with pytest.raises(UserError, match='has no'):
        new_config.main([*again, '--force', '--val', str(tmp_path), str(tmp_path)])
    assert {path: path.read_bytes() for path in tmp_path.glob('own*')} == before
    masks = ['--model', 'mask-rcnn', '--backbone', 'fastervit-toy']
    with pytest.raises(UserError, match='mend'):  # boxes are no masks
        new_config.main([*words, *masks, '--out', str(tmp_path / 'masks.py')])
    # Nothing is left that would stop the next attempt.
    assert not list(tmp_path.glob('masks*'))


# --- what is wrong --------------------------------------------------------------------------------


def broken(coco: dict, kind: str) -> dict:
    first = coco['annotations'][0]
    if kind == 'missing':
        coco['images'][0]['file_name'] = 'nowhere.png'
    elif kind == 'twice':
        coco['annotations'][1]['id'] = first['id']
    elif kind == 'image twice':
        coco['images'][1]['id'] = coco['images'][0]['id']
    elif kind == 'stranger':
        first['category_id'] = 77
    elif kind == 'maskless':
        first['segmentation'] = []
    elif kind == 'outside':
        first['bbox'] = [5000, 5000, 10, 10]
    elif kind == 'beyond':
        first['bbox'][2] = 5000
    elif kind == 'empty class':
        coco['categories'].append(dict(id=99, name='hexagon'))
    elif kind == 'empty picture':
        image = coco['images'][0]['id']
        coco['annotations'] = [a for a in coco['annotations'] if a['image_id'] != image]
    elif kind == 'nothing':
        coco['annotations'] = []
    elif kind == 'zero':
        first['id'] = 0
    elif kind == 'class twice':
        coco['categories'][1]['id'] = coco['categories'][0]['id']
    elif kind == 'no number':
        first['bbox'][0] = float('nan')
    elif kind == 'no size':
        coco['images'][0]['height'] = 0
    elif kind == 'two corners':
        first['segmentation'] = [[1, 1, 9, 9]]
    elif kind == 'flat polygon':
        first['segmentation'] = [1, 1, 9, 9, 1, 9]
    elif kind == 'points':
        for annotation in coco['annotations']:
            annotation['bbox'] = [0.4, 0.5, 0.1, 0.1]
    elif kind == 'thin':
        first['bbox'][2] = 0.5
    return coco


@pytest.mark.parametrize(
    ('kind', 'words', 'fatal'),
    [
        ('missing', 'pictures that are not in', True),
        ('twice', 'ids of annotations that occur twice', True),
        ('image twice', 'ids of images that occur twice', True),
        ('stranger', 'objects of an unknown picture or class', True),
        ('maskless', 'objects without a mask', True),
        ('nothing', 'no object at all', True),
        ('zero', 'objects with the id 0', False),
        ('flat polygon', 'objects without a mask', True),
        ('points', 'empty or outside', True),
        ('class twice', 'ids of categories that occur twice: 1', True),
        ('no number', 'box that is no number', True),
        ('no size', 'pictures without height and width', True),
        ('two corners', 'objects without a mask', True),
        ('thin', 'empty or outside', False),
        ('outside', 'empty or outside of their picture', False),
        ('beyond', 'reach beyond their picture', False),
        ('empty class', 'classes without an example: 1 (hexagon)', False),
        ('empty picture', 'pictures without an object: 1', False),
    ],
)
def test_faults_are_reported(data, tmp_path, capsys, kind, words, fatal):
    shutil.copytree(data / 'instances', tmp_path / 'instances')
    for split in ('train', 'val'):
        path = tmp_path / f'instances/annotations/{split}.json'
        path.write_text(json.dumps(broken(json.loads(path.read_text()), kind)))
    out = tmp_path / 'own.py'
    if fatal:
        with pytest.raises(UserError, match='mend'):
            write(tmp_path, 'mask-rcnn', 'fastervit-toy', out)
    else:
        write(tmp_path, 'mask-rcnn', 'fastervit-toy', out)
    assert out.exists() != fatal
    report = capsys.readouterr().out
    assert f'{"error" if fatal else "warning"}: ' in report
    assert words in report


def without(coco: dict, name: str) -> str:
    for annotation in coco['annotations']:
        annotation.pop(name, None)
    return json.dumps(coco)


def test_a_file_of_another_format_is_an_error(data, tmp_path):
    coco = json.loads((data / 'instances/annotations/train.json').read_text())
    texts = ['[]', '{', '{"images": [{}], "annotations": [], "categories": []}']
    # mmdet reads the area, COCO's evaluation reads iscrowd.
    texts += [without(copy.deepcopy(coco), name) for name in ('area', 'iscrowd', 'bbox')]
    coco['annotations'][0]['bbox'] = [1, 2]
    for text in [*texts, json.dumps(coco)]:
        path = tmp_path / 'instances/annotations/train.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        with pytest.raises(UserError, match="not in COCO's format"):
            write(tmp_path, 'faster-rcnn', 'fastervit-toy', tmp_path / 'own.py')


def test_label_maps_are_checked(data, tmp_path, capsys):
    shutil.copytree(data / 'semantic', tmp_path / 'semantic')
    shutil.copy(data / 'names.txt', tmp_path)
    maps = sorted((tmp_path / 'semantic/annotations/training').glob('*.png'))
    labels = cv2.imread(str(maps[0]), cv2.IMREAD_UNCHANGED)
    labels[0, 0] = 9
    cv2.imwrite(str(maps[0]), labels)
    maps[1].unlink()
    cv2.imwrite(str(maps[2]), labels[:-1] * 0)
    cv2.imwrite(str(maps[3]), np.dstack([labels] * 3))
    maps[4].write_bytes(b'damaged')
    bits = cv2.imread(str(maps[5]), cv2.IMREAD_UNCHANGED) > 100
    PIL.Image.fromarray(bits).save(maps[5])  # one bit a pixel
    with pytest.raises(UserError, match='mend'):
        write(tmp_path, 'upernet', 'fastervit-toy', tmp_path / 'own.py')
    report = capsys.readouterr().out
    assert f'other values than 0 to 3 and 255: 1 ({maps[0].name} with 9)' in report
    assert 'pictures without a .png' in report
    assert 'another size than their picture: 1' in report
    assert f'several channels, which must have one: 1 ({maps[3].name})' in report
    assert 'cannot be read, or their label maps: 1' in report


def test_classes_of_both_splits_must_agree(data, tmp_path, capsys):
    shutil.copytree(data / 'classes', tmp_path / 'classes')
    (tmp_path / 'classes/val/circle').rename(tmp_path / 'classes/val/zircle')
    with pytest.raises(UserError, match='mend'):
        write(tmp_path, 'classifier', 'fastervit-0', tmp_path / 'own.py')
    assert 'classes of --train or --val alone: 2 (circle, zircle)' in capsys.readouterr().out


def test_a_config_is_not_overwritten(data, tmp_path):
    out = tmp_path / 'own.py'
    out.write_text('mine = 1')
    with pytest.raises(UserError, match='--force'):
        write(data, 'retinanet', 'fastervit-toy', out)
    assert out.read_text() == 'mine = 1'
    write(data, 'retinanet', 'fastervit-toy', out, '--force')


def test_a_config_behind_a_link_finds_its_bases(data, tmp_path):
    for link, target in (('near', 'far/away/from/here'), ('deep/down/below', 'far')):
        (tmp_path / target).mkdir(parents=True, exist_ok=True)
        (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / target)
        assert write(data, 'retinanet', 'fastervit-toy', tmp_path / link / 'run/own.py').model


def test_splits_with_the_same_annotations_are_warned_of(data, tmp_path, capsys):
    words = arguments(data, 'retinanet')
    words[4:6] = words[1:3]
    model = ['--model', 'retinanet', '--backbone', 'fastervit-toy']
    new_config.main([*words, *model, '--out', str(tmp_path / 'own.py')])
    assert 'same annotations for --train and --val' in capsys.readouterr().out


def test_each_split_has_its_suffix(data, tmp_path):
    shutil.copytree(data / 'semantic', tmp_path / 'semantic')
    shutil.copy(data / 'names.txt', tmp_path)
    for path in (tmp_path / 'semantic/images/validation').iterdir():
        cv2.imwrite(str(path.with_suffix('.jpg')), cv2.imread(str(path)))
        path.unlink()
    cfg = write(tmp_path, 'upernet', 'fastervit-toy', tmp_path / 'own.py')
    assert cfg.train_dataloader.dataset.img_suffix == '.png'
    assert cfg.val_dataloader.dataset.img_suffix == '.jpg'


def test_the_wrong_folders_of_other_formats(data, tmp_path):
    pytest.importorskip('supervision')
    (tmp_path / 'empty').mkdir()
    words = ['--train', str(tmp_path / 'empty'), f'{data}/instances/train']
    words += ['--val', str(tmp_path / 'empty'), f'{data}/instances/val']
    words += ['--model', 'retinanet', '--backbone', 'fastervit-toy', '--out', f'{tmp_path}/a.py']
    with pytest.raises(UserError, match=r'has no \.xml files'):
        new_config.main(words)
    with pytest.raises(UserError, match=r'has no \.txt files'):
        new_config.main([*words, '--classes', f'{data}/names.txt'])
    words[2] = str(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='there is no folder'):
        new_config.main(words)


def test_a_model_without_a_small_recipe_says_which_have_one(data, tmp_path):
    with pytest.raises(UserError, match='faster-rcnn, mask-rcnn, retinanet, upernet have one'):
        write(data, 'dino', 'fastervit-toy', tmp_path / 'own.py')


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (['--backbone', 'fastervit-9'], "'fastervit-9' is none of"),
        (['--out', 'a.b.py'], 'without further dots'),
        (['--out', 'a.json'], 'must be a .py file'),
        (['--epochs', '0'], 'at least 1'),
        (['--scale', '0'], 'above 0'),
        (['--classes', 'names.txt'], 'is for YOLO and label maps'),
        (['--model', 'classifier', '--train', 'a', '--val', 'b', '--scale', '2'], 'no --scale'),
        (['--val', 'x'], '--val takes 2 paths'),
        (['--model', 'upernet'], 'needs --classes'),
    ],
)
def test_wrong_arguments(data, tmp_path, capsys, change, words):
    given = [*arguments(data, 'faster-rcnn'), '--model', 'faster-rcnn', '--backbone']
    given += ['fastervit-toy', '--out', str(tmp_path / 'own.py')]
    with pytest.raises(SystemExit):
        new_config.parse_args([*given, *change])
    assert words in capsys.readouterr().err
