"""Scores for the toolboxes' evaluators."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from hat_mm import compat
from hat_mm.registry import METRICS

LOADING = (
    'the test pipeline needs LoadAnnotations(with_bbox=True, with_mask=True, with_seg=True) after '
    'Resize'
)


@METRICS.register_module()
class PanopticQuality(BaseMetric):
    """Panoptic quality of predictions, with truth from instance masks and a label map.

    mmdet's ``CocoPanopticMetric`` is for COCO's panoptic files, and needs the package panopticapi,
    which is not on PyPI. This one takes what ``LoadAnnotations(with_mask=True, with_seg=True)``
    loads after ``Resize``, and computes with torchmetrics, which takes a few seconds for a picture
    of COCO's size. Reports PQ, SQ and RQ in percent, averaged over the classes that occur. Source:
    https://arxiv.org/abs/1801.00868.

    Args:
        num_things_classes: Classes of objects, the first labels of a label map.
        num_stuff_classes: Classes of stuff, the labels after them; all further ones are ignored,
            and so is what lies under crowds.
        collect_device: As in mmengine.
        prefix: As in mmengine.

    Raises:
        hat_mm.compat.DependencyError: torchmetrics or mmdet is not installed.
    """

    default_prefix = 'panoptic'

    def __init__(
        self,
        num_things_classes: int,
        num_stuff_classes: int,
        collect_device: str = 'cpu',
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device, prefix)
        self.things = range(num_things_classes)
        self.stuff = range(num_things_classes, num_things_classes + num_stuff_classes)
        self.offset = compat.require('mmdet.evaluation').INSTANCE_OFFSET
        self.metric()  # fails now rather than after a training

    def metric(self) -> Any:
        """A new metric of torchmetrics."""
        # torchmetrics does not count an object as missed where nothing is predicted; COCO does. So
        # pixels without a prediction are a class of their own here, which the scores leave out.
        return compat.require('torchmetrics.detection').PanopticQuality(
            things=set(self.things),
            stuffs={*self.stuff, self.stuff.stop},
            return_sq_and_rq=True,
            return_per_class=True,
            sync_on_compute=False,  # mmengine has gathered the pictures of all processes
        )

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Adds a batch of predictions: data samples of mmdet, as dicts."""
        for sample in data_samples:
            encoded = sample['pred_panoptic_seg']['sem_seg'][0].cpu()
            labels = (encoded % self.offset).clamp(max=self.stuff.stop)
            predicted = torch.stack([labels, encoded // self.offset], dim=-1)
            metric = self.metric()
            metric.update(predicted[None], self.truth(sample, encoded.shape)[None])
            self.results.append(metric)

    def truth(self, sample: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
        """Class and number of the object at each pixel, (H, W, 2).

        Raises:
            ValueError: Label map or bitmaps are missing or not (H, W) as in ``shape``, or an object
                is of a class that is none of things.
        """
        objects = sample['gt_instances']
        bitmaps = getattr(objects.get('masks'), 'masks', None)
        if 'gt_sem_seg' not in sample:
            raise ValueError(f'a picture has no label map: {LOADING}')
        if not isinstance(bitmaps, np.ndarray):
            kind = type(objects.get('masks')).__name__
            raise ValueError(f'masks must be BitmapMasks, not {kind}: {LOADING}')
        labels = sample['gt_sem_seg']['sem_seg'][0].long().cpu()
        sizes = [tuple(size) for size in (shape, labels.shape, bitmaps.shape[1:])]
        if len(set(sizes)) > 1:
            raise ValueError(
                'prediction, label map and masks must be of one size, not {}×{}, {}×{} and {}×{}: '
                '{}'.format(*(side for size in sizes for side in size), LOADING)
            )
        # A thing that no mask covers is no object, and unknown classes are ignored.
        void = -1
        known = (labels >= self.stuff.start) & (labels < self.stuff.stop)
        segments = torch.stack([labels.where(known, void), labels * 0], dim=-1)
        masks = torch.from_numpy(bitmaps).bool()
        of_objects = zip(masks, objects['labels'].tolist(), strict=True)
        for number, (mask, label) in enumerate(of_objects, 1):
            if label not in self.things:
                raise ValueError(
                    f'an object is of class {label}, but num_things_classes={len(self.things)}'
                )
            segments[mask] = torch.tensor([label, number])
        for mask in torch.from_numpy(sample['ignored_instances']['masks'].masks).bool():
            segments[mask] = torch.tensor([void, 0])
        return segments

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Turns the sums of all pictures into scores."""
        metric = copy.deepcopy(results[0])
        for other in results[1:]:
            metric.merge_state(other)
        segments = metric.true_positives + metric.false_positives + metric.false_negatives
        occurs = (segments > 0)[: self.stuff.stop]
        scores = 100 * metric.compute()[: self.stuff.stop][occurs].mean(0)
        return dict(zip(('PQ', 'SQ', 'RQ'), scores.tolist(), strict=True))
