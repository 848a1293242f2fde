"""Parameters and FLOPs of a model by part, counted by ``mmengine.analysis``.

A FLOP is a multiply-add, as in the papers. mmengine traces one forward pass and adds up what each
operator computes; it knows no scaled-dot-product attention and takes the first factor of a
broadcast ``matmul`` for the whole product, so both get a handle here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn

from hat_mm.layers import AbsolutePositionEmbedding, RelativePositionBias

__all__ = ['KINDS', 'Complexity', 'Part', 'count']

KINDS = {
    'convolution': ('conv',),
    'linear': ('linear', 'addmm', 'mm', 'matmul', 'bmm', 'baddbmm', 'einsum'),
    'attention': ('scaled_dot_product_attention',),
    'position': (),
    'norm': ('batch_norm', 'group_norm', 'layer_norm', 'instance_norm'),
    'resampling': (
        'upsample_nearest2d',
        'upsample_bilinear2d',
        'adaptive_avg_pool2d',
        'grid_sampler',
    ),
}
"""Kinds of FLOPs and mmengine's operators that belong to them.

``attention`` are the products of queries with keys and of their softmax with values. ``position``
are the MLPs that make FasterViT's position embeddings and biases: a network that predicts computes
them once for a size and keeps them. The products inside them are taken out of ``linear``.
"""

# Their results are counted as elements, apart from the FLOPs: no product of matrices is in them.
_ELEMENTWISE = (
    *('abs', 'add', 'add_', 'div', 'div_', 'exp', 'gelu', 'hardtanh_', 'leaky_relu_', 'log2'),
    *('mul', 'mul_', 'neg', 'pow', 'reciprocal', 'rsub', 'sigmoid', 'sign', 'silu', 'silu_'),
    *('softmax', 'sqrt', 'sub', 'sub_', 'tanh'),
    # Reductions and pooling, about an addition for each element they read.
    *('adaptive_avg_pool1d', 'amax', 'avg_pool2d', 'max_pool2d', 'mean', 'sum'),
)
# What mmengine's own list of operators that compute nothing lacks.
_FREE = (
    *('alias', 'clone', 'empty_like', 'expand_as', 'feature_dropout', 'index_select', 'le', 'lt'),
    *('meshgrid', 'new_ones', 'pad', 'pixel_unshuffle', 'repeat', 'unflatten', 'view_as'),
)
_ELEMENTS = 'elements of '


@dataclass(frozen=True)
class Part:
    """What one part of a model has and computes.

    Attributes:
        parameters: Number of parameters.
        flops: Multiply-adds by kind, each of :data:`KINDS`.
    """

    parameters: int
    flops: dict[str, int]

    @property
    def total(self) -> int:
        """Multiply-adds of all kinds."""
        return sum(self.flops.values())


@dataclass(frozen=True)
class Complexity:
    """What a model has and computes.

    Attributes:
        whole: The model.
        parts: Its children by name, the entries of lists one by one; those without parameters and
            FLOPs are left out.
        elements: Results of elementwise operators, reductions and pooling, which are no FLOPs here.
        unknown: Other operators that count as 0, and how often they are called.
    """

    whole: Part
    parts: dict[str, Part]
    elements: int
    unknown: Counter


def _shape(value: Any) -> list[int]:
    if not value.isCompleteTensor():
        raise ValueError(f'the trace does not know the shape of {value.debugName()}')
    return value.type().sizes()


def attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Handle of ``aten::scaled_dot_product_attention``.

    Queries (..., N, D), keys (..., M, D) and values (..., M, E) make N * M * (D + E) products in
    each head. A mask, also a causal one, saves none.
    """
    query, key, _ = (_shape(value) for value in inputs[:3])
    # The result has all of the axes in front, whichever of the three are broadcast.
    return prod(_shape(outputs[0])[:-1]) * key[-2] * query[-1] + (
        prod(_shape(outputs[0])) * key[-2]
    )


def matmul_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Handle of ``aten::matmul``, where either factor may lack axes that the other one has."""
    return prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def baddbmm_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Handle of ``aten::baddbmm``, of which only the product is counted."""
    return prod(_shape(outputs[0])) * _shape(inputs[1])[-1]


def _elements(name: str) -> Callable[[list[Any], list[Any]], Counter]:
    def handle(inputs: list[Any], outputs: list[Any]) -> Counter:
        # Sums of sizes are traced, too; they are no tensors.
        tensors = [v.type().sizes() for v in (*inputs[:1], *outputs[:1]) if v.isCompleteTensor()]
        return Counter({_ELEMENTS + name: max(map(prod, tensors), default=0)})

    return handle


def _analyzer(model: nn.Module, inputs: torch.Tensor) -> FlopAnalyzer:
    analyzer = FlopAnalyzer(model, inputs)
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analyzer.set_op_handle(
        **{
            'aten::scaled_dot_product_attention': attention_flops,
            'aten::matmul': matmul_flops,
            'aten::baddbmm': baddbmm_flops,
        }
    )
    analyzer.set_op_handle(**{f'aten::{name}': _elements(name) for name in _ELEMENTWISE})
    analyzer.set_op_handle(**{f'aten::{name}': None for name in _FREE})
    return analyzer


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f'{name}.{i}', entry) for i, entry in enumerate(child))
        else:
            yield name, child


@contextmanager
def _countable(model: nn.Module, sample: BaseDataElement, proposals: int) -> Iterator[None]:
    """Makes a forward pass one that can be counted, and undoes it.

    A two-stage detector gets ``proposals`` boxes, however many its random weights would find.
    """

    def fixed_proposals(
        cls_scores: list[torch.Tensor], bbox_preds: list[torch.Tensor], *args: Any, **kwargs: Any
    ) -> list[InstanceData]:
        # A number from each map: the trace drops what its result does not depend on.
        used = sum(x.flatten()[0] for x in (*cls_scores, *bbox_preds))
        boxes = used.new_tensor([[0, 0, 64, 64]]).repeat(proposals, 1) + 0 * used
        scores, labels = boxes[:, 0], boxes[:, 0].long()
        return [InstanceData(bboxes=boxes, scores=scores, labels=labels)]

    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    forward = model.forward
    region_head = getattr(model, 'rpn_head', None)
    model.eval()
    # The fast path of nn.MultiheadAttention is a single operator with products inside.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if hasattr(model, 'data_preprocessor'):
            # An OpenMMLab model: heads ask the samples for the size of the image.
            model.forward = lambda x: forward(x, [sample], mode='tensor')
        if region_head is not None:
            region_head.predict_by_feat = fixed_proposals
        with torch.no_grad():
            yield
    finally:
        vars(model).pop('forward', None)
        if region_head is not None:
            vars(region_head).pop('predict_by_feat', None)
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training


def count(
    model: nn.Module, shape: tuple[int, int], channels: int = 3, proposals: int = 1000
) -> Complexity:
    """Counts what a model computes for one image.

    The forward pass is that of a prediction before its post-processing, with nothing kept from an
    earlier one: losses and heads that only training has compute nothing.

    Args:
        model: A backbone, or a detector, segmentor or classifier of the toolboxes.
        shape: Height and width of the image in pixels.
        channels: Channels of the image.
        proposals: Boxes that the second stage of a detector gets; mmdet's mask heads take the first
            100 of them in this kind of pass.

    Returns:
        Parameters and MACs, of all and by part.

    Raises:
        ValueError: ``shape``, ``channels`` or ``proposals`` are not positive ints.
    """
    numbers = (*shape, channels, proposals)
    if len(shape) != 2 or any(not isinstance(n, int) or n < 1 for n in numbers):
        raise ValueError(
            'shape (height, width), channels and proposals must be positive ints, not '
            f'{tuple(shape)}, {channels!r} and {proposals!r}'
        )
    device = next((parameter.device for parameter in model.parameters()), None)
    size = tuple(shape)
    sample = BaseDataElement(
        metainfo=dict(
            img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
            scale_factor=(1.0, 1.0),
        )
    )  # fmt: skip
    with _countable(model, sample, proposals):
        analyzer = _analyzer(model, torch.zeros(1, channels, *size, device=device))
        operators = analyzer.by_module_and_operator()
        unknown = analyzer.unsupported_ops()
    return Complexity(
        whole=_part(model, '', model, operators),
        parts={
            name: part
            for name, module in _parts(model)
            for part in [_part(model, name, module, operators)]
            if part.parameters or part.total
        },
        elements=sum(n for op, n in operators[''].items() if op.startswith(_ELEMENTS)),
        unknown=unknown,
    )


def _part(model: nn.Module, name: str, module: nn.Module, operators: dict[str, Counter]) -> Part:
    position = sum(
        sum(n for op, n in operators[full].items() if op in KINDS['linear'])
        for full, child in module.named_modules(prefix=name)
        if isinstance(child, AbsolutePositionEmbedding | RelativePositionBias)
    )
    flops = {kind: sum(operators[name][op] for op in ops) for kind, ops in KINDS.items()}
    flops['linear'] -= position
    flops['position'] = position
    return Part(sum(p.numel() for p in module.parameters()), flops)
