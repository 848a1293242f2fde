"""Names of tensors in official checkpoints, and the native ones, that is hat_mm's own.

All functions here are pure functions of names and tensors.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Where a converted file keeps what the network does not use; no module's name has a colon.
UNUSED = 'unused'
UNUSED_PREFIX = f'{UNUSED}:'

Rule = tuple[str, str | Callable[[re.Match], str]]


def identical(one: Any, other: Any) -> bool:
    """Whether two tensors are equal, dtypes included."""
    return (
        is_dense(one) and is_dense(other) and one.dtype == other.dtype and torch.equal(one, other)
    )


def is_dense(value: Any) -> bool:
    """Tells whether a value is a strided tensor that is not quantized."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized


def rename_old(name: str) -> str:
    """Today's name of a backbone's tensor, from the one that hat_mm 0.1 saved."""
    return re.sub(r'^(stages\.\d\.blocks\.\d+\.(?:window|carrier))\.', r'\1_attn.', name)


def _substitute(rules: Iterable[Rule], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _unchanged(name: str, value: Any) -> Any:
    return value


def some(names: Iterable[Any], most: int = 4) -> str:
    """Text with the first of many names, for messages."""
    names = [*map(str, names)]
    return ', '.join(names[:most]) + (', …' if len(names) > most else '')


@dataclass(frozen=True)
class NameMap:
    """How a family's official checkpoints name their tensors.

    Attributes:
        family: Name of the family's class.
        marker: Pattern that matches the start of some name in every official file of this family,
            and of no name in another family's.
        native_marker: The same for the native names of a backbone of this family.
        first_conv: Native name of the weight of the convolution that takes the image.
        head: Prefix of ``weight`` and ``bias`` of the classifier's linear layer.
        tables: Pattern of the names (full match) of tensors that are not learned: their values and
            shapes follow from a resolution.
        unused: Pattern of the names (full match) of learned tensors that a backbone does not use,
            apart from the classifier.
        twins: Substitutions (pattern, replacement) from a tensor's name to its second name. If the
            values differ, the first name counts.
        rules: Substitutions (pattern, replacement) that, applied in order, turn an official name
            into the native one.
        back: Substitutions that turn a native name into the official one.
        block: Pattern of a block's names with the groups stage and block, for messages.
        last_norm: Whether the files hold the norm of the last map.
        added: Pattern of native names (full match) that no official file has: what a network adds
            to the published one.
        to_value: Converts the value of an official name to the native layout.
        from_value: The inverse, called with the official name and the native value.
    """

    family: str
    marker: str
    native_marker: str
    first_conv: str
    head: str
    tables: str
    unused: str
    twins: tuple[Rule, ...]
    rules: tuple[Rule, ...]
    back: tuple[Rule, ...]
    block: str
    last_norm: bool
    added: str = '(?!)'
    to_value: Callable[[str, Any], Any] = _unchanged
    from_value: Callable[[str, Any], Any] = _unchanged

    def matches(self, names: Iterable[str]) -> bool:
        """Tells whether the names are those of an official file of this family."""
        return any(re.match(self.marker, name) for name in names)

    def matches_native(self, names: Iterable[str]) -> bool:
        """Tells whether the names are those of a backbone of this family."""
        return any(re.match(self.native_marker, name) for name in names)

    @property
    def dropped(self) -> str:
        """Pattern of the names (full match) that a backbone does not use."""
        return rf'{re.escape(self.head)}.*|{self.tables}|{self.unused}'

    def to_native(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Renames the tensors of an official state dict and drops those that are not used."""
        native: dict[str, Any] = {}
        for name, value in state.items():
            if re.fullmatch(self.dropped, name):
                continue
            native.setdefault(_substitute(self.rules, name), self.to_value(name, value))
        return native

    def left_over(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The learned tensors of an official state dict that :meth:`to_native` drops.

        A second name is left out if its tensor equals that of the first.
        """
        left = {
            name: value
            for name, value in state.items()
            if re.fullmatch(self.dropped, name) and not re.fullmatch(self.tables, name)
        }
        for name, value in state.items():
            twin = _substitute(self.twins, name)
            if twin != name and twin in left and identical(left[twin], value):
                del left[twin]
        return left

    def to_official(self, native: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Renames a backbone's tensors to the official names, second names included.

        Returns:
            The official state dict, and the native names that the published network lacks: norms of
            maps that it does not normalize, and what was added to it.
        """
        official, unknown = {}, []
        for name, value in native.items():
            if re.fullmatch(self.added, name):
                unknown.append(name)
                continue
            if re.match(r'norm\d\.', name) and not (self.last_norm and name.startswith('norm3.')):
                unknown.append(name)
                continue
            name = _substitute(self.back, name)
            value = official[name] = self.from_value(name, value)
            twin = _substitute(self.twins, name)
            if twin != name:
                official[twin] = value
        return official, tuple(unknown)

    def depths(self, names: Iterable[str]) -> tuple[int, ...]:
        """Reads the number of blocks of each stage from the names."""
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
    native_marker=r'stages\.\d\.blocks\.\d+\.window(_attn)?\.|stem\.norm1\.',
    first_conv='stem.conv1.weight',
    head='head.',
    # hat_mm computes them for the grid size of each input.
    tables=r'.*\.(relative_coords_table|relative_position_index|relative_bias)',
    # The second name of the carrier convolution.
    unused=r'levels\.\d\.global_tokenizer\.pos_embed\..*',
    twins=((r'\.global_tokenizer\.to_global_feature\.pos\.', '.global_tokenizer.pos_embed.'),),
    rules=(
        (r'^patch_embed\.conv_down\.0\.', 'stem.conv1.'),
        (r'^patch_embed\.conv_down\.1\.', 'stem.norm1.'),
        (r'^patch_embed\.conv_down\.3\.', 'stem.conv2.'),
        (r'^patch_embed\.conv_down\.4\.', 'stem.norm2.'),
        (r'^norm\.', 'norm3.'),
        # Official stages end with their downsampler, ours start with it.
        (r'^levels\.(\d)\.downsample\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.'),
        (r'\.downsample\.reduction\.0\.', '.downsample.conv.'),
        (r'^levels\.', 'stages.'),
        (r'\.global_tokenizer\.to_global_feature\.pos\.', '.tokenizer.conv.'),
        (_BLOCK + 'hat_', r'\1carrier_attn.'),
        (_BLOCK + '(gamma[12])$', r'\1carrier_attn.\2'),
        (_BLOCK + 'gamma3$', r'\1window_attn.gamma1'),
        (_BLOCK + 'gamma4$', r'\1window_attn.gamma2'),
        (_BLOCK + r'(?!carrier_attn\.|window_attn\.)', r'\1window_attn.'),
        (r'\.pos_emb_funct\.cpb_mlp\.', '.bias.cpb_mlp.'),
        (r'\.cpb_mlp\.0\.', '.fc1.'),
        (r'\.cpb_mlp\.2\.', '.fc2.'),
    ),
    back=(
        (r'^stem\.conv1\.', 'patch_embed.conv_down.0.'),
        (r'^stem\.norm1\.', 'patch_embed.conv_down.1.'),
        (r'^stem\.conv2\.', 'patch_embed.conv_down.3.'),
        (r'^stem\.norm2\.', 'patch_embed.conv_down.4.'),
        (r'^norm3\.', 'norm.'),
        (r'^stages\.(\d)\.downsample\.', lambda m: f'levels.{int(m[1]) - 1}.downsample.'),
        (r'\.downsample\.conv\.', '.downsample.reduction.0.'),
        (r'\.tokenizer\.conv\.', '.global_tokenizer.to_global_feature.pos.'),
        (
            _BLOCK + r'(window|carrier)_attn\.(attn\.bias|pos_embed)\.fc1\.',
            r'\1\2_attn.\3.cpb_mlp.0.',
        ),
        (
            _BLOCK + r'(window|carrier)_attn\.(attn\.bias|pos_embed)\.fc2\.',
            r'\1\2_attn.\3.cpb_mlp.2.',
        ),
        (r'\.attn\.bias\.cpb_mlp\.', '.attn.pos_emb_funct.cpb_mlp.'),
        (_BLOCK + r'window_attn\.gamma1$', r'\1gamma3'),
        (_BLOCK + r'window_attn\.gamma2$', r'\1gamma4'),
        (_BLOCK + r'window_attn\.', r'\1'),
        (_BLOCK + r'carrier_attn\.(gamma[12])$', r'\1\2'),
        (_BLOCK + r'carrier_attn\.', r'\1hat_'),
        (r'^stages\.', 'levels.'),
    ),
    block=r'levels\.(\d)\.blocks\.(\d+)\.',
    last_norm=True,
)

HAT_NET_NAMES = NameMap(
    family='HATNet',
    marker=r'blocks\.\d\.\d+\.attn\.(grid|proj)_norm\.|ds\d\.conv\.',
    native_marker=r'stages\.\d\.blocks\.\d+\.conv\.norm1\.|stem\.norm\.',
    first_conv='stem.conv1.weight',
    head='classifier.1.',
    tables='(?!)',
    # A norm that the published network never uses.
    unused=r'.*\.attn\.proj_norm\..*',
    twins=(),
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
    back=(
        (r'^stem\.conv1\.', 'patch_embed.0.'),
        (r'^stem\.norm\.', 'patch_embed.1.'),
        (r'^stem\.conv2\.', 'patch_embed.3.'),
        (r'^stages\.(\d)\.downsample\.', lambda m: f'ds{int(m[1]) + 1}.'),
        (r'^stages\.(\d)\.blocks\.', r'blocks.\1.'),
        (r'\.conv\.conv1\.', '.conv.conv1.1.'),
        (r'\.conv\.norm1\.', '.conv.conv1.0.'),
        (r'\.conv\.conv2\.', '.conv.conv2.0.'),
        (r'\.conv\.conv3\.', '.conv.conv3.0.'),
        (r'\.conv\.norm2\.', '.conv.conv3.1.'),
    ),
    block=r'blocks\.(\d)\.(\d+)\.',
    last_norm=False,
)


_MERGING = r'layers\.\d\.downsample\.(norm|reduction)\.'


def _swin_merging(order: str) -> Callable[[str, Any], Any]:
    """Reorders the inputs of a downsampler, four pixels of C channels each.

    In official files the pixels are the outer axis, ordered down the columns first; in
    ``nn.Unfold``, ``pixel_unshuffle`` and the toolboxes the channels are the outer axis, and the
    pixels are ordered along the rows.
    """

    def reorder(name: str, value: Any) -> Any:
        if not re.match(_MERGING, name) or not is_dense(value) or value.shape[-1] % 4:
            return value
        shape = (2, 2, -1) if order == 'native' else (-1, 2, 2)
        return value.unflatten(-1, shape).transpose(-3, -1).flatten(-3)

    return reorder


# The official files are Swin's. The rules also accept the names of mmpretrain and mmdet.
SWIN_NAMES = NameMap(
    family='SwinHAT',
    marker=r'patch_embed\.proj(ection)?\.',
    native_marker=r'stages\.\d\.blocks\.\d+\.attn\.bias\.relative_position_bias_table',
    first_conv='stem.conv.weight',
    head='head.',
    tables=r'.*\.(relative_position_index|attn_mask)',
    unused='(?!)',
    twins=(),
    rules=(
        (r'^patch_embed\.proj(ection)?\.', 'stem.conv.'),
        (r'^patch_embed\.', 'stem.'),
        (r'^norm\.', 'norm3.'),
        (r'^layers\.', 'stages.'),
        (r'^stages\.(\d)\.downsample\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.'),
        (r'\.attn\.w_msa\.', '.attn.'),
        (r'\.attn\.relative_position_bias_table$', '.attn.bias.relative_position_bias_table'),
        (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
        (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
    ),
    back=(
        (r'^stem\.conv\.', 'patch_embed.proj.'),
        (r'^stem\.', 'patch_embed.'),
        (r'^norm3\.', 'norm.'),
        (r'^stages\.(\d)\.downsample\.', lambda m: f'layers.{int(m[1]) - 1}.downsample.'),
        (r'^stages\.', 'layers.'),
        (r'\.attn\.bias\.', '.attn.'),
    ),
    block=r'(?:layers|stages)\.(\d)\.blocks\.(\d+)\.',
    last_norm=True,
    added=r'stages\.\d\.(tokenizer|blocks\.\d+\.carrier_attn)\..*',
    to_value=_swin_merging('native'),
    from_value=_swin_merging('official'),
)


# The families whose official files can be converted to native ones and back.
NAME_MAPS = (FASTERVIT_NAMES, HAT_NET_NAMES)
