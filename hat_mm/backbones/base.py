"""What all backbones share: arguments, freezing, outputs, loading."""

import difflib
import logging
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any, ClassVar

from mmcv.cnn import build_norm_layer
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hat_mm.layers import (
    Deployable,
    MapNorm,
    NormFactory,
    checkpoint_block,
    guard_group_norm,
)
from hat_mm.weights.loading import adapt, is_backbone_alone, unwrap
from hat_mm.weights.names import NameMap


def resolve_arch(arch: Any, table: Mapping[str, Any], row: type) -> tuple[str, Any]:
    """Finds an arch by name or makes one from a dictionary.

    Args:
        arch: Name, number that is a name, or dictionary of fields of ``row``.
        table: Known archs by name.
        row: Frozen dataclass of an arch; its defaults stand in for fields that are not given.

    Returns:
        Name, ``'custom'`` for a dictionary, and the row.

    Raises:
        ValueError: The name or a field is unknown.
        TypeError: ``arch`` is none of the above.
    """
    if isinstance(arch, Mapping):
        known = [field.name for field in fields(row)]
        for name in arch:
            if name not in known:
                raise ValueError(f'unknown arch field {name!r}{near_names(name, known)}')
        return 'custom', row(**arch)
    if isinstance(arch, int) and not isinstance(arch, bool):
        arch = str(arch)
    if not isinstance(arch, str):
        raise TypeError(f'arch must be a name, a number or a dict, not {arch!r}')
    if arch not in table:
        raise ValueError(f'unknown arch {arch!r}{near_names(arch, list(table))}')
    return arch, table[arch]


def near_names(name: Any, choices: Sequence[str]) -> str:
    """Text for an error about an unknown name: the choices, and the names closest to it."""
    near = difflib.get_close_matches(str(name), choices, n=2, cutoff=0.6)
    hint = f'; did you mean {" or ".join(map(repr, near))}?' if near else ''
    return f'; choices: {", ".join(choices)}{hint}'


def check_int(name: str, value: int) -> None:
    """Raises ValueError about ``name`` unless ``value`` is a positive int."""
    if _not_int(value) or value < 1:
        raise ValueError(f'{name} must be a positive int, not {value!r}')


def check_ints(name: str, values: Sequence[int], length: int) -> None:
    """Raises ValueError about ``name`` unless ``values`` are ``length`` positive ints."""
    if (
        not isinstance(values, Sequence)
        or len(values) != length
        or any(_not_int(v) or v < 1 for v in values)
    ):
        raise ValueError(
            f'{name} must be {length} positive ints, one for each stage, not {values!r}'
        )


def check_number(name: str, value: float) -> None:
    """Raises ValueError about ``name`` unless ``value`` is an int or a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f'{name} must be a number, not {value!r}')


def check_heads(dims: Sequence[int], num_heads: Sequence[int], stages: Iterable[int]) -> None:
    """Raises ValueError unless the heads of these stages divide their channels."""
    for i in stages:
        if dims[i] % num_heads[i]:
            raise ValueError(
                f'num_heads[{i}] = {num_heads[i]} does not divide the {dims[i]} channels of '
                f'stage {i} (embed_dims * 2**{i})'
            )


def check_carriers(
    window_sizes: Sequence[int], carrier_sizes: Sequence[int], stages: Iterable[int]
) -> None:
    """Raises ValueError unless the windows of these stages have room for their carriers."""
    for i in stages:
        if window_sizes[i] < carrier_sizes[i]:
            raise ValueError(
                f'window_size[{i}] = {window_sizes[i]} is smaller than the carrier_size '
                f'{carrier_sizes[i]}'
            )


def check_stages(name: str, stages: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Returns ``stages``; raises ValueError about ``name`` unless they exist and are distinct."""
    if (
        not isinstance(stages, Sequence)
        or not stages
        or any(_not_int(i) or i not in range(num_stages) for i in stages)
        or len(set(stages)) != len(stages)
    ):
        raise ValueError(
            f'{name} must be different stages out of 0 to {num_stages - 1}, not {stages!r}'
        )
    return tuple(stages)


def check_ratio(name: str, value: float, dim: int) -> None:
    """Raises ValueError about ``name`` unless ``value * dim`` is at least one channel."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value * dim < 1e9:
        raise ValueError(
            f'{name} must be a finite number of at least 1/{dim}, which leaves a channel, '
            f'not {value!r}'
        )


def per_stage(values: int | Sequence[int], num_stages: int) -> Sequence[int]:
    """Returns one number for each stage, from one for all stages or one for each."""
    return (values,) * num_stages if isinstance(values, int) else values


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Spreads a drop-path rate over blocks, linearly from 0 at the first block to ``rate``."""
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(f'drop_path_rate must be in [0, 1), not {rate!r}')
    total = sum(depths)
    rates = iter([rate * i / max(total - 1, 1) for i in range(total)])
    return [[next(rates) for _ in range(depth)] for depth in depths]


# The ``strict`` of a call to a backbone's own load_state_dict; PyTorch does not pass it on.
_STRICT = ContextVar('strict', default=True)


class Stage(nn.Module):
    """A downsampler and blocks; each block maps (B, C, H, W) to the same shape.

    Args:
        downsample: Module before the blocks.
        blocks: The blocks.
        with_cp: Recomputes the blocks' activations in the backward pass, which saves memory.
    """

    def __init__(
        self, downsample: nn.Module, blocks: Iterable[nn.Module], *, with_cp: bool
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the stage's feature map."""
        return self.run_blocks(self.downsample(x))

    def run_blocks(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        for block in self.blocks:
            x = checkpoint_block(block, x) if self.with_cp else block(x)
        return x


class HierarchicalBackbone(Deployable, BaseModule):
    """A stem and stages, each stage at half the resolution of the one before.

    A subclass builds ``stem`` and ``stages`` from ``spec`` in :meth:`_build`, and defines:

    - ``archs``: its variants, rows of ``arch_type``, which have ``dims`` and ``depths``, the
      channels and blocks of each stage;
    - ``name_map``: the tensor names of its official checkpoints;
    - ``published_norm``: the config of its norms;
    - ``published_out_norm``: the type of the norms of maps in official files;
    - ``from_scratch``: the initialization.

    ``stages[i]`` starts with its downsampler (the first has none) and holds its blocks in
    ``blocks``, so the result of a stage is its feature map.

    Stages after the last one in ``out_indices`` are not built: their parameters would get no
    gradient, which DistributedDataParallel refuses.

    Args:
        arch: Name in ``archs``, a number that is one, or a dict of fields of ``arch_type``.
        overrides: Fields of the arch that arguments replace; None keeps the arch's value.
        in_channels: Channels of the images.
        out_indices: Stages whose maps are returned, in this order.
        out_norm_cfg: Config of the norm ``norm{i}`` of each returned map, or None for raw maps.
        norm_cfg: Changes the type (and any other settings that it gives) of the norms on maps;
            each keeps its own eps unless ``eps`` is given. None for the published type.
        frozen_stages: Freezes nothing (-1), the stem (0), or the stem and the first k stages (k).
        norm_eval: Keeps batch norms in eval mode during training.
        with_cp: Recomputes the blocks' activations in the backward pass, which saves memory.
        init_cfg: mmengine's initialization config.

    Attributes:
        arch: Name of the arch, ``'custom'`` if it was given as a dict.
        spec: The arch, a row of ``arch_type``, with what arguments replace.
        depths: Blocks of each stage.
        out_indices: Stages whose maps are returned.
        out_channels: Channels of each returned map.
        out_strides: Pixels of the image to a pixel of each returned map.
    """

    archs: ClassVar[Mapping[str, Any]]
    arch_type: ClassVar[type]
    name_map: ClassVar[NameMap]
    published_norm: ClassVar[dict]
    published_out_norm: ClassVar[type] = _BatchNorm
    from_scratch: ClassVar[list[dict]]
    init_cfg: Any  # mmengine sets it

    def __init__(
        self,
        *,
        arch: str | int | dict,
        overrides: dict[str, Any],
        in_channels: int,
        out_indices: int | Sequence[int],
        out_norm_cfg: dict | None,
        norm_cfg: dict | None,
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        super().__init__(init_cfg=self.from_scratch if init_cfg is None else init_cfg)
        self.arch, spec = resolve_arch(arch, self.archs, self.arch_type)
        self.spec = replace(spec, **{k: v for k, v in overrides.items() if v is not None})
        dims, self.depths = self.spec.dims, self.spec.depths
        num_stages = len(self.depths)
        check_int('in_channels', in_channels)
        indices = (out_indices,) if isinstance(out_indices, int) else out_indices
        self.out_indices = check_stages('out_indices', indices, num_stages)
        if _not_int(frozen_stages) or frozen_stages not in range(-1, num_stages + 1):
            raise ValueError(
                f'frozen_stages must be -1 (none), 0 (the stem) or 1 to {num_stages} (the stem and '
                f'as many stages), not {frozen_stages!r}'
            )
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.out_channels = tuple(dims[i] for i in self.out_indices)
        self.out_strides = tuple(4 * 2**i for i in self.out_indices)
        for name, cfg in (('norm_cfg', norm_cfg), ('out_norm_cfg', out_norm_cfg)):
            if cfg is not None and not isinstance(cfg, Mapping):
                raise TypeError(
                    f"{name} must be a dict such as dict(type='BN') or None, not {cfg!r}"
                )
        published = self.published_norm
        if norm_cfg is not None and norm_cfg.get('type', published['type']) != published['type']:
            published = {}
        self._norm_cfg = {**published, **(norm_cfg or {})}
        self.stem: nn.Module
        self.stages: nn.ModuleList
        self._build(max(self.out_indices) + 1)
        for i in self.out_indices:
            norm = None
            if out_norm_cfg is not None:
                norm = _build_norm('out_norm_cfg', out_norm_cfg, dims[i])
            self.add_module(f'norm{i}', norm)
        self._freeze()

    @abstractmethod
    def _build(self, num_stages: int) -> None:
        """Sets ``stem`` and ``stages``, the latter with the first ``num_stages`` stages."""

    @property
    def norm_layer(self) -> NormFactory:
        """Makes the norm of a map from channels and eps, as ``norm_cfg`` says."""
        return lambda dim, eps: _build_norm('norm_cfg', {'eps': eps, **self._norm_cfg}, dim)

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Computes feature maps.

        Args:
            x: Images, (B, in_channels, H, W), for any H, W >= 1.

        Returns:
            For each of ``out_indices`` a contiguous map (B, out_channels, H / stride, W / stride),
            the sizes rounded up.

        Raises:
            ValueError: ``x`` has a wrong number of axes or channels, or no pixels.
        """

    def check_images(self, x: Tensor) -> None:
        """Raises ValueError unless ``x`` is (B, in_channels, H, W) with at least one pixel."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(
                f'{type(self).__name__} takes images of shape (batch, {self.in_channels}, height, '
                f'width) with at least one pixel, not {tuple(x.shape)}'
            )

    def output(self, x: Tensor, stage: int) -> Tensor:
        """The map of a stage as it is returned: normalized, and contiguous.

        mmcv's RoI operators read the memory as contiguous whatever its strides.
        """
        norm = getattr(self, f'norm{stage}')
        return (x if norm is None else norm(x)).contiguous()

    def train(self, mode: bool = True) -> 'HierarchicalBackbone':
        """Sets the mode; frozen parts stay in eval mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.stem, *self.stages[: self.frozen_stages]]
        norms = (getattr(self, f'norm{i}') for i in self.out_indices if i < self.frozen_stages)
        for module in [*frozen, *filter(None, norms)]:
            module.eval()
            module.requires_grad_(False)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Finds the depth of a parameter for layer-wise learning rates, as mmpretrain's models do.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: Prefix of the backbone's own names, such as ``'backbone.'``.

        Returns:
            Depth of the parameter's layer, and number of depths. The stem has depth 0, each block
            has the next depth (a downsampler belongs to the block after it), and output norms and
            everything outside the backbone have the last.
        """
        total = sum(self.depths) + 2
        name = param_name.removeprefix(prefix)
        if not param_name.startswith(prefix):
            return total - 1, total
        if name.startswith('stem.'):
            return 0, total
        found = re.match(r'stages\.(\d+)\.(?:blocks\.(\d+)\.)?', name)
        if found is None:
            return total - 1, total
        stage, block = int(found[1]), int(found[2] or 0)
        return sum(self.depths[:stage]) + block + 1, total

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads as PyTorch does, official files too.

        With ``strict=False``, names of an unknown network are not an error: what did not fit is
        returned. Official files must fit in any case; output norms and stages that are not
        built count as filled.
        """
        token = _STRICT.set(strict)
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            _STRICT.reset(token)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads, after mapping the names of official files to ours.

        Overridden because PyTorch's and mmengine's loaders both call it, with this backbone's part
        of the state dict, before they look at the children. The loaders report what a native file
        lacks, or has beyond this backbone.
        """
        state = {k[len(prefix) :]: state_dict.pop(k) for k in [*state_dict] if k.startswith(prefix)}
        if state or not prefix:
            state = self._adapt(state)
            state_dict.update({prefix + name: value for name, value in state.items()})
        elif is_backbone_alone(unexpected_keys):
            # The whole model loads before its parts, and has listed what none of them takes.
            raise ValueError(
                f'the checkpoint holds no tensor for {prefix[:-1]!r}, a {type(self).__name__}, but '
                'those of a backbone alone. No whole model takes such a file as load_from (but a '
                'classifier an official one of its family): set '
                "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=FILE) instead."
            )
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _checkpoint_filter(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Lets a classifier load a whole official file, by renaming tensors in place first.

        mmpretrain's ImageClassifier calls a backbone's method of this name with what it is about to
        load. The backbone's tensors go to :meth:`_load_from_state_dict`, the classifier's to the
        linear layer ``head.fc``.
        """
        names = [name for name in state_dict if name.startswith(prefix)]
        state = unwrap({name.removeprefix(prefix): state_dict[name] for name in names})
        if self.name_map.matches(state):
            head = self.name_map.head
            state = {
                f'head.fc.{name.removeprefix(head)}'
                if name.startswith(head)
                else f'backbone.{name}': value
                for name, value in state.items()
            }
        for name in names:
            del state_dict[name]
        state_dict.update({prefix + name: value for name, value in state.items()})

    def _adapt(self, state: dict[str, Any]) -> dict[str, Any]:
        """Maps what is loaded to this backbone's names, and logs what it fills."""
        self.refuse_loading()
        built = len(self.stages)
        norms = (f'norm{i}' for i in self.out_indices)
        state, report = adapt(
            state,
            self.state_dict(),
            self.name_map,
            self.arch,
            norms=[n for n in norms if isinstance(getattr(self, n), self.published_out_norm)],
            unused=rf'stages\.[{built}-9]\..*',
            strict=_STRICT.get(),
        )
        print_log(
            f'{type(self).__name__} {self.arch}: {report}',
            logger='current',
            level=logging.INFO if report.complete else logging.WARNING,
        )
        return state


def _not_int(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int)


def _build_norm(name: str, cfg: Mapping[str, Any], dim: int) -> nn.Module:
    try:
        norm = build_norm_layer(deepcopy(dict(cfg)), dim)[1]
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f'{name} = {dict(cfg)!r} makes no norm of {dim} channels ({error or "missing field"}); '
            "examples are dict(type='BN'), dict(type='SyncBN'), dict(type='GN', num_groups=1) and "
            "dict(type='hat_mm.LayerNorm2d')"
        ) from error
    if type(norm) is nn.LayerNorm:
        raise ValueError(
            f'{name} = {dict(cfg)!r} normalizes the last axis, of a map its width; for the '
            "channels of each pixel take dict(type='hat_mm.LayerNorm2d')"
        )
    if isinstance(norm, nn.GroupNorm) and not isinstance(norm, MapNorm):
        norm.register_forward_pre_hook(guard_group_norm)
    return norm
