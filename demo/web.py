"""A page in the browser: what models find in a picture, where they look, and how fast they are.

Without --models it offers what `make demo`, its kin, and exports have left in work_dirs. Pictures
stay on this machine; the page asks no other host for anything.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL.Image

import hat_mm
from hat_mm import compat
from hat_mm.engine.cli import UserError, explain, run_tool
from hat_mm.engine.overlays import AttentionMaps, overlay
from hat_mm.weights import fileio
from hat_mm_runtime import ENDS, Classification, Detections, PictureError, Segmentation
from hat_mm_runtime.images import read
from hat_mm_runtime.results import Result

ROOT = Path(__file__).resolve().parents[1]
WORK_DIRS = Path('work_dirs')
EXAMPLES = ('data/trees/test', 'data/trees/val', 'data/nuclei/val', 'data/shapes/val')
LARGEST_FILE, LARGEST_PICTURE = '20mb', 50_000_000  # bytes, pixels
SIDE, PANEL_SIDE = 1600, 512  # pixels: of pictures that are kept, and of attention
LEAST_SCORE, SCORE = 0.05, 0.3
RUNS = 5
MODELS_KEPT = 4

START = 'Drop a picture on the left, or choose an example.'
LOOKING = (
    'Click a point of the picture. **Rollout** is how much of each place has reached this point '
    'through the stage. A block looks at the **tokens** of its window, outlined, and far away '
    'through **carriers** (HAT-Net: averages).'
)
TIMING = (
    'The model in PyTorch beside its exported file in onnxruntime, on this picture and this '
    'machine, in turns. The first time, the model is exported, which takes a minute or two.'
)
# As many columns as fit, and all rows; words in one piece.
CSS = """
#attention .grid-container { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
#attention .grid-wrap { min-height: 0; max-height: none; }
#counts td, #speed td, #speed th { overflow-wrap: normal; word-break: normal; padding: 6px 10px; }
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--models',
        nargs='+',
        metavar='CONFIG[:CHECKPOINT]',
        help='config with its checkpoint, exported file (.onnx, .xml), or a name of '
        'hat_mm.list_models() that has weights (default: what is in work_dirs)',
    )
    parser.add_argument('--port', type=int, default=7860)
    parser.add_argument(
        '--host', default='127.0.0.1', help='0.0.0.0 lets other machines use the page, all of them'
    )
    return parser.parse_args(argv)


# --- models ---------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A model that can be chosen: config and checkpoint, or an exported file without one."""

    model: str
    weights: str | None = None

    @property
    def exported(self) -> bool:
        """Whether it is an exported file."""
        return self.model.endswith(ENDS)


def find_models(root: Path = WORK_DIRS) -> dict[str, Choice]:
    """What the demos have trained and what has been exported, by its folder or file."""
    found = {}
    for last in sorted(
        [*root.glob('demo*/last_checkpoint'), *root.glob('demo*/*/last_checkpoint')]
    ):
        folder = last.parent
        weights = Path(last.read_text(encoding='utf-8').strip())
        if not weights.is_file():  # the folder has moved
            weights = folder / weights.name
        configs = sorted(folder.glob('*.py'), key=lambda path: path.stat().st_mtime)
        if configs and weights.is_file():
            found[str(folder.relative_to(root))] = Choice(str(configs[-1]), str(weights))
    for path in sorted(path for end in ENDS for path in root.rglob(f'*{end}')):
        # Annotations may be .xml, too.
        if path.suffix == '.onnx' or path.with_suffix('.bin').is_file():
            found[str(path.relative_to(root))] = Choice(str(path))
    return found


def given_models(texts: list[str]) -> dict[str, Choice]:
    """Models of the command line.

    Raises:
        UserError: A file does not exist, or a config has no checkpoint.
    """
    found = {}
    for text in texts:
        model, _, weights = (text, '', '') if Path(text).is_file() else text.partition(':')
        files = [model] * model.endswith((*ENDS, '.py')) + [weights] * ('://' not in weights)
        for path in filter(None, files):
            if not Path(path).is_file():
                raise UserError(f'--models {text}: there is no file {path!r}')
        if model.endswith('.py') and not weights:
            raise UserError(f'--models {text}: give its checkpoint, as {model}:CHECKPOINT')
        found[text] = Choice(model, weights or None)
    return found


@dataclasses.dataclass
class Loaded:
    """A place for a model, and the lock of those who use it."""

    lock: Any
    infer: Any = None


class Models:
    """Models by name, loaded when they are first asked for; the last few are kept.

    Args:
        choices: What can be asked for.
    """

    def __init__(self, choices: dict[str, Choice]) -> None:
        self.choices = choices
        self.exporting = threading.Lock()
        self._guard = threading.Lock()
        # One for all PyTorch models: mmengine's default scope is the same for all threads.
        self._torch = threading.Lock()
        self._kept: OrderedDict[Choice, Loaded] = OrderedDict()

    @contextlib.contextmanager
    def borrow(self, choice: Choice) -> Iterator[Any]:
        """Gives the inferencer of a model to one thread at a time."""
        with self._guard:
            lock = threading.Lock() if choice.exported else self._torch
            loaded = self._kept.setdefault(choice, Loaded(lock))
            self._kept.move_to_end(choice)
            while len(self._kept) > MODELS_KEPT:
                self._kept.popitem(last=False)
        with loaded.lock:
            if loaded.infer is None:
                loaded.infer = hat_mm.Inferencer(choice.model, choice.weights)
            yield loaded.infer

    def export(self, name: str) -> Path:
        """An exported file of a model, written unless it is there.

        Raises:
            UserError: It is one, or it cannot be written.
        """
        choice = self.choices[name]
        if choice.exported:
            raise UserError(f'{name} is an exported file: choose the model that it was made from')
        if not Path(choice.weights or '').is_file() or not Path(choice.model).is_file():
            raise UserError(f'{name}: only a config with a checkpoint file can be exported here')
        parts = ''.join(fileio.sha256(path) for path in choice)
        digest = hashlib.sha256(parts.encode()).hexdigest()[:8]
        out = WORK_DIRS / 'web' / f'{re.sub("[^A-Za-z0-9_.-]+", "-", name)}-{digest}.onnx'
        with self.exporting:
            if not out.is_file():
                out.parent.mkdir(parents=True, exist_ok=True)
                # In a process of its own, because tracing changes modules for all threads.
                command = [sys.executable, ROOT / 'tools/deployment/export.py', *choice, out]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    last = (done.stderr.strip().splitlines() or ['no message'])[-1]
                    raise UserError(f'{name} cannot be exported: {last}')
        return out


# --- what the page does ---------------------------------------------------------------------------


@dataclasses.dataclass
class Session:
    """What one visitor's page shows.

    Attributes:
        name: The model.
        found: All that it has found, with the picture.
        seconds: How long that took.
        maps: Its attention, after the first click.
        place: The last click, x and y.
    """

    name: str
    found: Any
    seconds: float
    maps: AttentionMaps | None = None
    place: tuple[float, float] | None = None


def load_picture(path: str) -> np.ndarray:
    """Reads an uploaded picture, (H, W, 3), BGR, made smaller if it is very large.

    Raises:
        PictureError: It is none, or would take too much memory.
    """
    name = Path(path).name
    pixels = 0
    with (
        contextlib.suppress(OSError, PIL.Image.DecompressionBombError),
        PIL.Image.open(path) as file,
    ):
        pixels = math.prod(file.size)
    if pixels > LARGEST_PICTURE:
        raise PictureError(
            f'{name} has {pixels / 1e6:.0f} million pixels; {LARGEST_PICTURE // 10**6} are allowed'
        )
    try:
        return shrunk(read(path), SIDE)
    except PictureError as error:
        raise PictureError(str(error).replace(repr(path), name)) from error


def shrunk(image: np.ndarray, side: int) -> np.ndarray:
    """Makes a picture smaller if its longer side is too long."""
    height, width = image.shape[:2]
    factor = side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA) if factor < 1 else image


def find(models: Models, name: str, path: str) -> Session:
    """Runs a model on a picture."""
    image = load_picture(path)
    with models.borrow(models.choices[name]) as infer:
        start = time.perf_counter()
        found = infer(image, LEAST_SCORE)
        return Session(name, found, time.perf_counter() - start)


def above(found: Result, score: float) -> Result:
    """Detections of at least a score; other results as they are."""
    if not isinstance(found, Detections):
        return found
    good = found.scores >= score
    masks = None if found.masks is None else found.masks[good]
    parts = dict(boxes=found.boxes[good], scores=found.scores[good], labels=found.labels[good])
    return dataclasses.replace(found, **parts, masks=masks)


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown."""
    lines = [head, ['---'] + ['---:'] * (len(head) - 1), *rows]
    return '\n'.join(f'| {" | ".join(str(x).replace("|", "¦") for x in row)} |' for row in lines)


def summary(found: Any) -> str:
    """Classes of a result with their counts, shares or probabilities."""
    if isinstance(found, Segmentation):
        shares = np.bincount(found.map.ravel()) / found.map.size
        largest = [i for i in np.argsort(-shares) if shares[i] > 0]
        rows = [[found.name(i), f'{shares[i]:.1%}'] for i in largest]
        return table(['class', 'share of the picture'], rows)
    if isinstance(found, Classification):
        rows = [[one['name'], f'{one["score"]:.3f}'] for one in found.to_json()]
        return table(['class', 'probability'], rows)
    labels, counts = np.unique(np.asarray(found.labels, int), return_counts=True)
    rows = [[found.name(i), n] for i, n in zip(labels, counts, strict=True)]
    return table(['class', 'found'], rows or [['nothing', 0]])


def look(models: Models, session: Session, stage: str | None) -> list[tuple[np.ndarray, str]]:
    """Pictures (RGB) of what the clicked place looks at, with titles."""
    image = session.found.image
    with models.borrow(models.choices[session.name]) as infer:
        if session.maps is None:
            session.maps = AttentionMaps.of(infer, image)
    name = stage if stage in session.maps.stages else next(iter(session.maps.stages))
    x, y = session.place or (0, 0)
    shown = []
    for panel in session.maps.panels(name, [x, y, x, y]):
        for kind in ('tokens', 'carriers'):
            values = getattr(panel, kind)
            if values is None:
                continue
            picture = overlay(image, values)
            if panel.name != 'rollout' and kind == 'tokens':  # where they end, the window ends
                seen = (values > 0).astype(np.uint8)
                outline, _ = cv2.findContours(seen, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
                cv2.drawContours(picture, outline, -1, (255, 255, 255), 1)
            size = max(8, max(image.shape) // 24)
            at = (round(x), round(y))
            cv2.drawMarker(picture, at, (255, 255, 0), cv2.MARKER_CROSS, size, max(1, size // 10))
            title = panel.name if panel.name == 'rollout' else f'{panel.name}, {kind}'
            shown.append((shrunk(picture, PANEL_SIDE)[..., ::-1], title))
    return shown


def compare(models: Models, session: Session, score: float) -> str:
    """Times a model and its exported file on the picture in turns; a table in Markdown."""
    choices = {
        'PyTorch': models.choices[session.name],
        'onnxruntime': Choice(str(models.export(session.name))),
    }
    seconds: dict[str, list[float]] = {what: [] for what in choices}
    found: dict[str, Any] = {}
    for _ in range(RUNS + 1):
        for what, choice in choices.items():
            with models.borrow(choice) as infer:
                start = time.perf_counter()
                found[what] = infer(session.found.image, score)
                seconds[what].append(time.perf_counter() - start)
    rows = []
    for what, [_, *times] in seconds.items():  # the first run warms up
        middle, span = statistics.median(times), f'{min(times) * 1e3:.0f}–{max(times) * 1e3:.0f}'
        rows.append([what, f'{middle * 1e3:.0f}', span, str(found[what])])
    first, second = (str(one) for one in found.values())
    verdict = 'They agree.' if first == second else '**They differ.**'
    head = ['', f'median of {RUNS}, ms', 'range, ms', 'found']
    return f'{table(head, rows)}\n\n{verdict} The file is {choices["onnxruntime"].model}.'


# --- the page -------------------------------------------------------------------------------------


def find_examples() -> list[list[str]]:
    """A few pictures of each data set that is there."""
    found = []
    for folder in EXAMPLES:
        files = (path for path in sorted(Path(folder).glob('*')) if path.is_file())
        found += [[str(path)] for path, _ in zip(files, range(3), strict=False)]
    return found


def reason(error: Exception) -> str:
    """What to tell a visitor; an error that is not his keeps its traceback in the terminal."""
    line = explain(error) or (str(error) if isinstance(error, ValueError) else None)
    if line is None:
        raise error
    return line


def build_page(models: Models) -> Any:
    """The page; all results belong to the visitor's session."""
    gr = compat.require('gradio')

    def on_picture(name: str, path: str | None, score: float) -> dict:
        session, broken = None, {}
        if path is not None:
            try:
                session = find(models, name, path)
            except Exception as error:
                gr.Warning(reason(error), duration=None)
                if isinstance(error, PictureError):
                    broken = {picture: None}
        out = {state: session, gallery: None, stages: gr.Radio(visible=False), speed: ''}
        out[place] = session and session.found.image[..., ::-1]
        out[slider] = gr.Slider(visible=session is None or isinstance(session.found, Detections))
        return out | broken | dict(zip((result, counts), on_score(session, score), strict=True))

    def on_score(session: Session | None, score: float) -> tuple[Any, str]:
        if session is None:
            return None, START
        found = above(session.found, score)
        seconds = f'{session.seconds:.2f} s for the picture by {session.name}'
        return found.draw()[..., ::-1], f'{summary(found)}\n\n{seconds}'

    def on_click(session: Session | None, stage: str | None, event: gr.SelectData) -> tuple:
        if session is None:
            raise gr.Error('choose a picture first', print_exception=False)
        session.place = event.index
        return on_stage(session, stage)

    def on_stage(session: Session, stage: str | None) -> tuple:
        try:
            shown = look(models, session, stage)
        except Exception as error:
            raise gr.Error(reason(error), print_exception=False) from error
        assert session.maps is not None
        names = [*session.maps.stages]
        value = stage if stage in names else names[0]
        return gr.Radio(names, value=value, visible=True), shown

    def on_compare(session: Session | None, score: float) -> Iterator[str]:
        if session is None:
            raise gr.Error('choose a picture first', print_exception=False)
        yield ''
        try:
            yield compare(models, session, score)
        except Exception as error:
            raise gr.Error(reason(error), print_exception=False) from error

    names = list(models.choices)
    # The usual buttons of a picture have one that sends it to another host.
    shown = dict(interactive=False, buttons=['fullscreen', 'download'])
    with gr.Blocks(title='hat_mm', analytics_enabled=False, delete_cache=(600, 3600)) as page:
        state = gr.State(time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                model = gr.Dropdown(names, value=names[0], label='Model')
                sources = dict(type='filepath', sources=['upload', 'clipboard'])
                picture = gr.Image(**sources, label='Picture', height=260, elem_id='picture')
                # Gradio would open it first, and not say what is wrong with it.
                picture.preprocess = lambda payload: payload and payload.path
                if examples := find_examples():
                    gr.Examples(examples, picture, examples_per_page=12)
            with gr.Column(scale=5, min_width=300):
                with gr.Tab('Find'):
                    slider = gr.Slider(LEAST_SCORE, 0.95, SCORE, step=0.05, label='Least score')
                    result = gr.Image(**shown, label='Result', height=460, elem_id='result')
                    counts = gr.Markdown(START, elem_id='counts')
                with gr.Tab('Where does it look?'):
                    gr.Markdown(LOOKING)
                    place = gr.Image(**shown, label='Click here', height=320, elem_id='place')
                    stages = gr.Radio([], label='Stage', visible=False)
                    gallery = gr.Gallery(label='Attention', elem_id='attention', **shown)
                with gr.Tab('Speed'):
                    gr.Markdown(TIMING)
                    button = gr.Button('Compare', variant='primary')
                    speed = gr.Markdown(elem_id='speed')
        outputs = {state, picture, result, counts, place, slider, gallery, stages, speed}
        # What is chosen while a network runs comes after it; by default it would be ignored.
        last = dict(trigger_mode='always_last')
        chosen = [picture.change, model.change]
        gr.on(chosen, on_picture, [model, picture, slider], outputs, **last)
        redrawn = [result, counts]
        slider.change(on_score, [state, slider], redrawn, show_progress='hidden', **last)
        place.select(on_click, [state, stages], [stages, gallery], **last)
        stages.input(on_stage, [state, stages], [stages, gallery], **last)
        button.click(on_compare, [state, slider], speed)
    return page.queue(default_concurrency_limit=4, api_open=False)


def main(argv: list[str] | None = None) -> None:
    """Serves the page until it is interrupted.

    Raises:
        UserError: There is no model, or the port is taken.
    """
    args = parse_args(argv)
    choices = given_models(args.models) if args.models else find_models()
    if not choices:
        raise UserError('there is no trained model in work_dirs: `make demo` trains one')
    # Gradio reads these when it is imported. No statistics are sent, no newer version looked for.
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    with tempfile.TemporaryDirectory(prefix='hat_mm-web-') as folder:  # gone at the end
        os.environ['GRADIO_TEMP_DIR'] = folder
        gr = compat.require('gradio')
        fonts = dict(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace'])
        page = build_page(Models(choices))
        try:
            page.launch(
                server_name=args.host,
                server_port=args.port,
                share=False,
                ssr_mode=False,
                run_history=False,
                footer_links=[],
                max_file_size=LARGEST_FILE,
                state_session_capacity=50,
                theme=gr.themes.Default(**fonts),
                css=CSS,
            )
        except OSError as error:
            taken = f'{args.host}:{args.port} is taken, or no address of this machine'
            raise UserError(f'{taken}: choose another --port or --host') from error


if __name__ == '__main__':
    sys.exit(run_tool(main, 'web.py'))
