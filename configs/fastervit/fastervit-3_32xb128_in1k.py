_base_ = [
    '../_base_/recipes/fastervit_32xb128_in1k.py',
    '../_base_/datasets/imagenet_224-full.py',
    '../_base_/backbones/fastervit-3.py',
]
model = dict(
    backbone=dict(_base_.backbone, init_cfg=None),
    head=dict(in_channels=_base_.channels[-1]),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.075))
warm_up, decay = _base_.param_scheduler
param_scheduler = [dict(warm_up, end=35), dict(decay, begin=35)]
