"""Names and contents of checkpoints: official files into native names, with a report.

Everything here is a pure function of dictionaries. Backbones call :func:`adapt` while they load, so
an official file works wherever OpenMMLab loads weights.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_COUNTER = 'num_batches_tracked'
# Where a converted file keeps what the network has no use for; no module's name has a colon.
UNUSED = 'unused'
UNUSED_PREFIX = f'{UNUSED}:'

Rule = tuple[str, str | Callable[[re.Match], str]]


def _identical(one: Any, other: Any) -> bool:
    """Whether two tensors are the same bit by bit, the sign of zeros included."""
    return (
        _is_dense(one)
        and _is_dense(other)
        and (one.dtype, one.shape) == (other.dtype, other.shape)
        and torch.equal(*(t.reshape(-1).contiguous().view(torch.uint8) for t in (one, other)))
    )


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized


def _substitute(rules: Iterable[Rule], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _unchanged(name: str, value: Any) -> Any:
    return value


@dataclass(frozen=True)
class NameMap:
    """How a family's official checkpoints name their tensors.

    Attributes:
        family: Name of the family's class.
        marker: Pattern that some name of every official file matches from its start, and no name
            of another family does.
        native_marker: The same for the names of a backbone of this family.
        first_conv: Native name of the weight of the convolution that sees the image.
        head: What stands before ``weight`` and ``bias`` of the classifier's linear layer.
        tables: Pattern of the names (matched whole) of tensors that are not learned: their values,
            and shapes, follow from a resolution.
        unused: Pattern of the names (matched whole) of learned tensors that a backbone has no use
            for, the classifier apart.
        twins: Substitutions (pattern, replacement) from a name to the second one that the same
            tensor has. If the values differ the first counts.
        rules: Substitutions (pattern, replacement) that, applied in order, make a native name.
        back: Those that make an official name of a native one.
        block: Pattern of a block's names with the groups stage and block, for messages.
        last_norm: Whether the files hold the norm of the last map.
        added: Pattern of native names (matched whole) that no official file has: what a network
            adds to the published one.
        to_value: Brings the value of an official name to the native layout.
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
        """Pattern of the names (matched whole) that a backbone has no use for."""
        return rf'{re.escape(self.head)}.*|{self.tables}|{self.unused}'

    def to_native(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Renames the tensors of an official state dict and drops those of no use."""
        native = {}
        for name, value in state.items():
            if re.fullmatch(self.dropped, name):
                continue
            native.setdefault(_substitute(self.rules, name), self.to_value(name, value))
        return native

    def left_over(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The learned tensors of an official state dict that :meth:`to_native` drops.

        A second name is left out where its tensor equals that of the first.
        """
        left = {
            name: value
            for name, value in state.items()
            if re.fullmatch(self.dropped, name) and not re.fullmatch(self.tables, name)
        }
        for name, value in state.items():
            twin = _substitute(self.twins, name)
            if twin != name and twin in left and _identical(left[twin], value):
                del left[twin]
        return left

    def to_official(self, native: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Renames a backbone's tensors to the official names, second names included.

        Returns:
            The official state dict, and the native names that the published network does not have:
            norms of maps that it does not normalise, and what was added to it.
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
        """Reads the number of blocks of each stage off the names."""
        depths: dict[int, int] = {}
        for name in names:
            if found := re.match(self.block, name):
                stage, block = map(int, found.groups())
                depths[stage] = max(depths.get(stage, 0), block + 1)
        return tuple(depths[stage] for stage in sorted(depths))


def rename_old(name: str) -> str:
    """The name that a tensor has today, of one that hat_mm 0.1 saved."""
    return re.sub(r'(^|\.)(blocks\.\d+\.(?:window|carrier))\.', r'\1\2_attn.', name)


_BLOCK = r'^(stages\.[23]\.blocks\.\d+\.)'

FASTERVIT_NAMES = NameMap(
    family='FasterViT',
    marker=r'levels\.\d\.|patch_embed\.conv_down\.',
    native_marker=r'stages\.\d\.blocks\.\d+\.window(_attn)?\.|stem\.norm1\.',
    first_conv='stem.conv1.weight',
    head='head.',
    # Computed here, for the grid of each input.
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
        # Official stages end with their down-sampler, ours start with it.
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
    """Reorders the inputs of a down-sampler, four pixels of C channels each.

    Official files have the pixels outside, down the columns first; ``nn.Unfold``,
    ``pixel_unshuffle`` and the toolboxes have the channels outside, then the pixels along the rows.
    """

    def reorder(name: str, value: Any) -> Any:
        if not re.match(_MERGING, name) or not _is_dense(value) or value.shape[-1] % 4:
            return value
        sides = (2, 2, -1) if order == 'native' else (-1, 2, 2)
        return value.unflatten(-1, sides).transpose(-3, -1).flatten(-3)

    return reorder


# Official files are Swin's. The rules take the names of mmpretrain and mmdet too.
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

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


# Of the networks whose official files can be converted to files of the same network and back.
NAME_MAPS = (FASTERVIT_NAMES, HAT_NET_NAMES)
_ALL_NAMES = (*NAME_MAPS, SWIN_NAMES)


@dataclass(frozen=True)
class OfficialFile:
    """A file that a network's authors publish, and how its network wants to see images.

    Attributes:
        backbone: Name of the backbone in configs, such as ``'fastervit-0'``.
        arch: ``arch`` of the class that the file fits.
        url: Where the authors publish it; ends with the file's name.
        licence: What binds it.
        input_size: Side of the images in pixels.
        crop: Share of the resized image's side that is cropped for a test; None if it is not
            published.
        squash: Whether images become square without regard to their proportions.
        trained_on: Data sets, in this order.
        sha256: Checksum of the file, None where it is not known.
        mirrors: Other places of the same file, asked before ``url``.
        mean: Mean of each channel, RGB, 0 to 255.
        std: Standard deviation of each channel.
    """

    backbone: str
    arch: str
    url: str
    licence: str
    input_size: int
    crop: float | None
    squash: bool = False
    trained_on: tuple[str, ...] = ('ImageNet-1k',)
    sha256: str | None = None
    mirrors: tuple[str, ...] = ()
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.url.rpartition('/')[2]

    @property
    def family(self) -> str:
        """Class of the backbone."""
        return 'FasterViT' if self.backbone.startswith('fastervit') else 'HATNet'


_FASTERVIT_URL = 'https://huggingface.co/ahatamiz/FasterViT/resolve/main/'
_HAT_NET_URL = 'https://github.com/yun-liu/HAT-Net/releases/download/v2.0/'
_NON_COMMERCIAL = 'NVIDIA Source Code License-NC'
_NONE_STATED = 'none is stated'
_BOTH = ('ImageNet-21k', 'ImageNet-1k')


def _fastervit(arch: str, crop: float) -> OfficialFile:
    url = f'{_FASTERVIT_URL}fastervit_{arch}_224_1k.pth.tar'
    return OfficialFile(f'fastervit-{arch}', arch, url, _NON_COMMERCIAL, 224, crop)


def _fastervit_21k(side: int, window: int, crop: float) -> OfficialFile:
    arch = f'4-21k-{side}'
    url = f'{_FASTERVIT_URL}fastervit_4_21k_{side}_w{window}.pth.tar'
    return OfficialFile(
        f'fastervit-{arch}', arch, url, _NON_COMMERCIAL, side, crop, squash=True, trained_on=_BOTH
    )


def _hat_net(arch: str) -> OfficialFile:
    url = f'{_HAT_NET_URL}HAT-Net_{arch.capitalize()}.pth'
    return OfficialFile(f'hat-net-{arch}', arch, url, _NONE_STATED, 224, crop=None)


OFFICIAL_FILES = (
    _fastervit('0', crop=0.875),
    *(_fastervit(arch, crop=1.0) for arch in '123456'),
    _fastervit_21k(224, window=14, crop=0.95),
    _fastervit_21k(384, window=24, crop=1.0),
    _fastervit_21k(512, window=32, crop=1.0),
    _fastervit_21k(768, window=48, crop=0.93),
    *(_hat_net(arch) for arch in ('tiny', 'small', 'medium', 'large')),
)
# What stands before the names of all of them.
OFFICIAL_PREFIXES = (_FASTERVIT_URL, _HAT_NET_URL)


def official_file(name_or_url: str) -> OfficialFile | None:
    """Finds an official file by its name, or its address, of which a query is no part."""
    wanted = re.split('[?#]', name_or_url)[0]
    return next((file for file in OFFICIAL_FILES if wanted in (file.name, file.url)), None)


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint did to a backbone.

    Attributes:
        loaded: Names of the backbone's tensors that the checkpoint fills.
        missing: Names that it does not fill, which keep their values.
        unexpected: Names in the checkpoint that the backbone has no place for.
        mismatched: Names that both have, with another shape or kind of number.
        kept: Names that need not be in the checkpoint and are not, which keep their values.
        dropped: Names in the checkpoint that a backbone has no use for.
        new: Names of what the backbone adds to the published network, which keep their values.
        adapted: Names of what was made for colour images and is for images of other channels now.
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
    def complete(self) -> bool:
        """Whether every tensor was filled and none was left over."""
        return not (self.missing or self.unexpected or self.mismatched)

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
                more = ', …' if len(names) > 4 else ''
                parts.append(f'{len(names)} {label} ({", ".join(names[:4])}{more})')
        return '; '.join(parts)


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Finds the tensors of a training checkpoint.

    Takes ``state_dict`` (or ``model``) out of a dictionary that also holds the optimizer and so on,
    and removes the ``module.`` that a parallel wrapper put before every name, and what a converted
    safetensors file keeps for the way back alone.
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
    fits = {
        n
        for n, tensor in own.items()
        if _is_dense(state.get(n))
        and state[n].shape == tensor.shape
        and state[n].is_floating_point() == tensor.is_floating_point()
    }

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


def is_backbone_alone(names: Collection[str]) -> bool:
    """Tells whether names are a backbone's without a prefix, official or native, of any family."""
    return any(m.matches(names) or m.matches_native(names) for m in _ALL_NAMES)


def fit_channels(weight: Tensor, channels: int) -> Tensor:
    """Brings the weight of a convolution that sees colour images to another number of channels.

    As timm does it: one channel gets the sum over the colours, more get the colours in turn, scaled
    so that the response to a grey image keeps its size.

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
    unused: str,
) -> tuple[dict[str, Any], LoadReport]:
    """Brings what a user loads into a backbone to the backbone's names.

    A first convolution for colour images is brought to the backbone's channels.

    Args:
        state: Names relative to the backbone and their tensors; a training checkpoint with the
            state dict inside; names of an official file or native ones.
        own: The backbone's ``state_dict()``.
        name_map: Official names of the backbone's family.
        arch: The backbone's arch, for messages.
        unused: Pattern of native names (matched whole) that need not be in both: norms of outputs,
            which each task trains for itself, and stages that this backbone does not build.

    Returns:
        The state dict in native names, with the own values of tensors that need not be in the file,
        and the report. Of a file in native names the report need not be complete.

    Raises:
        ValueError: The state dict is of another network or no checkpoint at all, or an official
            file that does not fill the backbone exactly.
    """
    state = {rename_old(name): value for name, value in unwrap(state).items()}
    if not name_map.matches(state):
        _refuse_foreign(state, own, name_map)
        state, adapted = _with_channels(state, own, name_map.first_conv)
        # A file with all but what was added starts a network with it, as an official one does.
        spare = rf'{unused}|{name_map.added}'
        has_added = any(re.fullmatch(name_map.added, name) for name in state)
        if has_added or compare(own, state, spare).missing:
            spare = unused
        report = _with_new(compare(own, state, spare), name_map)
        state = {**{n: v for n, v in own.items() if re.fullmatch(spare, n)}, **state}
        return state, replace(report, adapted=adapted)
    native, adapted = _with_channels(name_map.to_native(state), own, name_map.first_conv)
    no_use = tuple(name for name in state if re.fullmatch(name_map.dropped, name))
    no_use += tuple(name for name in native if re.fullmatch(unused, name))
    native = {name: value for name, value in native.items() if name not in no_use}
    report = _with_new(compare(own, native, rf'{unused}|{name_map.added}'), name_map)
    if not report.complete:
        raise ValueError(
            f'an official {name_map.family} checkpoint with depths {name_map.depths(state)} does '
            f'not fit arch {arch}: {report}. {_remedy(report)}'
        )
    optional = rf'{unused}|{name_map.added}|.*{_COUNTER}'
    native = {**{n: v for n, v in own.items() if re.fullmatch(optional, n)}, **native}
    return native, replace(report, dropped=no_use, adapted=adapted)


def _with_channels(
    state: Mapping[str, Any], own: Mapping[str, Tensor], name: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fits the first convolution, ``name``, to the backbone's; returns what it changed, too."""
    weight, mine = state.get(name), own.get(name)
    if (
        not (_is_dense(weight) and _is_dense(mine))
        or not weight.ndim == mine.ndim == 4
        or weight.shape[1] != 3
        or mine.shape[1] == 3
    ):
        return dict(state), ()
    return {**state, name: fit_channels(weight, mine.shape[1])}, (name,)


def _with_new(report: LoadReport, name_map: NameMap) -> LoadReport:
    """Tells what was added to the published network from what else keeps its values."""
    new = tuple(name for name in report.kept if re.fullmatch(name_map.added, name))
    return replace(report, kept=tuple(n for n in report.kept if n not in new), new=new)


def _remedy(report: LoadReport) -> str:
    if report.missing and all(re.search(r'\.running_(mean|var)$', n) for n in report.missing):
        return (
            'The norms of the file keep no running statistics, those of the backbone do: leave '
            'norm_cfg at its default, None.'
        )
    return 'Use the file of this arch, or the arch of this file.'


def _refuse_foreign(state: Collection[str], own: Collection[str], name_map: NameMap) -> None:
    """Raises ValueError unless names that are no official ones are a backbone's, or some of it."""
    if not state:
        raise ValueError(f'no tensors to load into a {name_map.family}: the checkpoint is empty')
    strange = [name for name in state if name not in own]
    others = (m for m in _ALL_NAMES if m.family != name_map.family)
    other = next((m.family for m in others if m.matches(strange) or m.matches_native(strange)), '')
    # Other networks have some names in common with ours, norms of outputs for example.
    num_known = len(state) - len(strange)
    native = num_known > len(strange) or (num_known and name_map.matches_native(state))
    if native and not other:
        return
    names = ', '.join(map(repr, strange[:3]))
    hint = f' It looks like a {other}.' if other else ''
    if any('.backbone.' in f'.{name}' for name in state):
        hint = (
            " It looks like a whole detector's or segmentor's: take the backbone out of it with "
            "init_cfg=dict(type='Pretrained', checkpoint=FILE, prefix='backbone.')."
        )
    raise ValueError(
        f'this is no {name_map.family} checkpoint: it holds names such as {names}; expected the '
        f'names of an official file or of this backbone ({next(iter(own))!r}, …).{hint}'
    )
