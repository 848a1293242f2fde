"""Pictures in, results out: one call for models of the three toolboxes and for exported files."""

import copy
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmengine.registry import DefaultScope

from hat_mm import compat
from hat_mm.configs import innermost_dataset
from hat_mm.engine.build import evaluation
from hat_mm.engine.cli import UserError, set_memory_format
from hat_mm.engine.exported import TASKS, open_file
from hat_mm.zoo.models import get_model
from hat_mm_runtime import (
    ENDS,
    Classification,
    Detections,
    Model,
    PictureError,
    Segmentation,
)
from hat_mm_runtime.images import check, read
from hat_mm_runtime.results import Result, encode

__all__ = ['Inferencer', 'PanopticSegmentation']

# mmdet numbers the segments of a picture: class + OFFSET * number.
OFFSET = 1000


@dataclass(frozen=True)
class PanopticSegmentation(Result):
    """Segments that cover the picture: objects, and one for each class of background.

    Attributes:
        map: Number of the segment of each pixel, (H, W); -1 where there is none.
        labels: Class of each segment.
    """

    map: np.ndarray
    labels: Sequence[int]

    def __str__(self) -> str:
        return self.counted(self.labels)

    def draw(self) -> np.ndarray:
        """The picture in the colours of the classes, with outlines, (H, W, 3), uint8, BGR."""
        picture = self.image.copy()
        for i, label in enumerate(self.labels):
            mask = self.map == i
            picture[mask] = (picture[mask] * 0.5 + np.array(self.color(label)) * 0.5).astype('u1')
            outline, _ = cv2.findContours(mask.astype('u1'), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(picture, outline, -1, (255, 255, 255), 1)
        return picture

    def to_json(self) -> list[dict[str, Any]]:
        """The mask of each segment, as RLE."""
        return [
            dict(category_id=int(i), name=self.name(i), segmentation=encode(self.map == n))
            for n, i in enumerate(self.labels)
        ]


class Prepared(NamedTuple):
    """What a network gets for a picture.

    Attributes:
        inputs: The normalized and padded image, (1, C, H, W).
        sample: Its data sample, with the prediction.
        matrix: From the picture's pixels (x, y, 1) to the image's, (2, 3).
    """

    inputs: torch.Tensor
    sample: Any
    matrix: np.ndarray


class Inferencer:
    """Finds what is in pictures.

    PyTorch models run as the toolboxes' inferencers run them: by the config's test pipeline and the
    model's ``test_step``. :class:`hat_mm_runtime.Model` runs exported files. The results are of the
    same classes. Neither the model nor its config is changed.

    Args:
        model: A name of :func:`hat_mm.list_models`, the path of a config, a config, a model of
            :func:`hat_mm.get_model`, or a file that ``hat_mm.export`` wrote.
        weights: File or URL of a checkpoint; None for the published weights of a name.
        device: Such as ``'cuda'``; None for the GPU if there is one, else the CPU. Exported files
            run on the CPU.
        tile: Side in pixels of the tiles in which a detector looks at pictures, through SAHI; None
            for whole pictures.
        overlap: Shared part of neighbouring tiles, from 0 to below 1. It should hold the largest
            object.

    Attributes:
        classes: Names of the classes; None if the model has none.

    Raises:
        UserError: There is no such model, file or device, the weights do not fill the model, tiles
            are asked of what is no detector, or an exported file is given weights or a GPU.
        hat_mm_runtime.ModelError: An exported file cannot be opened.
        hat_mm.compat.DependencyError: A package is not installed.
    """

    def __init__(
        self,
        model: Any,
        weights: str | Path | None = None,
        *,
        device: str | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
    ) -> None:
        self.model: Any = None
        self.file: Model | None = None
        if isinstance(model, str | Path) and str(model).endswith(ENDS):
            if weights is not None or device not in (None, 'cpu'):
                raise UserError(f'{model} is an exported file: it has weights and runs on the CPU')
            self.file = open_file(model)
            self.task, meta = self.file.meta['task'], self.file.meta
        else:
            if not isinstance(model, torch.nn.Module):
                model = _load(model, weights, device)
            elif weights is not None or device is not None or not hasattr(model, 'cfg'):
                raise UserError(
                    f'{type(model).__name__}: a model that is built must come from get_model, with '
                    'its weights, and on its device'
                )
            self.model = model
            self.task = TASKS.get(model.cfg.default_scope, str(model.cfg.default_scope))
            meta = model.dataset_meta or {}
        if self.task not in TASKS.values():
            name = type(model).__name__ if self.model is not None else model
            raise UserError(f'{name} is for {self.task}, not for {", ".join(TASKS.values())}')
        if self.model is not None:
            self._pipeline = _pipeline_of(self.model.cfg)
        if tile is not None:
            if self.task != 'detection':
                raise UserError(f'tiles are for detectors; this model is for {self.task}')
            if not isinstance(tile, int) or tile < 32 or not 0 <= overlap < 1:
                raise UserError(
                    f'a tile must have 32 pixels or more, the overlap lie from 0 to below 1, got '
                    f'{tile!r} and {overlap!r}'
                )
            compat.require('sahi')
        self.tile, self.overlap = tile, overlap
        self.classes = meta.get('classes')
        palette = meta.get('palette')
        self._palette = None if isinstance(palette, str) else palette  # 'random'

    def __call__(self, image: str | Path | np.ndarray, score_thr: float = 0.3) -> Result:
        """Finds what is in a picture.

        Args:
            image: A file, or an array (H, W, 3), uint8, BGR as OpenCV has it.
            score_thr: Least score of detections.

        Returns:
            :class:`hat_mm_runtime.Detections`, :class:`hat_mm_runtime.Segmentation`,
            :class:`hat_mm_runtime.Classification` or :class:`PanopticSegmentation`. Each has
            ``draw()``, ``to_json()`` and a text.

        Raises:
            hat_mm_runtime.PictureError: It is no picture.
        """
        if isinstance(image, str | Path):
            image = read(image)
        if not isinstance(image, np.ndarray):
            raise PictureError(f'an image must be a file or an array, got {type(image).__name__}')
        check(image)
        if self.tile is not None:
            return self._in_tiles(image, score_thr)
        return self._whole(image, score_thr)

    def _whole(self, image: np.ndarray, score_thr: float) -> Any:
        if self.file is not None:
            return self.file(image, score_thr)
        sample = self.run(image)
        common: Any = dict(image=image, classes=self.classes, palette=self._palette)
        if self.task == 'segmentation':
            return Segmentation(**common, map=sample.pred_sem_seg.data[0].cpu().numpy())
        if self.task == 'classification':
            return Classification(**common, scores=sample.pred_score.cpu().numpy())
        if 'pred_panoptic_seg' in sample:
            numbers = sample.pred_panoptic_seg.sem_seg[0].cpu().numpy()
            found, inverse = np.unique(numbers, return_inverse=True)
            real = found % OFFSET < len(self.classes or ())  # one more stands for no segment
            order = np.where(real, np.cumsum(real) - 1, -1)
            labels = (found[real] % OFFSET).tolist()
            segments = order[inverse].reshape(numbers.shape)
            return PanopticSegmentation(**common, map=segments, labels=labels)
        found = sample.pred_instances
        found = found[found.scores >= score_thr].cpu().numpy()
        return Detections(
            **common,
            boxes=found.bboxes,
            scores=found.scores,
            labels=found.labels,
            masks=found.masks.astype(bool) if 'masks' in found else None,
        )

    def prepare(self, image: np.ndarray) -> Prepared:
        """What the network gets for a picture (H, W, 3), uint8, BGR.

        Raises:
            UserError: The model is an exported file.
        """
        if self.model is None:
            raise UserError('an exported file has no modules to look into: give a config')
        caught: list[Any] = []
        hook = self.model.data_preprocessor.register_forward_hook(lambda *one: caught.append(one))
        try:
            self.run(image)
        finally:
            hook.remove()
        data = caught[-1][-1]
        [sample] = data['data_samples']
        # From the picture's size to that after resizing, from there to a central crop.
        old, new = np.array(image.shape[1::-1]), np.array(sample.img_shape[1::-1])
        scale = np.array(sample.get('scale_factor', new / old), float)
        offset = np.maximum(np.round((np.round(old * scale) - new) / 2), 0)
        return Prepared(data['inputs'], sample, np.column_stack([np.diag(scale), -offset]))

    def run(self, image: np.ndarray) -> Any:
        """The toolbox's data sample of a picture (H, W, 3), uint8, BGR, with the prediction.

        Raises:
            PictureError: The test pipeline cannot prepare it, because it is too thin, for example.
        """
        scope = self.model.cfg.default_scope
        height, width = image.shape[:2]
        size = dict(img_shape=(height, width), ori_shape=(height, width))
        with DefaultScope.overwrite_default_scope(scope):
            try:
                data = self._pipeline(dict(img=image, img_id=0, img_path='', **size))
            except (cv2.error, ZeroDivisionError, MemoryError) as error:
                cause = ' '.join(str(error).split())
                raise PictureError(
                    f'the test pipeline cannot prepare a picture of {width}x{height}: {cause}'
                ) from error
            batch = {key: [value] for key, value in data.items()}
            with evaluation(self.model), torch.no_grad():
                return self.model.test_step(batch)[0]

    def _in_tiles(self, image: np.ndarray, score_thr: float) -> Detections:
        from sahi.models.base import DetectionModel
        from sahi.predict import get_sliced_prediction
        from sahi.prediction import ObjectPrediction
        from sahi.utils.cv import get_coco_segmentation_from_bool_mask

        whole = self._whole

        class OneTile(DetectionModel):
            has_masks = False

            def load_model(self) -> None:
                self.model = whole

            def perform_inference(self, image: np.ndarray) -> None:
                found = self.model(image, self.confidence_threshold)
                self._original_predictions, self.has_masks = found, found.masks is not None

            def _create_object_prediction_list_from_original_predictions(
                self, shift_amount_list: Any = None, full_shape_list: Any = None
            ) -> None:
                found = self._original_predictions
                outlines: Any = [None] * len(found)
                if found.masks is not None:
                    outlines = [get_coco_segmentation_from_bool_mask(mask) for mask in found.masks]
                ones = zip(found.boxes, found.labels, found.scores, outlines, strict=True)
                self._object_prediction_list_per_image = [
                    [
                        ObjectPrediction(
                            bbox=box.tolist(),
                            category_id=int(label),
                            category_name=found.name(label),
                            score=float(score),
                            segmentation=outline,
                            shift_amount=shift_amount_list[0],
                            full_shape=full_shape_list[0],
                        )
                        for box, label, score, outline in ones
                        # A mask of less than three pixels has no outline.
                        if outline is None or outline
                    ]
                ]

        detector = OneTile(confidence_threshold=score_thr, device='cpu')
        tiles = get_sliced_prediction(
            image,
            detector,
            slice_height=self.tile,
            slice_width=self.tile,
            overlap_height_ratio=self.overlap,
            overlap_width_ratio=self.overlap,
            perform_standard_pred=False,
            postprocess_type='NMS',
            postprocess_match_metric='IOU',
            verbose=0,
        )
        found = sorted(tiles.object_prediction_list, key=lambda one: -one.score.value)
        shapes = [one.mask.bool_mask for one in found if one.mask is not None]
        masks = np.array(shapes, bool).reshape(-1, *image.shape[:2])
        return Detections(
            image=image,
            classes=self.classes,
            palette=self._palette,
            boxes=np.array([one.bbox.to_xyxy() for one in found], np.float32).reshape(-1, 4),
            scores=np.array([one.score.value for one in found], np.float32),
            labels=np.array([one.category.id for one in found], np.int64),
            masks=masks if detector.has_masks else None,
        )


def _load(model: Any, weights: Any, device: str | None) -> Any:
    """Builds a model with weights on a device.

    Raises:
        UserError: One of them is not there, or they do not fit.
    """
    device = device or importlib.import_module('mmengine.device').get_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        cause = str(error).splitlines()[0]
        raise UserError(f'device {device!r} cannot be used: {cause}') from error
    try:
        model = get_model(model, pretrained=True if weights is None else str(weights))
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    set_memory_format(model.to(device))
    return model


def _pipeline_of(cfg: Any) -> Any:
    """The test pipeline of a config for pictures that are loaded, without their annotations.

    Raises:
        UserError: The config has none.
    """
    if not cfg.get('test_dataloader'):
        raise UserError('the config has no test_dataloader, which says how pictures are prepared')
    steps = innermost_dataset(cfg.test_dataloader).get('pipeline')
    if not steps:
        raise UserError('the dataset of test_dataloader has no pipeline')
    kept: list[Any] = []
    for step in steps:
        name = step.type if isinstance(step.type, str) else step.type.__name__
        if not re.search('Load[A-Za-z]*(Image|Annotation)', name):
            kept.append(step)
        elif step.get('to_float32'):
            kept.insert(0, _to_float32)
    importlib.import_module(f'{cfg.default_scope}.datasets')  # registers the transforms
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return importlib.import_module('mmcv.transforms').Compose(copy.deepcopy(kept))


def _to_float32(data: dict[str, Any]) -> dict[str, Any]:
    """What loading does with ``to_float32``."""
    return data | dict(img=data['img'].astype(np.float32))
