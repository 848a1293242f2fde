_base_ = [
    '../_base_/recipes/faster-rcnn_fpn_relation.py',
    '../_base_/backbones/resnet-hmhsa-toy.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
