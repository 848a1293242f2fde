_base_ = [
    '../_base_/recipes/upernet_8xb1-160k_cityscapes-1024x2048.py',
    '../_base_/backbones/swin-hat-small.py',
]
model = dict(
    backbone=_base_.backbone,
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.channels[2]),
)
