"""Training of models that are too large for one device: FSDP2 in mmengine's runner.

Each process keeps its part of every parameter, gradient and optimizer state. torch's
``fully_shard`` gathers the parameters of a unit, such as a block of the backbone, right before they
are needed, and sums up its gradients when they are there.
"""

import copy
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from mmengine.device import get_device
from mmengine.dist import barrier, get_world_size, is_main_process
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from hat_mm.backbones.base import HierarchicalBackbone
from hat_mm.registry import RUNNERS
from hat_mm.weights import sharded

from .resume import ExactResumeRunner

# --- sharding a model -----------------------------------------------------------------------------


def find_units(model: nn.Module, min_params: int) -> Iterator[nn.Module]:
    """Yields the modules that are gathered on their own, inner ones before outer ones.

    These are the backbone, and the innermost large members of lists and sequences: blocks, layers
    of transformers, fully connected layers. All else is gathered with the whole model, for a whole
    step. So are heads that compute their losses: toolboxes call their ``loss``, and FSDP2 only
    notices calls of ``forward``.

    Args:
        model: A model of the toolboxes.
        min_params: Least number of parameters of a member.
    """
    backbone = getattr(model, 'backbone', None)

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
        )
        if is_block or module is backbone:
            yield module

    for child in model.children():
        yield from visit(child, False)


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
        mixed_precision: Arguments of torch's ``MixedPrecisionPolicy`` for the backbone, with names
            of dtypes: ``dict(param_dtype='bfloat16', reduce_dtype='float32')``. Its batch norms,
            whose statistics are in float32, and all other parts keep float32.
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


def share(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, sharded as a parameter is."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    if tensor.numel() == parameter.numel() == 1:
        tensor = tensor.reshape(parameter.shape)
    if tensor.shape != parameter.shape:
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
            state_dict[prefix + name] = share(state_dict[prefix + name], parameter)


def _share_optimizer_state(optimizer: Optimizer, state_dict: dict) -> dict:
    """Lets an optimizer of sharded parameters load whole tensors; a pre-hook of its loading."""
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    saved = [index for group in state_dict['param_groups'] for index in group['params']]
    state = dict(state_dict['state'])
    for index, parameter in zip(saved, parameters, strict=True):
        state[index] = {
            name: share(value, parameter) if name != 'step' and isinstance(value, Tensor) else value
            for name, value in state.get(index, {}).items()
        }
    return state_dict | {'state': state}


def _make_scalars_vectors(model: nn.Module) -> set[str]:
    """Gives parameters without dimensions one, which FSDP2 requires; returns their names."""
    names = {name for name, parameter in model.named_parameters() if not parameter.ndim}
    for name in names:
        module, _, leaf = name.rpartition('.')
        parameter = model.get_parameter(name)
        vector = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
        setattr(model.get_submodule(module), leaf, vector)
    return names


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
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        meta = torch.empty_like(parameter, device='meta')
        memo[id(parameter)] = nn.Parameter(meta, parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device='meta')
    return copy.deepcopy(model, memo)


# --- the setting ----------------------------------------------------------------------------------


_OPTIONS = {'checkpoints', 'min_params', 'mixed_precision'}


@RUNNERS.register_module()
class FSDP2Runner(ExactResumeRunner):
    """mmengine's runner that shards what it trains over all processes, by torch's FSDP2.

    Set ``runner_type = 'hat_mm.FSDP2Runner'`` in any config and train with several processes. The
    losses are those of DDP. In one process, and for tests, nothing is sharded. A validation holds
    the whole model in each process, because each detects something else. Resume is exact.

    Options are in the config's ``fsdp2``: ``min_params`` and ``mixed_precision`` as in
    :func:`shard`, and ``checkpoints``: ``'full'`` (default) writes files as DDP does, which load
    anywhere; ``'sharded'`` writes folders without gathering anything
    (:mod:`hat_mm.weights.sharded`), which this runner loads with any number of processes.

    Raises:
        ValueError: An option is unknown.
    """

    mesh: DeviceMesh | None = None
    """Set once the model is sharded."""
    _folder: Path | None = None
    """Sharded checkpoint that is being read or written."""
    _scalars: frozenset = frozenset()
    """Names of scalars in state dicts, and their indices in the optimizer's."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Moves the model to the device; it is sharded when the training starts."""
        self._options = {'checkpoints': 'full', **(self.cfg.get('fsdp2') or {})}
        if unknown := set(self._options) - _OPTIONS:
            raise ValueError(f'fsdp2 has the options {sorted(_OPTIONS)}, not {sorted(unknown)}')
        files = self._options.pop('checkpoints')
        if files not in ('full', 'sharded'):
            raise ValueError(f"fsdp2.checkpoints must be 'full' or 'sharded', not {files!r}")
        self._writes_folders = files == 'sharded'
        if not self.distributed:
            return super().wrap_model(model_wrapper_cfg, model)
        device = get_device()
        if device == 'cpu':
            model = revert_sync_batchnorm(model)
        elif self.cfg.get('sync_bn'):
            model = convert_sync_batchnorm(model, self.cfg.sync_bn)
        return model.to(device)

    def train(self) -> nn.Module:
        """Shards the model with its initial weights, and trains."""
        if self.distributed and self.mesh is None:
            self._init_model_weights()
            names = _make_scalars_vectors(self.model)
            self._scalars = frozenset(names | {f'module.{name}' for name in names})  # EMA's
            self.mesh = init_device_mesh(get_device(), (get_world_size(),))
            for module in self.model.modules():
                module.register_load_state_dict_pre_hook(_share_weights)
            skeleton = _skeleton(self.model)
            shard(self.model, self.mesh, **self._options)
            _allow_copies(self.model, skeleton)
        return super().train()

    def _init_model_weights(self) -> None:
        if self.mesh is None:
            super()._init_model_weights()

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Builds the optimizer wrapper, which can load whole and sharded states."""
        built = super().build_optim_wrapper(optim_wrapper)
        if self.mesh is not None and built is not optim_wrapper:
            optimizer = built.optimizer
            optimizer.register_load_state_dict_pre_hook(_share_optimizer_state)
            names = {id(p): name for name, p in self.model.named_parameters()}
            parameters = [p for group in optimizer.param_groups for p in group['params']]
            self._scalars |= {i for i, p in enumerate(parameters) if names[id(p)] in self._scalars}
        return built

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Calls the hooks, and prepares what they get or have left."""
        if fn_name == 'after_load_checkpoint' and self._folder:
            checkpoint = kwargs['checkpoint']
            checkpoint.update(sharded.fill(checkpoint, self._folder, self.mesh))
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
        if self._writes_folders:
            self._folder, filename = part, f'{part.name}/{sharded.REST}'
            if is_main_process():
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            barrier()
        try:
            if is_main_process():
                super().save_checkpoint(
                    out_dir, filename, file_client_args, save_optimizer, **kwargs
                )
                if self._folder:
                    shutil.rmtree(target, ignore_errors=True)
                    part.rename(target)
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
