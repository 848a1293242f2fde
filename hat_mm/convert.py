"""Official checkpoints into files of hat_mm and back, with a report and where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

import hat_mm

from .checkpoint_io import UNUSED
from .checkpoints import NAME_MAPS, LoadReport, NameMap, OfficialFile, compare, unwrap

# Where official training checkpoints keep the average of the weights.
EMA_KEYS = ('state_dict_ema', 'model_ema')
_HEAD = 'head.fc.'


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from.

    Attributes:
        name: Name of the file.
        sha256: Its checksum.
        official: Its row in the table of official files, None if it has none.
    """

    name: str
    sha256: str
    official: OfficialFile | None

    @property
    def provenance(self) -> dict[str, str]:
        """As plain data."""
        known = {'file': self.name, 'sha256': self.sha256}
        if self.official is not None:
            known |= {'url': self.official.url, 'licence': self.official.licence}
        return known


def from_official(
    checkpoint: Mapping[str, Any], source: Source, with_head: bool, ema: bool
) -> tuple[dict[str, Any], LoadReport]:
    """Makes a checkpoint of hat_mm from an official one.

    Args:
        checkpoint: What the official file holds.
        source: The file.
        with_head: Whether the result is an mmpretrain classifier (``backbone.…``, ``head.fc.…``)
            instead of a backbone.
        ema: Whether to take the average of the weights that a training keeps.

    Returns:
        A checkpoint with ``state_dict``, ``meta`` and, under :data:`~hat_mm.checkpoint_io.UNUSED`,
        the learned tensors that the network has no use for, in their official names; and what the
        tensors do to the backbone.

    Raises:
        ValueError: It is no official file, has no average or no classifier, or its tensors do not
            fill the arch exactly.
    """
    state = _averaged(checkpoint) if ema else unwrap(checkpoint)
    name_map = _official_map(state, source.name)
    native, left = name_map.to_native(state), name_map.left_over(state)
    archs, report = _fit(native, name_map, source, name_map.depths(state))
    if with_head:
        head = {k: v for k, v in left.items() if k.startswith(name_map.head)}
        if not head:
            raise ValueError(
                f'{source.name} has no classifier ({name_map.head}weight): leave --head out'
            )
        left = {k: v for k, v in left.items() if k not in head}
        native = {f'backbone.{name}': value for name, value in native.items()}
        native |= {_HEAD + k.removeprefix(name_map.head): v for k, v in head.items()}
    meta = {
        'family': name_map.family,
        'arch': archs,
        'source': source.provenance | {'weights': 'average' if ema else 'last'},
        'report': str(report),
        'time': datetime.now(UTC).strftime('%Y-%m-%d %H:%M:%S UTC'),
        'hat_mm_version': hat_mm.__version__,
    }
    return {'state_dict': native, 'meta': meta, UNUSED: left}, report


def to_official(checkpoint: Mapping[str, Any], source: Source) -> tuple[dict[str, Any], str]:
    """Makes an official checkpoint from one of hat_mm: a backbone, a classifier or a detector.

    Returns:
        A checkpoint with ``state_dict`` in official names and ``meta``; and what was done, in
        words.

    Raises:
        ValueError: It holds no backbone of hat_mm.
    """
    whole = unwrap(checkpoint)
    within = {
        name.removeprefix('backbone.'): value
        for name, value in whole.items()
        if name.startswith('backbone.')
    }
    native = within or dict(whole)
    name_map = next((m for m in NAME_MAPS if m.matches_native(native)), None)
    if name_map is None:
        kind = next((m.family for m in NAME_MAPS if m.matches(whole)), None)
        raise ValueError(
            f'{source.name} is an official {kind} file already'
            if kind
            else f'{source.name} holds no backbone of hat_mm, but {_names(whole)}'
        )
    state, unknown = name_map.to_official(native)
    state |= {
        name_map.head + name.removeprefix(_HEAD): value
        for name, value in whole.items()
        if within and name.startswith(_HEAD)
    }
    renamed = len(state)
    kept = checkpoint.get(UNUSED, {})
    state |= kept
    said = [f'{renamed} tensors in official names', f'{len(kept)} kept from the official file']
    if unknown:
        said.append(f'{len(unknown)} left out that the published network lacks ({unknown[0]}, …)')
    if f'{name_map.head}weight' not in state:
        said.append('no classifier')
    report = '; '.join(said)
    meta = {
        'family': name_map.family,
        'source': source.provenance,
        'report': report,
        'hat_mm_version': hat_mm.__version__,
    }
    return {'state_dict': state, 'meta': meta}, report


def _averaged(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in EMA_KEYS:
        if isinstance(checkpoint.get(key), Mapping):
            return unwrap(checkpoint[key])
    raise ValueError(
        f'the checkpoint has no averaged weights ({" or ".join(EMA_KEYS)}), but '
        f'{_names(checkpoint)}: leave --ema out'
    )


def _names(state: Mapping[str, Any]) -> str:
    return ', '.join(map(repr, list(state)[:4])) + (', …' if len(state) > 4 else '')


def _official_map(state: Mapping[str, Any], name: str) -> NameMap:
    for name_map in NAME_MAPS:
        if name_map.matches(state):
            return name_map
    if any(m.matches_native(n.removeprefix('backbone.') for n in state) for m in NAME_MAPS):
        raise ValueError(f'{name} is a file of hat_mm already; --to-official makes an official one')
    raise ValueError(
        f'{name} is no official file of {" or ".join(m.family for m in NAME_MAPS)}: it holds '
        f'{_names(state) or "nothing"}'
    )


def _fit(
    native: Mapping[str, Any], name_map: NameMap, source: Source, depths: tuple[int, ...]
) -> tuple[list[str], LoadReport]:
    """The archs that the tensors fill exactly, and what they do to the first."""
    family = getattr(hat_mm, name_map.family)
    official = source.official
    known = official is not None and official.family == name_map.family
    archs, reports = [official.arch] if known else list(family.archs), {}
    for arch in archs:
        with torch.device('meta'):
            backbone = family(arch, out_indices=(3,))
        reports[arch] = compare(backbone.state_dict(), native, spare='(?!)')
    fitting = [arch for arch, report in reports.items() if report.complete]
    if fitting:
        return fitting, reports[fitting[0]]
    nearest = min(reports, key=lambda arch: len(_wrong(reports[arch])))
    raise ValueError(
        f'{source.name} does not fit {name_map.family} arch {", ".join(archs)}: its depths are '
        f'{depths}; nearest is {nearest}: {reports[nearest]}'
    )


def _wrong(report: LoadReport) -> tuple[str, ...]:
    return report.missing + report.unexpected + report.mismatched
