"""Trainings of a small model in several processes; test_engine/test_fsdp2.py looks at their files.

torchrun --nproc_per_node N fsdp2_worker.py FOLDER RUN...
"""

import json
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, RUNNERS
from torch import nn
from torch.utils.data import Dataset

import hat_mm

ARCH = dict(embed_dims=8, stem_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 4), window_size=2)
STEPS = 6


@DATASETS.register_module(name='FSDP2Pictures')
class Pictures(Dataset):
    """Pictures of noise; an odd number, so that processes validate different numbers of them."""

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> dict:
        picture = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index))
        return dict(inputs=picture, data_samples=float(index))


class Layer(nn.Module):
    """A layer with a scalar, as heads of FCOS have."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dims, dims)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.linear(x).relu()


@MODELS.register_module(name='FSDP2Net')
class Net(BaseModel):
    """A backbone and a head with a loss; predictions of one process leave out its layers."""

    def __init__(self, **backbone) -> None:
        super().__init__()
        self.backbone = hat_mm.FasterViT(arch=ARCH, out_indices=(3,), **backbone)
        self.layers = nn.ModuleList(Layer(64) for _ in range(2))
        self.head = nn.Linear(64, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        x = self.backbone(torch.stack(inputs))[-1].mean((2, 3))
        if mode != 'predict' or get_rank() == 0:
            for layer in self.layers:
                x = layer(x)
        x = self.head(x)[:, 0]
        if mode == 'loss':
            return dict(loss=(x - torch.tensor(data_samples) / 10).square().mean())
        return list(x)


@METRICS.register_module(name='FSDP2Mean')
class Mean(BaseMetric):
    """The mean prediction, and how many there are."""

    def process(self, data_batch, data_samples):
        self.results += [float(x) for x in data_samples]

    def compute_metrics(self, results):
        return dict(mean=sum(results) / len(results), count=len(results))


@HOOKS.register_module(name='FSDP2Watch')
class Watch(Hook):
    """Writes what this process sees: losses, and the bytes that it holds."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.losses: list[float] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(float(outputs['loss']))

    def after_val_epoch(self, runner, metrics=None):
        runner.message_hub.update_info('metrics', metrics)

    def before_train(self, runner):
        def weigh(optimizer, *_):
            self.gradients = held(p.grad for p in runner.model.parameters())

        runner.optim_wrapper.optimizer.register_step_pre_hook(weigh)

    def after_train(self, runner):
        parameters = dict(runner.model.named_parameters())
        states = runner.optim_wrapper.optimizer.state.values()
        found = dict(
            losses=self.losses,
            parameters=held(parameters.values()),
            gradients=self.gradients,
            states=held(x for state in states for name, x in state.items() if name != 'step'),
            metrics=runner.message_hub.runtime_info.get('metrics'),
        )
        path = self.folder / f'rank{get_rank()}.json'
        path.write_text(json.dumps(found), encoding='utf-8')
        parts = {name: local(parameter).detach() for name, parameter in parameters.items()}
        torch.save(parts, path.with_suffix('.pt'))


def local(tensor):
    """The part of a tensor that is in this process."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def held(tensors) -> int:
    """Bytes of the parts of tensors that are in this process."""
    return sum(local(x).nbytes for x in tensors if x is not None)


def make(folder: Path, runner_type: str, **changes) -> Config:
    data = dict(
        batch_size=2, num_workers=0, dataset=dict(type='FSDP2Pictures'),
        sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
        collate_fn=dict(type='pseudo_collate'),
    )  # fmt: skip
    cfg = dict(
        default_scope='mmengine',
        runner_type=runner_type,
        fsdp2=dict(min_params=1000),
        model=dict(type='FSDP2Net', drop_path_rate=0.0, frozen_stages=0),
        train_dataloader=data | dict(sampler=dict(type='InfiniteSampler')),
        val_dataloader=data,
        train_cfg=dict(by_epoch=False, max_iters=STEPS, val_interval=STEPS),
        val_cfg=dict(),
        val_evaluator=dict(type='FSDP2Mean'),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=1e-3),
            clip_grad=dict(max_norm=1.0),
            constructor='hat_mm.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.8),
        ),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=STEPS),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=3, by_epoch=False)),
        custom_hooks=[
            dict(type='EMAHook', momentum=0.1),
            dict(type='FSDP2Watch', folder=str(folder)),
        ],
        randomness=dict(seed=0),
        launcher='pytorch',
        work_dir=str(folder),
    )  # fmt: skip
    cfg = Config(cfg)
    cfg.merge_from_dict(changes)
    return cfg


def main(root: Path, *names: str) -> None:
    """Runs trainings one after the other."""
    ddp, fsdp2 = 'hat_mm.ExactResumeRunner', 'hat_mm.FSDP2Runner'
    folders = {'fsdp2.checkpoints': 'sharded'}
    bf16 = {'fsdp2.mixed_precision': dict(param_dtype='bfloat16', reduce_dtype='float32')}
    runs = {
        'ddp': (ddp, {}),
        'full': (fsdp2, {}),
        'sharded': (fsdp2, folders),
        'with_cp': (fsdp2, {'model.with_cp': True}),
        'bf16': (fsdp2, bf16),
        'full_resumed': (fsdp2, dict(resume=True, load_from=str(root / 'full/iter_3.pth'))),
        'sharded_resumed': (
            fsdp2, dict(resume=True, load_from=str(root / 'sharded/iter_3.pth'), **folders)
        ),
        'from_ddp': (fsdp2, dict(resume=True, load_from=str(root / 'ddp/iter_3.pth'))),
        'to_ddp': (ddp, dict(resume=True, load_from=str(root / 'full/iter_3.pth'))),
    }  # fmt: skip
    for name in names:
        runner, changes = runs[name]
        (root / name).mkdir(exist_ok=True)
        RUNNERS.build(make(root / name, runner, **changes)).train()


if __name__ == '__main__':
    main(Path(sys.argv[1]), *sys.argv[2:])
