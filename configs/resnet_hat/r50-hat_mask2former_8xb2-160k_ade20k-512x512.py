_base_ = [
    'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
    '../_base_/backbones/r50-hat.py',
]
model = dict(backbone=_base_.backbone)
