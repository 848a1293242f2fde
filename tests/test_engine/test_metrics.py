"""Panoptic quality, by hand and as an evaluator of mmdet's data samples."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.structures.mask import BitmapMasks
from mmengine.registry import METRICS

import hat_mm

OFFSET = 1000  # mmdet's: number of the object times this, plus its class
THINGS, STUFF = 2, 2
VOID = THINGS + STUFF


def panoptic_quality():
    kind = dict(type='hat_mm.PanopticQuality', num_things_classes=2, num_stuff_classes=2)
    return METRICS.build(kind)


def sample(predicted, stuff, objects=(), crowds=()):
    """A data sample; objects are pairs of class and mask, crowds are masks."""
    height, width = stuff.shape

    def bitmaps(masks):
        array = np.array(masks, np.uint8).reshape(-1, height, width)
        return BitmapMasks(array, height, width)

    labels = torch.tensor([label for label, _ in objects], dtype=torch.long)
    return dict(
        pred_panoptic_seg=dict(sem_seg=torch.as_tensor(predicted)[None]),
        gt_sem_seg=dict(sem_seg=torch.as_tensor(stuff)[None]),
        gt_instances=dict(masks=bitmaps([mask for _, mask in objects]), labels=labels),
        ignored_instances=dict(masks=bitmaps(crowds)),
    )


def scores(*samples):
    metric = panoptic_quality()
    for one in samples:
        metric.process(None, [one])
    return metric.compute_metrics(metric.results)


def scene():
    """Two classes of stuff, left and right, and an object of each class on them."""
    stuff = np.full((8, 12), THINGS)
    stuff[:, 6:] = THINGS + 1
    first, second = np.zeros((2, 8, 12), bool)
    first[1:4, 1:5] = second[4:7, 7:11] = True
    predicted = stuff.copy()
    predicted[first], predicted[second] = OFFSET, 2 * OFFSET + 1
    return predicted, stuff, [(0, first), (1, second)]


def test_perfect_and_empty():
    predicted, stuff, objects = scene()
    assert scores(sample(predicted, stuff, objects)) == dict(PQ=100, SQ=100, RQ=100)
    nothing = np.full_like(stuff, VOID)
    assert scores(sample(nothing, stuff, objects)) == dict(PQ=0, SQ=0, RQ=0)


def test_by_hand():
    predicted, stuff, objects = scene()
    predicted[1, 1:5] = THINGS  # a third of the first object is missed: 8 of 12 pixels, IoU 2/3
    predicted[objects[1][1]] = 2 * OFFSET  # the second has the wrong class
    # Class 0: one found at 2/3, one too many. Class 1: missed. Stuff: 36 of 40 and 36 of 36.
    expected = [(2 / 3) / 1.5, 0, 36 / 40, 1]
    found = scores(sample(predicted, stuff, objects))
    assert found['PQ'] == pytest.approx(100 * np.mean(expected))
    assert found['SQ'] == pytest.approx(100 * np.mean([2 / 3, 0, 0.9, 1]))
    assert found['RQ'] == pytest.approx(100 * np.mean([1 / 1.5, 0, 1, 1]))


def test_pictures_are_counted_together():
    predicted, stuff, objects = scene()
    missed = np.where(objects[0][1], THINGS, predicted)
    found = scores(sample(predicted, stuff, objects), sample(missed, stuff, objects))
    # Class 0: one found, one missed. The stuff below it: once all of it, then 36 of 48 pixels.
    assert found['RQ'] == pytest.approx(100 * np.mean([1 / 1.5, 1, 1, 1]))
    assert found['SQ'] == pytest.approx(100 * np.mean([1, 1, (1 + 36 / 48) / 2, 1]))


def test_what_is_below_crowds_and_unknown_classes_does_not_count():
    predicted, stuff, objects = scene()
    crowd = objects[1][1]
    strange = np.where(objects[0][1], 3 * OFFSET + 1, predicted)
    found = scores(sample(strange, stuff, objects[:1], [crowd]))
    assert found['RQ'] == pytest.approx(100 * np.mean([0, 0, 1, 1]))
    # The prediction inside the crowd alone is neither found nor too many: no class 1.
    assert scores(sample(predicted, stuff, objects[:1], [crowd]))['PQ'] == 100
    unknown = np.where(stuff == THINGS + 1, 255, stuff)
    assert scores(sample(predicted, unknown, objects))['PQ'] == 100


@given(st.integers(0, 2**32 - 1))
def test_scores_are_between_nothing_and_all(seed):
    rng = np.random.default_rng(seed)
    predicted, stuff, objects = scene()
    noise = rng.choice([*range(THINGS, VOID + 1), OFFSET, OFFSET + 1], predicted.shape)
    share = rng.uniform()
    found = scores(
        sample(np.where(rng.random(stuff.shape) < share, noise, predicted), stuff, objects)
    )
    assert all(0 <= value <= 100 for value in found.values())
    assert found['PQ'] <= min(found['SQ'], found['RQ']) + 1e-6


def test_truth_that_does_not_fit():
    predicted, stuff, objects = scene()
    fitting = sample(predicted, stuff, objects)
    for wrong, message in (
        ({k: v for k, v in fitting.items() if k != 'gt_sem_seg'}, 'has no label map'),
        (fitting | dict(gt_instances=dict(labels=torch.tensor([0]))), 'not NoneType'),
        (sample(predicted[1:], stuff, objects), 'not 7×12, 8×12 and 8×12: .* after Resize'),
        (fitting | dict(gt_sem_seg=dict(sem_seg=torch.zeros(1, 9, 12))), '8×12, 9×12 and 8×12'),
        (sample(predicted, stuff, [(2, objects[0][1])]), 'of class 2, but num_things_classes=2'),
    ):
        with pytest.raises(ValueError, match=message):
            scores(wrong)


def evaluate(rank, address, out):
    torch.distributed.init_process_group('gloo', init_method=address, rank=rank, world_size=2)
    predicted, stuff, objects = scene()
    missed = np.where(objects[0][1], THINGS, predicted)
    metric = panoptic_quality()
    metric.process(None, [sample([predicted, missed][rank], stuff, objects)])
    (out / f'{rank}.json').write_text(json.dumps(metric.evaluate(2)))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path):
    torch.multiprocessing.spawn(evaluate, (f'file://{tmp_path}/store', tmp_path), nprocs=2)
    predicted, stuff, objects = scene()
    missed = np.where(objects[0][1], THINGS, predicted)
    one = scores(sample(predicted, stuff, objects), sample(missed, stuff, objects))
    for rank in (0, 1):
        found = json.loads((tmp_path / f'{rank}.json').read_text())
        assert found == {f'panoptic/{name}': value for name, value in one.items()}


def test_without_torchmetrics(monkeypatch):
    require = hat_mm.compat.require

    def missing(name):
        return require(name.replace('torchmetrics', 'no_torchmetrics'))

    monkeypatch.setattr(hat_mm.compat, 'require', missing)
    with pytest.raises(hat_mm.compat.DependencyError, match='no_torchmetrics'):
        panoptic_quality()
