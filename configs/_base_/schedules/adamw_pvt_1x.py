# mmdet's 1x schedule with the optimizer of PVT, which HAT-Net's authors follow.
_base_ = ['mmdet::_base_/schedules/schedule_1x.py']
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4))
