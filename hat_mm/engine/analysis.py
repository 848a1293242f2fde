"""Parameters and FLOPs of a model by part, counted by ``torch.utils.flop_counter``.

A FLOP is a multiply-add (MAC) of a matrix product or a convolution, as in the papers.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hat_mm.layers import AbsolutePositionEmbedding, RelativePositionBias

__all__ = ['Complexity', 'Part', 'count']

_ATTENTION = torch.ops.aten.scaled_dot_product_attention


@dataclass(frozen=True)
class Part:
    """Parameters and FLOPs of a model or one part of it.

    Attributes:
        parameters: Number of parameters.
        flops: All FLOPs.
        attention: FLOPs of the products of queries with keys, and of their softmax with values.
        position: FLOPs of the MLPs of position embeddings and biases.
    """

    parameters: int
    flops: int
    attention: int
    position: int


@dataclass(frozen=True)
class Complexity:
    """Parameters and FLOPs of a model and its parts.

    Attributes:
        whole: The model.
        parts: Its children by name, with the entries of module lists one by one; children without
            parameters and FLOPs are left out.
    """

    whole: Part
    parts: dict[str, Part]


def count(
    model: nn.Module, shape: tuple[int, int], channels: int = 3, proposals: int = 1000
) -> Complexity:
    """Counts the parameters of a model and its FLOPs for one image.

    The forward pass is that of a prediction before its post-processing; losses, and heads that only
    training uses, are not run. On the device ``'meta'`` it takes no time or memory, but that fails
    if the model needs values, as a two-stage detector does.

    Args:
        model: A backbone, or a detector, segmentor or classifier of the toolboxes. It is left in
            eval mode.
        shape: Height and width of the image in pixels.
        channels: Channels of the image.
        proposals: Boxes that the second stage of a detector gets, however many its weights would
            propose; mmdet's mask heads take the first 100 of them in this kind of pass.

    Returns:
        Parameters and FLOPs of the whole model and of its parts.

    Raises:
        ValueError: ``shape``, ``channels`` or ``proposals`` are not positive ints.
    """
    sides = shape if isinstance(shape, Sequence) else [shape]
    numbers = (*sides, channels, proposals)
    if len(sides) != 2 or any(not isinstance(n, int) or n < 1 for n in numbers):
        raise ValueError(
            'shape (height, width), channels and proposals must be positive ints, not '
            f'{shape!r}, {channels!r} and {proposals!r}'
        )
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), None)
    # The counter looks up the overload before it decomposes an operator, the packet after that.
    handles = {_ATTENTION: _attention, _ATTENTION.default: _attention}
    counter = FlopCounterMode(display=False, custom_mapping=handles)
    fast = torch.backends.mha.get_fastpath_enabled()
    # The fast path of nn.MultiheadAttention is a single operator, which the counter ignores.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Inference mode keeps the attention operator whole, so that it is counted separately.
        with counter, torch.inference_mode():
            _predict(model, torch.zeros(1, channels, *shape, device=device), proposals)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    counts = counter.get_flop_counts()
    root = type(model).__name__
    parts = {name: _part(child, f'{root}.{name}', counts) for name, child in _children(model)}
    return Complexity(
        whole=_part(model, root, counts),
        parts={name: part for name, part in parts.items() if part.parameters or part.flops},
    )


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs from the shapes (…, L, E); a mask, even a causal one, does not reduce them."""
    batch = torch.broadcast_shapes(query[:-2], key[:-2], value[:-2])
    heads = batch.numel()
    return sdpa_flop_count((1, heads, *query[-2:]), (1, heads, *key[-2:]), (1, heads, *value[-2:]))


def _predict(model: nn.Module, image: Tensor, proposals: int) -> None:
    if not hasattr(model, 'data_preprocessor'):
        model(image)
        return
    # Heads of OpenMMLab's models read the size of the image from the sample.
    size = tuple(image.shape[-2:])
    sizes = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    sample = BaseDataElement(metainfo=dict.fromkeys(sizes, size) | {'scale_factor': (1.0, 1.0)})
    region_head = getattr(model, 'rpn_head', None)
    if region_head is None:
        model(image, [sample], mode='tensor')
        return

    def fixed_proposals(*_: Any, **__: Any) -> list[InstanceData]:
        boxes = image.new_tensor([[0, 0, 64, 64]]).repeat(proposals, 1)
        scores = boxes[:, 0]
        return [InstanceData(bboxes=boxes, scores=scores, labels=scores.long())]

    region_head.predict_by_feat = fixed_proposals
    try:
        model(image, [sample], mode='tensor')
    finally:
        del region_head.predict_by_feat


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f'{name}.{i}', entry) for i, entry in enumerate(child))
        else:
            yield name, child


def _part(module: nn.Module, name: str, counts: dict[str, dict[Any, int]]) -> Part:
    found = _found(module, name, counts)
    position = sum(
        _found(child, full, counts).total()
        for full, child in module.named_modules(prefix=name)
        if isinstance(child, AbsolutePositionEmbedding | RelativePositionBias)
    )
    return Part(
        parameters=sum(p.numel() for p in module.parameters()),
        # torch counts a multiply-add as two.
        flops=found.total() // 2,
        attention=found[_ATTENTION] // 2,
        position=position // 2,
    )


def _found(module: nn.Module, name: str, counts: dict[str, dict[Any, int]]) -> Counter:
    """Counts of torch for a module, or for its children if another method was called."""
    if name in counts:
        return Counter(counts[name])
    children = (_found(child, f'{name}.{key}', counts) for key, child in module.named_children())
    return sum(children, Counter())
