"""Operators of detectors that PyTorch's exporter does not know: NMS and RoIAlign.

In PyTorch they are mmcv's. In a graph each is one symbol, and :func:`translations` replaces it by
the operator of the same meaning in the ONNX standard, so no file needs a library of custom
operators.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor


@torch.library.custom_op('hat_mm::nms', mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, max_boxes: int) -> Tensor:
    """Non-maximum suppression.

    Args:
        boxes: (N, 4), as x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: Boxes that overlap a better one by more than this are left out.
        max_boxes: Largest number of boxes to keep.

    Returns:
        Indices of the kept boxes, by falling score, (K,) int64.
    """
    ops = importlib.import_module('mmcv.ops')
    return ops.nms(boxes, scores, iou_threshold)[1][:max_boxes]


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, max_boxes: int) -> Tensor:
    # PyTorch would not trace what works differently for no box or a single one. In the graph, all
    # operators work for any number.
    size = torch.library.get_ctx().new_dynamic_size(min=2)
    return boxes.new_empty(size, dtype=torch.int64)


@torch.library.custom_op(
    'hat_mm::roi_align',
    mutates_args=(),
    # torch 2.6 does not read it from the annotation `list[int]`.
    schema=(
        '(Tensor x, Tensor rois, SymInt[] size, float scale, SymInt sampling_ratio, bool aligned)'
        ' -> Tensor'
    ),
)
def roi_align(
    x: Tensor, rois: Tensor, size: list[int], scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Average-pooled RoIAlign.

    Args:
        x: Feature map, (B, C, H, W).
        rois: Index of the image, then x1, y1, x2, y2 in pixels of the image, (N, 5).
        size: Height and width of the output.
        scale: Pixels of the map per pixel of the image.
        sampling_ratio: Samples per output cell and axis; 0 for as many as the RoI has pixels.
        aligned: Whether coordinates are shifted by half a pixel, as they should be.

    Returns:
        (N, C, *size).
    """
    ops = importlib.import_module('mmcv.ops')
    return ops.roi_align(x, rois, tuple(size), scale, sampling_ratio, 'avg', aligned)


@roi_align.register_fake
def _(
    x: Tensor, rois: Tensor, size: list[int], scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    return x.new_empty(rois.shape[0], x.shape[1], *size)


def translations() -> dict[Callable, Callable]:
    """The table of translations for ``torch.onnx.export(custom_translation_table=...)``."""
    op = importlib.import_module('onnxscript').opset18

    def onnx_nms(boxes, scores, iou_threshold, max_boxes):
        limit = op.Constant(value_ints=[max_boxes])
        threshold = op.Constant(value_floats=[iou_threshold])
        # Reshaped, because OpenVINO has to know that there are four coordinates.
        boxes = op.Reshape(boxes, op.Constant(value_ints=[1, -1, 4]))
        scores = op.Reshape(scores, op.Constant(value_ints=[1, 1, -1]))
        # Each row: image, class, box.
        selected = op.NonMaxSuppression(boxes, scores, limit, threshold)
        return op.Gather(selected, op.Constant(value_int=2), axis=1)

    def onnx_roi_align(x, rois, size, scale, sampling_ratio, aligned):
        image = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=7)  # int64
        return op.RoiAlign(
            x,
            op.Reshape(
                op.Gather(rois, op.Constant(value_ints=[1, 2, 3, 4]), axis=1),
                op.Constant(value_ints=[-1, 4]),
            ),
            image,
            coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
            mode='avg',
            output_height=size[0],
            output_width=size[1],
            sampling_ratio=sampling_ratio,
            spatial_scale=scale,
        )

    hat_mm = torch.ops.hat_mm
    return {hat_mm.nms.default: onnx_nms, hat_mm.roi_align.default: onnx_roi_align}
