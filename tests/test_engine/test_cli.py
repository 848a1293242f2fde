"""Command lines, flags and errors of the tools, without training anything."""

import multiprocessing
import os
import stat
import subprocess
from pathlib import Path

import pytest
from mmengine.config import Config

from hat_mm import compat
from hat_mm.engine import cli

ROOT = Path(__file__).resolve().parents[2]
TOY_CONFIG = str(ROOT / 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py')


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
        (cli.train_parser, ['c.py', '--cfg-options', 'a=[(1,2]']),
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
         '--launcher', 'slurm', '--cfg-options', 'a.b=1', 'c=[1,2]', 'd=(x,y)']
    )  # fmt: skip
    assert (args.work_dir, args.amp, args.auto_scale_lr, args.resume) == ('w', True, True, 'a.pth')
    assert args.cfg_options == {'a.b': 1, 'c': [1, 2], 'd': ('x', 'y')}
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
        ('a = (', ['cannot be read', 'SyntaxError']),
        ('a = undefined', ['cannot be read', 'NameError', 'undefined']),
        ("_base_ = ['missing.py']", ['cannot be read', 'missing.py']),
        ("_base_ = ['mmdet::_base_/models/missing.py']", ['cannot be read', 'missing.py']),
        ("custom_imports = dict(imports=['no_such_module'])", ['cannot be read', 'no_such_module']),
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
    has_module = compat._has_module
    monkeypatch.setattr(compat, '_has_module', lambda name: name != 'mmseg' and has_module(name))
    config = tmp_path / 'config.py'
    config.write_text("model = dict(type='EncoderDecoder')\ndefault_scope = 'mmseg'\n")
    status, stderr = tool(cli.train, config, '--work-dir', tmp_path / 'w')
    assert_one_line(status, stderr, 'mmseg is not installed', "pip install 'hat_mm[seg]'")


@pytest.mark.parametrize('option', ['model.type.deeper=1', 'train_pipeline.99.type=x'])
def test_options_that_do_not_fit(option, tool, tmp_path):
    status, stderr = tool(cli.train, TOY_CONFIG, '--work-dir', tmp_path, '--cfg-options', option)
    assert_one_line(status, stderr, '--cfg-options do not fit', expected=2)


@pytest.mark.parametrize('where', ['file', 'file/below', '/proc/hat_mm'])
def test_work_dirs_that_cannot_be_written(where, tool, tmp_path):
    (tmp_path / 'file').write_text('')
    status, stderr = tool(cli.train, TOY_CONFIG, '--work-dir', tmp_path / where)
    assert_one_line(status, stderr, 'cannot write to work dir', where)
    assert (tmp_path / 'file').read_text() == ''


def _as_nobody(folder, queue):
    try:
        if os.getuid() == 0:
            os.setuid(65534)
        cli._make_writable(folder, 'work dir')
    except cli.UserError as error:
        queue.put(str(error))
    else:
        queue.put(None)


def test_work_dir_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | stat.S_IXOTH | stat.S_IXGRP)
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    process = context.Process(target=_as_nobody, args=(str(tmp_path), queue))
    process.start()
    message = queue.get(timeout=60)
    process.join()
    tmp_path.chmod(0o755)
    assert message == f'cannot write to work dir {str(tmp_path)!r}: Permission denied'


def test_missing_checkpoint(tool, tmp_path):
    missing = tmp_path / 'no.pth'
    status, stderr = tool(cli.test, TOY_CONFIG, missing, '--work-dir', tmp_path)
    assert_one_line(status, stderr, f"checkpoint '{missing}' does not exist", name='test.py')
    status, stderr = tool(cli.train, TOY_CONFIG, '--work-dir', tmp_path, '--resume', missing)
    assert_one_line(status, stderr, f"checkpoint '{missing}' does not exist")


def test_amp_needs_a_gpu(tool, tmp_path, monkeypatch):
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cpu')
    status, stderr = tool(cli.train, TOY_CONFIG, '--work-dir', tmp_path, '--amp')
    assert_one_line(status, stderr, '--amp needs a GPU')


def test_out_of_mmdet_must_be_a_pickle(tool, tmp_path):
    checkpoint = tmp_path / 'a.pth'
    checkpoint.write_bytes(b'')
    status, stderr = tool(
        cli.test, TOY_CONFIG, checkpoint, '--work-dir', tmp_path, '--out', 'out.json'
    )
    assert_one_line(
        status, stderr, "must end with .pkl or .pickle, got 'out.json'", name='test.py', expected=2
    )


# --- what is an error of the user, and what a bug -------------------------------------------------


def raised(error):
    try:
        raise error
    except BaseException as caught:
        return caught


def test_a_bug_keeps_its_traceback():
    for bug in (ValueError('x'), RuntimeError('x'), TypeError('x'), OSError('x'), KeyError('x')):
        assert cli.explain(raised(bug)) is None

    def tool():
        raise ValueError('a bug')

    with pytest.raises(ValueError, match='a bug'):
        cli.run_tool(tool, 'train.py')


def test_a_bug_while_building_keeps_its_traceback():
    from mmengine.registry import Registry

    registry = Registry('buggy')

    @registry.register_module()
    class Buggy:
        def __init__(self, size):
            self.size = len(size)

    with pytest.raises(TypeError) as caught:
        registry.build(dict(type='Buggy', size=3))
    assert cli.explain(caught.value) is None
    with pytest.raises(TypeError) as caught:
        registry.build(dict(type='Buggy', sizes=3))
    assert "unexpected keyword argument 'sizes'" in cli.explain(caught.value)


def test_debugging_shows_the_traceback_of_user_errors(monkeypatch):
    monkeypatch.setenv('HAT_MM_DEBUG', '1')

    def tool():
        raise cli.UserError('wrong')

    with pytest.raises(cli.UserError):
        cli.run_tool(tool, 'train.py')


def test_errors_of_dataloader_workers_become_one_line():
    error = raised(
        FileNotFoundError(
            'Caught FileNotFoundError in DataLoader worker process 0.\n'
            'Original Traceback (most recent call last):\n  File "x", line 1\n'
            "FileNotFoundError: [Errno 2] No such file or directory: 'a.png'\n"
        )
    )
    line = cli.explain(error)
    assert line == "FileNotFoundError: [Errno 2] No such file or directory: 'a.png'"


# --- flags in each toolbox -----------------------------------------------------------------------


def cfg_of(**settings):
    return Config(
        dict(
            model=dict(type='Model'),
            test_dataloader=dict(
                num_workers=2,
                dataset=dict(pipeline=[dict(type='Load'), dict(type='Pack', key=1)]),
            ),
            test_evaluator=dict(type='Metric'),
            default_hooks=dict(visualization=dict(type='Hook')),
            visualizer=dict(type='Visualizer'),
            **settings,
        )
    )


def test_args(*extra):
    return cli.test_parser().parse_args(['c.py', 'a.pth', *extra])


test_args.__test__ = False


@pytest.mark.parametrize(
    ('toolbox', 'hook', 'save_dir'),
    [
        ('mmdet', dict(draw=True, show=True, wait_time=1.0, test_out_dir='s'), None),
        ('mmseg', dict(draw=True, show=True, wait_time=1.0), 's'),
        ('mmpretrain', dict(enable=True, show=True, wait_time=1.0, out_dir='s'), None),
    ],
)
def test_show(toolbox, hook, save_dir):
    cfg = cfg_of()
    args = test_args('--show', '--show-dir', 's', '--wait-time', '1')
    cli._set_show(cfg, cli.TOOLBOXES[toolbox], args)
    assert cfg.default_hooks.visualization == dict(type='Hook', **hook)
    assert cfg.visualizer.get('save_dir') == save_dir


def test_show_needs_a_hook():
    cfg = cfg_of()
    cfg.default_hooks = {}
    with pytest.raises(cli.UserError, match='visualization hook'):
        cli._set_show(cfg, cli.TOOLBOXES['mmdet'], test_args('--show'))


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmpretrain'])
def test_default_tta_flips(toolbox):
    cfg = cfg_of()
    cli._set_tta(cfg, cli.TOOLBOXES[toolbox])
    assert cfg.model.type == cli.TOOLBOXES[toolbox].tta_model['type']
    assert cfg.model.module == dict(type='Model')
    *rest, tta = cfg.test_dataloader.dataset.pipeline
    assert rest == [dict(type='Load')]
    flips, [pack] = tta['transforms']
    assert [flip['prob'] for flip in flips] == [1.0, 0.0]
    assert pack['type'] == ('PackDetInputs' if toolbox == 'mmdet' else 'Pack')


def test_tta_of_the_config_comes_first():
    cfg = cfg_of(tta_model=dict(type='Mine'), tta_pipeline=[dict(type='MyPipeline')])
    cli._set_tta(cfg, cli.TOOLBOXES['mmseg'])
    assert cfg.model == dict(type='Mine', module=dict(type='Model'))
    assert cfg.test_dataloader.dataset.pipeline == [dict(type='MyPipeline')]


@pytest.mark.parametrize('settings', [{}, dict(tta_model=dict(type='Mine'))])
def test_mmseg_has_no_default_tta(settings):
    with pytest.raises(cli.UserError, match='--tta needs'):
        cli._set_tta(cfg_of(**settings), cli.TOOLBOXES['mmseg'])


def test_out_of_mmseg_is_a_folder(tmp_path):
    cfg = cfg_of()
    out = str(tmp_path / 'maps')
    cli._set_out(cfg, cli.TOOLBOXES['mmseg'], test_args('--out', out))
    assert cfg.test_evaluator == dict(type='Metric', output_dir=out, keep_results=True)


def test_loader_defaults_of_mmpretrain_leave_what_is_set():
    cfg = cfg_of()
    cfg.val_dataloader = dict(num_workers=0, pin_memory=False, collate_fn=dict(type='mine'))
    cli._set_loader_defaults(cfg)
    assert cfg.test_dataloader.collate_fn == dict(type='default_collate')
    assert cfg.test_dataloader.persistent_workers is True
    assert cfg.val_dataloader.persistent_workers is False
    assert cfg.val_dataloader.collate_fn == dict(type='mine')


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
