_base_ = [
    '../_base_/recipes/fastervit_32xb128_in1k.py',
    '../_base_/datasets/imagenet_224-full.py',
    '../_base_/backbones/fastervit-5.py',
]
model = dict(
    backbone=dict(_base_.backbone, init_cfg=None),
    head=dict(in_channels=_base_.channels[-1]),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='Lamb', lr=5e-3, weight_decay=0.12, max_grad_norm=5.0)
)
