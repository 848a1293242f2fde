# mmdet's DINO on strides 8, 16 and 32 and one more level, without its ResNet: a leaf adds the
# backbone and the neck's inputs. Optimizer, images and schedule are mmdet's.
_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py']
model = dict(backbone=dict(_delete_=True, out_indices=(1, 2, 3), drop_path_rate=0.1))
auto_scale_lr = dict(enable=False)
