_base_ = [
    '../_base_/recipes/fpn_4xb4-80k_ade20k-512x512.py',
    '../_base_/backbones/fastervit-1.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
