"""The toy data set: same bytes every time, masks that tell the truth, nothing lost."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from hat_mm import toy

ROOT = Path(__file__).resolve().parents[1]
SMALL = {'num_train': 12, 'num_val': 6}


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toy') / 'shapes'
    assert toy.make_instances(folder, **SMALL)
    return folder


def run_tool(*args, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / 'tools/make_toy_dataset.py'), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


# --- the files ------------------------------------------------------------------------------------


def test_byte_identical_in_another_process(small, tmp_path):
    run = run_tool('--out', 'again', '--num-train', 12, '--num-val', 6, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert 'drawing train: 12/12' in run.stdout
    assert digests(tmp_path / 'again') == digests(small)


def test_an_image_does_not_depend_on_the_number_of_images(small, tmp_path):
    toy.make_instances(tmp_path / 'fewer', num_train=2, num_val=1)
    for name in ('train/000001.png', 'val/000000.png'):
        assert (tmp_path / 'fewer' / name).read_bytes() == (small / name).read_bytes()


def test_another_seed_and_the_splits_differ(small, tmp_path):
    toy.make_instances(tmp_path / 'other', **SMALL, seed=1)
    images = [path.read_bytes() for path in (*small.rglob('*.png'), *tmp_path.rglob('*.png'))]
    assert len(images) == 36
    assert len(set(images)) == 36


@pytest.mark.parametrize(('split', 'count'), [('train', 12), ('val', 6)])
def test_coco_layout_agrees_with_the_images(small, split, count):
    coco = COCO(str(small / 'annotations' / f'{split}.json'))
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == ['circle', 'square', 'triangle']
    assert len(coco.imgs) == count == len(list((small / split).glob('*.png')))
    for record in coco.imgs.values():
        image = np.array(Image.open(small / split / record['file_name']))
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
                assert visible.sum() >= toy.MIN_VISIBLE * whole.sum()
                later |= whole
        assert not remaining
    assert hidden >= 10


def test_hard_option(tmp_path, small):
    toy.make_instances(tmp_path / 'hard', num_train=12, num_val=1, hard=True)
    coco = COCO(str(tmp_path / 'hard/annotations/train.json'))
    names = {c['name'] for c in coco.loadCats(coco.getCatIds())}
    assert names == {'circle', 'square', 'triangle', 'pentagon', 'star', 'cross'}
    squares = coco.loadAnns(coco.getAnnIds(catIds=[2]))
    fill = [a['area'] / (a['bbox'][2] * a['bbox'][3]) for a in squares]
    assert min(fill) < 0.9  # turned squares do not fill their boxes

    def edges(folder):
        image = np.array(Image.open(folder / 'train/000000.png').convert('L'), float)
        return np.abs(np.diff(image, axis=1)).mean()

    assert edges(tmp_path / 'hard') > 3 * edges(small)


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


def test_second_run_skips(small, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in small.rglob('*')}
    assert not toy.make_instances(small, **SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in small.rglob('*')}


def test_a_set_with_missing_files_is_drawn_again_only_by_force(tmp_path):
    folder = tmp_path / 'set'
    toy.make_instances(folder, num_train=2, num_val=1)
    (folder / 'train/000001.png').unlink()
    with pytest.raises(FileExistsError, match='files are missing'):
        toy.make_instances(folder, num_train=2, num_val=1)
    assert toy.make_instances(folder, num_train=2, num_val=1, force=True)
    assert (folder / 'train/000001.png').is_file()


def test_other_parameters_need_force(tmp_path):
    folder = tmp_path / 'set'
    toy.make_instances(folder, num_train=2, num_val=1)
    with pytest.raises(FileExistsError, match=r'seed 0 -> 1.*--force'):
        toy.make_instances(folder, num_train=2, num_val=1, seed=1)
    assert toy.make_instances(folder, num_train=2, num_val=1, seed=1, force=True)
    assert json.loads((folder / toy.MARKER).read_text())['seed'] == 1


def test_a_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path / 'thesis.txt').write_text('years of work')
    for force in (False, True):
        with pytest.raises(FileExistsError, match='not a toy set'):
            toy.make_instances(tmp_path, num_train=1, num_val=1, force=force)
    assert (tmp_path / 'thesis.txt').read_text() == 'years of work'


def test_an_interruption_leaves_nothing(tmp_path):
    def stop(split, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.make_instances(tmp_path / 'set', num_train=2, num_val=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_bad_numbers():
    with pytest.raises(ValueError, match='num_val must be at least 1, got 0'):
        toy.make_instances('nowhere', num_val=0)
    with pytest.raises(ValueError, match='seed must be at least 0, got -1'):
        toy.make_instances('nowhere', seed=-1)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('--num-train', '0'), 'num_train must be at least 1, got 0'),
        (('--out', 'taken'), 'is not a toy set'),
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
