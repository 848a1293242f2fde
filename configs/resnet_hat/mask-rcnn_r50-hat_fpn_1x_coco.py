_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    '../_base_/backbones/r50-hat.py',
]
model = dict(backbone=_base_.backbone)
