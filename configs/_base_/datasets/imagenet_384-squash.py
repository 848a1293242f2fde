# mmpretrain's ImageNet-1K for Swin at 384 pixels: tested on whole images squeezed into squares.
_base_ = ['mmpretrain::_base_/datasets/imagenet_bs64_swin_384.py']
train_dataloader = dict(batch_size=32)
val_dataloader = dict(batch_size=32)
test_dataloader = val_dataloader
