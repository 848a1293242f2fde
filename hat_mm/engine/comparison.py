"""Compares what an exported file computes with the predictions of the model in PyTorch."""

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .graphs import paste

# Largest differences that count as small, by precision: of features relative to the largest value
# of a map, of probabilities, and the share of detections that may differ, as may the pixels of
# their masks.
_FEATURES = {'fp32': 1e-4, 'fp16': 3e-2, 'bf16': 0.1, 'int8': 0.5}
_SCORES = {'fp32': 1e-3, 'fp16': 3e-2, 'bf16': 0.1, 'int8': 0.2}
_SHARE = {'fp32': 0.01, 'fp16': 0.1, 'bf16': 0.3, 'int8': 0.5}
# Boxes of the same class that overlap by this much are the same detection.
_IOU = {'fp32': 0.99, 'fp16': 0.8, 'bf16': 0.7, 'int8': 0.5}


@dataclass(frozen=True)
class Difference:
    """A comparison.

    Attributes:
        text: What differs by how much.
        small: Whether that is rounding.
    """

    text: str
    small: bool


@torch.no_grad()
def compare(
    outputs: dict[str, np.ndarray], model: nn.Module, image: Tensor, meta: dict[str, Any]
) -> Difference:
    """Compares the outputs of a file with the model's own prediction for the same image.

    Args:
        outputs: The file's outputs by name.
        model: The model, in eval mode.
        image: Normalized image, (1, 3, H, W).
        meta: The file's metadata.
    """
    found = {name: torch.from_numpy(array) for name, array in outputs.items()}
    by_task = dict(
        features=_features,
        classification=_classification,
        segmentation=_segmentation,
        detection=_detection,
    )
    return by_task[meta['task']](found, model, image, meta)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def _features(found: dict, model: Any, image: Tensor, meta: dict) -> Difference:
    worst = max(_relative(a, b) for a, b in zip(found.values(), model(image), strict=True))
    text = f'maps differ by at most {worst:.1e} of their largest value'
    return Difference(text, worst <= _FEATURES[meta['precision']])


def _classification(found: dict, model: Any, image: Tensor, meta: dict) -> Difference:
    expected = model.head(model.extract_feat(image)).softmax(1)
    worst = float((found['output'] - expected).abs().max())
    text = f'probabilities differ by at most {worst:.1e}'
    return Difference(text, worst <= _SCORES[meta['precision']])


def _segmentation(found: dict, model: Any, image: Tensor, meta: dict) -> Difference:
    size = tuple(image.shape[2:])
    expected = model.encode_decode(image, [dict(img_shape=size, pad_shape=size)])
    output = found['output']
    if output.dtype == torch.float32:
        worst = _relative(output, expected)
        text = f'scores differ by at most {worst:.1e} of their largest value'
        return Difference(text, worst <= _FEATURES[meta['precision']])
    if expected.shape[1] == 1:
        expected = expected - torch.logit(torch.tensor(model.decode_head.threshold))
        expected = torch.cat([-expected, expected], 1)
    best, classes = expected.max(1, keepdim=True)
    # A class may only be another where both have nearly the same score.
    worst = _relative(expected.gather(1, output), best)
    text = f'{float((output != classes).float().mean()):.2%} of the pixels have another class'
    return Difference(
        f'{text}, whose score is at most {worst:.1e} of the largest lower',
        worst <= _FEATURES[meta['precision']],
    )


def _detection(found: dict, model: Any, image: Tensor, meta: dict) -> Difference:
    size = tuple(image.shape[2:])
    structures = importlib.import_module('mmdet.structures')
    sample = structures.DetDataSample(
        metainfo=dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1.0, 1.0),
        )
    )
    [expected] = model.predict(image, [sample], rescale=False)
    expected = expected.pred_instances
    boxes, scores = found['dets'][0].split([4, 1], 1)
    number = len(expected)
    text = f'{number} detections in PyTorch, {len(boxes)} in the file'
    if number == 0 or len(boxes) == 0:
        text += '; nothing is compared, other --images may show objects' if number == 0 else ''
        return Difference(text, len(boxes) == number)
    overlaps = importlib.import_module('mmdet.structures.bbox').bbox_overlaps
    same = found['labels'][0] == expected.labels[:, None]
    iou, index = torch.where(same, overlaps(expected.bboxes, boxes), -1).max(1)
    precision = meta['precision']
    apart = (scores[index, 0] - expected.scores).abs()
    paired = (iou >= _IOU[precision]) & (apart <= _SCORES[precision])
    text += f', {len(index[paired].unique())} of them equal'
    # A detection with one of the lowest scores may be in only one of them.
    edge = min(float(scores.min()), float(expected.scores.min())) + _SCORES[precision]
    extra = torch.ones(len(boxes), dtype=torch.bool)
    extra[index[paired]] = False
    missing = int((~paired & (expected.scores > edge)).sum())
    wrong = max(missing, int((extra & (scores[:, 0] > edge)).sum()))
    small = wrong <= _SHARE[precision] * max(number, len(boxes))
    if paired.any():
        moved = (boxes[index] - expected.bboxes)[paired].abs().max()
        text += f': boxes differ by at most {moved:.1e} px, scores by {apart[paired].max():.1e}'
    if 'masks' in found:
        masks = found['masks'][0]
        if masks.dtype != torch.bool:
            masks = paste(masks, boxes, size) >= meta['mask_threshold']
        ours, theirs = masks[index][paired], expected.masks[paired]
        share = int((ours != theirs).sum()) / max(int((ours | theirs).sum()), 1)
        text += f', {share:.2%} of the pixels of masks'
        small &= share <= _SHARE[precision]
    return Difference(text, small)
