_base_ = [
    '../_base_/recipes/faster-rcnn_fpn_relation.py',
    '../_base_/backbones/fastervit-carrier-bias-toy.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
