_base_ = [
    '../_base_/recipes/cascade-mask-rcnn_fpn_shapes.py',
    '../_base_/backbones/fastervit-tiny.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
