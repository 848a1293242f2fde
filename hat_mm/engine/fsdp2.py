"""Training of models that are too large for one device: FSDP2 in mmengine's runner.

Each process keeps its part of every parameter, gradient and optimizer state. torch's
``fully_shard`` gathers the parameters of a unit, such as a block of the backbone, right before they
are needed, and sums up its gradients when they are there.
"""

import copy
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Set
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint
from mmengine.device import get_device
from mmengine.dist import barrier, get_world_size, is_main_process
from mmengine.hooks import EMAHook
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.optim import OptimWrapperDict
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from hat_mm import compat
from hat_mm.backbones.base import HierarchicalBackbone
from hat_mm.registry import RUNNERS
from hat_mm.weights import sharded

from .resume import ExactResumeRunner

# --- sharding a model -----------------------------------------------------------------------------


def find_units(model: nn.Module, min_params: int) -> Iterator[nn.Module]:
    """Yields the modules that are gathered on their own, inner ones before outer ones.

    These are the backbone, and the innermost large members of lists and sequences: blocks, layers
    of transformers, fully connected layers. All else is gathered with the whole model, for a whole
    step. So are heads that compute their losses, because toolboxes call their ``loss`` while FSDP2
    only notices calls of ``forward``, and members that share a parameter with another module.

    Args:
        model: A model of the toolboxes.
        min_params: Least number of parameters of a member.
    """
    backbone = getattr(model, 'backbone', None)
    uses = _count_uses(model)

    def visit(module: nn.Module, is_member: bool) -> Iterator[nn.Module]:
        is_list = isinstance(module, nn.ModuleList | nn.Sequential)
        inner = [unit for child in module.children() for unit in visit(child, is_list)]
        yield from inner
        is_block = (
            is_member
            and not inner
            and not isinstance(module, nn.ModuleList)
            and not hasattr(module, 'loss')
            and sum(parameter.numel() for parameter in module.parameters()) >= min_params
            and all(uses[key] == count for key, count in _count_uses(module).items())
        )
        if is_block or module is backbone:
            yield module

    for child in model.children():
        yield from visit(child, False)


def _count_uses(module: nn.Module) -> Counter:
    """How often each parameter, by its identity, occurs in a module."""
    return Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    min_params: int = 1_000_000,
    mixed_precision: dict[str, str] | None = None,
) -> None:
    """Shards a model in place; all processes call it, with equal weights.

    Args:
        model: A model of the toolboxes.
        mesh: All processes, in one dimension.
        min_params: See :func:`find_units`.
        mixed_precision: Dtypes of the backbone's computation and of the sums of its gradients, by
            name: ``dict(param_dtype='bfloat16', reduce_dtype='float32')``. Its batch norms, whose
            statistics are in float32, and all other parts keep float32.
    """
    dtypes = {name: getattr(torch, dtype) for name, dtype in (mixed_precision or {}).items()}
    backbone = getattr(model, 'backbone', None)
    if isinstance(backbone, HierarchicalBackbone):
        # Blocks return views. torch warns of changing them in place, which nothing does.
        warnings.filterwarnings('ignore', 'FSDP2-wrapped module .* returned a view')
    within = set(backbone.modules()) if dtypes and backbone is not None else set()
    for unit in find_units(model, min_params):
        policy = MixedPrecisionPolicy()
        if unit in within:
            norms: list[Any] = [m for m in unit.modules() if isinstance(m, _BatchNorm) and m.affine]
            if norms := [norm for norm in norms if not isinstance(norm, FSDPModule)]:
                as_is = MixedPrecisionPolicy(cast_forward_inputs=False)
                fully_shard(norms, mesh=mesh, mp_policy=as_is)
            policy = MixedPrecisionPolicy(
                **dtypes, output_dtype=torch.float32 if unit is backbone else None
            )
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def share(tensor: Any, parameter: Tensor, is_scalar: bool) -> Any:
    """This process's part of a whole tensor, if that has the size of a sharded parameter.

    Args:
        tensor: What was loaded.
        parameter: The parameter that it belongs to.
        is_scalar: Whether it is one element for :func:`_make_scalars_vectors`.
    """
    if not isinstance(parameter, DTensor) or not isinstance(tensor, Tensor):
        return tensor
    if is_scalar and not tensor.ndim:
        tensor = tensor.reshape(1)
    if isinstance(tensor, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh = parameter.device_mesh
    # All processes have the whole tensor: each takes its part without asking the others.
    return distribute_tensor(
        tensor.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None
    )


def _share_weights(module: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    """Lets a sharded module load whole tensors; a pre-hook of ``load_state_dict``."""
    for name, parameter in module.named_parameters(recurse=False):
        if prefix + name in state_dict:
            is_scalar = parameter.numel() == 1
            state_dict[prefix + name] = share(state_dict[prefix + name], parameter, is_scalar)


def _share_optimizer_state(scalars: Set, optimizer: Optimizer, state_dict: dict) -> dict:
    """Lets an optimizer of sharded parameters load whole tensors; a pre-hook of its loading."""
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    saved = [index for group in state_dict['param_groups'] for index in group['params']]
    state = dict(state_dict['state'])
    for index, parameter in zip(saved, parameters, strict=False):  # torch compares the numbers
        if index in state:
            state[index] = {
                name: value if name == 'step' else share(value, parameter, index in scalars)
                for name, value in state[index].items()
            }
    return state_dict | {'state': state}


def _make_scalars_vectors(model: nn.Module) -> set[str]:
    """Gives parameters without dimensions one, which FSDP2 requires; returns their names."""
    every = list(model.named_parameters(remove_duplicate=False))
    scalars = {name: parameter for name, parameter in every if not parameter.ndim}
    vectors = {
        parameter: nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
        for parameter in scalars.values()
    }
    for name, parameter in scalars.items():
        module, _, leaf = name.rpartition('.')
        setattr(model.get_submodule(module), leaf, vectors[parameter])
    return set(scalars)


def _allow_copies(model: nn.Module, skeleton: nn.Module) -> None:
    """Lets EMAHook copy a sharded model, which FSDP2 forbids.

    Args:
        model: The sharded model.
        skeleton: The same before it was sharded, with tensors on the meta device. The copy is one
            of it with sharded parameters: it can be averaged, saved and loaded, but not run.
    """

    def copy_model(memo: dict) -> nn.Module:
        for kind in ('named_parameters', 'named_buffers'):
            live = dict(getattr(model, kind)())
            for name, tensor in getattr(skeleton, kind)():
                memo[id(tensor)] = copy.deepcopy(live[name])
        return copy.deepcopy(skeleton, memo)

    model.__deepcopy__ = copy_model  # type: ignore[assignment]


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy on the meta device, for which no memory is needed at any time."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        meta = torch.empty_like(parameter, device='meta')
        memo[id(parameter)] = nn.Parameter(meta, parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device='meta')
    return copy.deepcopy(model, memo)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- the setting ----------------------------------------------------------------------------------


_DTYPES = ('float32', 'float16', 'bfloat16')
_OPTIONS = {'checkpoints', 'min_params', 'mixed_precision'}


@RUNNERS.register_module()
class FSDP2Runner(ExactResumeRunner):
    """mmengine's runner that shards what it trains over all processes, by torch's FSDP2.

    Set ``runner_type = 'hat_mm.FSDP2Runner'`` in any config and train with several processes. The
    losses are those of DDP. Without a launcher, and for tests, nothing is sharded. A validation
    holds the whole model in each process. Resume is exact.

    Options are in the config's ``fsdp2``: ``min_params`` and ``mixed_precision`` as in
    :func:`shard`, and ``checkpoints``: ``'full'`` (default) writes files as DDP does, which load
    anywhere; ``'sharded'`` writes folders without gathering anything
    (:mod:`hat_mm.weights.sharded`), which this runner loads with any number of processes.

    Raises:
        ValueError: An option is unknown, or does not suit the model or the checkpoints.
    """

    mesh: DeviceMesh | None = None
    """Set once the model is sharded."""
    _folder: Path | None = None
    """Sharded checkpoint that is being read or written."""
    _scalars: frozenset = frozenset()
    """Names of scalars in state dicts, and their indices in the optimizer's."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Moves the model to the device; it is sharded when the training starts."""
        self._options = self._read_options(model)
        self._writes_folders = self._options.pop('checkpoints') == 'sharded'
        if not self.distributed:
            return super().wrap_model(model_wrapper_cfg, model)
        if model_wrapper_cfg or self.cfg.get('find_unused_parameters'):
            self.logger.warning(
                'FSDP2Runner does not use model_wrapper_cfg and find_unused_parameters: in each '
                'step, all processes must use the same parts of the model'
            )
        device = get_device()
        if device == 'cpu':
            model = revert_sync_batchnorm(model)
        elif self.cfg.get('sync_bn'):
            model = convert_sync_batchnorm(model, self.cfg.sync_bn)
        return model.to(device)

    def _read_options(self, model: nn.Module) -> dict[str, Any]:
        options = {'checkpoints': 'full', **(self.cfg.get('fsdp2') or {})}
        if unknown := set(options) - _OPTIONS:
            raise ValueError(f'fsdp2 has the options {sorted(_OPTIONS)}, not {sorted(unknown)}')
        if options['checkpoints'] not in ('full', 'sharded'):
            raise ValueError(
                f"fsdp2.checkpoints must be 'full' or 'sharded', not {options['checkpoints']!r}"
            )
        precision = options.get('mixed_precision') or {}
        if not isinstance(precision, dict):
            raise ValueError(f'fsdp2.mixed_precision must be a dict, not {precision!r}')
        for name, dtype in precision.items():
            if name not in ('param_dtype', 'reduce_dtype') or dtype not in _DTYPES:
                raise ValueError(
                    f'fsdp2.mixed_precision has param_dtype and reduce_dtype, which are one of '
                    f'{", ".join(_DTYPES)}, not {name}={dtype!r}'
                )
            if not hasattr(getattr(model, 'module', model), 'backbone'):  # of a TTA model
                raise ValueError(
                    f'fsdp2.mixed_precision is for backbones, and {type(model).__name__} has none'
                )
        if options['checkpoints'] == 'sharded':
            compat.require('safetensors')
            if not hasattr(torch.distributed.checkpoint, 'HuggingFaceStorageWriter'):
                raise ValueError(
                    f"fsdp2.checkpoints='sharded' needs a newer torch than {torch.__version__}"
                )
            hook = (self.cfg.get('default_hooks') or {}).get('checkpoint')
            hook = hook if isinstance(hook, dict) else {}
            if hook.get('published_keys') or '://' in str(hook.get('out_dir')):
                raise ValueError(
                    "fsdp2.checkpoints='sharded' writes folders to a local disk: it goes neither "
                    "with CheckpointHook's published_keys nor with an address as its out_dir"
                )
        return options

    def train(self) -> nn.Module:
        """Shards the model with its initial weights, and trains."""
        if self.distributed and self.mesh is None:
            self._init_model_weights()
            names = _make_scalars_vectors(self.model)
            self._scalars = frozenset(names | {f'module.{name}' for name in names})  # EMA's
            self.mesh = init_device_mesh(get_device(), (get_world_size(),))
            for module in self.model.modules():
                module.register_load_state_dict_pre_hook(_share_weights)
            averaged = any(isinstance(hook, EMAHook) for hook in self.hooks)
            skeleton = _skeleton(self.model) if averaged else None
            shard(self.model, self.mesh, **self._options)
            if skeleton is not None:
                _allow_copies(self.model, skeleton)
        return super().train()

    def _init_model_weights(self) -> None:
        if self.mesh is None:
            super()._init_model_weights()

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Builds the optimizer wrapper, which can load whole and sharded states.

        Raises:
            ValueError: There are several optimizers.
        """
        built = super().build_optim_wrapper(optim_wrapper)
        if self.mesh is not None and built is not optim_wrapper:
            if isinstance(built, OptimWrapperDict):
                raise ValueError('FSDP2Runner trains with one optimizer, not with several')
            optimizer = built.optimizer
            names = {id(p): name for name, p in self.model.named_parameters()}
            parameters = [p for group in optimizer.param_groups for p in group['params']]
            self._scalars |= {i for i, p in enumerate(parameters) if names[id(p)] in self._scalars}
            hook = partial(_share_optimizer_state, self._scalars)
            optimizer.register_load_state_dict_pre_hook(hook)
        return built

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Calls the hooks, and prepares what they get or have left."""
        if fn_name == 'after_load_checkpoint' and self._folder:
            checkpoint = kwargs['checkpoint']
            filled = sharded.fill(checkpoint, self._folder, self.mesh, with_optimizer=self._resume)
            checkpoint.clear()
            checkpoint.update(filled)
        if self.mesh is not None and fn_name in ('after_val_epoch', 'after_test_epoch'):
            self._gather_for_evaluation(False)
        super().call_hook(fn_name, **kwargs)
        if self.mesh is not None and fn_name in ('before_val_epoch', 'before_test_epoch'):
            self._gather_for_evaluation(True)
        if self.mesh is not None and fn_name == 'before_save_checkpoint':
            self._gather_checkpoint(kwargs['checkpoint'])

    def _gather_for_evaluation(self, whole: bool) -> None:
        """Gathers all parameters, or shards them again.

        In a validation each process goes its own way: it may have more pictures than another, or
        find nothing and leave out a head. Gathering unit by unit would wait for ever.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                keep = whole or module is self.model
                module.set_reshard_after_forward(not keep, recurse=False)
                module.unshard() if whole else module.reshard()

    def _gather_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replaces the sharded tensors of a checkpoint; all processes take part."""

        def is_scalar(path: tuple) -> bool:
            return not self._scalars.isdisjoint(path)

        def gather(path: tuple, leaf: Any) -> Any:
            if not isinstance(leaf, DTensor):
                return leaf
            # mmengine has moved it to the CPU, where processes with GPUs cannot exchange it.
            whole = cast(DTensor, leaf.to(leaf.device_mesh.device_type)).full_tensor()
            if not is_main_process():
                return None
            return whole.cpu().reshape(() if is_scalar(path) else whole.shape)

        if self._folder:
            rest, shards = sharded.split(checkpoint, is_scalar)
            sharded.write_shards(self._folder, shards)
            checkpoint.update(rest)
        else:
            checkpoint.update(sharded.replaced(checkpoint, gather))

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes a checkpoint; mmengine lets only the first process do it, here all take part.

        Args:
            out_dir: Folder of the checkpoints.
            filename: Name of the file, or of the folder of a sharded one.
            file_client_args: See mmengine.
            save_optimizer: Whether it holds the optimizer's state.
            **kwargs: The other arguments of mmengine's method.
        """
        if self.mesh is None:
            super().save_checkpoint(out_dir, filename, file_client_args, save_optimizer, **kwargs)
            return
        target = Path(out_dir, filename)
        part = target.with_name(f'.{filename}.part')
        old = target.with_name(f'.{filename}.old')
        if self._writes_folders:
            self._folder, filename = part, f'{part.name}/{sharded.REST}'
            if is_main_process():
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            barrier()
        try:
            if is_main_process():
                _remove(old)
                if target.is_dir() and not self._folder:  # of an earlier training
                    target.rename(old)
                super().save_checkpoint(
                    out_dir, filename, file_client_args, save_optimizer, **kwargs
                )
                if self._folder:
                    if target.exists():
                        target.rename(old)
                    part.rename(target)
                _remove(old)
            else:
                checkpoint = {'meta': {}, 'state_dict': self.model.state_dict()}
                if save_optimizer:
                    checkpoint['optimizer'] = self.optim_wrapper.state_dict()
                self.call_hook('before_save_checkpoint', checkpoint=checkpoint)
        finally:
            self._folder = None
        barrier()

    def load_checkpoint(self, filename: str, map_location: Any = 'cpu', **kwargs: Any) -> dict:
        """Loads a checkpoint file, or the folder of a sharded checkpoint.

        Args:
            filename: File, folder or address.
            map_location: Where a file's tensors go before they are shared out.
            **kwargs: The other arguments of mmengine's method.
        """
        if sharded.is_sharded(filename):
            self._folder = Path(filename)
            filename = str(self._folder / sharded.REST)
        try:
            return super().load_checkpoint(filename, map_location, **kwargs)
        finally:
            self._folder = None

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: Any = 'cpu',
    ) -> None:
        """Resumes a training.

        Args:
            filename: See :meth:`load_checkpoint`.
            resume_optimizer: Whether to load the optimizer's state.
            resume_param_scheduler: Whether to load the states of schedules.
            map_location: The CPU, not the device as in mmengine, which need not hold a whole file.
        """
        super().resume(filename, resume_optimizer, resume_param_scheduler, map_location)
