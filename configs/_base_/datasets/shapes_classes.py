# The toy set that `python demo/shapes.py --layout classes` draws: one shape an image.
_base_ = ['mmpretrain::_base_/datasets/imagenet_bs32.py']
dataset_type = 'CustomDataset'
data_root = 'data/shapes-classes/'
metainfo = dict(classes=('circle', 'square', 'triangle'))
data_preprocessor = dict(num_classes=len(metainfo['classes']))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128)),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root=data_root + 'train',
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root=data_root + 'val',
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = [val_evaluator, dict(type='ConfusionMatrix')]
