"""Average precision of detections in COCO's format, with up to 1000 a picture.

COCO's own mAP takes the best 100 detections of a picture, which a picture with more objects cannot
do with.
"""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

MOST = 1000


class Scores(NamedTuple):
    """Scores of detections against annotations.

    Attributes:
        ap: Mean average precision over IoU 0.5 to 0.95.
        ap50: Average precision at IoU 0.5.
        ap75: Average precision at IoU 0.75.
        precision: Precision at IoU 0.5 for each recall of 0, 0.01, … 1: (101,).
    """

    ap: float
    ap50: float
    ap75: float
    precision: np.ndarray


def score(annotations: Path, detections: list[dict], kind: str = 'bbox') -> Scores:
    """Scores detections.

    Args:
        annotations: JSON file in COCO's format.
        detections: Results in COCO's format.
        kind: ``'bbox'`` or ``'segm'``.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not detections:
        return Scores(0.0, 0.0, 0.0, np.zeros(101))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(detections), kind)
        evaluation.params.maxDets = [1, 100, MOST]
        evaluation.evaluate()
        evaluation.accumulate()
    # IoU thresholds, recalls, classes, sizes, numbers of detections; -1 where there is no object.
    precision = evaluation.eval['precision'][:, :, :, 0, -1]
    present = precision[:, :, precision[0, 0] > -1]
    return Scores(
        ap=float(present.mean()),
        ap50=float(present[0].mean()),
        ap75=float(present[5].mean()),
        precision=present[0].mean(-1),
    )
