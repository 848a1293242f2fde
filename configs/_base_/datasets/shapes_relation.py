# The set that `python demo/shapes.py --relation` draws: a marker at the other end of the
# image alone tells whether a shape is of class -a or -b.
_base_ = ['mmdet::_base_/datasets/coco_detection.py']
data_root = 'data/shapes-relation/'
metainfo = dict(
    classes=('circle-a', 'square-a', 'triangle-a', 'circle-b', 'square-b', 'triangle-b'),
    palette=[
        *((220, 20, 60), (0, 160, 80), (30, 80, 230)),
        *((250, 150, 160), (140, 220, 170), (150, 180, 250)),
    ],
)
# All images are of one size, that of the tests' Resize. A mirror image keeps the relation.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(384, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
# Loaded by the training process itself, which so needs one core.
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(_delete_=True, type='InfiniteSampler'),
    batch_sampler=None,
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/'),
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
# Beside the mean average precision the recall of boxes whatever their class.
val_evaluator = dict(ann_file=data_root + 'annotations/val.json', metric=['bbox', 'proposal'])
test_evaluator = val_evaluator
