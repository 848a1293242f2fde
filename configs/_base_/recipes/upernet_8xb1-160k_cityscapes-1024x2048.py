# mmseg's UPerNet without its ResNet, on crops as large as the images of Cityscapes: a leaf adds the
# backbone and the heads' inputs. 8 GPUs with one image each.
_base_ = [
    'mmseg::_base_/models/upernet_r50.py',
    'mmseg::_base_/datasets/cityscapes.py',
    '../schedules/adamw_160k.py',
    'mmseg::_base_/default_runtime.py',
]
crop_size = (1024, 2048)
data_preprocessor = dict(size=crop_size)
model = dict(data_preprocessor=data_preprocessor, pretrained=None, backbone=dict(_delete_=True))
train_pipeline = [
    dict(step, crop_size=crop_size) if step['type'] == 'RandomCrop' else step
    for step in _base_.train_pipeline
]
train_dataloader = dict(batch_size=1, dataset=dict(pipeline=train_pipeline))
auto_scale_lr = dict(base_batch_size=8)
