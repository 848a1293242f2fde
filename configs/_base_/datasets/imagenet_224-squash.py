# imagenet_384-squash at 224 pixels: tested on the middle of images squeezed into squares of 235.
_base_ = ['./imagenet_384-squash.py']
train_pipeline = [
    dict(step, scale=224) if 'scale' in step else step for step in _base_.train_pipeline
]
test_pipeline = [
    dict(step, scale=235) if 'scale' in step else step for step in _base_.test_pipeline
]
test_pipeline.insert(-1, dict(type='CenterCrop', crop_size=224))
train_dataloader = dict(batch_size=128, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
