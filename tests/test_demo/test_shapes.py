"""The toy data set: masks that tell the truth, nothing lost."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import shapes as toy
from PIL import Image
from pycocotools.coco import COCO

SMALL = {'num_train': 6, 'num_val': 3}

of_layouts = pytest.mark.parametrize('layout', toy.LAYOUTS)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A set in each layout, below one folder."""
    folder = tmp_path_factory.mktemp('toy')
    for layout in toy.LAYOUTS:
        assert toy.make_dataset(folder / layout, layout=layout, **SMALL)
    return folder


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


# --- the files ------------------------------------------------------------------------------------


def test_coco_layout_agrees_with_the_images(small):
    folder = small / 'instances'
    coco = COCO(str(folder / 'annotations/train.json'))
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == ['circle', 'square', 'triangle']
    assert len(coco.imgs) == 6 == len(list((folder / 'train').glob('*.png')))
    for record, scene in zip(coco.imgs.values(), toy.scenes('train', 6, 0, toy.EASY), strict=True):
        image = pixels(folder / 'train' / record['file_name'])
        assert np.array_equal(image, scene.image)
        assert image.shape == (record['height'], record['width'], 3)
        annotations = coco.loadAnns(coco.getAnnIds(record['id']))
        assert [a['category_id'] - 1 for a in annotations] == scene.labels.tolist()
        for annotation, visible in zip(annotations, scene.masks, strict=True):
            assert np.array_equal(coco.annToMask(annotation), visible)
            rows, columns = np.nonzero(visible)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation['bbox'] == box
            assert annotation['area'] == visible.sum()


def test_semantic_layout_agrees_with_the_scenes(small):
    names = [f'{index:06d}.png' for index in range(3)]
    images, maps = (small / 'semantic' / kind / 'validation' for kind in ('images', 'annotations'))
    assert sorted(path.name for path in images.iterdir()) == names
    assert sorted(path.name for path in maps.iterdir()) == names
    for name, scene in zip(names, toy.scenes('val', 3, 0, toy.EASY), strict=True):
        assert np.array_equal(pixels(images / name), scene.image)
        label_map = pixels(maps / name)
        # ADE20K's: 0 would be unlabelled, 1 is the first class, here the background.
        assert np.array_equal(label_map == 1, ~scene.masks.any(axis=0))
        for label in range(3):
            masks = scene.masks[scene.labels == label]
            assert np.array_equal(label_map == label + 2, masks.any(axis=0))


def test_panoptic_layout_agrees_with_the_scenes(small):
    folder = small / 'panoptic'
    coco = COCO(str(folder / 'annotations/train.json'))
    style = dataclasses.replace(toy.EASY, stuff=toy.STUFF)
    drawn = list(toy.scenes('train', 6, 0, style))
    assert {int(label) for scene in drawn for label in np.unique(scene.stuff)} == {0, 1}
    for record, scene in zip(coco.imgs.values(), drawn, strict=True):
        assert np.array_equal(pixels(folder / 'train' / record['file_name']), scene.image)
        label_map = pixels(folder / 'annotations/train' / record['file_name'])
        covered = scene.masks.any(axis=0)
        assert np.array_equal(label_map[~covered], scene.stuff[~covered] + 3)
        annotations = coco.loadAnns(coco.getAnnIds(record['id']))
        for annotation, visible, label in zip(annotations, scene.masks, scene.labels, strict=True):
            assert np.array_equal(coco.annToMask(annotation), visible)
            assert set(label_map[visible]) == {label}


def test_two_kinds_of_background(many):
    style = dataclasses.replace(toy.EASY, stuff=toy.STUFF)
    for scene in toy.scenes('train', 20, 0, style):
        assert scene.stuff.shape == scene.image.shape[:2]
        share = scene.stuff.mean()  # neither side is a sliver
        assert 0.05 < share < 0.95
    assert all(scene.stuff is None for scene in many)


def test_class_layout_agrees_with_the_scenes(small):
    folder = small / 'classes/train'
    assert len(list(folder.glob('*/*.png'))) == 6
    for index, scene in enumerate(toy.scenes('train', 6, 0, toy.EASY, single=True)):
        assert scene.labels.tolist() == [index % 3]
        image = pixels(folder / toy.EASY.classes[index % 3] / f'{index:06d}.png')
        assert np.array_equal(image, scene.image)


def test_relation_set(tmp_path):
    counts = {'num_train': 4, 'num_val': 2}
    assert toy.make_dataset(tmp_path / 'set', **counts, relation=True)
    content = json.loads((tmp_path / 'set/annotations/train.json').read_text())
    assert tuple(c['name'] for c in content['categories']) == toy.RELATION.classes
    drawn = list(toy.scenes('train', 4, 0, toy.RELATION))
    found = [a['category_id'] - 1 for a in content['annotations']]
    assert found == np.concatenate([scene.labels for scene in drawn]).tolist()
    for index, scene in enumerate(drawn):
        assert np.array_equal(pixels(tmp_path / f'set/train/{index:06d}.png'), scene.image)


# --- what is drawn --------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def many():
    return list(toy.scenes('train', 40, 0, toy.EASY))


def test_scenes_differ_but_not_from_run_to_run(many):
    seeds = ((split, seed) for split in toy.SPLITS for seed in (0, 1))
    first = [next(toy.scenes(split, 1, seed, toy.EASY)).image.tobytes() for split, seed in seeds]
    assert len({*first, *(scene.image.tobytes() for scene in many[1:])}) == 4 + 39
    again = next(toy.scenes('train', 1, 0, toy.EASY))
    assert np.array_equal(again.image, many[0].image)
    assert np.array_equal(again.masks, many[0].masks)


def test_sizes_classes_and_numbers_of_objects(many):
    sizes = [scene.image.shape[:2] for scene in many]
    assert all(192 <= side <= 384 for size in sizes for side in size)
    assert {height > width for height, width in sizes} == {True, False}
    assert all(height != width for height, width in sizes)
    assert set(np.concatenate([scene.labels for scene in many])) == {0, 1, 2}
    assert {len(scene.labels) for scene in many} == {1, 2, 3, 4}


def test_masks_are_what_is_visible(many):
    """No pixel belongs to two objects, and those of an object have its one colour."""
    for scene in many:
        assert scene.masks.sum(axis=0).max() == 1
        for mask in scene.masks:
            assert len(np.unique(scene.image[mask], axis=0)) == 1


SHARES = {'circle': np.pi / 4, 'square': 1.0, 'triangle': 0.5}


def test_single_objects_have_the_shape_of_their_class_and_their_images_are_small():
    for scene in toy.scenes('val', 30, 0, toy.EASY, single=True):
        assert all(112 <= side <= 160 for side in scene.image.shape[:2])
        [mask] = scene.masks
        height, width = np.ptp(np.nonzero(mask), axis=1) + 1
        assert 32 <= height == width <= 96
        name = toy.EASY.classes[scene.labels[0]]
        assert mask.sum() / (height * width) == pytest.approx(SHARES[name], abs=0.04)
        if name == 'triangle':  # upright: the wide side is at the bottom
            rows = mask.sum(1)[mask.any(1)]
            assert rows[0] <= 3
            assert rows[-1] == width


def test_some_objects_are_hidden_in_part_but_none_too_far(many):
    shares = []
    for scene in many:
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            height, width = np.ptp(np.nonzero(mask), axis=1) + 1
            name = toy.EASY.classes[label]
            shares.append(mask.sum() / (max(height, width) ** 2 * SHARES[name]))
    assert min(shares) > 0.2
    assert sum(share < 0.9 for share in shares) >= 5


def test_hard_scenes_have_turned_shapes_of_six_classes_in_clutter(many):
    hard = list(toy.scenes('train', 12, 0, toy.HARD))
    assert set(np.concatenate([scene.labels for scene in hard])) == set(range(6))
    fill = []
    for scene in hard:
        for mask in scene.masks[scene.labels == toy.HARD.classes.index('square')]:
            height, width = np.ptp(np.nonzero(mask), axis=1) + 1
            fill.append(mask.sum() / (height * width))
    assert min(fill) < 0.9  # turned squares do not fill their boxes

    def edges(scenes):
        return np.mean([np.abs(np.diff(s.image.astype(float), axis=1)).mean() for s in scenes])

    assert edges(hard) > 3 * edges(many)


def test_the_two_kinds_differ_in_the_marker_and_the_labels_alone():
    """So nothing else in an image, nor in how many objects there are, tells the kind."""
    for seed in range(10):
        left = seed % 2 == 0
        a, b = (toy.draw_relation(np.random.default_rng(seed), mark, left) for mark in (0, 1))
        assert np.array_equal(a.masks, b.masks)
        assert np.array_equal(a.labels + 3, b.labels)
        assert set(a.labels) <= {0, 1, 2}
        rows, columns = np.nonzero((a.image != b.image).any(axis=2))
        assert set(rows) == set(range(toy.RELATION_SIZE[0]))
        assert np.ptp(columns) + 1 == toy.MARKER_WIDTH == len(rows) / toy.RELATION_SIZE[0]
        # Far from all objects, and at the end that was asked for.
        objects = np.nonzero(a.masks.any(axis=0))[1]
        gap = objects.min() - columns.max() if left else columns.min() - objects.max()
        assert gap > toy.FAR


def test_relations_have_small_whole_objects_and_kinds_and_ends_take_turns():
    """Four images have each kind at each end, so no prior is better than chance."""
    seen = []
    for scene in toy.scenes('train', 40, 0, toy.RELATION):
        assert scene.image.shape == (*toy.RELATION_SIZE, 3)
        assert 2 <= len(scene.labels) <= 5
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            height, width = np.ptp(np.nonzero(mask), axis=1) + 1
            assert 14 <= height == width <= 28
            share = SHARES[toy.RELATION.classes[label].partition('-')[0]]
            assert mask.sum() / (height * width) == pytest.approx(share, abs=0.08)
        [kind] = set(scene.labels // 3)
        columns = np.nonzero(scene.masks.any(axis=0))[1]
        seen.append((kind, columns.min() > scene.image.shape[1] / 2))
    assert seen == [(0, True), (1, True), (0, False), (1, False)] * 10


# --- nothing is lost ------------------------------------------------------------------------------


@of_layouts
def test_a_second_run_skips(small, layout):
    folder = small / layout
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    assert not toy.make_dataset(folder, layout=layout, **SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'seed': 1}, 'seed 0 -> 1'),
        ({'layout': 'semantic'}, 'layout instances -> semantic'),
        ({'num_val': 1}, "counts {'train': 6, 'val': 3} -> {'train': 6, 'val': 1}"),
        ({'relation': True}, 'relation False -> True'),
    ],
)
def test_other_parameters_need_force(small, tmp_path, change, message):
    folder = shutil.copytree(small / 'instances', tmp_path / 'set')
    options = {**SMALL, **change}
    with pytest.raises(FileExistsError, match=rf'\({re.escape(message)}\).*--force'):
        toy.make_dataset(folder, **options)
    assert toy.make_dataset(folder, **options, force=True)
    assert not toy.make_dataset(folder, **options)


def test_a_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path / 'thesis.txt').write_text('years of work')
    for force in (False, True):
        with pytest.raises(FileExistsError, match='not a toy set'):
            toy.make_dataset(tmp_path, num_train=1, num_val=1, force=force)
    assert (tmp_path / 'thesis.txt').read_text() == 'years of work'


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def stopping(*args):
        yield from list(toy_scenes('train', 1, 0, toy.EASY))
        raise KeyboardInterrupt

    toy_scenes = toy.scenes
    monkeypatch.setattr(toy, 'scenes', stopping)
    with pytest.raises(KeyboardInterrupt):
        toy.make_dataset(tmp_path / 'set', num_train=2, num_val=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'layout': 'coco'}, "one of instances, semantic, classes, panoptic, got 'coco'"),
        ({'num_train': 4, 'num_val': 0}, 'at least 1 and seed at least 0, got 4, 0 and 0'),
        ({'seed': -1}, 'got 256, 48 and -1'),
        ({'relation': True, 'hard': True}, 'relation goes with'),
        ({'relation': True, 'layout': 'classes'}, "relation goes with the layout 'instances' only"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        toy.make_dataset(tmp_path / 'set', **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('options', 'folder'),
    [
        ([], 'data/shapes'),
        (['--layout', 'semantic'], 'data/shapes-semantic'),
        (['--layout', 'classes', '--hard'], 'data/shapes-classes-hard'),
        (['--layout', 'panoptic'], 'data/shapes-panoptic'),
        (['--relation'], 'data/shapes-relation'),
    ],
)
def test_default_folders(tmp_path, monkeypatch, capsys, options, folder):
    monkeypatch.chdir(tmp_path)
    options = [*options, '--num-train', '1', '--num-val', '1']
    assert toy.main(options) == 0
    assert capsys.readouterr().out.endswith(f'{folder}: drawn\n')
    assert toy.main(options) == 0
    assert capsys.readouterr().out == f'{folder}: already there\n'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--num-train', '0'], 'got 0, 48 and 0'),
        (['--out', 'taken'], 'is not a toy set'),
        (['--out', 'taken/a/set'], 'taken/a'),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken/a').touch()
    assert toy.main(options) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ')
    assert message in error
    assert error.count('\n') == 1
