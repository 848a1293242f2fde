_base_ = [
    '../_base_/recipes/retinanet_fpn_1x_coco.py',
    '../_base_/backbones/fastervit-2.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels[1:]))
