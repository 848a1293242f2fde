_base_ = [
    '../_base_/recipes/hat-net_8xb128_in1k.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/backbones/hat-net-medium.py',
]
model = dict(
    backbone=dict(_base_.backbone, init_cfg=None),
    head=dict(in_channels=_base_.channels[-1]),
)
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
