"""Names and contents of checkpoints: official files into native names, with a report.

Everything here is a pure function of dictionaries. Backbones call :func:`adapt` while they load, so
an official file works wherever OpenMMLab loads weights.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

_COUNTER = 'num_batches_tracked'

Rule = tuple[str, str | Callable[[re.Match], str]]


@dataclass(frozen=True)
class NameMap:
    """How a family's official checkpoints name their tensors.

    Attributes:
        family: Name of the family for messages.
        marker: Pattern that some name of every official file matches from its start, and no name
            of another family does.
        dropped: Pattern of the names (matched whole) that a backbone has no use for.
        rules: Substitutions (pattern, replacement) that, applied in order, make a native name.
        block: Pattern of a block's names with the groups stage and block, for messages.
        last_norm: Whether the files hold the batch norm of the last map.
    """

    family: str
    marker: str
    dropped: str
    rules: tuple[Rule, ...]
    block: str
    last_norm: bool

    def matches(self, names: Iterable[str]) -> bool:
        """Tells whether the names are those of an official file of this family."""
        return any(re.match(self.marker, name) for name in names)

    def to_native(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Renames the tensors of an official state dict and drops those of no use."""
        native = {}
        for name, value in state.items():
            if re.fullmatch(self.dropped, name):
                continue
            for pattern, replacement in self.rules:
                name = re.sub(pattern, replacement, name)
            native.setdefault(name, value)
        return native

    def depths(self, names: Iterable[str]) -> tuple[int, ...]:
        """Reads the number of blocks of each stage off the names."""
        depths: dict[int, int] = {}
        for name in names:
            if found := re.match(self.block, name):
                stage, block = map(int, found.groups())
                depths[stage] = max(depths.get(stage, 0), block + 1)
        return tuple(depths[stage] for stage in sorted(depths))


_BLOCK = r'^(stages\.[23]\.blocks\.\d+\.)'

FASTERVIT_NAMES = NameMap(
    family='FasterViT',
    marker=r'levels\.\d\.|patch_embed\.conv_down\.',
    # The classifier; tables whose shape depends on a resolution, computed here; the second name of
    # the carrier convolution.
    dropped=r'head\..*'
    r'|.*\.(relative_coords_table|relative_position_index|relative_bias)'
    r'|levels\.\d\.global_tokenizer\.pos_embed\..*',
    rules=(
        (r'^patch_embed\.conv_down\.0\.', 'stem.conv1.'),
        (r'^patch_embed\.conv_down\.1\.', 'stem.norm1.'),
        (r'^patch_embed\.conv_down\.3\.', 'stem.conv2.'),
        (r'^patch_embed\.conv_down\.4\.', 'stem.norm2.'),
        (r'^norm\.', 'norm3.'),
        # Official stages end with their down-sampler, ours start with it.
        (r'^levels\.(\d)\.downsample\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.'),
        (r'\.downsample\.reduction\.0\.', '.downsample.conv.'),
        (r'^levels\.', 'stages.'),
        (r'\.global_tokenizer\.to_global_feature\.pos\.', '.tokenizer.conv.'),
        (_BLOCK + 'hat_', r'\1carrier.'),
        (_BLOCK + '(gamma[12])$', r'\1carrier.\2'),
        (_BLOCK + 'gamma3$', r'\1window.gamma1'),
        (_BLOCK + 'gamma4$', r'\1window.gamma2'),
        (_BLOCK + r'(?!carrier\.|window\.)', r'\1window.'),
        (r'\.pos_emb_funct\.cpb_mlp\.', '.bias.cpb_mlp.'),
        (r'\.cpb_mlp\.0\.', '.fc1.'),
        (r'\.cpb_mlp\.2\.', '.fc2.'),
    ),
    block=r'levels\.(\d)\.blocks\.(\d+)\.',
    last_norm=True,
)

HAT_NET_NAMES = NameMap(
    family='HATNet',
    marker=r'blocks\.\d\.\d+\.attn\.(grid|proj)_norm\.|ds\d\.conv\.',
    # The classifier, and a norm that the published network never uses.
    dropped=r'classifier\..*|.*\.attn\.proj_norm\..*',
    rules=(
        (r'^patch_embed\.0\.', 'stem.conv1.'),
        (r'^patch_embed\.1\.', 'stem.norm.'),
        (r'^patch_embed\.3\.', 'stem.conv2.'),
        (r'^ds(\d)\.', lambda m: f'stages.{int(m[1]) - 1}.downsample.'),
        (r'^blocks\.(\d)\.', r'stages.\1.blocks.'),
        (r'\.conv\.conv1\.0\.', '.conv.norm1.'),
        (r'\.conv\.conv1\.1\.', '.conv.conv1.'),
        (r'\.conv\.conv2\.0\.', '.conv.conv2.'),
        (r'\.conv\.conv3\.0\.', '.conv.conv3.'),
        (r'\.conv\.conv3\.1\.', '.conv.norm2.'),
    ),
    block=r'blocks\.(\d)\.(\d+)\.',
    last_norm=False,
)


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint did to a backbone.

    Attributes:
        loaded: Names of the backbone's tensors that the checkpoint fills.
        missing: Names that it does not fill, which keep their values.
        unexpected: Names in the checkpoint that the backbone has no place for.
        mismatched: Names that both have, with different shapes.
        kept: Names that need not be in the checkpoint and are not, which keep their values.
        dropped: Names in the checkpoint that a backbone has no use for.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every tensor was filled and none was left over."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        total = sum(map(len, (self.loaded, self.missing, self.mismatched, self.kept)))
        parts = [f'{len(self.loaded)} of {total} tensors loaded']
        labels = {
            'missing': self.missing,
            'unexpected': self.unexpected,
            'mismatched': self.mismatched,
            'kept as they were': self.kept,
            'dropped': self.dropped,
        }
        for label, names in labels.items():
            if names:
                more = ', …' if len(names) > 4 else ''
                parts.append(f'{len(names)} {label} ({", ".join(names[:4])}{more})')
        return '; '.join(parts)


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Finds the tensors of a training checkpoint.

    Takes ``state_dict`` (or ``model``) out of a dictionary that also holds the optimizer and so on,
    and removes the ``module.`` that a parallel wrapper put before every name.
    """
    for key in ('state_dict', 'model'):
        inner = checkpoint.get(key)
        if isinstance(inner, Mapping):
            return unwrap(inner)
    if checkpoint and all(name.startswith('module.') for name in checkpoint):
        return {name.removeprefix('module.'): value for name, value in checkpoint.items()}
    return checkpoint


def compare(own: Mapping[str, Tensor], state: Mapping[str, Any], spare: str) -> LoadReport:
    """Compares a state dict in native names with a backbone's own.

    Counters of batches count as nothing.

    Args:
        own: The backbone's ``state_dict()``.
        state: What is to be loaded.
        spare: Pattern of names (matched whole) that need not be in both.
    """
    own = {name: value for name, value in own.items() if not name.endswith(_COUNTER)}
    state = {name: value for name, value in state.items() if not name.endswith(_COUNTER)}
    fits = {n for n in own if n in state and getattr(state[n], 'shape', None) == own[n].shape}

    def split(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        names = tuple(names)
        needed = tuple(name for name in names if not re.fullmatch(spare, name))
        return needed, tuple(name for name in names if name not in needed)

    missing, kept = split(name for name in own if name not in state)
    unexpected, dropped = split(name for name in state if name not in own)
    return LoadReport(
        loaded=tuple(name for name in own if name in fits),
        missing=missing,
        unexpected=unexpected,
        mismatched=tuple(name for name in own if name in state and name not in fits),
        kept=kept,
        dropped=dropped,
    )


def adapt(
    state: Mapping[str, Any],
    own: Mapping[str, Tensor],
    name_map: NameMap,
    arch: str,
    unused: str,
) -> tuple[dict[str, Any], LoadReport]:
    """Brings what a user loads into a backbone to the backbone's names.

    Args:
        state: Names relative to the backbone and their tensors; a training checkpoint with the
            state dict inside; names of an official file or native ones.
        own: The backbone's ``state_dict()``.
        name_map: Official names of the backbone's family.
        arch: The backbone's arch, for messages.
        unused: Pattern of native names (matched whole) that need not be in both: norms of outputs,
            which each task trains for itself, and stages that this backbone does not build.

    Returns:
        The state dict in native names, with the own values of tensors that an official file need
        not have, and the report.

    Raises:
        ValueError: The state dict is of another family or no checkpoint at all, or an official
            file that does not fill the backbone exactly.
    """
    state = unwrap(state)
    if not name_map.matches(state):
        if not any(name in own for name in state):
            raise ValueError(_foreign(state, name_map))
        return dict(state), compare(own, state, unused)
    native = name_map.to_native(state)
    no_use = tuple(name for name in state if re.fullmatch(name_map.dropped, name))
    no_use += tuple(name for name in native if re.fullmatch(unused, name))
    native = {name: value for name, value in native.items() if name not in no_use}
    report = compare(own, native, unused)
    if not report.complete:
        raise ValueError(
            f'an official {name_map.family} checkpoint with depths {name_map.depths(state)} does '
            f'not fit arch {arch}: {report}. {_remedy(report)}'
        )
    optional = rf'{unused}|.*{_COUNTER}'
    native = {**{n: v for n, v in own.items() if re.fullmatch(optional, n)}, **native}
    return native, replace(report, dropped=no_use)


def _remedy(report: LoadReport) -> str:
    if report.missing and all(re.search(r'\.running_(mean|var)$', n) for n in report.missing):
        return (
            'The norms of the file keep no running statistics, those of the backbone do: leave '
            'norm_cfg at its default, None.'
        )
    return 'Use the file of this arch, or the arch of this file.'


def _foreign(state: Collection[str], name_map: NameMap) -> str:
    if not state:
        return f'no tensors to load into a {name_map.family}: the checkpoint is empty'
    names = ', '.join(map(repr, list(state)[:3]))
    hint = ''
    if any(f'.{name}'.find('.backbone.') >= 0 for name in map(str, state)):
        hint = (
            " It looks like a whole detector's or segmentor's: take the backbone out of it with "
            "init_cfg=dict(type='Pretrained', checkpoint=FILE, prefix='backbone.')."
        )
    return (
        f'this is no {name_map.family} checkpoint: it holds names such as {names}; expected the '
        f"names of an official file or of this backbone ('stem.conv1.weight', …).{hint}"
    )
