"""Python of README and plugins runs; commands, options and links of all pages exist and fit."""

import importlib
import re
import runpy
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import candidates
import models
import pytest
import swap_backbone
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

import hat_mm
from hat_mm.engine import cli
from hat_mm.engine.build import build_model
from hat_mm_runtime import __main__ as runtime

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text()
PAGES = ['README.md', 'CONTRIBUTING.md', 'WEIGHTS.md', 'DATA.md', 'CHANGELOG.md']
# docs/_pages has copies of the others, for the site.
PAGES += [
    str(page.relative_to(ROOT))
    for page in sorted(ROOT.glob('docs/**/*.md'))
    if page.parent.name != '_pages'
]
PAGES += [str(page.relative_to(ROOT)) for page in sorted(ROOT.glob('configs/**/*.md'))]


def blocks(language, text=README):
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


PYTHON = blocks('python')
for page in ('docs/plugins.md', 'docs/plugins/own_network.md', 'docs/plugins/swin_hat.md'):
    PYTHON += blocks('python', (ROOT / page).read_text())
COMMANDS = [line for block in blocks('bash') for line in block.splitlines() if line.strip()]


def test_there_is_something_to_test():
    assert len(PYTHON) >= 5
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize('code', PYTHON, ids=range(len(PYTHON)))
def test_python_block_runs(code):
    exec(compile(code, 'a page', 'exec'), {})


@pytest.mark.parametrize('command', COMMANDS)
def test_command_exists(command):
    words = shlex.split(command)
    if words[0] == 'make':
        done = subprocess.run(
            ['make', '-n', *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return
    if words[0] == 'pip' or words[:3] == ['python', '-m', 'hat_mm_runtime']:
        return  # tested below, or not ours
    assert words[0] in ('python', 'bash')
    assert (ROOT / words[1]).is_file()
    if words[1].endswith('.py'):
        program = [sys.executable, ROOT / words[1], '--help']
        help_text = subprocess.run(
            program, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for word in words[2:]:
            if word.startswith('--'):
                assert word in help_text
    if words[1].endswith(('swap_backbone.py', 'new_config.py')):
        return  # run below, and by tests/test_own_pictures.py
    configs = [word for word in words[2:] if word.startswith('configs/')]
    assert configs or words[2].startswith('work_dirs/')
    assert all((ROOT / config).is_file() for config in configs)


def test_swap_backbone(tmp_path, monkeypatch, capsys):
    """The README's command runs, and the page shows what another one writes."""
    monkeypatch.chdir(tmp_path)
    [command, train] = [
        shlex.split(line)
        for line in COMMANDS
        if 'swap_backbone.py' in line or line.startswith('python tools/train.py work_dirs/')
    ]
    swap_backbone.main(command[2:])
    assert Config.fromfile(train[2]).model.backbone.type == 'hat_mm.FasterViT'
    page = (ROOT / 'docs/swap.md').read_text()
    [shown] = [block for block in blocks('python', page) if block.startswith('_base_')]
    capsys.readouterr()
    swap_backbone.main([re.findall("'(.*)'", shown)[0], 'hat-net-tiny', '--no-check'])
    assert capsys.readouterr().out == shown


# --- commands of all pages ------------------------------------------------------------------------

SITE = sysconfig.get_path('purelib')


def tool_commands(tools: tuple[str, ...]) -> list[list[str]]:
    """Words of the commands of all pages that call one of these tools, ours or a toolbox's."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        for block in re.findall(r'^```bash\n(.*?)^```', text, re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                # The README's environment is the default one, tests run in others, too.
                words = shlex.split(line.replace('.venv/lib/python3.11/site-packages', SITE))
                words = [word for word in words if word not in ('python', 'bash', '-m', 'hat_mm')]
                if words and words[0].endswith(tools):
                    found.append(words)
    return found


TOOLS = ('tools/train.py', 'tools/test.py', 'tools/dist_train.sh', 'tools/misc/print_config.py')
# tests/test_own_pictures.py runs those with a config that the reader makes first.
CONFIG_COMMANDS = [words for words in tool_commands(TOOLS) if 'work_dirs/' not in words[1]]


def test_the_pages_have_commands():
    pages = {words[0].rpartition('/')[2] for words in CONFIG_COMMANDS}
    assert pages == {'train.py', 'test.py', 'dist_train.sh', 'print_config.py'}
    programs = {words[0].rpartition('/')[2] for words in PROGRAMS}
    assert programs >= {'shapes.py', 'get_flops.py', 'padding_effect.py', 'publish_model.py'}
    assert len(BENCHMARKS) >= 6
    assert len(RUNTIME) >= 2
    text = (ROOT / 'docs/configs.md').read_text()
    assert len(re.findall(r'^(?:python|bash) ', text, re.MULTILINE)) >= 10


def merged(words: list[str]) -> Config:
    """The config of a command with its options."""
    program, *args = words
    parser = cli.test_parser() if program.endswith('test.py') else cli.train_parser()
    if program.endswith('.sh'):
        args = [args[0], *args[2:]]  # without the number of GPUs
    if program.endswith('print_config.py'):
        args = args[: args.index('--save-path')]
    args = parser.parse_args(args)
    cfg = Config.fromfile(args.config)
    keys = args.cfg_options or {}
    for key in keys:
        # What is set has to be there: a typo would add a key that nobody reads.
        above, _, last = key.rpartition('.')
        new = ('backbone.', 'window_size', 'accumulative_counts', 'constructor', 'paramwise_cfg')
        if above and not any(name in key for name in (*new, 'test_cfg', 'metainfo')):
            assert last in at(cfg, above), key
    cfg.merge_from_dict(keys)
    return cfg


def at(cfg: Config, key: str):
    for name in key.split('.'):
        cfg = cfg[int(name)] if name.isdigit() else cfg[name]
    return [str(i) for i in range(len(cfg))] if isinstance(cfg, list) else cfg


@pytest.mark.parametrize('page', PAGES)
def test_a_shell_reads_every_command(page):
    text = (ROOT / page).read_text()
    for block in re.findall(r'^```bash\n(.*?)^```', text, re.MULTILINE | re.DOTALL):
        done = subprocess.run(
            ['bash', '-n', '-c', block], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('words', CONFIG_COMMANDS, ids=lambda words: '-'.join(words[1:3])[-60:])
def test_options_fit(words):
    assert (ROOT / words[0]).is_file()
    cfg = merged(words)
    with torch.device('meta'):
        model = build_model(cfg)
        parts = {type(module).__module__.partition('.')[0] for module in model.backbone.modules()}
        assert hat_mm.__name__ in parts  # the backbone is ours, or has plugins of ours
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            assert build_optim_wrapper(model, cfg.optim_wrapper)
            for split in ('train', 'val', 'test'):
                dataset = cfg[f'{split}_dataloader'].dataset
                dataset = dataset.get('dataset', dataset)  # of a RepeatDataset
                assert Compose(dataset.pipeline)


PROGRAMS = [
    words
    for words in tool_commands(('.py',))
    if not words[0].endswith(TOOLS) and 'dev' not in Path(words[0]).parts
]


@pytest.mark.parametrize('words', PROGRAMS, ids=lambda words: '-'.join(words)[-60:])
def test_programs_take_the_arguments_of_the_pages(words, monkeypatch):
    monkeypatch.setattr(sys, 'argv', words)
    importlib.import_module(Path(words[0]).stem).parse_args()


RUNTIME = tool_commands(('hat_mm_runtime',))


@pytest.mark.parametrize('words', RUNTIME, ids=lambda words: '-'.join(words)[-60:])
def test_the_runtime_takes_the_arguments_of_the_pages(words):
    assert runtime.parse_args(words[1:]).images


BENCHMARKS = [words[1:] for words in tool_commands(('analysis_tools/benchmark',))]


@pytest.mark.parametrize('words', BENCHMARKS, ids=lambda words: '-'.join(words)[-60:])
def test_the_benchmark_takes_the_arguments_of_the_pages(words, monkeypatch):
    ran = []
    monkeypatch.setattr(models, 'run', ran.append)
    runpy.run_path(str(ROOT / 'tools/analysis_tools/benchmark/__main__.py'))['main'](words)
    [args] = ran
    assert models.find_peers(args, models.make_plan(args))
    for text in args.candidates:
        name = candidates.parse(text).name
        assert name in candidates.PEERS or re.search('[./]', name)


def test_the_config_for_own_data_builds(tmp_path, monkeypatch):
    [text] = re.findall(
        r'^```python\n(.*?)^```', (ROOT / 'docs/datasets.md').read_text(), re.MULTILINE | re.DOTALL
    )
    path = tmp_path / 'own.py'
    path.write_text(text.replace("['configs/", f"['{ROOT}/configs/"))
    cfg = Config.fromfile(path)
    assert cfg.model.roi_head.bbox_head.num_classes == len(cfg.metainfo.classes) == 3
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == 'data/shapes/'
        assert loader.dataset.metainfo == cfg.metainfo
    assert cfg.test_evaluator.ann_file == 'data/shapes/annotations/val.json'


# --- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r'\]\(([^)#]+)\)', text):
        if not target.startswith('http'):
            assert ((ROOT / page).parent / target).exists(), target


# A changelog names what is there no more.
@pytest.mark.parametrize('page', [page for page in PAGES if page != 'CHANGELOG.md'])
def test_files_named_in_prose_exist(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r'`((?:hat_mm|tools|demo|tests|configs|docs)/[\w./-]+)`', text):
        assert (ROOT / name).exists(), name
