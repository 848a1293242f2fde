# UPerNet on crops of 512 pixels, 8 GPUs with 2 images each.
_base_ = ['./upernet_160k_ade20k.py', 'mmseg::_base_/datasets/ade20k.py']
data_preprocessor = dict(size=_base_.crop_size)
model = dict(data_preprocessor=data_preprocessor)
train_dataloader = dict(batch_size=2)
