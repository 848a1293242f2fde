_base_ = [
    '../_base_/recipes/mask-rcnn_fpn_sample1e-3_ms-1x_lvis-v1.py',
    '../_base_/backbones/fastervit-4-21k-384.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
