_base_ = [
    '../_base_/recipes/upernet_swin-8xb2-160k_ade20k-512x512.py',
    '../_base_/backbones/swin-hat-base.py',
]
model = dict(
    backbone=_base_.backbone,
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.channels[2]),
)
