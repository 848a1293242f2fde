# mmdet's Cascade Mask R-CNN with ResNet-50, trained on images of several scales: a leaf adds to its
# backbone. mmdet's config of this name measures boxes alone; here masks are measured, too.
_base_ = ['mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_ms-3x_coco.py']
val_evaluator = dict(metric=['bbox', 'segm'])
test_evaluator = val_evaluator
