"""Maps what a user loads into a backbone to the backbone's names, with a report.

All functions here are pure functions of dictionaries. Backbones call :func:`adapt` while they load,
so an official file works wherever OpenMMLab loads weights.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .dino import is_authors_dino
from .names import NAME_MAPS, SWIN_NAMES, UNUSED_PREFIX, NameMap, is_dense, rename_old, some

_COUNTER = 'num_batches_tracked'
_ALL_NAMES = (*NAME_MAPS, SWIN_NAMES)


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint did to a backbone.

    Attributes:
        loaded: Names of the backbone's tensors that the checkpoint fills.
        missing: Names that it does not fill although it should; they keep their values.
        unexpected: Names in the checkpoint that the backbone has no place for.
        mismatched: Names in both whose shape or kind of number differs.
        kept: Names that may be absent from the checkpoint and are; they keep their values.
        dropped: Names in the checkpoint that a backbone does not use.
        new: Names that the backbone adds to the published network; they keep their values.
        adapted: Names of weights for colour images that were adapted to other channels.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()

    @property
    def faults(self) -> int:
        """Number of missing, unexpected and mismatched tensors."""
        return len(self.missing + self.unexpected + self.mismatched)

    @property
    def complete(self) -> bool:
        """Whether there are no faults."""
        return self.faults == 0

    def __str__(self) -> str:
        total = sum(map(len, (self.loaded, self.missing, self.mismatched, self.kept, self.new)))
        parts = [f'{len(self.loaded)} of {total} tensors loaded']
        labels = {
            'missing': self.missing,
            'unexpected': self.unexpected,
            'mismatched': self.mismatched,
            'new': self.new,
            'kept as they were': self.kept,
            'dropped': self.dropped,
            'summed or repeated over colours': self.adapted,
        }
        for label, names in labels.items():
            if names:
                parts.append(f'{len(names)} {label} ({some(names)})')
        return '; '.join(parts)


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Finds the tensors of a training checkpoint.

    Takes ``state_dict`` (or ``model``) out of a dictionary that also holds the optimizer and so on.
    Removes the prefix ``module.`` of a parallel wrapper from every name, and the unused tensors
    that a converted safetensors file keeps.
    """
    for name in checkpoint:
        if not isinstance(name, str):
            raise ValueError(f'this is no checkpoint: {name!r} in it is no name of a tensor')
    for key in ('state_dict', 'model'):
        inner = checkpoint.get(key)
        if isinstance(inner, Mapping):
            return unwrap(inner)
    if checkpoint and all(name.startswith('module.') for name in checkpoint):
        checkpoint = {name.removeprefix('module.'): value for name, value in checkpoint.items()}
    if any(name.startswith(UNUSED_PREFIX) for name in checkpoint):
        return {k: v for k, v in checkpoint.items() if not k.startswith(UNUSED_PREFIX)}
    return checkpoint


def _matching(pattern: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if re.fullmatch(pattern, name))


def compare(
    own: Mapping[str, Tensor], state: Mapping[str, Any], spare: str, added: str = '(?!)'
) -> LoadReport:
    """Compares a state dict in native names with a backbone's own.

    The counters ``num_batches_tracked`` are ignored.

    Args:
        own: The backbone's ``state_dict()``.
        state: What is to be loaded.
        spare: Pattern of names (full match) that need not be in both.
        added: Pattern of those that count as new if they are not loaded.
    """
    own = {name: value for name, value in own.items() if not name.endswith(_COUNTER)}
    both = [name for name in own if name in state]

    def fits(name: str) -> bool:
        mine, value = own[name], state[name]
        return (
            is_dense(value)
            and value.shape == mine.shape
            and value.is_floating_point() == mine.is_floating_point()
        )

    absent = [name for name in own if name not in state]
    beyond = [name for name in state if name not in own and not name.endswith(_COUNTER)]
    kept, dropped = _matching(spare, absent), _matching(spare, beyond)
    new = _matching(added, kept)
    return LoadReport(
        loaded=tuple(name for name in both if fits(name)),
        missing=tuple(name for name in absent if name not in kept),
        unexpected=tuple(name for name in beyond if name not in dropped),
        mismatched=tuple(name for name in both if not fits(name)),
        kept=tuple(name for name in kept if name not in new),
        dropped=dropped,
        new=new,
    )


def is_backbone_alone(names: Collection[str]) -> bool:
    """Tells whether names are those of a backbone alone, official or native, of any family."""
    return any(m.matches(names) or m.matches_native(names) for m in _ALL_NAMES)


def fit_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapts the weight of a convolution for colour images to another number of channels.

    As in timm: a single channel gets the sum over the colours; several channels get the colours in
    turn, scaled by 3 / ``channels``. So the response to a grey image stays the same, exactly if
    ``channels`` is 1 or a multiple of 3.

    Args:
        weight: (out, 3, kernel height, kernel width).
        channels: Channels of the images.
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)


def adapt(
    state: Mapping[str, Any],
    own: Mapping[str, Tensor],
    name_map: NameMap,
    arch: str,
    *,
    norms: Collection[str],
    unused: str,
    strict: bool = True,
) -> tuple[dict[str, Any], LoadReport]:
    """Maps what a user loads into a backbone to the backbone's names.

    A first convolution for colour images is adapted to the backbone's channels.

    Args:
        state: Tensors by official or native name, relative to the backbone, or a training
            checkpoint that holds such a state dict.
        own: The backbone's ``state_dict()``.
        name_map: Official names of the backbone's family.
        arch: The backbone's arch, for messages.
        norms: The backbone's output norms that are of the published type. Official files fill
            those that they have, and must have that of the last map if the family's do. Each task
            trains the others for itself.
        unused: Pattern of native names (full match) that need not be in both: stages that this
            backbone does not build.
        strict: Whether names of an unknown network, or no names at all, are an error.

    Returns:
        The state dict in native names, with the backbone's own values for tensors that may be
        absent from the file, and the report. For a native file the report need not be complete.

    Raises:
        ValueError: The state dict belongs to another network, is not a checkpoint, or is an
            official file that does not fill the backbone exactly.
    """
    state = {rename_old(name): value for name, value in unwrap(state).items()}
    is_official, depths = name_map.matches(state), name_map.depths(state)
    no_use: tuple[str, ...] = ()
    native = name_map.to_native(state) if is_official else {}
    last = {'norm3'} if name_map.last_norm else set()
    expected = [norm for norm in norms if f'{norm}.weight' in native or norm in last]
    unused = rf'(?!({"|".join(expected)})\.)norm\d\..*|{unused}'
    if is_official:
        no_use = _matching(name_map.dropped, state) + _matching(unused, native)
        state = {name: value for name, value in native.items() if name not in no_use}
    else:
        _refuse_foreign(state, own, name_map, strict=strict)
    state, adapted = _with_channels(state, own, name_map.first_conv)
    # A native file that lacks only what was added counts as one of the published network.
    spare = rf'{unused}|{name_map.added}'
    if not is_official and (_matching(name_map.added, state) or compare(own, state, spare).missing):
        spare = unused
    report = replace(compare(own, state, spare, name_map.added), adapted=adapted)
    if is_official:
        if not report.complete:
            raise ValueError(
                f'an official {name_map.family} checkpoint with depths {depths} does not fit arch '
                f'{arch!r}: {report}. {_remedy(report)}'
            )
        report = replace(report, dropped=no_use)
        spare = rf'{spare}|.*{_COUNTER}'
    return {name: own[name] for name in _matching(spare, own)} | state, report


def _with_channels(
    state: Mapping[str, Any], own: Mapping[str, Tensor], name: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Adapts the first convolution, ``name``, to the backbone's; also returns what it changed."""
    weight: Any = state.get(name)
    mine: Any = own.get(name)
    if (
        not (is_dense(weight) and is_dense(mine))
        or not weight.ndim == mine.ndim == 4
        or weight.shape[1] != 3
        or mine.shape[1] == 3
    ):
        return dict(state), ()
    return {**state, name: fit_channels(weight, mine.shape[1])}, (name,)


def _remedy(report: LoadReport) -> str:
    if report.missing and all(re.search(r'\.running_(mean|var)$', n) for n in report.missing):
        return (
            'The norms of the file keep no running statistics, those of the backbone do: leave '
            'norm_cfg at its default, None.'
        )
    return 'Use the file of this arch, or the arch of this file.'


def _refuse_foreign(
    state: Collection[str], own: Collection[str], name_map: NameMap, *, strict: bool
) -> None:
    """Raises ValueError unless names that are not official are the backbone's, at least in part."""
    if not state and strict:
        raise ValueError(f'no tensors to load into a {name_map.family}: the checkpoint is empty')
    strange = [name for name in state if name not in own]
    others = (m for m in _ALL_NAMES if m.family != name_map.family)
    other = next((m.family for m in others if m.matches(strange) or m.matches_native(strange)), '')
    # Other networks share some names with ours, such as those of output norms.
    num_known = len(state) - len(strange)
    native = num_known > len(strange) or (num_known and name_map.matches_native(state))
    if not other and (native or not strict):
        return
    names = ', '.join(map(repr, strange[:3]))
    hint = f' It looks like a {other}.' if other else ''
    if any('.backbone.' in f'.{name}' for name in state):
        hint = (
            " It looks like a whole detector's or segmentor's: take the backbone out of it with "
            "init_cfg=dict(type='Pretrained', checkpoint=FILE, prefix='backbone.')."
        )
    if is_authors_dino(state):
        hint = (
            " It looks like a file of the authors' DINO: convert it first, as docs/dino.md shows."
        )
    raise ValueError(
        f'this is no {name_map.family} checkpoint: it holds names such as {names}; expected the '
        f'names of an official file or of this backbone ({next(iter(own))!r}, …).{hint}'
    )
