_base_ = [
    '../_base_/recipes/mask-rcnn_fpn_swin-1x_coco.py',
    '../_base_/backbones/swin-hat-tiny.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
