"""Whole models as graphs for any image size, which :mod:`hat_mm.engine.export` traces.

The toolboxes' own ``predict`` turns sizes into numbers, branches on how many boxes were found, and
works on data samples. The modules here call the same backbones, necks, heads, priors and box
coders, from a normalized batch to final results, without a branch that depends on data.

Letters: B batch, H W image size, K classes, N boxes.
"""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hat_mm.layers.windows import averaging_matrix

from . import onnx_ops
from .cli import UserError

Size = Sequence[int]


class Graph(nn.Module):
    """What the graphs have in common.

    Args:
        model: The model in eval mode. Some of its modules may be replaced.

    Attributes:
        task: ``'features'``, ``'classification'``, ``'segmentation'`` or ``'detection'``.
        output_names: Names of the outputs of ``forward``.
        batched: Whether it takes any number of images.
        final: Regular expressions for the names of the last layers, which int8 leaves in float.
    """

    task: str
    output_names: Sequence[str]
    batched = True
    final: Sequence[str] = ()

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def settings(self) -> dict[str, Any]:
        """Settings of the model for the file's metadata, as plain data."""
        return {}


class Features(Graph):
    """A bare backbone: one output for each map."""

    task = 'features'

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.output_names = [f'stage{i}' for i in model.out_indices]

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Maps (B, 3, H, W) to the backbone's maps."""
        return tuple(self.model(input))


class Classifier(Graph):
    """mmpretrain's ImageClassifier with a head of one label for each image."""

    task = 'classification'
    output_names = ('output',)
    final = (r'head\.fc',)

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        _check_kind(model.head, ['LinearClsHead'])

    def forward(self, input: Tensor) -> tuple[Tensor]:
        """Maps (B, 3, H, W) to the probabilities of the classes, (B, K)."""
        return (self.model.head(self.model.extract_feat(input)).softmax(1),)


class Segmentor(Graph):
    """mmseg's EncoderDecoder on whole images.

    Args:
        model: The segmentor.
        scores: Whether the output is the score of each class (before the softmax) instead of the
            class.
    """

    task = 'segmentation'
    output_names = ('output',)
    final = ('conv_seg',)

    def __init__(self, model: Any, scores: bool = False) -> None:
        super().__init__(model)
        _check_kind(model, ['EncoderDecoder'])
        _check_kind(model.decode_head, ['UPerHead', 'FPNHead'])
        if model.decode_head.align_corners:
            raise UserError('align_corners=True cannot be exported, align_corners=False can')
        _replace(model, 'AdaptiveAvgPool2d', AdaptiveAvgPool2d)
        _replace(model.decode_head, 'Upsample', Upsample)
        self.scores = scores

    def settings(self) -> dict[str, Any]:
        """Mode of inference, number of maps, and the threshold of a segmentor with a single map."""
        head = self.model.decode_head
        return dict(
            inference=_plain(self.model.test_cfg),
            threshold=head.threshold,
            out_channels=head.out_channels,
        )

    def forward(self, input: Tensor) -> tuple[Tensor]:
        """Maps (B, 3, H, W) to classes (B, 1, H, W), int64, or to scores (B, K, H, W)."""
        meta = dict(img_shape=tuple(input.shape[2:]))
        feats = self.model.extract_feat(input)
        scores = self.model.decode_head.predict(feats, [meta], self.model.test_cfg)
        if self.scores:
            return (scores,)
        if scores.shape[1] > 1:
            return (scores.argmax(1, keepdim=True),)
        return ((scores.sigmoid() > self.model.decode_head.threshold).long(),)


class AdaptiveAvgPool2d(nn.Module):
    """Adaptive average pooling as one matrix product for each axis, so for any map size."""

    def __init__(self, module: nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        size: Any = module.output_size
        self.output_size = (size, size) if isinstance(size, int) else tuple(size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, *output_size)."""
        rows, cols = (
            self._pooling(k, n, x) for k, n in zip(self.output_size, x.shape[2:], strict=True)
        )
        return rows @ x @ cols.t()

    def _pooling(self, cells: int, size: int, like: Tensor) -> Tensor:
        """The (cells, size) matrix that averages an axis."""
        cell = torch.arange(cells, device=like.device)
        start, end = cell * size // cells, ((cell + 1) * size + cells - 1) // cells
        return averaging_matrix(start, end, size, like.dtype)


class Upsample(nn.Module):
    """mmseg's Upsample by a whole number; mmseg's own turns the size into a constant."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.factor = int(module.scale_factor)
        self.mode = module.mode
        self.align_corners = module.align_corners

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to a map that is larger by the factor."""
        size = [n * self.factor for n in x.shape[2:]]
        return F.interpolate(x, size, mode=self.mode, align_corners=self.align_corners)


class Detector(Graph):
    """What detectors have in common: they take one image."""

    task = 'detection'
    output_names: Sequence[str] = ('dets', 'labels')
    batched = False


class SingleStageDetector(Detector):
    """mmdet's RetinaNet, for one image."""

    final = ('retina_cls', 'retina_reg')

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        _check_kind(model.bbox_head, ['RetinaHead'])
        _check_nms(model.test_cfg)

    def settings(self) -> dict[str, Any]:
        """Thresholds and limits of the post-processing."""
        return dict(test_cfg=_plain(self.model.test_cfg))

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (1, 3, H, W) to boxes with scores (1, N, 5) and classes (1, N)."""
        head, cfg = self.model.bbox_head, self.model.test_cfg
        levels = []
        for scores, deltas, priors in _levels(head, self.model.extract_feat(input)):
            classes = scores.shape[1]
            best, index = _top(scores.flatten(), cfg.get('nms_pre', -1))
            row = index // classes
            levels.append((best, index % classes, deltas[row], priors[row]))
        scores, labels, deltas, priors = (torch.cat(parts) for parts in zip(*levels, strict=True))
        boxes = head.bbox_coder.decode(priors, deltas, max_shape=tuple(input.shape[2:]))
        good = ((scores > cfg.get('score_thr', 0)) & _is_large(boxes, cfg)).nonzero().squeeze(1)
        dets, labels = _suppress(boxes[good], scores[good], labels[good], cfg)
        return dets[None], labels[None]


class TwoStageDetector(Detector):
    """mmdet's Faster, Mask and Cascade R-CNN, for one image.

    Args:
        model: The detector.
        paste_masks: Whether masks are pasted into the image.
    """

    final = ('rpn_cls', 'rpn_reg', 'fc_cls', 'fc_reg', 'conv_logits')

    def __init__(self, model: Any, paste_masks: bool = False) -> None:
        super().__init__(model)
        _check_kind(model.rpn_head, ['RPNHead'])
        _check_kind(model.roi_head, ['StandardRoIHead', 'CascadeRoIHead'])
        for cfg in (model.test_cfg.rpn, model.test_cfg.rcnn):
            _check_nms(cfg)
        self.paste_masks = paste_masks
        roi_head = model.roi_head
        self.output_names = ('dets', 'labels', 'masks')[: 3 if roi_head.with_mask else 2]
        # A cascade has lists of these, a single stage is a cascade of one.
        self.extractors = _listed(roi_head.bbox_roi_extractor)
        self.heads = _listed(roi_head.bbox_head)
        self.mask_extractors = _listed(roi_head.mask_roi_extractor) if roi_head.with_mask else []
        self.mask_heads = _listed(roi_head.mask_head) if roi_head.with_mask else []
        for extractor in [*self.extractors, *self.mask_extractors]:
            _check_kind(extractor, ['SingleRoIExtractor'])
            for layer in extractor.roi_layers:
                _check_kind(layer, ['RoIAlign'])
                if layer.pool_mode != 'avg':
                    raise UserError(f"RoIAlign with {layer.pool_mode!r} cannot be exported: 'avg'")
        if roi_head.with_shared_head:
            raise UserError('a RoI head with a shared head cannot be exported')
        for head in self.heads:
            _check_kind(head, ['Shared2FCBBoxHead', 'Shared4Conv1FCBBoxHead', 'ConvFCBBoxHead'])
            if head.custom_activation:
                raise UserError(f'{type(head.loss_cls).__name__} cannot be exported')
        for head in self.mask_heads:
            _check_kind(head, ['FCNMaskHead'])

    def settings(self) -> dict[str, Any]:
        """Thresholds and limits of the post-processing."""
        cfg = self.model.test_cfg
        threshold = cfg.rcnn.get('mask_thr_binary')
        return dict(test_cfg=_plain(cfg), mask_threshold=threshold if self.mask_heads else None)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Detects objects in one image.

        Args:
            input: Normalized image, (1, 3, H, W).

        Returns:
            Boxes with scores (1, N, 5), classes (1, N), and if the model has masks these: their
            probabilities in the box (1, N, 28, 28), or pasted masks (1, N, H, W) of booleans.
        """
        size = tuple(input.shape[2:])
        feats = self.model.extract_feat(input)
        boxes, scores = self._refine(feats, self._propose(feats, size), size)
        dets, labels = self._select(boxes, scores)
        if not self.mask_heads:
            return dets[None], labels[None]
        masks = self._masks(feats, dets[:, :4], labels)
        if self.paste_masks:
            masks = paste(masks, dets[:, :4], size) >= self.model.test_cfg.rcnn.mask_thr_binary
        return dets[None], labels[None], masks[None]

    def _propose(self, feats: Sequence[Tensor], size: Size) -> Tensor:
        """Proposals of the RPN, (N, 4)."""
        head, cfg = self.model.rpn_head, self.model.test_cfg.rpn
        levels = []
        for i, (scores, deltas, priors) in enumerate(_levels(head, feats)):
            best, index = _top(scores.flatten(), cfg.get('nms_pre', -1))
            levels.append((best, torch.full_like(index, i), deltas[index], priors[index]))
        scores, level, deltas, priors = (torch.cat(parts) for parts in zip(*levels, strict=True))
        boxes = head.bbox_coder.decode(priors, deltas, max_shape=size)
        good = _is_large(boxes, cfg).nonzero().squeeze(1)
        dets, _ = _suppress(boxes[good], scores[good], level[good], cfg)
        return dets[:, :4]

    def _refine(self, feats: Sequence[Tensor], boxes: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4) or, one for each class, (N, K, 4), and scores (N, K) of proposals."""
        all_scores = []
        for extractor, head in zip(self.extractors, self.heads, strict=True):
            scores, deltas = head(_pool(extractor, feats, boxes))
            all_scores.append(scores)
            deltas = deltas.unflatten(1, (-1, 4))  # one for each class, or one
            if head is not self.heads[-1] and not head.reg_class_agnostic:
                best = scores[:, :-1].argmax(1)[:, None, None].expand(-1, 1, 4)
                deltas = deltas.gather(1, best)
            priors = boxes[:, None].expand(-1, deltas.shape[1], 4).reshape(-1, 4)
            boxes = _decode(head.bbox_coder, priors, deltas.reshape(-1, 4), size)
            if deltas.shape[1] > 1:
                boxes = boxes.unflatten(0, (-1, deltas.shape[1]))
        scores = sum(all_scores) / len(all_scores)
        return boxes, scores.softmax(1)[:, :-1]

    def _select(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        cfg = self.model.test_cfg.rcnn
        classes = scores.shape[1]
        scores = scores.flatten()
        good = (scores > cfg.score_thr).nonzero().squeeze(1)
        chosen = boxes[good // classes] if boxes.dim() == 2 else boxes.flatten(0, 1)[good]
        return _suppress(chosen, scores[good], good % classes, cfg)

    def _masks(self, feats: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Probabilities of the masks in their boxes, (N, 28, 28): the mean of all stages."""
        masks = []
        for extractor, head in zip(self.mask_extractors, self.mask_heads, strict=True):
            logits = head(_pool(extractor, feats, boxes))
            if not head.class_agnostic:
                index = labels[:, None, None, None].expand(-1, 1, *logits.shape[2:])
                logits = logits.gather(1, index)
            masks.append(logits.sigmoid().squeeze(1))
        return sum(masks) / len(masks)


class DINO(Detector):
    """mmdet's DINO, for one image.

    Args:
        model: The detector. mmdet keeps the sizes of the levels in a tensor, whose values would
            become constants; here they are a list of numbers, which needs
            :class:`DeformableAttention`.
    """

    final = ('cls_branches', 'reg_branches', 'ref_point_head', 'sampling_offsets')

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        _check_kind(model.bbox_head, ['DINOHead'])
        if not model.bbox_head.loss_cls.use_sigmoid:
            raise UserError('DINO with a softmax over classes cannot be exported')
        _replace(model, 'MultiScaleDeformableAttention', DeformableAttention)

    def settings(self) -> dict[str, Any]:
        """Limit of the results; number of queries, the least number of places on the maps."""
        return dict(test_cfg=_plain(self.model.test_cfg), queries=self.model.num_queries)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (1, 3, H, W) to boxes with scores (1, N, 5) and classes (1, N)."""
        height, width = input.shape[2:]
        head = self.model.bbox_head
        feats = self.model.extract_feat(input)
        with _SymbolicSizes():
            hidden, references = self._decode(feats)
        logits, boxes = (layers[-1][0] for layers in head(hidden, references))
        limit = self.model.test_cfg.get('max_per_img', self.model.num_queries)
        scores, index = logits.sigmoid().flatten().topk(limit)
        x, y, w, h = boxes[index // head.num_classes].unbind(1)
        x = torch.stack([x - w / 2, x + w / 2], 1).clamp(0, 1) * width
        y = torch.stack([y - h / 2, y + h / 2], 1).clamp(0, 1) * height
        dets = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1], scores], 1)
        return dets[None], (index % head.num_classes)[None]

    def _decode(self, feats: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Hidden states and reference boxes of the decoder's layers."""
        model = self.model
        tokens, positions = [], []
        for feat, embed in zip(feats, model.level_embed, strict=True):
            tokens.append(feat.flatten(2).transpose(1, 2))
            position = model.positional_encoding(None, input=feat)
            positions.append(position.flatten(2).transpose(1, 2) + embed)
        levels = dict(
            spatial_shapes=[tuple(feat.shape[2:]) for feat in feats],
            level_start_index=None,
            valid_ratios=feats[0].new_ones(1, len(feats), 2),
        )
        memory = model.encoder(
            query=torch.cat(tokens, 1),
            query_pos=torch.cat(positions, 1),
            key_padding_mask=None,
            **levels,
        )
        start, _ = model.pre_decoder(memory, None, levels['spatial_shapes'])
        out = model.forward_decoder(memory_mask=None, **start, **levels)
        return out['hidden_states'], out['references']


class _SymbolicSizes(TorchFunctionMode):
    """Keeps sizes from becoming constants where mmdet calls functions that take only numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.linspace:  # always from start to start + steps - 1
            start, _, steps = args
            return start + torch.arange(steps, **kwargs)
        if func is torch.Tensor.new_tensor:  # of the size of a level
            like, size = args
            return torch.cat([like.new_full((1,), n) for n in size])
        return func(*args, **kwargs)


class DeformableAttention(nn.Module):
    """mmcv's MultiScaleDeformableAttention in plain PyTorch, with sizes of levels as numbers."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        query: Tensor,
        *,
        value: Tensor | None = None,
        query_pos: Tensor | None = None,
        reference_points: Tensor,
        spatial_shapes: list[tuple[int, int]],
        **unused: Any,
    ) -> Tensor:
        """Maps queries (1, Q, C) to the same shape; as mmcv's module, with ``batch_first``."""
        module: Any = self.module
        asking = query if query_pos is None else query + query_pos
        value = module.value_proj(query if value is None else value)
        value = value.unflatten(2, (module.num_heads, -1))
        points = (module.num_heads, module.num_levels, module.num_points)
        offsets = module.sampling_offsets(asking).unflatten(2, (*points, 2))
        weights = module.attention_weights(asking).unflatten(2, (module.num_heads, -1)).softmax(3)
        reference = reference_points[:, :, None, :, None]
        if reference.shape[-1] == 2:  # points: the offsets are in pixels of a level
            x, y = offsets.unbind(-1)
            heights, widths = zip(*spatial_shapes, strict=True)
            x = torch.stack([x[:, :, :, i] / width for i, width in enumerate(widths)], 3)
            y = torch.stack([y[:, :, :, i] / height for i, height in enumerate(heights)], 3)
            locations = reference + torch.stack([x, y], -1)
        else:  # boxes: they are in halves of a box
            locations = reference[..., :2] + offsets / module.num_points * reference[..., 2:] / 2
        sample = importlib.import_module('mmcv.ops.multi_scale_deform_attn')
        output = sample.multi_scale_deformable_attn_pytorch(
            value, spatial_shapes, locations, weights.unflatten(3, points[1:])
        )
        return module.output_proj(output) + query


GRAPHS: dict[str, type[Graph]] = {
    'ImageClassifier': Classifier,
    'EncoderDecoder': Segmentor,
    'TwoStageDetector': TwoStageDetector,
    'DINO': DINO,
    'SingleStageDetector': SingleStageDetector,
}


def inference_graph(model: Any, *, scores: bool = False, paste_masks: bool = False) -> Graph:
    """Makes the graph of a model.

    Args:
        model: A classifier, segmentor, detector or backbone in eval mode. It is changed.
        scores: See :class:`Segmentor`.
        paste_masks: See :class:`TwoStageDetector`.

    Raises:
        UserError: The model or a part of it is not supported, or has no such output.
    """
    kind = next((GRAPHS[name] for name in GRAPHS if _is(model, name)), None)
    if kind is None and hasattr(model, 'out_indices'):
        kind = Features
    if kind is None:
        raise UserError(
            f'{type(model).__name__} cannot be exported; what can: {", ".join(GRAPHS)} and '
            'backbones with out_indices'
        )
    if scores and kind is not Segmentor:
        raise UserError(f'scores is for segmentors, the model is {type(model).__name__}')
    if paste_masks and not (kind is TwoStageDetector and model.roi_head.with_mask):
        raise UserError(f'paste_masks is for detectors with masks, not {type(model).__name__}')
    options = {Segmentor: dict(scores=scores), TwoStageDetector: dict(paste_masks=paste_masks)}
    return kind(model, **options.get(kind, {}))


def _is(module: Any, kind: str) -> bool:
    """Tells whether an object is of a class of this name, or of one derived from it."""
    return any(base.__name__ == kind for base in type(module).__mro__)


def _check_kind(module: Any, kinds: Sequence[str]) -> None:
    """Refuses all other classes, also derived ones, which may predict in another way."""
    if type(module).__name__ not in kinds:
        raise UserError(
            f'{type(module).__name__} cannot be exported; instead of it: {", ".join(kinds)}'
        )


def _plain(cfg: Any) -> Any:
    return cfg.to_dict() if hasattr(cfg, 'to_dict') else dict(cfg)


def _check_nms(cfg: Any) -> None:
    nms = cfg.get('nms') or {}
    known = {'type', 'iou_threshold', 'split_thr', 'class_agnostic'}
    plain = nms.get('type', 'nms') == 'nms' and not nms.get('class_agnostic')
    if not plain or 'iou_threshold' not in nms or not {*nms} <= known:
        raise UserError(
            f"nms={nms} cannot be exported; instead of it: dict(type='nms', iou_threshold=...)"
        )


def _replace(model: nn.Module, kind: str, by: type[nn.Module]) -> None:
    """Replaces the modules of a kind by others, which are made from them."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if _is(child, kind):
                setattr(module, name, by(child))


def _listed(modules: Any) -> list[Any]:
    return list(modules) if isinstance(modules, nn.ModuleList) else [modules]


def _levels(head: Any, feats: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Scores (A, K), deltas (A, 4) and prior boxes (A, 4) of each level, for one image."""
    all_scores, all_deltas = head(feats)
    sizes = [tuple(scores.shape[2:]) for scores in all_scores]
    all_priors = head.prior_generator.grid_priors(sizes, dtype=feats[0].dtype, device='cpu')
    for scores, deltas, priors in zip(all_scores, all_deltas, all_priors, strict=True):
        scores = scores[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
        scores = scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(1)[:, :-1]
        yield scores, deltas[0].permute(1, 2, 0).reshape(-1, 4), priors


def _top(scores: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The best scores, at most ``limit``, and their indices."""
    number = scores.shape[0]
    return scores.topk(torch.sym_min(limit, number) if limit > 0 else number)


def _is_large(boxes: Tensor, cfg: Any) -> Tensor:
    """Tells which boxes (N, 4) are wider and higher than ``min_bbox_size``, (N,)."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    smallest = cfg.get('min_bbox_size', -1)
    return (width > smallest) & (height > smallest)


def _suppress(boxes: Tensor, scores: Tensor, labels: Tensor, cfg: Any) -> tuple[Tensor, Tensor]:
    """The best boxes with their scores (N, 5), and their labels (N,), after NMS in each class."""
    # Like mmcv: boxes of different classes are moved apart. There may be none at all.
    offset = F.pad(boxes.flatten(), (0, 1)).amax(0) + 1
    apart = boxes + (labels * offset)[:, None]
    limit = cfg.get('max_per_img', -1)
    limit = limit if limit > 0 else 2**31 - 1
    kept = onnx_ops.nms(apart, scores, cfg.nms.iou_threshold, limit)
    return torch.cat([boxes[kept], scores[kept, None]], 1), labels[kept]


def _decode(coder: Any, priors: Tensor, deltas: Tensor, size: Size) -> Tensor:
    """Boxes (N, 4) from priors and deltas, within the image."""
    # The coder asks whether there are any. With another row, which is cut off, there are.
    priors, deltas = F.pad(priors, (0, 0, 0, 1)), F.pad(deltas, (0, 0, 0, 1))
    return coder.decode(priors, deltas, max_shape=size)[:-1]


def _pool(extractor: Any, feats: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """RoI features (N, C, h, w) of boxes (N, 4), each from the level that suits its size."""
    rois = F.pad(boxes, (1, 0))
    feats = feats[: extractor.num_inputs]
    level = extractor.map_roi_levels(rois, len(feats))
    parts = []
    for i, (feat, layer) in enumerate(zip(feats, extractor.roi_layers, strict=True)):
        index = (level == i).nonzero().squeeze(1)
        parts.append(
            onnx_ops.roi_align(
                feat,
                rois[index],
                list(layer.output_size),
                layer.spatial_scale,
                layer.sampling_ratio,
                layer.aligned,
            )
        )
    number = rois.shape[0]
    by_level = (level * number + torch.arange(number, device=level.device)).argsort()
    return torch.cat(parts)[by_level.argsort()]


def paste(masks: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Pastes masks into the image, with bilinear interpolation, as mmdet does.

    Args:
        masks: Probabilities in the boxes, (N, h, w).
        boxes: (N, 4), x1, y1, x2, y2.
        size: Image size (H, W).

    Returns:
        Probabilities, (N, H, W); 0 outside the boxes.
    """
    height, width = size
    x1, y1, x2, y2 = boxes[:, None].unbind(2)
    y = (torch.arange(height, device=boxes.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
    x = (torch.arange(width, device=boxes.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
    shape = (boxes.shape[0], height, width)
    grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], 3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
