_base_ = [
    '../_base_/recipes/mask-rcnn_fpn_sample1e-3_ms-1x_lvis-v1.py',
    '../_base_/backbones/swin-hat-small.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
