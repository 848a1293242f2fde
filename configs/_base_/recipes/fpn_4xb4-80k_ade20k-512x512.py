# mmseg's Semantic FPN, without its ResNet: a leaf adds the backbone and the neck's inputs.
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../schedules/adamw_pvt_80k.py',
    'mmseg::_base_/default_runtime.py',
]
data_preprocessor = dict(size=_base_.crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained=None,
    backbone=dict(_delete_=True),
    decode_head=dict(num_classes=150),
)
