"""Model files as functions from pictures to results."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from . import images
from .images import ModelError
from .results import Classification, Detections, Segmentation

# Key of the file's metadata, a JSON text.
META = 'hat_mm'
# Ends of the names of model files.
ENDS = ('.onnx', '.xml')
_NEEDED = {'task', 'classes', 'palette', 'mean', 'std', 'bgr_to_rgb', 'pad_size_divisor', 'resize'}


class Model:
    """A detector, segmentor, classifier or backbone from a file that ``hat_mm.export`` wrote.

    onnxruntime runs ``.onnx`` and OpenVINO ``.xml``, both on the CPU.

    Args:
        path: The file.
        threads: Number of threads; None leaves it to the engine.

    Attributes:
        meta: What the exporter wrote into the file: task, classes, normalization and the rest.
        names: Names of the outputs.

    Raises:
        ModelError: The file is missing or broken, or was not written by hat_mm.
        ImportError: onnxruntime or OpenVINO is not installed.
    """

    meta: dict[str, Any]
    names: list[str]

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ModelError(f'model {str(path)!r} does not exist')
        if self.path.suffix not in ENDS:
            raise ModelError(f'model {str(path)!r} must end with one of {", ".join(ENDS)}')
        try:
            if self.path.suffix == '.onnx':
                self._open_with_onnxruntime(threads)
            else:
                self._open_with_openvino(threads)
        except (ImportError, ModelError):
            raise
        except Exception as error:  # each engine has its own, and a broken file may raise any
            cause = ' '.join(str(error).split())[:300]
            raise ModelError(f'model {str(path)!r} cannot be opened: {cause}') from error

    def _open_with_onnxruntime(self, threads: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        session = onnxruntime.InferenceSession(
            str(self.path), options, providers=['CPUExecutionProvider']
        )
        self._read(session.get_modelmeta().custom_metadata_map.get(META))
        self.names = [output.name for output in session.get_outputs()]
        self._run = lambda images: session.run(None, {'input': images})

    def _open_with_openvino(self, threads: int | None) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(self.path)
        self._read(model.get_rt_info([META]).astype(str) if model.has_rt_info([META]) else None)
        # By default, OpenVINO computes in bfloat16 wherever the processor can.
        half = self.meta.get('precision') == 'bf16'
        options: dict[str, Any] = {'INFERENCE_PRECISION_HINT': 'bf16' if half else 'f32'}
        if threads:
            options['INFERENCE_NUM_THREADS'] = threads
        compiled = core.compile_model(model, 'CPU', options)
        self.names = [output.any_name for output in compiled.outputs]
        self._run = lambda images: list(compiled([images]).values())

    def _read(self, text: str | None) -> None:
        if text is None:
            raise ModelError(f'model {str(self.path)!r} was not written by hat_mm.export')
        self.meta = json.loads(text)
        if not {*self.meta} >= _NEEDED:
            raise ModelError(f'model {str(self.path)!r} was written by another version of hat_mm')

    def __call__(self, image: str | Path | np.ndarray, score_thr: float = 0.0) -> Any:
        """Finds what is in a picture.

        Args:
            image: A file, or an array (H, W, 3), uint8, BGR as OpenCV has it.
            score_thr: Least score of detections.

        Returns:
            :class:`Detections`, :class:`Segmentation` or :class:`Classification`.

        Raises:
            PictureError: It is no picture, or is too thin.
            ModelError: The file cannot run on a picture of this size, or is a bare backbone.
        """
        if self.meta['task'] == 'features':
            raise ModelError(f'{self.path} is a backbone; only run() can run it')
        if not isinstance(image, np.ndarray):
            image = images.read(image)
        images.check(image)
        batch, size = images.prepare(image, self.meta)
        return self.finish(image, self.run(batch), size=size, score_thr=score_thr)

    def finish(
        self,
        image: np.ndarray,
        outputs: dict[str, np.ndarray],
        *,
        size: tuple[int, int],
        score_thr: float = 0.0,
    ) -> Any:
        """Makes the result of a picture from the file's outputs.

        Args:
            image: The picture, (H, W, 3), uint8, BGR.
            outputs: What :meth:`run` returned.
            size: Height and width of the image that the file was given, without padding.
            score_thr: Least score of detections.
        """
        common = dict(image=image, classes=self.meta['classes'], palette=self.meta['palette'])
        if self.meta['task'] == 'detection':
            threshold = self.meta.get('mask_threshold', 0.5)
            return _detections(common, outputs, size=size, score_thr=score_thr, mask_thr=threshold)
        if self.meta['task'] == 'segmentation':
            threshold = self.meta['threshold']
            return _segmentation(common, outputs['output'][0], size=size, threshold=threshold)
        return Classification(**common, scores=outputs['output'][0])

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Runs the file on normalized images.

        Args:
            images: (B, 3, H, W), float32.

        Returns:
            The outputs by name.

        Raises:
            ModelError: The file does not take images of this size.
        """
        fixed = self.meta.get('static')
        if fixed and (1, 3, *fixed) != images.shape:
            raise ModelError(
                f'{self.path} takes one image of {fixed[0]}x{fixed[1]} (height x width), got '
                f'{images.shape[0]} of {images.shape[2]}x{images.shape[3]}'
            )
        try:
            results = self._run(np.ascontiguousarray(images))
        except Exception as error:  # each engine has its own
            cause = ' '.join(str(error).split())[:300]
            if queries := self.meta.get('queries'):
                cause = f'DINO needs {queries} places on its maps, so a larger image? {cause}'
            size = f'{images.shape[2]}x{images.shape[3]} (height x width)'
            raise ModelError(f'{self.path} failed on an image of {size}: {cause}') from error
        return dict(zip(self.names, results, strict=True))


# --- from outputs to results ----------------------------------------------------------------------


def _detections(
    common: dict[str, Any],
    outputs: dict[str, np.ndarray],
    *,
    size: tuple[int, int],
    score_thr: float,
    mask_thr: float,
) -> Detections:
    height, width = common['image'].shape[:2]
    scale = np.array([size[1] / width, size[0] / height] * 2, np.float32)
    dets, labels = outputs['dets'][0], outputs['labels'][0]
    good = dets[:, 4] >= score_thr
    limit = np.array([size[1], size[0]] * 2, np.float32)
    boxes = np.clip(dets[good, :4], 0, limit) / scale
    masks = None
    if 'masks' in outputs:
        masks = np.zeros((len(boxes), height, width), bool)
        for target, mask, box in zip(masks, outputs['masks'][0][good], boxes, strict=True):
            _paste(target, mask, box, size=size, threshold=mask_thr)
    return Detections(**common, boxes=boxes, scores=dets[good, 4], labels=labels[good], masks=masks)


def _paste(
    target: np.ndarray,
    mask: np.ndarray,
    box: np.ndarray,
    *,
    size: tuple[int, int],
    threshold: float,
) -> None:
    """Fills the target (H, W) with a mask that covers a box, or one of the whole image."""
    height, width = target.shape
    if mask.dtype == bool:
        whole = mask[: size[0], : size[1]].astype(np.float32)
        target[:] = cv2.resize(whole, (width, height)) >= threshold
        return
    # Bilinear, with the corners of the box at those of the mask, and zeros around it.
    weights, inside = [], []
    sides = zip(box[[1, 0]], box[[3, 2]], target.shape, mask.shape, strict=True)
    for start, end, pixels, cells in sides:
        cell = max(end - start, 1e-6) / cells
        first, last = max(0, int(start - cell)), min(pixels, int(np.ceil(end + cell)))
        at = (np.arange(first, last) + 0.5 - start) / cell - 0.5
        weights.append(np.maximum(1 - np.abs(at[:, None] - np.arange(cells)), 0))
        inside.append(slice(first, last))
    target[tuple(inside)] = weights[0] @ mask @ weights[1].T >= threshold


def _segmentation(
    common: dict[str, Any], output: np.ndarray, *, size: tuple[int, int], threshold: float
) -> Segmentation:
    height, width = common['image'].shape[:2]
    output = output[:, : size[0], : size[1]]
    planes: Iterable[tuple[int, np.ndarray]]
    if output.dtype != np.float32:  # one map of classes
        planes = ((int(label), output[0] == label) for label in np.unique(output))
    elif len(output) == 1:  # one map of scores, which are to exceed a threshold
        least = np.log(threshold / (1 - threshold))
        planes = enumerate([np.full_like(output[0], least), output[0]])
    else:
        planes = enumerate(output)
    best = np.full((height, width), -np.inf, np.float32)
    classes = np.zeros((height, width), np.int64)
    # One by one: the scores of 150 classes of a large picture take gigabytes.
    for label, plane in planes:
        scores = cv2.resize(plane.astype(np.float32), (width, height))
        classes[scores > best] = label
        np.maximum(best, scores, out=best)
    return Segmentation(**common, map=classes)
