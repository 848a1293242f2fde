"""The toy data set: same bytes every time, masks that tell the truth, nothing lost."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shapes as toy
from PIL import Image
from pycocotools.coco import COCO

ROOT = Path(__file__).resolve().parents[2]
SMALL = {'num_train': 12, 'num_val': 6}

of_layouts = pytest.mark.parametrize('layout', toy.LAYOUTS)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A set in each layout, below one folder."""
    folder = tmp_path_factory.mktemp('toy')
    for layout in toy.LAYOUTS:
        assert toy.make_dataset(folder / layout, layout=layout, **SMALL)
    return folder


def run_tool(*args, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / 'demo/shapes.py'), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


# --- the files ------------------------------------------------------------------------------------


@of_layouts
def test_byte_identical_in_another_process(small, tmp_path, layout):
    options = ('--layout', layout, '--out', 'again', '--num-train', 12, '--num-val', 6)
    run = run_tool(*options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert 'drawing train: 12/12' in run.stdout
    assert digests(tmp_path / 'again') == digests(small / layout)


def test_the_instance_set_keeps_its_bytes(small):
    """As before there were other layouts, so a set drawn then is taken for what it is."""
    folder = small / 'instances'
    known = {'format': 1, 'counts': {'train': 12, 'val': 6}, 'seed': 0, 'hard': False}
    assert json.loads((folder / toy.MARKER).read_text()) == known
    # The pixels, as another version of Pillow may compress them in another way.
    pixels = [np.array(Image.open(path)).tobytes() for path in sorted(folder.rglob('*.png'))]
    annotations = [path.read_bytes() for path in sorted(folder.glob('annotations/*.json'))]
    digest = hashlib.sha256(b''.join(pixels + annotations)).hexdigest()
    assert digest == 'a0d57aa99e62e158cac74a31c6bf3550eacfe93257257ee820ebfffb7b0ba9ee'


@of_layouts
def test_an_image_does_not_depend_on_the_number_of_images(small, tmp_path, layout):
    toy.make_dataset(tmp_path / 'fewer', layout=layout, num_train=2, num_val=1)
    images = [path.relative_to(tmp_path / 'fewer') for path in tmp_path.rglob('*.png')]
    assert len(images) == 3 * toy.LAYOUTS[layout].pngs
    for image in images:
        assert (tmp_path / 'fewer' / image).read_bytes() == (small / layout / image).read_bytes()


@of_layouts
def test_another_seed_and_the_splits_differ(small, tmp_path, layout):
    toy.make_dataset(tmp_path / 'other', layout=layout, **SMALL, seed=1)
    paths = [*(small / layout).rglob('*.png'), *tmp_path.rglob('*.png')]
    images = [path.read_bytes() for path in paths]
    assert len(images) == 36 * toy.LAYOUTS[layout].pngs
    assert len(set(images)) == len(images)


@pytest.mark.parametrize(('split', 'count'), [('train', 12), ('val', 6)])
def test_coco_layout_agrees_with_the_images(small, split, count):
    folder = small / 'instances'
    coco = COCO(str(folder / 'annotations' / f'{split}.json'))
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == ['circle', 'square', 'triangle']
    assert len(coco.imgs) == count == len(list((folder / split).glob('*.png')))
    for record in coco.imgs.values():
        image = np.array(Image.open(folder / split / record['file_name']))
        assert image.shape == (record['height'], record['width'], 3)
        annotations = coco.loadAnns(coco.getAnnIds(record['id']))
        assert 1 <= len(annotations) <= 4
        covered = np.zeros(image.shape[:2], int)
        for annotation in annotations:
            mask = coco.annToMask(annotation)
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation['bbox'] == box
            assert annotation['area'] == mask.sum()
            assert annotation['iscrowd'] == 0
            # The pixels under a visible mask have the object's one colour.
            assert len(np.unique(image[mask > 0], axis=0)) == 1
            covered += mask
        assert covered.max() == 1


@pytest.mark.parametrize(
    ('split', 'ade', 'count'), [('train', 'training', 12), ('val', 'validation', 6)]
)
def test_semantic_layout_agrees_with_the_scenes(small, split, ade, count):
    names = [f'{index:06d}.png' for index in range(count)]
    images, maps = (small / 'semantic' / kind / ade for kind in ('images', 'annotations'))
    assert sorted(path.name for path in images.iterdir()) == names
    assert sorted(path.name for path in maps.iterdir()) == names
    for name, scene in zip(names, toy.scenes(split, count, 0, toy.EASY), strict=True):
        assert np.array_equal(np.array(Image.open(images / name)), scene.image)
        with Image.open(maps / name) as file:
            assert file.mode == 'L'
            label_map = np.array(file)
        # ADE20K's: 0 would be unlabelled, 1 is the first class, here the background.
        assert np.array_equal(label_map == 1, ~scene.masks.any(axis=0))
        for label in range(3):
            masks = scene.masks[scene.labels == label]
            assert np.array_equal(label_map == label + 2, masks.any(axis=0))


@pytest.mark.parametrize(('split', 'count'), [('train', 12), ('val', 6)])
def test_class_layout_agrees_with_the_scenes(small, split, count):
    folder = small / 'classes' / split
    assert {path.name for path in folder.iterdir()} == set(toy.EASY.classes)
    for name in toy.EASY.classes:
        assert len(list((folder / name).iterdir())) == count / 3
    for index, scene in enumerate(toy.scenes(split, count, 0, toy.EASY, single=True)):
        assert scene.labels.tolist() == [index % 3]
        image = Image.open(folder / toy.EASY.classes[index % 3] / f'{index:06d}.png')
        assert np.array_equal(np.array(image), scene.image)


# --- what is drawn --------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def many():
    return list(toy.scenes('train', 60, 0, toy.EASY))


def test_sizes(many):
    shapes = [scene.image.shape[:2] for scene in many]
    assert all(192 <= side <= 384 for shape in shapes for side in shape)
    assert all(height != width for height, width in shapes)
    assert len(set(shapes)) > 50
    assert {height > width for height, width in shapes} == {True, False}


def test_all_classes_and_numbers_of_objects(many):
    assert set(np.concatenate([scene.labels for scene in many])) == {0, 1, 2}
    assert {len(scene.labels) for scene in many} == {1, 2, 3, 4}


def test_single_objects_are_whole_and_their_images_small():
    for scene in toy.scenes('val', 30, 0, toy.EASY, single=True):
        height, width = scene.image.shape[:2]
        assert height != width
        assert 112 <= min(height, width) <= max(height, width) <= 160
        rows, columns = np.nonzero(scene.masks[0])
        assert all(31 <= np.ptp(side) + 1 <= 96 for side in (rows, columns))


def test_whole_objects_have_the_shape_of_their_class():
    rng = np.random.default_rng(3)
    share = {'circle': np.pi / 4, 'square': 1.0, 'triangle': 0.5}
    for label, name in enumerate(toy.EASY.classes):
        for _ in range(10):
            mask = toy._object_mask(rng, toy.EASY, label, (200, 240))
            height, width = np.ptp(np.nonzero(mask), axis=1) + 1
            # The tip of a triangle may fall between two pixel centres.
            assert 31 <= height <= 96
            assert 31 <= width <= 96
            assert mask.sum() / (height * width) == pytest.approx(share[name], abs=0.04)
            if name == 'triangle':  # upright: the wide side is at the bottom
                rows = mask.sum(1)[mask.any(1)]
                assert rows[0] <= 3
                assert rows[-1] >= width - 2


def test_later_objects_hide_earlier_ones(many):
    """Redraws the objects of each scene whole: what later ones cover is missing from the masks."""
    hidden = 0
    for index, scene in enumerate(many):
        record = []
        original = toy._object_mask

        def recording(*args, original=original, record=record):
            record.append(original(*args))
            return record[-1].copy()

        toy._object_mask = recording
        try:
            toy.draw_scene(np.random.default_rng([0, 0, index]))
        finally:
            toy._object_mask = original
        later = np.zeros(scene.image.shape[:2], bool)
        remaining = list(scene.masks)
        for whole in reversed(record):
            # The last ones drawn stay whole, so matching from the end finds each object's attempt.
            if remaining and np.array_equal(whole & ~later, remaining[-1]):
                visible = remaining.pop()
                hidden += bool((whole & later).any())
                assert visible.sum() >= toy.EASY.min_visible * whole.sum()
                later |= whole
        assert not remaining
    assert hidden >= 10


def test_hard_option(tmp_path, small):
    toy.make_dataset(tmp_path / 'hard', num_train=12, num_val=1, hard=True)
    coco = COCO(str(tmp_path / 'hard/annotations/train.json'))
    names = {c['name'] for c in coco.loadCats(coco.getCatIds())}
    assert names == {'circle', 'square', 'triangle', 'pentagon', 'star', 'cross'}
    squares = coco.loadAnns(coco.getAnnIds(catIds=[2]))
    fill = [a['area'] / (a['bbox'][2] * a['bbox'][3]) for a in squares]
    assert min(fill) < 0.9  # turned squares do not fill their boxes

    def edges(folder):
        image = np.array(Image.open(folder / 'train/000000.png').convert('L'), float)
        return np.abs(np.diff(image, axis=1)).mean()

    assert edges(tmp_path / 'hard') > 3 * edges(small / 'instances')


def test_the_two_kinds_differ_in_the_marker_and_the_labels_alone():
    """So nothing else in an image, nor in how many objects there are, tells the kind."""
    for seed in range(20):
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
        assert (columns.max() < objects.min()) == left


@pytest.fixture(scope='module')
def related():
    return list(toy.scenes('train', 240, 0, toy.RELATION))


def test_relations_keep_their_pixels(related):
    """The results in the docs are of these images."""
    digest = hashlib.sha256(b''.join(scene.image.tobytes() for scene in related[:12])).hexdigest()
    assert digest == '56d4011281c6b3df2ca23899abd5cc289736620586c3d71d8469a584535c7848'


def test_kinds_and_ends_of_the_marker_take_turns(related):
    """Four images have each kind at each end, so no prior is better than chance."""
    seen = []
    for scene in related:
        kinds = set(scene.labels // 3)
        assert len(kinds) == 1
        columns = np.nonzero(scene.masks.any(axis=0))[1]
        middle = scene.image.shape[1] / 2
        assert columns.min() > middle or columns.max() < middle
        seen.append((kinds.pop(), columns.min() > middle))
    assert seen == [(0, True), (1, True), (0, False), (1, False)] * 60


def test_objects_of_a_relation_are_small_and_whole(related):
    share = {'circle': np.pi / 4, 'square': 1.0, 'triangle': 0.5}
    assert {len(scene.labels) for scene in related} == {2, 3, 4, 5}
    assert len({scene.image.shape for scene in related}) == 1
    counts = np.bincount(np.concatenate([scene.labels for scene in related]), minlength=6)
    assert counts.min() > 0.8 * counts.mean()
    for scene in related:
        assert scene.masks.sum(axis=0).max() == 1
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            height, width = np.ptp(np.nonzero(mask), axis=1) + 1
            assert 13 <= min(height, width) <= max(height, width) <= 28
            outline = toy.RELATION.classes[label].partition('-')[0]
            assert mask.sum() / (height * width) == pytest.approx(share[outline], abs=0.08)


def test_objects_do_not_tell_the_kind_by_their_looks(related):
    """Colours, places and backgrounds have the same averages with both kinds."""
    looks = []
    for scene in related:
        inside, middle = scene.masks.any(axis=0), slice(80, -80)  # the marker is further outside
        looks.append(
            [
                *scene.image[inside].mean(axis=0),
                *scene.image[:, middle][~inside[:, middle]].mean(axis=0),
                np.nonzero(inside)[0].mean(),
                len(scene.labels),
            ]
        )
    a, b = np.array(looks[0::2]), np.array(looks[1::2])
    error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / len(a))
    assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) < 3.5 * error).all()


def test_relation_option(tmp_path):
    counts = {'num_train': 4, 'num_val': 2}
    assert toy.make_dataset(tmp_path / 'set', **counts, relation=True)
    assert not toy.make_dataset(tmp_path / 'set', **counts, relation=True)
    assert json.loads((tmp_path / 'set' / toy.MARKER).read_text())['relation'] is True
    content = json.loads((tmp_path / 'set/annotations/train.json').read_text())
    assert tuple(c['name'] for c in content['categories']) == toy.RELATION.classes
    drawn = list(toy.scenes('train', 4, 0, toy.RELATION))
    found = [a['category_id'] - 1 for a in content['annotations']]
    assert found == np.concatenate([scene.labels for scene in drawn]).tolist()
    for index, scene in enumerate(drawn):
        image = Image.open(tmp_path / f'set/train/{index:06d}.png')
        assert np.array_equal(np.array(image), scene.image)
    with pytest.raises(FileExistsError, match='relation True -> False'):
        toy.make_dataset(tmp_path / 'set', **counts)


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        ({'hard': True}, 'does not go with hard: '),
        ({'layout': 'semantic'}, "does not go with the layout 'semantic': "),
        ({'layout': 'classes'}, "does not go with the layout 'classes': "),
    ],
)
def test_relation_goes_with_instances_only(tmp_path, other, message):
    with pytest.raises(ValueError, match=message):
        toy.make_dataset(tmp_path / 'set', relation=True, **other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('mask', 'counts'),
    [
        ([[0, 1], [0, 1]], [2, 2]),
        ([[1, 0], [1, 0]], [0, 2, 2]),
        ([[0, 1, 0], [0, 0, 1]], [2, 1, 2, 1]),
        ([[0, 0]], [2]),
    ],
)
def test_run_lengths(mask, counts):
    encoded = toy.encode_mask(np.array(mask, bool))
    assert encoded == {'size': list(np.shape(mask)), 'counts': counts}


# --- nothing is lost ------------------------------------------------------------------------------


@of_layouts
def test_second_run_skips(small, layout):
    folder = small / layout
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    assert not toy.make_dataset(folder, layout=layout, **SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


@of_layouts
def test_a_set_with_missing_files_is_drawn_again_only_by_force(tmp_path, layout):
    options = {'layout': layout, 'num_train': 2, 'num_val': 1}
    toy.make_dataset(tmp_path / 'set', **options)
    whole = digests(tmp_path / 'set')
    for name in whole:
        if name == toy.MARKER:
            continue
        (tmp_path / 'set' / name).unlink()
        with pytest.raises(FileExistsError, match='files are missing'):
            toy.make_dataset(tmp_path / 'set', **options)
        assert toy.make_dataset(tmp_path / 'set', **options, force=True)
        assert digests(tmp_path / 'set') == whole


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'seed': 1}, 'seed 0 -> 1'),
        ({'layout': 'semantic'}, 'layout instances -> semantic'),
        ({'num_val': 2}, "counts {'train': 2, 'val': 1} -> {'train': 2, 'val': 2}"),
    ],
)
def test_other_parameters_need_force(tmp_path, change, message):
    folder = tmp_path / 'set'
    options = {'num_train': 2, 'num_val': 1}
    toy.make_dataset(folder, **options)
    options |= change
    with pytest.raises(FileExistsError, match=rf'{re.escape(message)}\).*--force'):
        toy.make_dataset(folder, **options)
    assert toy.make_dataset(folder, **options, force=True)
    assert not toy.make_dataset(folder, **options)


@of_layouts
def test_a_foreign_folder_is_never_replaced(tmp_path, layout):
    (tmp_path / 'thesis.txt').write_text('years of work')
    for force in (False, True):
        with pytest.raises(FileExistsError, match='not a toy set'):
            toy.make_dataset(tmp_path, layout=layout, num_train=1, num_val=1, force=force)
    assert (tmp_path / 'thesis.txt').read_text() == 'years of work'


@of_layouts
def test_an_interruption_leaves_nothing(tmp_path, layout):
    def stop(split, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.make_dataset(tmp_path / 'set', layout=layout, num_train=2, num_val=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments():
    with pytest.raises(ValueError, match="one of instances, semantic, classes, got 'coco'"):
        toy.make_dataset('nowhere', layout='coco')
    with pytest.raises(ValueError, match='num_val must be at least 1, got 0'):
        toy.make_dataset('nowhere', num_val=0)
    with pytest.raises(ValueError, match='seed must be at least 0, got -1'):
        toy.make_dataset('nowhere', seed=-1)


@pytest.mark.parametrize(
    ('args', 'folder'),
    [
        ((), 'data/shapes'),
        (('--layout', 'semantic'), 'data/shapes-semantic'),
        (('--layout', 'classes', '--hard'), 'data/shapes-classes-hard'),
        (('--relation',), 'data/shapes-relation'),
    ],
)
def test_default_folders(tmp_path, args, folder):
    run = run_tool(*args, '--num-train', 1, '--num-val', 1, cwd=tmp_path)
    assert run.stdout.splitlines()[-1].startswith(f'{folder}: 1 train and 1 val images')
    assert (tmp_path / folder / toy.MARKER).is_file()


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('--num-train', '0'), 'num_train must be at least 1, got 0'),
        (('--out', 'taken'), 'is not a toy set'),
        (('--relation', '--hard'), 'relation does not go with hard'),
        (('--out', 'file/set'), 'file'),
    ],
)
def test_tool_errors_are_one_line(tmp_path, args, message):
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken/a').touch()
    (tmp_path / 'file').touch()
    run = run_tool(*args, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith('error: ')
    assert message in run.stderr
    assert run.stderr.count('\n') == 1
