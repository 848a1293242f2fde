# mmseg's Mask2Former without its ResNet, on crops as large as the images of Cityscapes: a leaf adds
# the backbone and the head's inputs. Drop path and weight decay of the backbone are those with
# Swin, all else is mmseg's. 16 GPUs with one image each.
_base_ = [
    'mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py',
    '../schedules/mask2former_decay.py',
]
crop_size = (1024, 2048)
data_preprocessor = dict(size=crop_size)
model = dict(data_preprocessor=data_preprocessor, backbone=dict(_delete_=True, drop_path_rate=0.3))
train_pipeline = [
    dict(step, crop_size=crop_size) if step['type'] == 'RandomCrop' else step
    for step in _base_.train_pipeline
]
train_dataloader = dict(batch_size=1, dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.undecayed))
