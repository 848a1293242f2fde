"""Command lines, flags and errors of the tools, without training anything."""

import functools
import importlib
import json
import logging
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from mmengine.registry import RUNNERS

from hat_mm import FasterViT
from hat_mm.engine import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(capsys):
    """Run a tool in this process; returns exit status and what it wrote to stderr."""

    def run(function, *argv):
        status = cli.run_tool(lambda: function([str(a) for a in argv]), f'{function.__name__}.py')
        return status, capsys.readouterr().err

    return run


def assert_one_line(status, stderr, *parts, name='train.py', expected=1):
    lines = [line for line in stderr.splitlines() if line.startswith(f'{name}: error: ')]
    assert status == expected
    assert len(lines) == 1, stderr
    assert 'Traceback' not in stderr
    for part in parts:
        assert part in lines[0]


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('parser', 'argv'),
    [
        (cli.train_parser, ['c.py', '--cfg-options', 'novalue']),
        (cli.train_parser, ['c.py', '--cfg-options', '=1']),
        (cli.train_parser, ['c.py', '--launcher', 'ray']),
        (cli.train_parser, ['c.py', '--work-dri', 'x']),
        (cli.train_parser, []),
        (cli.test_parser, ['c.py']),
        (cli.test_parser, ['c.py', 'a.pth', '--out-item', 'boxes']),
    ],
)
def test_wrong_command_lines_exit_with_2(parser, argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(argv)
    assert caught.value.code == 2
    assert 'error:' in capsys.readouterr().err


def test_command_line_of_train():
    parse = cli.train_parser().parse_args
    args = parse(
        ['c.py', '--work-dir', 'w', '--amp', '--auto-scale-lr', '--resume', 'a.pth',
         '--launcher', 'slurm', '--cfg-options', 'a.b=1', 'c=[1,2]', 'd=(x,y)', 'e=f=g']
    )  # fmt: skip
    assert (args.work_dir, args.amp, args.auto_scale_lr, args.resume) == ('w', True, True, 'a.pth')
    assert args.cfg_options == {'a.b': 1, 'c': [1, 2], 'd': ('x', 'y'), 'e': 'f=g'}
    assert parse(['c.py', '--resume']).resume == 'auto'
    assert parse(['c.py']).resume is None
    for flag in ('--local_rank', '--local-rank'):
        assert parse(['c.py', f'{flag}=3']).local_rank == 3


def test_command_line_of_test():
    args = cli.test_parser().parse_args(
        ['c.py', 'a.pth', '--out', 'o.pkl', '--show', '--show-dir', 's', '--wait-time', '0.5',
         '--tta', '--launcher', 'pytorch', '--local-rank', '1']
    )  # fmt: skip
    assert (args.config, args.checkpoint, args.out) == ('c.py', 'a.pth', 'o.pkl')
    assert (args.show, args.show_dir, args.wait_time, args.tta) == (True, 's', 0.5, True)
    assert (args.launcher, args.local_rank) == ('pytorch', 1)


def test_scripts_end_with_the_status_of_their_tool(run_python):
    done = run_python('tools/train.py', 'no_such_config.py')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1:] == [
        "train.py: error: config file 'no_such_config.py' does not exist"
    ]
    assert 'Traceback' not in done.stderr


# --- errors before anything is built --------------------------------------------------------------


@pytest.mark.parametrize(
    ('text', 'parts'),
    [
        ('a = (', ['cannot be read', 'was never closed']),
        ("_base_ = ['missing.py']", ['cannot be read', 'missing.py']),
        ("_base_ = ['mmdet::_base_/models/missing.py']", ['cannot be read', 'missing.py']),
        ("default_scope = 'mmdet'", ["has no 'model'"]),
        ("model = dict(type='FasterRCNN')", ["has no 'default_scope'"]),
        ("model = dict(); default_scope = 'mmnowhere'", ['mmnowhere is not installed']),
    ],
)
def test_configs_that_cannot_be_used(text, parts, tool, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(text + '\n')
    status, stderr = tool(cli.train, config, '--work-dir', tmp_path / 'w')
    assert_one_line(status, stderr, *parts)
    assert not (tmp_path / 'w').exists()


def test_missing_toolbox_of_a_config(tool, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmseg', None)
    config = tmp_path / 'config.py'
    config.write_text("model = dict(type='EncoderDecoder')\ndefault_scope = 'mmseg'\n")
    status, stderr = tool(cli.train, config, '--work-dir', tmp_path / 'w')
    assert_one_line(status, stderr, 'mmseg is not installed', "pip install 'hat_mm[seg]'")


def test_errors_in_the_code_of_a_config_and_of_a_tool_keep_their_traceback(tool, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text('a = undefined\n')
    with pytest.raises(NameError, match='undefined'):
        tool(cli.train, config)

    def buggy(_):
        raise OSError('a bug')

    with pytest.raises(OSError, match='a bug'):
        tool(buggy)


@pytest.mark.parametrize('where', ['file', 'file/below', '/proc/hat_mm'])
def test_work_dirs_that_cannot_be_written(where, run, tool, tmp_path):
    (tmp_path / 'file').write_text('')
    status, stderr = tool(cli.train, run.config(), '--work-dir', tmp_path / where)
    assert_one_line(status, stderr, 'cannot write to work dir', where)
    assert (tmp_path / 'file').read_text() == ''


# --- what the runner is told ----------------------------------------------------------------------

CONFIG = """
default_scope = {scope!r}
runner_type = 'RecordingRunner'
model = dict(type='Model')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
auto_scale_lr = dict(enable=False, base_batch_size=16)
train_dataloader = dict(
    batch_size=8, num_workers=0, pin_memory=False, collate_fn=dict(type='mine'),
    dataset=dict(type='Twice', dataset=dict(data_root='no/such/folder')),
)
test_dataloader = dict(
    num_workers=2,
    dataset=dict(pipeline=[dict(type='Load'), dict(type='Pack', key=1)]),
)
test_evaluator = dict(type='Metric')
default_hooks = dict(visualization=dict(type='Hook'))
visualizer = dict(type='Visualizer')
{more}
"""


@RUNNERS.register_module()
class RecordingRunner:
    """Keeps its config, and calls a function instead of running."""

    built: list = []
    make_model = functools.partial(torch.nn.Conv2d, 1, 1, 1)
    world_size = 1
    running = staticmethod(lambda: {'accuracy': 0.5})

    def __init__(self, cfg):
        self.cfg = cfg
        self.hooks = []
        self.logger = logging.getLogger('recording')
        self.model = self.make_model()
        self.test_evaluator = types.SimpleNamespace(metrics=[])
        self.register_hook = self.hooks.append
        self.built.append(self)

    from_cfg = classmethod(lambda cls, cfg: cls(cfg))

    def train(self):
        self.running()

    def test(self):
        return self.running()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a tool with a config of a toolbox; returns the runner that it has built."""
    monkeypatch.setattr(RecordingRunner, 'built', [])
    checkpoint = tmp_path / 'a.pth'
    checkpoint.write_bytes(b'')

    def config(scope='mmdet', more=''):
        path = tmp_path / f'{scope}.py'
        path.write_text(CONFIG.format(scope=scope, more=more))
        return path

    def run(tool, *argv, **settings):
        given = [checkpoint] if tool is cli.test else []
        argv = [config(**settings), *given, '--work-dir', tmp_path / 'work', *argv]
        tool([str(word) for word in argv])
        [runner] = RecordingRunner.built
        return runner

    run.config = config
    return run


@pytest.mark.parametrize(
    'option', ['model.type.deeper=1', 'test_dataloader.dataset.pipeline.9.a=1']
)
def test_options_that_do_not_fit(option, run, tool, tmp_path):
    status, stderr = tool(cli.train, run.config(), '--work-dir', tmp_path, '--cfg-options', option)
    assert_one_line(status, stderr, '--cfg-options do not fit', expected=2)


def test_options_and_work_dir_reach_the_runner(run, tmp_path):
    cfg = run(cli.train, '--cfg-options', 'model.depth=3', 'model.size=(1,2)').cfg
    assert cfg.model == dict(type='Model', depth=3, size=(1, 2))
    assert cfg.work_dir == str(tmp_path / 'work')
    assert cfg.launcher == 'none'


def test_the_work_dir_is_named_after_the_config(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.train([str(run.config())])
    assert RecordingRunner.built[0].cfg.work_dir == './work_dirs/mmdet'


def test_resume(run, tmp_path):
    assert run(cli.train, '--resume').cfg.resume is True
    assert RecordingRunner.built.pop().cfg.load_from is None
    cfg = run(cli.train, '--resume', tmp_path / 'a.pth').cfg
    assert (cfg.resume, cfg.load_from) == (True, str(tmp_path / 'a.pth'))


def test_missing_checkpoint(run, tool, tmp_path):
    missing = tmp_path / 'no.pth'
    result = tool(cli.test, run.config(), missing, '--work-dir', tmp_path)
    assert_one_line(*result, f"checkpoint '{missing}' does not exist", name='test.py')
    for words in (['--resume', missing], ['--cfg-options', f'load_from={missing}']):
        result = tool(cli.train, run.config(), '--work-dir', tmp_path, *words)
        assert_one_line(*result, f"checkpoint '{missing}' does not exist")
    assert RecordingRunner.built == []


def test_amp(run, monkeypatch):
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cpu')
    with pytest.raises(cli.UserError, match='--amp needs a GPU'):
        run(cli.train, '--amp')
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cuda')
    wrapper = run(cli.train, '--amp').cfg.optim_wrapper
    assert (wrapper.type, wrapper.loss_scale) == ('AmpOptimWrapper', 'dynamic')
    with pytest.raises(cli.UserError, match="but the config has 'Other'"):
        run(cli.train, '--amp', '--cfg-options', 'optim_wrapper.type=Other')


def test_scaling_of_the_learning_rate(run):
    assert run(cli.train, '--auto-scale-lr').cfg.auto_scale_lr.enable is True
    with pytest.raises(cli.UserError, match='--auto-scale-lr needs auto_scale_lr='):
        run(cli.train, '--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None')
    # mmengine's scaling would count the images of one forward pass only.
    with pytest.raises(cli.UserError, match=r'does not count optim_wrapper.accumulative_counts=4'):
        run(cli.train, '--auto-scale-lr', '--cfg-options', 'optim_wrapper.accumulative_counts=4')


@pytest.mark.parametrize(
    ('option', 'processes', 'told'),
    [
        ('a=1', 2, None),
        ('a=1', 1, 'this run takes 8 (1 process(es) x 8 images x 1 accumulated)'),
        ('optim_wrapper.accumulative_counts=2', 1, None),
        ('optim_wrapper.accumulative_counts=3', 2, 'this run takes 48 (2 process(es) x 8 images'),
        ('auto_scale_lr.enable=True', 1, None),
        ('auto_scale_lr=None', 1, None),
        ('train_dataloader=None', 1, None),  # mmengine says what is missing
        ('optim_wrapper=None', 1, 'this run takes 8'),
    ],
)
def test_which_batches_are_warned_of(option, processes, told, run, monkeypatch, caplog):
    monkeypatch.setattr(RecordingRunner, 'world_size', processes)
    run(cli.train, '--cfg-options', option)
    warnings = [r.getMessage() for r in caplog.records if r.name == 'recording']
    assert len(warnings) == (told is not None)
    assert all(told in warning for warning in warnings)


def test_the_log_names_the_software(run, caplog):
    caplog.set_level(logging.INFO)
    run(cli.train)
    [line] = [r.getMessage() for r in caplog.records if 'Software' in r.getMessage()]
    assert re.fullmatch(r'Software: hat_mm \S+, mmcv \S+, mmdet \S+', line)


def test_a_missing_data_folder_is_named_where_a_file_is_not_found(run, monkeypatch):
    def running():
        Path('no/such/folder/a.json').read_text()

    monkeypatch.setattr(RecordingRunner, 'running', staticmethod(running))
    with pytest.raises(cli.UserError, match=r"data folder 'no/such/folder' does not exist .*docs/"):
        run(cli.train)
    with pytest.raises(FileNotFoundError):  # its data sets have no folder
        run(cli.test)


def test_loader_defaults_of_mmpretrain_leave_what_is_set(run):
    cfg = run(cli.train, scope='mmpretrain').cfg
    assert cfg.test_dataloader.collate_fn == dict(type='default_collate')
    assert cfg.test_dataloader.persistent_workers is True
    assert cfg.train_dataloader.persistent_workers is False
    assert cfg.train_dataloader.pin_memory is False
    assert cfg.train_dataloader.collate_fn == dict(type='mine')


@pytest.mark.parametrize(
    ('scope', 'hook', 'save_dir'),
    [
        ('mmdet', dict(draw=True, show=True, wait_time=1.0, test_out_dir='s'), None),
        ('mmseg', dict(draw=True, show=True, wait_time=1.0), 's'),
        ('mmpretrain', dict(enable=True, show=True, wait_time=1.0, out_dir='s'), None),
    ],
)
def test_show(scope, hook, save_dir, run):
    cfg = run(cli.test, '--show', '--show-dir', 's', '--wait-time', '1', scope=scope).cfg
    assert cfg.default_hooks.visualization == dict(type='Hook', **hook)
    assert cfg.visualizer.get('save_dir') == save_dir


def test_show_needs_a_hook(run):
    with pytest.raises(cli.UserError, match='visualization hook'):
        run(cli.test, '--show', more='default_hooks = dict()')


@pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain'])
def test_default_tta_flips(scope, run):
    cfg = run(cli.test, '--tta', scope=scope).cfg
    assert cfg.model.type == cli.TOOLBOXES[scope].tta_model['type']
    assert cfg.model.module == dict(type='Model')
    *rest, tta = cfg.test_dataloader.dataset.pipeline
    assert rest == [dict(type='Load')]
    flips, [pack] = tta['transforms']
    assert [flip['prob'] for flip in flips] == [1.0, 0.0]
    assert pack['type'] == ('PackDetInputs' if scope == 'mmdet' else 'Pack')


def test_tta_of_the_config_comes_first(run):
    more = "tta_model = dict(type='Mine'); tta_pipeline = [dict(type='MyPipeline')]"
    cfg = run(cli.test, '--tta', scope='mmseg', more=more).cfg
    assert cfg.model == dict(type='Mine', module=dict(type='Model'))
    assert cfg.test_dataloader.dataset.pipeline == [dict(type='MyPipeline')]


@pytest.mark.parametrize('more', ['', "tta_model = dict(type='Mine')"])
def test_mmseg_has_no_default_tta(more, run):
    with pytest.raises(cli.UserError, match='--tta needs'):
        run(cli.test, '--tta', scope='mmseg', more=more)


def test_out(run, tool, tmp_path):
    out = str(tmp_path / 'maps')
    cfg = run(cli.test, '--out', out, scope='mmseg').cfg
    assert cfg.test_evaluator == dict(type='Metric', output_dir=out, keep_results=True)
    RecordingRunner.built.clear()
    [dump] = run(cli.test, '--out', tmp_path / 'folder/out.pkl').test_evaluator.metrics
    assert dump.out_file_path == str(tmp_path / 'folder/out.pkl')
    RecordingRunner.built.clear()
    out = tmp_path / 'metrics.json'
    runner = run(cli.test, '--out', out, '--out-item', 'metrics', scope='mmpretrain')
    assert runner.test_evaluator.metrics == []
    assert json.loads(out.read_text()) == {'accuracy': 0.5}
    with pytest.raises(cli.UserError, match=r'must end with \.json, .*for metrics'):
        run(cli.test, '--out', tmp_path / 'maps', '--out-item', 'metrics', scope='mmseg')
    result = tool(
        cli.test, run.config(), tmp_path / 'a.pth', '--work-dir', tmp_path, '--out', 'out.json'
    )
    part = "must end with .pkl or .pickle, got 'out.json'"
    assert_one_line(*result, part, name='test.py', expected=2)


def test_deploy(run, monkeypatch):
    with pytest.raises(cli.UserError, match='--deploy: the model has no backbone'):
        run(cli.test, '--deploy')
    RecordingRunner.built.clear()
    tiny = dict(
        embed_dims=16, stem_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4), window_size=2,
        carriers=(2,),
    )  # fmt: skip
    monkeypatch.setattr(RecordingRunner, 'make_model', functools.partial(FasterViT, tiny))
    more = "custom_hooks = [dict(type='EMAHook'), dict(type='Other')]"
    runner = run(cli.test, '--deploy', more=more)
    assert [type(hook).__name__ for hook in runner.hooks] == ['SwitchToDeployHook']
    assert [hook.type for hook in runner.cfg.custom_hooks] == ['Other']


def test_deploy_needs_a_model_that_is_built(run, monkeypatch):
    monkeypatch.setattr(RecordingRunner, 'make_model', dict)  # FlexibleRunner has its config
    with pytest.raises(cli.UserError, match='--deploy does not work with RecordingRunner'):
        run(cli.test, '--deploy')


@pytest.mark.parametrize(
    ('tool', 'arguments'),
    [
        ('get_flops', ['a.py']),
        ('padding_effect', ['a.py', 'a.pth']),
        ('plugin_study', []),
        ('merge_lora', ['a.py', 'a.pth', 'b.pth']),
        ('shapes_demo', []),
        ('whole_and_tiles', ['a.py', 'a.pth']),
    ],
)
def test_an_option_without_a_value(tool, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(tool).parse_args([*arguments, '--cfg-options', 'foo'])
    assert caught.value.code == 2
    assert "expected KEY=VALUE, got 'foo'" in capsys.readouterr().err


# --- launchers ------------------------------------------------------------------------------------


@pytest.fixture
def launch(tmp_path):
    """Run a launcher with stand-ins for python and srun that print how they were called."""
    for name in ('python', 'srun'):
        program = tmp_path / name
        program.write_text('#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@"\n')
        program.chmod(0o755)

    def run(script, *arguments, **environment):
        done = subprocess.run(
            [str(ROOT / 'tools' / script), *arguments],
            env={'PATH': f'{tmp_path}:{os.environ["PATH"]}', **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


def test_dist_scripts(launch):
    environment = dict(NNODES='2', NODE_RANK='1', PORT='1234', MASTER_ADDR='10.0.0.1')
    status, called, _ = launch('dist_train.sh', 'c.py', '8', '--amp', 'a b', **environment)
    assert status == 0
    assert called[:3] == ['python', '-m', 'torch.distributed.run']
    assert {'--nnodes=2', '--node_rank=1', '--master_port=1234', '--master_addr=10.0.0.1',
            '--nproc_per_node=8'} <= set(called)  # fmt: skip
    assert called[-5:] == ['c.py', '--launcher', 'pytorch', '--amp', 'a b']
    assert called[-6].endswith('tools/train.py')
    status, called, _ = launch('dist_test.sh', 'c.py', 'a.pth', '2', '--tta')
    assert called[-5:] == ['c.py', 'a.pth', '--launcher', 'pytorch', '--tta']
    assert '--nnodes=1' in called
    assert '--nproc_per_node=2' in called


def test_slurm_scripts(launch):
    environment = dict(GPUS='16', GPUS_PER_NODE='4', CPUS_PER_TASK='3', SRUN_ARGS='-x bad --qos=q')
    status, called, _ = launch('slurm_train.sh', 'part', 'job', 'c.py', 'w', '--amp', **environment)
    assert status == 0
    assert called[:3] == ['srun', '-p', 'part']
    assert {'--job-name=job', '--gres=gpu:4', '--ntasks=16', '--ntasks-per-node=4',
            '--cpus-per-task=3', '-x', 'bad', '--qos=q'} <= set(called)  # fmt: skip
    assert called[-4:] == ['c.py', '--work-dir=w', '--launcher=slurm', '--amp']
    status, called, _ = launch('slurm_test.sh', 'part', 'job', 'c.py', 'a.pth', '--out', 'o.pkl')
    assert called[-5:] == ['c.py', 'a.pth', '--launcher=slurm', '--out', 'o.pkl']


@pytest.mark.parametrize(
    'script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh']
)
def test_launchers_without_arguments_say_how(script, launch):
    status, _, stderr = launch(script, 'c.py')
    assert status == 2
    assert 'usage:' in stderr
