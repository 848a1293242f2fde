_base_ = [
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    '../_base_/backbones/r50-hat.py',
]
model = dict(backbone=_base_.backbone)
