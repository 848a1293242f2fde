"""Converts official checkpoints to files of hat_mm and back, with a report and their origin."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

import hat_mm

from . import dino
from .loading import LoadReport, compare, unwrap
from .names import FASTERVIT_NAMES, NAME_MAPS, UNUSED, NameMap, some
from .official import OfficialFile

# Keys under which official training checkpoints keep the averaged weights.
EMA_KEYS = ('state_dict_ema', 'model_ema', 'ema_model')
_HEAD = 'head.fc.'


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from.

    Attributes:
        name: Name of the file.
        sha256: Its checksum.
        url: Its URL; None if it was on this machine.
        official: Its row in the table of official files; None if it has none.
    """

    name: str
    sha256: str
    url: str | None = None
    official: OfficialFile | None = None

    @property
    def provenance(self) -> dict[str, str]:
        """The source as plain data; a file on this machine is identified by its name."""
        known = {'file': self.name, 'sha256': self.sha256}
        if url := self.url or (self.official and self.official.url):
            known['url'] = url
        if self.official is not None:
            known['licence'] = self.official.licence
        return known


def from_official(
    checkpoint: Mapping[str, Any], source: Source, with_head: bool, ema: bool
) -> dict[str, Any]:
    """Makes a checkpoint of hat_mm from an official one.

    Args:
        checkpoint: What the official file holds.
        source: The file.
        with_head: Whether the result is an mmpretrain classifier (``backbone.…``, ``head.fc.…``)
            instead of a backbone.
        ema: Whether to take the averaged weights that a training checkpoint may hold.

    Returns:
        A checkpoint with ``state_dict``, ``meta`` (with the load report) and, under
        :data:`~hat_mm.weights.names.UNUSED`, the learned tensors that the network does not use,
        under their official names.

    Raises:
        ValueError: It is not an official file, has no averaged weights or no classifier, or its
            tensors do not fill any arch exactly.
    """
    state = _averaged(checkpoint) if ema else unwrap(checkpoint)
    origin = source.provenance | {'weights': 'average' if ema else 'last'}
    if dino.is_authors_dino(state):
        if with_head:
            raise ValueError(f'{source.name} holds a detector, no classifier: leave --head out')
        return _from_authors_dino(state, source, origin)
    name_map = _official_map(state, source.name)
    native, left = name_map.to_native(state), name_map.left_over(state)
    archs, report = _fit(native, name_map, source, spare='(?!)')
    said = str(report)
    if with_head:
        head = {k: left.pop(k) for k in [*left] if k.startswith(name_map.head)}
        head = {_HEAD + k.removeprefix(name_map.head): v for k, v in head.items()}
        said += f'; {_check_head(head, name_map, archs[0], source)}'
        native = {f'backbone.{name}': value for name, value in native.items()} | head
    return {'state_dict': native, 'meta': _meta(name_map, archs, origin, said), UNUSED: left}


def _from_authors_dino(
    state: Mapping[str, Any], source: Source, origin: dict[str, Any]
) -> dict[str, Any]:
    """Makes a checkpoint of mmdet's DINO from one of the authors'."""
    try:
        renamed, whole = dino.to_mmdet(state)
    except ValueError as error:
        raise ValueError(f'{source.name}: {error}') from error
    backbone = _part(renamed, 'backbone.')
    if not FASTERVIT_NAMES.matches(backbone):
        raise ValueError(
            f"{source.name} is a file of the authors' DINO, but its backbone is no FasterViT: it "
            f'holds {some(map(repr, backbone))}'
        )
    native, left = FASTERVIT_NAMES.to_native(backbone), FASTERVIT_NAMES.left_over(backbone)
    archs, report = _fit(native, FASTERVIT_NAMES, source, spare='(?!)', in_dino=True)
    outside = {k: v for k, v in renamed.items() if not k.startswith('backbone.')}
    said = f'backbone: {report}; outside: all {len(outside)} tensors renamed for DINO of mmdet'
    if whole:
        said += f', of {len(whole)} the rows of {len(outside[dino.OUR_LABELS])} classes'
    return {
        'state_dict': outside | {f'backbone.{name}': value for name, value in native.items()},
        'meta': _meta(FASTERVIT_NAMES, archs, origin, said),
        UNUSED: whole | {f'backbone.0.{name}': value for name, value in left.items()},
    }


def _to_authors_dino(
    state: Mapping[str, Any], checkpoint: Mapping[str, Any], source: Source
) -> dict[str, Any]:
    """Makes a checkpoint of the authors' DINO from one of mmdet's, which holds ``state``."""
    dropped = rf'{dino.WITH_CLASS_ROWS}|backbone\.0\.({FASTERVIT_NAMES.dropped})'
    kept = _kept(checkpoint, dropped, source)
    native = _part(state, 'backbone.')
    archs, _ = _fit(native, FASTERVIT_NAMES, source, spare='(?!)', in_dino=True)
    norms = {name: v for name, v in native.items() if re.match(r'norm\d\.', name)}
    rest = {name: v for name, v in native.items() if name not in norms}
    backbone = FASTERVIT_NAMES.to_official(rest)[0] | norms
    renamed = {k: v for k, v in state.items() if not k.startswith('backbone.')}
    renamed |= {f'backbone.{name}': value for name, value in backbone.items()}
    unused = {name: v for name, v in kept.items() if name.startswith('backbone.0.')}
    said = f"all {len(state)} tensors in names of the authors' DINO"
    try:
        official = dino.from_mmdet(renamed, kept) | unused
    except ValueError as error:
        raise ValueError(f'{source.name}: {error}') from error
    return {
        'model': official,
        'meta': _meta(FASTERVIT_NAMES, archs, _made_from(checkpoint, source), said),
    }


def _part(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors whose names start with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def to_official(checkpoint: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Makes an official checkpoint from one of hat_mm: a backbone, a classifier or a detector.

    A converted file of the authors' DINO becomes one again. Of other detectors the backbone alone
    is taken.

    Returns:
        A checkpoint with the tensors in official names, under ``state_dict`` or, as the authors'
        DINO has it, under ``model``, and ``meta`` (with a report).

    Raises:
        ValueError: It holds no backbone of hat_mm, or its tensors fill no arch exactly.
    """
    whole = unwrap(checkpoint)
    unused = checkpoint.get(UNUSED)
    if dino.is_mmdet_dino(whole) and isinstance(unused, Mapping) and dino.LABELS in unused:
        return _to_authors_dino(whole, checkpoint, source)
    within = _part(whole, 'backbone.')
    native = within or dict(whole)
    name_map = next((m for m in NAME_MAPS if m.matches_native(native)), None)
    if name_map is None:
        kind = next((m.family for m in NAME_MAPS if m.matches(whole)), None)
        raise ValueError(
            f'{source.name} is an official {kind} file already'
            if kind
            else f'{source.name} holds no backbone of hat_mm, but {some(map(repr, whole))}'
        )
    archs, _ = _fit(native, name_map, source, spare=r'norm\d\..*')
    last = [f'norm3.{part}' for part in ('weight', 'bias', 'running_mean', 'running_var')]
    if not all(name in native for name in last):  # another kind of norm, or none
        native = {k: v for k, v in native.items() if not k.startswith('norm3.')}
    state, lacking = name_map.to_official(native)
    renamed = len(state)
    head = {k: v for k, v in whole.items() if within and k.startswith(_HEAD)}
    kept = _kept(checkpoint, name_map.dropped, source)
    said = [f'{renamed} tensors in official names', f'{len(kept)} kept from the official file']
    if head:
        said.append(_check_head(head, name_map, archs[0], source))
        state |= {name_map.head + k.removeprefix(_HEAD): v for k, v in head.items()}
    state = {**kept, **state}
    # Where a second name held another value than the first, that value was kept.
    state |= {k: v for k, v in kept.items() if re.fullmatch(name_map.unused, k)}
    if lacking:
        said.append(f'{len(lacking)} left out that the published network lacks ({lacking[0]}, …)')
    if name_map.last_norm and 'norm.weight' not in state:
        said.append('no norm of the last map')
    if f'{name_map.head}weight' not in state:
        said.append('no classifier')
    if within and (outside := len(whole) - len(within) - len(head)):
        said.append(f'{outside} outside the backbone left out')
    meta = _meta(name_map, archs, _made_from(checkpoint, source), '; '.join(said))
    return {'state_dict': state, 'meta': meta}


def _made_from(checkpoint: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The origin of a file made from ``checkpoint``, with that of the checkpoint itself."""
    before = checkpoint.get('meta')
    made_from = before.get('source') if isinstance(before, Mapping) else None
    return source.provenance | ({'made_from': made_from} if made_from else {})


def _meta(
    name_map: NameMap, archs: list[str], origin: dict[str, Any], report: str
) -> dict[str, Any]:
    return {
        'family': name_map.family,
        'arch': archs,
        'source': origin,
        'report': report,
        'time': datetime.now(UTC).strftime('%Y-%m-%d %H:%M:%S UTC'),
        'hat_mm_version': hat_mm.__version__,
    }


def _kept(checkpoint: Mapping[str, Any], dropped: str, source: Source) -> dict[str, Tensor]:
    """The tensors of the official file that a converted file keeps under ``unused``.

    Their names fully match ``dropped``.
    """
    kept = checkpoint.get(UNUSED) or {}
    if not isinstance(kept, Mapping):
        raise ValueError(f'{source.name}: {UNUSED!r} in it is no state dict')
    strange = [name for name in kept if not re.fullmatch(dropped, str(name))]
    if strange:
        raise ValueError(
            f'{source.name}: under {UNUSED!r} it holds other things than what official files have '
            f'beyond the network: {some(map(repr, strange))}'
        )
    return dict(kept)


def _check_head(head: Mapping[str, Any], name_map: NameMap, arch: str, source: Source) -> str:
    """Raises ValueError unless a linear layer fits the backbone; returns a description."""
    dim = getattr(hat_mm, name_map.family).archs[arch].dims[-1]
    weight, bias = (head.get(_HEAD + part) for part in ('weight', 'bias'))
    if not head:
        raise ValueError(
            f'{source.name} has no classifier ({name_map.head}weight): leave --head out'
        )
    if (
        len(head) != 2
        or not (isinstance(weight, Tensor) and isinstance(bias, Tensor))
        or weight.shape != (len(bias), dim)
        or bias.ndim != 1
    ):
        found = ', '.join(f'{k} {tuple(getattr(v, "shape", ()))}' for k, v in head.items())
        raise ValueError(
            f'{source.name}: the classifier is no linear layer of {dim} inputs, with weight and '
            f'bias: {found}'
        )
    return f'classifier of {len(bias)} classes'


def _averaged(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in EMA_KEYS:
        if isinstance(checkpoint.get(key), Mapping):
            return unwrap(checkpoint[key])
    raise ValueError(
        f'the checkpoint has no averaged weights ({" or ".join(EMA_KEYS)}), but '
        f'{some(map(repr, checkpoint))}: leave --ema out'
    )


def _official_map(state: Mapping[str, Any], name: str) -> NameMap:
    for name_map in NAME_MAPS:
        if name_map.matches(state):
            return name_map
    if any(m.matches_native(n.removeprefix('backbone.') for n in state) for m in NAME_MAPS):
        raise ValueError(f'{name} is a file of hat_mm already; --to-official makes an official one')
    raise ValueError(
        f'{name} is no official file of {" or ".join(m.family for m in NAME_MAPS)}: it holds '
        f'{some(map(repr, state)) or "nothing"}'
    )


def _fit(
    native: Mapping[str, Any],
    name_map: NameMap,
    source: Source,
    *,
    spare: str,
    in_dino: bool = False,
) -> tuple[list[str], LoadReport]:
    """Returns the archs that the tensors fill exactly, and the load report of the first.

    Names that fully match ``spare`` may be absent. With ``in_dino`` only archs of the authors' DINO
    count, otherwise only the others, because the tensors do not tell them apart.
    """
    family, official = getattr(hat_mm, name_map.family), source.official
    if official is not None and official.family != name_map.family:
        raise ValueError(
            f'{source.name} is the name of a {official.family} file, but it holds a '
            f'{name_map.family}'
        )
    reports = {}
    maps = [i for i in range(4) if f'norm{i}.weight' in native] if in_dino else [3]
    for arch, spec in family.archs.items():
        if getattr(spec, 'pad_every_stage', False) != in_dino:
            continue
        with torch.device('meta'):
            backbone = family(arch, out_indices=maps or [3])
        reports[arch] = compare(backbone.state_dict(), native, spare)
    fitting = [arch for arch, report in reports.items() if report.complete]
    if official is not None and fitting and official.arch not in fitting:
        raise ValueError(
            f'{source.name} is the name of arch {official.arch}, but its tensors are those of arch '
            f'{" or ".join(fitting)}: was it renamed?'
        )
    if fitting:
        archs = [official.arch] if official is not None else fitting
        return archs, reports[fitting[0]]
    nearest = min(reports, key=lambda arch: reports[arch].faults)
    raise ValueError(
        f'{source.name} fits no arch of {name_map.family} ({", ".join(reports)}); nearest is '
        f'{nearest}: {reports[nearest]}'
    )
