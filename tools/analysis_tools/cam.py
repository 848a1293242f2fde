"""Shows which places of a picture speak for what the model has found, by the Grad-CAM family.

For detectors the score is that of all objects, or of those of a class, for segmentors that of a
class on the pixels where it was found, for classifiers that of a class. The methods are those of
the library grad-cam (https://github.com/jacobgil/pytorch-grad-cam).
"""

from __future__ import annotations

import argparse
import copy
import difflib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

import hat_mm
from hat_mm import compat
from hat_mm.engine.attention import recorded
from hat_mm.engine.build import evaluation
from hat_mm.engine.cli import UserError, make_writable, run_tool
from hat_mm.engine.overlays import overlay, to_picture
from hat_mm_runtime.images import read

METHODS = {
    'gradcam': 'GradCAM',
    'gradcam++': 'GradCAMPlusPlus',
    'xgradcam': 'XGradCAM',
    'hirescam': 'HiResCAM',
    'layercam': 'LayerCAM',
    'eigencam': 'EigenCAM',
    'eigengradcam': 'EigenGradCAM',
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('image', help='picture')
    parser.add_argument('model', help='name of hat_mm.list_models() or config')
    parser.add_argument('weights', nargs='?', help='checkpoint (default: the published one)')
    parser.add_argument('--method', choices=METHODS, default='layercam')
    parser.add_argument('--category', metavar='NAME', help='class (default: all, or the best one)')
    parser.add_argument(
        '--layers',
        nargs='+',
        metavar='NAME',
        help='modules that return a map; several are averaged (default: the stages that the rest '
        'of the model reads)',
    )
    parser.add_argument('--score-thr', type=float, default=0.3, help='least score of detections')
    parser.add_argument('--out-dir', type=Path, default=Path('outputs/cam'))
    parser.add_argument('--device')
    return parser.parse_args(argv)


# --- what is explained ----------------------------------------------------------------------------


class Scored(nn.Module):
    """A model that returns a list of one score for each image.

    Args:
        model: The model.
        score: From the model, an image (1, C, H, W) and its data sample to a score.
        sample: The data sample.
    """

    def __init__(self, model: nn.Module, score: Callable[..., Tensor], sample: Any) -> None:
        super().__init__()
        self.model, self.score, self.sample = model, score, sample

    def forward(self, images: Tensor) -> list[Tensor]:
        """Scores images (B, C, H, W)."""
        return [self.score(self.model, image[None], copy.deepcopy(self.sample)) for image in images]


def score_of(task: str, label: int | None, threshold: float) -> Callable[..., Tensor]:
    """The score that is explained.

    Args:
        task: As in :class:`hat_mm.Inferencer`.
        label: Number of the class; None for all, or for the best one.
        threshold: Least score of detections.
    """

    def detections(model: Any, image: Tensor, sample: Any) -> Tensor:
        [found] = model(image, [sample], mode='predict')
        found = found.pred_instances
        if found.scores.requires_grad:
            good = found.scores >= threshold
            return found.scores[good if label is None else good & (found.labels == label)].sum()
        # One-stage heads detach what they predict from: the maps of their scores.
        head = getattr(model, 'bbox_head', None)
        if not getattr(head, 'use_sigmoid_cls', False):
            raise UserError(f'{type(head).__name__} has no scores that can be explained')
        maps = model(image, [sample], mode='tensor')[0]
        classes = head.cls_out_channels
        total = image.new_zeros(())
        for scores in maps:
            scores = scores.sigmoid().unflatten(1, (-1, classes))
            scores = scores if label is None else scores[:, :, label]
            total = total + scores[scores >= threshold].sum()
        return total

    def segmentation(model: Any, image: Tensor, sample: Any) -> Tensor:
        logits = model.encode_decode(image, [sample.metainfo])
        if logits.shape[1] == 1:  # foreground alone
            return logits[logits > 0].sum()
        found = logits.argmax(1)
        chosen = found.flatten().bincount().argmax() if label is None else label
        return logits[:, chosen][found == chosen].sum()

    def classification(model: Any, image: Tensor, sample: Any) -> Tensor:
        [logits] = model(image, mode='tensor')
        return logits.max() if label is None else logits[label]

    return dict(detection=detections, segmentation=segmentation, classification=classification)[
        task
    ]


def find_layers(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """Modules by their names.

    Raises:
        UserError: There is none of a name.
    """
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise UserError(
                f'there is no module {name!r}; did you mean {" or ".join(near) or "…"}?'
            )
    return [known[name] for name in names]


def check_maps_of(names: list[str], modules: list[nn.Module], seen: dict) -> None:
    """Checks that modules have returned a map (1, C, H, W).

    Raises:
        UserError: One has not.
    """
    for name, module in zip(names, modules, strict=True):
        if module not in seen:
            raise UserError(f'{name} is not run on the whole image: choose another of --layers')
        output = seen[module][1]
        if not isinstance(output, Tensor) or output.ndim != 4 or len(output) != 1:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(f'{name} returns no map (1, C, H, W) but {shape}: choose another')


def default_layers(model: nn.Module) -> list[str]:
    """Names of the stages of the backbone whose maps are read."""
    backbone: Any = getattr(model, 'backbone', None)
    if not hasattr(backbone, 'stages') or not hasattr(backbone, 'out_indices'):
        raise UserError('--layers is needed: the backbone is none of hat_mm')
    return [f'backbone.stages.{i}' for i in sorted(backbone.out_indices)]


def cam(
    infer: hat_mm.Inferencer,
    image: np.ndarray,
    *,
    method: str = 'layercam',
    layers: list[str] | None = None,
    label: int | None = None,
    threshold: float = 0.3,
) -> np.ndarray:
    """Which places of a picture raise the score.

    Args:
        infer: The model.
        image: The picture, (H, W, 3), uint8, BGR.
        method: One of :data:`METHODS`.
        layers: Names of modules that return a map.
        label: Number of the class; None for all, or for the best one.
        threshold: Least score of detections.

    Returns:
        (H, W), from 0 to 1.

    Raises:
        UserError: There is no such layer, or nothing was found that could be explained.
    """
    kinds = compat.require('pytorch_grad_cam')
    if label is not None and not 0 <= label < len(infer.classes or ()):
        raise UserError(f'there is no class {label}; the classes are {infer.classes}')
    inputs, sample, matrix = infer.prepare(image)
    names = layers or default_layers(infer.model)
    modules = find_layers(infer.model, names)
    scored = Scored(infer.model, score_of(infer.task, label, threshold), sample)
    gradients = [(parameter, parameter.grad) for parameter in infer.model.parameters()]
    run = None
    try:
        with evaluation(infer.model), torch.enable_grad():
            images = inputs.clone().requires_grad_()
            with recorded(modules) as seen:
                [score] = scored(images)
            check_maps_of(names, modules, seen)
            _checked(score, infer.task)
            del score, seen  # and the graph of the pass
            run = getattr(kinds, METHODS[method])(scored, modules)
            target = functools.partial(_checked, task=infer.task)
            values = run(images, targets=[target])
    finally:
        if run is not None:
            run.activations_and_grads.release()
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return to_picture(values[0], matrix=matrix, stride=1, size=image.shape[:2], smooth=True)


def _checked(score: Tensor, task: str) -> Tensor:
    if not score.requires_grad or not score:
        hint = ': try a lower --score-thr' if task == 'detection' else ' of this class'
        raise UserError(f'nothing was found that could be explained{hint}')
    return score


def main(argv: list[str] | None = None) -> None:
    """Explains one picture."""
    args = parse_args(argv)
    image = read(args.image)
    make_writable(str(args.out_dir), '--out-dir')
    infer = hat_mm.Inferencer(args.model, args.weights, device=args.device)
    label = None
    if args.category is not None:
        classes = list(infer.classes or ())
        if args.category not in classes:
            raise UserError(f'--category {args.category!r} is none of {classes}')
        label = classes.index(args.category)
    values = cam(
        infer,
        image,
        method=args.method,
        layers=args.layers,
        label=label,
        threshold=args.score_thr,
    )
    path = args.out_dir / f'{Path(args.image).stem}_{args.method}.png'
    path.write_bytes(cv2.imencode('.png', overlay(image, values))[1].tobytes())
    print(path)


if __name__ == '__main__':
    sys.exit(run_tool(main, 'cam.py'))
