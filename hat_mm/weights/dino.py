"""Renames the tensors of the authors' DINO with FasterViT to those of mmdet's DINO, and back.

The backbone's tensors keep their official names, which the backbone itself maps. All functions here
are pure functions of names and tensors.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .names import FASTERVIT_NAMES, identical, is_dense, some

# The authors' class layers have a row for each category id of COCO from 0 to 90; mmdet's have one
# for each of the 80 ids that COCO uses.
_NUM_IDS = 91
_IDS = [i for i in range(1, _NUM_IDS) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
LABELS, OUR_LABELS = 'label_enc.weight', 'dn_query_generator.label_embedding.weight'
_CLASS_BIAS = 'transformer.enc_out_class_embed.bias'
WITH_CLASS_ROWS = r'class_embed\..*|transformer\.enc_out_class_embed\..*|label_enc\.weight'
# The heads of the decoder's layers, which have a second name each.
_HEADS = r'(class|bbox)_embed\..*'
_SECOND = 'transformer.decoder.'

_BACKBONE = 'backbone.0.'

_LAYER = ('weight', 'bias')
_NORM = ('weight', 'bias', 'running_mean', 'running_var')
_SELF_ATTENTION = ('in_proj_weight', 'in_proj_bias', 'out_proj.weight', 'out_proj.bias')
_DEFORMABLE_ATTENTION = tuple(
    f'{layer}.{part}'
    for layer in ('sampling_offsets', 'attention_weights', 'value_proj', 'output_proj')
    for part in _LAYER
)


def is_authors_dino(names: Collection[str]) -> bool:
    """Tells whether names are those of the authors' DINO, with any backbone and complete or not."""
    starts = ('transformer.', 'input_proj.', _BACKBONE)
    transformer, levels, backbone = (any(n.startswith(start) for n in names) for start in starts)
    return backbone or (transformer and levels)


def is_mmdet_dino(names: Collection[str]) -> bool:
    """Tells whether names are those of mmdet's DINO."""
    return 'level_embed' in names and OUR_LABELS in names


def to_mmdet(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Renames the tensors of the authors' DINO.

    Returns:
        The state dict of mmdet's DINO, its backbone in official names. And, under the authors'
        names, the whole of each tensor of which mmdet's DINO has only some rows.

    Raises:
        ValueError: A tensor is missing, not known or of a wrong kind or shape, or one tensor has
            two values.
    """
    _check_tensors(state)
    levels = [name for name in state if re.fullmatch(r'input_proj\.\d+\.0\.weight', name)]
    # The levels that are made of maps have 1x1 convolutions, the others 3x3.
    num_maps = sum(state[name].shape[-1] == 1 for name in levels)
    names = dict(
        _names(
            num_maps=num_maps,
            num_levels=len(levels),
            num_encoder_layers=_count(r'transformer\.encoder\.layers\.(\d+)\.', state),
            num_decoder_layers=_count(r'transformer\.decoder\.layers\.(\d+)\.', state),
        )
    )
    second = {_SECOND + name for name in names if re.fullmatch(_HEADS, name)}
    wanted = {*names, *second, *_norms(state, num_maps)}
    _check_complete(state, wanted, _BACKBONE, "the authors' DINO")
    _check_shapes({name: state[name] for name in names}, len(levels))
    num_classes = len(state[_CLASS_BIAS])
    if not 0 < num_classes < len(state[LABELS]):
        raise ValueError(
            f'{LABELS} has {len(state[LABELS])} rows, which must be more than the {num_classes} '
            'classes'
        )
    rows = _class_rows(num_classes)
    renamed, whole = {}, {}
    for name, value in state.items():
        if name in second:
            if not identical(state[name.removeprefix(_SECOND)], value):
                raise ValueError(
                    f'{name} differs from {name.removeprefix(_SECOND)}, but both are one tensor of '
                    "the authors' DINO"
                )
            continue
        if re.fullmatch(WITH_CLASS_ROWS, name) and len(rows) < len(value):
            whole[name], value = value, value[rows]
        renamed[names.get(name) or f'backbone.{name.removeprefix(_BACKBONE)}'] = value
    return renamed, whole


def from_mmdet(state: Mapping[str, Any], whole: Mapping[str, Tensor]) -> dict[str, Any]:
    """Renames the tensors of mmdet's DINO: the inverse of :func:`to_mmdet`.

    Args:
        state: The state dict of mmdet's DINO, the backbone's part in official names.
        whole: The second result of :func:`to_mmdet`; ``state`` replaces the rows that it has.

    Raises:
        ValueError: A tensor is missing or not known, or ``whole`` does not go with ``state``.
    """
    num_maps = _count(r'neck\.convs\.(\d+)\.', state)
    names = _names(
        num_maps=num_maps,
        num_levels=num_maps + _count(r'neck\.extra_convs\.(\d+)\.', state),
        num_encoder_layers=_count(r'encoder\.layers\.(\d+)\.', state),
        num_decoder_layers=_count(r'decoder\.layers\.(\d+)\.', state),
    )
    theirs = {ours: name for name, ours in names}
    _check_complete(state, theirs, 'backbone.', "mmdet's DINO")
    _check_tensors({**state, **whole})
    rows = _class_rows(len(whole[_CLASS_BIAS])) if _CLASS_BIAS in whole else None
    official = {}
    for ours, value in state.items():
        name = theirs.get(ours) or f'{_BACKBONE}{ours.removeprefix("backbone.")}'
        if name in whole or (rows and re.fullmatch(WITH_CLASS_ROWS, name)):
            value = _with_rows(whole.get(name), value, rows or [*range(len(value))], name)
        official[name] = value
        if re.fullmatch(_HEADS, name):
            official[_SECOND + name] = value
    again, _ = to_mmdet(official)
    lost = [n for n in state if n not in again or not identical(again[n], state[n])]
    if lost:
        raise ValueError(f'{lost[0]}: what was kept of the official file does not go with it')
    return official


def _names(
    *, num_maps: int, num_levels: int, num_encoder_layers: int, num_decoder_layers: int
) -> Iterator[tuple[str, str]]:
    """The authors' name and mmdet's of each tensor outside the backbone, in the authors' order."""

    def pairs(theirs: str, ours: str, parts: Sequence[str] = _LAYER) -> Iterator[tuple[str, str]]:
        return ((f'{theirs}.{part}', f'{ours}.{part}') for part in parts)

    for i in range(num_levels):
        ours = f'neck.convs.{i}' if i < num_maps else f'neck.extra_convs.{i - num_maps}'
        yield from pairs(f'input_proj.{i}.0', f'{ours}.conv')
        yield from pairs(f'input_proj.{i}.1', f'{ours}.gn')
    yield 'transformer.level_embed', 'level_embed'

    for i in range(num_encoder_layers):
        theirs, ours = f'transformer.encoder.layers.{i}', f'encoder.layers.{i}'
        yield from pairs(f'{theirs}.self_attn', f'{ours}.self_attn', _DEFORMABLE_ATTENTION)
        yield from pairs(f'{theirs}.norm1', f'{ours}.norms.0')
        yield from pairs(f'{theirs}.linear1', f'{ours}.ffn.layers.0.0')
        yield from pairs(f'{theirs}.linear2', f'{ours}.ffn.layers.1')
        yield from pairs(f'{theirs}.norm2', f'{ours}.norms.1')

    # The selection of queries is mmdet's branch after those of the decoder's layers.
    last = num_decoder_layers
    yield from pairs('transformer.enc_output', 'memory_trans_fc')
    yield from pairs('transformer.enc_output_norm', 'memory_trans_norm')
    yield from pairs('transformer.enc_out_class_embed', f'bbox_head.cls_branches.{last}')
    for j in range(3):
        theirs, ours = f'transformer.enc_out_bbox_embed.layers.{j}', f'reg_branches.{last}.{2 * j}'
        yield from pairs(theirs, f'bbox_head.{ours}')
    yield 'transformer.tgt_embed.weight', 'query_embedding.weight'
    yield LABELS, OUR_LABELS

    for i in range(num_decoder_layers):
        theirs, ours = f'transformer.decoder.layers.{i}', f'decoder.layers.{i}'
        yield from pairs(f'{theirs}.self_attn', f'{ours}.self_attn.attn', _SELF_ATTENTION)
        yield from pairs(f'{theirs}.norm2', f'{ours}.norms.0')
        yield from pairs(f'{theirs}.cross_attn', f'{ours}.cross_attn', _DEFORMABLE_ATTENTION)
        yield from pairs(f'{theirs}.norm1', f'{ours}.norms.1')
        yield from pairs(f'{theirs}.linear1', f'{ours}.ffn.layers.0.0')
        yield from pairs(f'{theirs}.linear2', f'{ours}.ffn.layers.1')
        yield from pairs(f'{theirs}.norm3', f'{ours}.norms.2')
        yield from pairs(f'class_embed.{i}', f'bbox_head.cls_branches.{i}')
        for j in range(3):
            yield from pairs(f'bbox_embed.{i}.layers.{j}', f'bbox_head.reg_branches.{i}.{2 * j}')
    yield from pairs('transformer.decoder.norm', 'decoder.norm')
    for j in range(2):
        layer = f'decoder.ref_point_head.layers.{j}'
        yield from pairs(f'transformer.{layer}', layer)


def _count(pattern: str, names: Iterable[str]) -> int:
    """The number of different numbers that ``pattern`` finds."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})


def _norms(state: Iterable[str], num_maps: int) -> list[str]:
    """The tensors of the norms of the maps; other backbones name theirs otherwise."""
    within = (name.removeprefix(_BACKBONE) for name in state if name.startswith(_BACKBONE))
    if not FASTERVIT_NAMES.matches(within):
        return []
    return [f'{_BACKBONE}norm{i}.{part}' for i in range(4 - num_maps, 4) for part in _NORM]


def _class_rows(num_classes: int) -> list[int]:
    """The rows of the authors' class layers and label embeddings that mmdet's DINO has."""
    return _IDS if num_classes == _NUM_IDS else [*range(num_classes)]


def _with_rows(whole: Any, value: Any, rows: list[int], name: str) -> Tensor:
    """Returns ``whole`` with ``value`` as its ``rows``."""
    if whole is None or (value.shape != (len(rows), *whole.shape[1:]) or rows[-1] >= len(whole)):
        raise ValueError(f'{name}: what was kept of the official file does not go with the rest')
    whole = whole.to(value.dtype, copy=True)
    whole[rows] = value
    return whole


def _check_complete(
    state: Collection[str], names: Collection[str], backbone: str, what: str
) -> None:
    """Raises ValueError unless ``state`` has ``names``, and beside them only the backbone's."""
    if not any(name.startswith(backbone) for name in state):
        raise ValueError(f'the tensors are not those of {what}: there is no backbone')
    missing = sorted(name for name in names if name not in state)
    unknown = [n for n in state if n not in names and not n.startswith(backbone)]
    if missing or unknown:
        counts = {'missing': missing, 'not known': unknown}
        said = [f'{len(found)} {how} ({some(found)})' for how, found in counts.items() if found]
        raise ValueError(f'the tensors are not those of {what}: {"; ".join(said)}')


def _check_tensors(state: Mapping[str, Any]) -> None:
    """Raises ValueError unless all values are dense tensors of floating point, except counters."""
    for name, value in state.items():
        if name.endswith('num_batches_tracked'):
            continue
        if not (is_dense(value) and value.is_floating_point() and value.ndim):
            raise ValueError(f'{name} is no dense tensor of floating-point numbers')


# Ends of the authors' names, in order, and the shapes: d is the width, n the number of classes, l
# that of levels; 0 stands for any size.
_SHAPES: tuple[tuple[str, tuple[str | int, ...]], ...] = (
    (r'input_proj\.\d+\.0\.weight', ('d', 0, 0, 0)),
    (r'class_embed(\.\d+)?\.weight', ('n', 'd')),
    (r'class_embed(\.\d+)?\.bias', ('n',)),
    (r'level_embed', ('l', 'd')),
    (r'(tgt_embed|label_enc|sampling_offsets|attention_weights|linear1)\.weight', (0, 'd')),
    (r'(sampling_offsets|attention_weights|linear1)\.bias', (0,)),
    (r'linear2\.weight', ('d', 0)),
    (r'in_proj_weight', ('3d', 'd')),
    (r'in_proj_bias', ('3d',)),
    (r'ref_point_head\.layers\.0\.weight', ('d', '2d')),
    (r'bbox_embed(\.\d+)?\.layers\.2\.weight', (4, 'd')),
    (r'bbox_embed(\.\d+)?\.layers\.2\.bias', (4,)),
    (r'(norm\d?|input_proj\.\d+\.1)\.weight', ('d',)),
    (r'\.weight', ('d', 'd')),
    (r'\.bias', ('d',)),
)


def _check_shapes(state: Mapping[str, Tensor], num_levels: int) -> None:
    """Raises ValueError unless the shapes of the tensors outside the backbone go together."""
    d, n = state['transformer.level_embed'].shape[-1], len(state[_CLASS_BIAS])
    sizes = {'d': d, '2d': 2 * d, '3d': 3 * d, 'n': n, 'l': num_levels}
    like: dict[str, str] = {}
    for name, value in state.items():
        ends = (shape for pattern, shape in _SHAPES if re.search(f'{pattern}$', name))
        wanted = [sizes[size] if isinstance(size, str) else size for size in next(ends)]
        # Where any size is right, it is the same in all layers.
        layer = re.sub(r'coder\.layers\.\d+', 'coder.layers.*', name)
        first = like.setdefault(layer, name)
        if (
            len(wanted) != value.ndim
            or any(size not in (0, found) for size, found in zip(wanted, value.shape, strict=True))
            or value.shape != state[first].shape
        ):
            raise ValueError(
                f'{name} has shape {tuple(value.shape)}, which does not go with the others'
            )
