"""Layer-wise learning rates: the closer a layer is to the image, the smaller its rate."""

import inspect
from typing import Any, NamedTuple

from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from hat_mm.backbones.base import near_names
from hat_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS
from hat_mm.weights.initialization import only_warnings

OPTIONS = (
    'layer_decay_rate',
    'custom_keys',
    'bias_lr_mult',
    'bias_decay_mult',
    'norm_decay_mult',
    'flat_decay_mult',
    'dwconv_decay_mult',
    'dcn_offset_lr_mult',
    'bypass_duplicate',
)


class _Group(NamedTuple):
    depth: int | None  # None outside the backbones
    scale: float
    settings: dict  # what the optimizer gets


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Learning rates that decrease with the distance of a layer from the backbone's outputs.

    A parameter at depth ``d`` of the ``D`` depths of a backbone gets ``layer_decay_rate ** (D - 1 -
    d)`` times its learning rate, so the stem gets the smallest rate and the output norms the full
    one. Parameters outside a backbone keep their rate. Source: https://arxiv.org/abs/2003.10555.

    A backbone is any part of the model with ``get_layer_depth(param_name, prefix)``, which returns
    ``d`` and ``D``: those of hat_mm, and mmpretrain's ConvNeXt, Swin and others. It may be the
    model itself or anywhere in it. If there are several, each has its own depths.

    All options of mmengine's ``DefaultOptimWrapperConstructor`` keep their meaning, frozen
    parameters are left out as there, and ``lr_mult`` is multiplied with the factor of the layer.
    Parameters of equal depth and settings form one parameter group, so the optimizer computes fewer
    and larger steps; the groups are logged as a table.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper; its ``optimizer`` must give ``lr``.
        paramwise_cfg: ``layer_decay_rate``, a number above 0 and up to 1, and mmengine's own
            options: ``custom_keys``, ``bias_lr_mult``, ``bias_decay_mult``,
            ``norm_decay_mult``, ``flat_decay_mult``, ``dwconv_decay_mult``,
            ``dcn_offset_lr_mult``, ``bypass_duplicate``.

    Raises:
        TypeError: ``paramwise_cfg`` is not a dict.
        ValueError: An option is unknown, ``layer_decay_rate`` is missing or out of range, the
            optimizer's config lacks ``lr``, or lacks ``weight_decay`` although an option scales it.
            When called: the model has no such backbone, or has a parameter twice without
            ``bypass_duplicate``.

    Example:
        >>> optim_wrapper = dict(
        ...     type='OptimWrapper',
        ...     constructor='hat_mm.LayerDecayOptimWrapperConstructor',
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     paramwise_cfg=dict(layer_decay_rate=0.9, flat_decay_mult=0.0),
        ... )
    """

    def _validate_cfg(self) -> None:
        options = self.paramwise_cfg
        if not isinstance(options, dict):
            raise TypeError(f'paramwise_cfg must be a dict, not {options!r}')
        for name in options:
            if name not in OPTIONS:
                choices = near_names(name, OPTIONS)
                raise ValueError(f'unknown paramwise_cfg option {name!r}{choices}')
        rate: Any = options.get('layer_decay_rate')
        if not _is_number(rate) or not 0 < rate <= 1:
            raise ValueError(
                f'paramwise_cfg.layer_decay_rate must be a number above 0 and up to 1, not {rate!r}'
            )
        if not _is_number(self.base_lr):
            raise ValueError(
                'layer-wise learning rates are multiples of optim_wrapper.optimizer.lr, which must '
                f'be a number, not {self.base_lr!r}'
            )
        scaled = [name for name in options if name.endswith('_decay_mult')]
        if scaled and self.base_wd is None:
            # mmengine would ignore flat_decay_mult and keep the optimizer's default.
            raise ValueError(
                f'paramwise_cfg.{scaled[0]} needs optim_wrapper.optimizer.weight_decay, which is '
                'not given'
            )
        super()._validate_cfg()

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: int | float | None = None,
    ) -> None:
        """Adds the parameters of a module to a list of parameter groups.

        Args:
            params: List of groups, which grows in place.
            module: The module; in the outermost call, the whole model.
            prefix: Name of the module in the model; empty in the outermost call.
            is_dcn_module: Whether the parent is a deformable convolution.
        """
        if prefix:  # mmengine's method calls this one for each child
            super().add_params(params, module, prefix, is_dcn_module)
            return
        backbones = _find_backbones(module)
        with only_warnings():  # mmengine logs each parameter's rate, which is not final
            super().add_params(params, module, prefix, is_dcn_module)
        groups = self._merge(params, module, backbones)
        params[:] = [group.settings for group in groups]
        if is_main_process():
            self._log(groups, backbones)

    def _merge(
        self, params: list[dict], model: nn.Module, backbones: dict[str, Any]
    ) -> list[_Group]:
        rate = self.paramwise_cfg['layer_decay_rate']
        names = {param: name for name, param in model.named_parameters()}
        merged: dict[Any, _Group] = {}
        for single in params:
            [param] = single['params']
            name = names.pop(param, None)
            if name is None:
                # Twice in one group, torch would accept it and update it twice.
                raise ValueError(
                    f'a parameter of shape {tuple(param.shape)} is in {type(model).__name__} '
                    'twice; paramwise_cfg.bypass_duplicate=True takes it once'
                )
            depth, scale = None, 1.0
            for prefix, backbone in backbones.items():
                if name.startswith(prefix):
                    depth, total = backbone.get_layer_depth(name, prefix)
                    scale = rate ** (total - 1 - depth)
            # The multipliers are in lr and weight_decay already.
            applied = ('params', 'lr_mult', 'decay_mult')
            settings: dict[str, Any] = {
                key: value for key, value in single.items() if key not in applied
            }
            lr: Any = settings.get('lr', self.base_lr)
            settings['lr'] = lr * scale
            if self.base_wd is not None:
                settings.setdefault('weight_decay', self.base_wd)
            # repr, as settings such as betas can be lists.
            key = (depth, scale, repr(sorted(settings.items())))
            group = merged.setdefault(key, _Group(depth, scale, {'params': [], **settings}))
            group.settings['params'].append(param)
        # Sorted from the stem to the parameters outside, larger settings first.
        return sorted(
            merged.values(),
            key=lambda group: (
                group.depth is None,
                group.depth,
                -group.settings['lr'],
                -group.settings.get('weight_decay', 0),
            ),
        )

    def _log(self, groups: list[_Group], backbones: dict[str, nn.Module]) -> None:
        where = ', '.join(f'{k[:-1] or "model"} ({type(v).__name__})' for k, v in backbones.items())
        rate = self.paramwise_cfg['layer_decay_rate']
        row = '{:>5}  {:>8}  {:>10}  {:>12}  {:>7}  {:>13}'.format
        lines = [
            f'layer_decay_rate {rate} in {where}; parameter groups before any schedule:',
            row('depth', 'lr scale', 'lr', 'weight decay', 'tensors', 'parameters'),
        ]
        for depth, scale, settings in groups:
            lines.append(
                row(
                    'other' if depth is None else depth,
                    f'{scale:.4g}',
                    f'{settings["lr"]:.4g}',
                    f'{settings["weight_decay"]:.4g}' if 'weight_decay' in settings else 'default',
                    len(settings['params']),
                    f'{sum(param.numel() for param in settings["params"]):,}',
                )
            )
        print_log('\n'.join(lines), logger='current')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _find_backbones(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the outermost parts of a model that have ``get_layer_depth``, by prefix."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # Looked up in the class: wrappers (FSDP, torch.compile) forward a backbone's attributes,
        # but their parameters have other names. mmpretrain's classifiers have a method of the same
        # name; only a backbone's takes a prefix.
        method = getattr(type(module), 'get_layer_depth', None)
        if method is None or 'prefix' not in inspect.signature(method).parameters:
            continue
        prefix = f'{name}.' if name else ''
        if not prefix.startswith(tuple(found)):
            found[prefix] = module
    if not found:
        raise ValueError(
            f'{type(model).__name__} has no layer-wise learning rates: no part of it has a method '
            'get_layer_depth(param_name, prefix). The backbones of hat_mm have it, and of '
            "mmpretrain's ConvNeXt, Swin and others"
        )
    return found
