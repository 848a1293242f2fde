# mmpretrain's ImageNet-1K for Swin: tested on the middle 87.5 % of a side, batches of 128.
_base_ = ['mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py']
train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = val_dataloader
