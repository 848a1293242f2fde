# imagenet_384-squash at 768 pixels: tested on the middle of images squeezed into squares of 825.
_base_ = ['./imagenet_384-squash.py']
train_pipeline = [
    dict(step, scale=768) if 'scale' in step else step for step in _base_.train_pipeline
]
test_pipeline = [
    dict(step, scale=825) if 'scale' in step else step for step in _base_.test_pipeline
]
test_pipeline.insert(-1, dict(type='CenterCrop', crop_size=768))
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
