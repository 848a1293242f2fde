# imagenet_384-squash at 512 pixels: tested on whole images squeezed into squares.
_base_ = ['./imagenet_384-squash.py']
train_pipeline = [
    dict(step, scale=512) if 'scale' in step else step for step in _base_.train_pipeline
]
test_pipeline = [
    dict(step, scale=512) if 'scale' in step else step for step in _base_.test_pipeline
]
train_dataloader = dict(batch_size=16, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
