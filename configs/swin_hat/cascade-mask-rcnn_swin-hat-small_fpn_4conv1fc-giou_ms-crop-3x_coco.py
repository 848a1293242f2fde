_base_ = [
    '../_base_/recipes/cascade-mask-rcnn_fpn_4conv1fc-giou_swin-ms-crop-3x_coco.py',
    '../_base_/backbones/swin-hat-small.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
