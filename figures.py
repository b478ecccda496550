"""Everything that is drawn, as PNG. Colours, fonts and the look of all pictures are in one place, at the top.

Names of runs, classes and files are drawn letter by letter, whatever they hold. A dollar sign starts no mathematics. A
letter that no installed font has is shown by its code, such as \\u4e2d. A name that is too long for its place loses its
middle, since names often differ at their end.

Nothing here uses pyplot, so that no display and no global state is touched.
"""
import math
import re
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageOps

from metrics import ReliabilityBins, check_pairs, risk_coverage

# From the palette of Okabe and Ito (2008), whose colours colour-blind readers can tell apart.
BLUE = '#0072B2'
ORANGE = '#D55E00'
GREEN = '#009E73'
GREY = '#6E6E6E'
LINES = ((BLUE, '-'), (ORANGE, '--'), (GREEN, '-.'), ('#CC79A7', ':'), ('black', '-'), ('#E69F00', '--'))
TITLE, LABEL, SMALL = 13, 11, 10  # sizes of letters, in points
# Fonts that have another picture than the letter at some of their places.
NO_LETTERS = re.compile('Last Resort|cm[a-z]+10$|STIXNon|STIXSize')


# ---------------------------------------------------------------------------------------------------------------------
# Names


@cache
def _usual() -> dict[str, frozenset[str]]:
    """The letters of the families that matplotlib is set to use, both plain and bold."""
    found = {}
    for family in rcParams['font.family']:
        files = [findfont(FontProperties(family=[family], weight=weight)) for weight in ('normal', 'bold')]
        found[family] = _letters(*files)
    return found


@cache
def _others() -> dict[str, frozenset[str]]:
    """The letters of every other family that is installed. Opening all of them takes a moment."""
    files = {}
    for font in sorted(fontManager.ttflist, key=lambda font: font.name):
        if font.style == 'normal' and not NO_LETTERS.match(font.name) and Path(font.fname).exists():
            files.setdefault(font.name, []).append(font.fname)
    return {family: _letters(*found) for family, found in files.items()}


def _letters(*files: str) -> frozenset[str]:
    """The letters that all these files have."""
    return frozenset.intersection(*(frozenset(map(chr, get_font(file).get_charmap())) for file in files))


@cache
def _family(letter: str) -> str | None:
    """The first family of fonts that has a letter, the usual ones before any that is installed; None if none has."""
    for families in (_usual, _others):
        for family, letters in families().items():
            if letter in letters:
                return family
    return None


@cache
def _width(shown: str) -> float:
    """Width of a letter, or of the code that stands for it, in units of the size of letters."""
    width = 0.
    for letter in shown:
        font = get_font(findfont(FontProperties(family=[_family(letter)])))
        font.set_size(12, 72)
        width += font.load_char(ord(letter)).linearHoriAdvance / 65536 / 12
    return width


def _shown(text: str) -> list[str]:
    """Each letter of a text as it is drawn: itself, or its code if no font has it or it is none that one can see."""
    return [c if c.isprintable() and _family(c) else c.encode('unicode_escape').decode() for c in text]


def _head(letters: list[str], room: float) -> list[str]:
    widths = np.cumsum([_width(letter) for letter in letters])
    return letters[:int((widths <= room).sum())]


def _without_middle(letters: list[str], room: float) -> list[str]:
    if len(_head(letters, room)) == len(letters):
        return letters
    half = (room - _width('…')) / 2
    return [*_head(letters, half), '…', *_head(letters[::-1], half)[::-1]]


def _lines(letters: list[str], room: float) -> list[list[str]]:
    """Lines of at most that width, broken after blanks and other signs between words if possible."""
    lines, start = [[]], 0
    ends = [i + 1 for i, letter in enumerate(letters) if letter in ' -_/'] + [len(letters)]
    for end in ends:
        word = letters[start:end]
        start = end
        bare = word[:-1] if word and word[-1] == ' ' else word
        if lines[-1] and len(_head(lines[-1] + bare, room)) < len(lines[-1] + bare):
            lines.append([])
        lines[-1] = lines[-1] + word
        while len(_head(lines[-1], room)) < len(lines[-1]) - (lines[-1][-1:] == [' ']):  # a word longer than a line
            first = _head(lines[-1], room) or lines[-1][:1]
            lines[-1:] = [first, lines[-1][len(first):]]
    return lines


def literal(text: str, inches: float = math.inf, size: float = TITLE, lines: int = 1) -> str:
    """A text for matplotlib that is drawn as it reads, in at most so many lines of that width.

    Args:
        text: Any, such as a name that a user gave.
        inches: Width of a line.
        size: Of the letters, in points.
        lines: If the text needs more, it loses its middle.
    """
    letters, room = _shown(text), 72 * inches / size
    found, kept = _lines(letters, room), lines * room
    while len(found) > lines:
        found = _lines(_without_middle(letters, kept), room)
        kept *= 0.97
    # matplotlib takes what is between two dollar signs for mathematics, unless a backslash stands before each.
    return '\n'.join(''.join(line).strip() for line in found).replace('$', r'\$')


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def new_figure(
        width: float,
        height: float,
        rows: int = 1,
        columns: int = 1,
        heading: str = '',
        **options,
) -> tuple[Figure, np.ndarray]:
    """A figure (inches) with a heading and its axes [rows, columns]; `options` are those of `Figure.subplots`."""
    figure = Figure(figsize=(width, height), dpi=150, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    if heading:
        figure.suptitle(literal(heading, width - 0.4, TITLE, lines=2), fontsize=TITLE)
    return figure, new_axes(figure, rows, columns, **options)


def new_axes(figure: Figure, rows: int = 1, columns: int = 1, **options) -> np.ndarray:
    """The axes [rows, columns] of a figure or a part of one."""
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[['top', 'right']].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(color='0.9', linewidth=0.8)
        axis.tick_params(labelsize=SMALL)
    return axes


def line_style(number: int) -> dict[str, str]:
    """Colour and dashes of the curve of that number. The first 36 all differ."""
    colour, dashes = LINES[number % len(LINES)][0], LINES[(number + number // len(LINES)) % len(LINES)][1]
    return dict(color=colour, linestyle=dashes)


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG, each letter in a font that has it."""
    usual = rcParams['font.family']
    for text in figure.findobj(Text):
        others = {_family(letter) for letter in text.get_text()} - {None, *usual}
        if others:
            text.set_fontfamily([*usual, *sorted(others)])
            text.set_fontweight('normal')  # few of these families have another
    figure.savefig(path, format='png')


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


class Panel(NamedTuple):
    """A reliability diagram.

    Attributes:
        title: Its name.
        bins: Of `reliability_bins`, `equal_mass_bins` or `EvalMeter.bins`.
        note: Stands in brackets behind its ECE.
    """
    title: str
    bins: ReliabilityBins
    note: str = ''


OVER = {'facecolor': '#F6CBB0', 'edgecolor': ORANGE, 'hatch': '////', 'linewidth': 0.8}
UNDER = {'facecolor': '#BFE6DA', 'edgecolor': GREEN, 'hatch': '\\\\\\\\', 'linewidth': 0.8}


def _draw_bins(bins: ReliabilityBins, top: Axes, bottom: Axes) -> None:
    filled = bins.count > 0
    # A bin of equal confidences has no width in an equal-mass diagram; it is drawn as a thin bar.
    width = bins.edges.diff().clamp(min=0.005)[filled].tolist()
    left = bins.edges[:-1][filled].clamp(max=0.995).tolist()
    acc, gap, weight = bins.accuracy[filled], bins.gap[filled], bins.weight[filled]
    top.bar(left, acc.tolist(), width, align='edge', color=BLUE, edgecolor='white', linewidth=0.6)
    for style, height in ((OVER, gap.clamp(min=0)), (UNDER, gap.clamp(max=0))):
        shown = [i for i, value in enumerate(height.tolist()) if value]
        top.bar(
            [left[i] for i in shown],
            height[shown].tolist(),
            [width[i] for i in shown],
            bottom=acc[shown].tolist(),
            align='edge',
            **style,
        )
    top.plot([0, 1], [0, 1], color='black', linestyle='--', linewidth=1.2)
    top.set(xlim=(0, 1), ylim=(0, 1))
    bottom.bar(left, weight.tolist(), width, align='edge', color='0.75', edgecolor='white', linewidth=0.6)
    bottom.axvline(float((weight * acc).sum()), color=BLUE, linewidth=2)
    bottom.axvline(float((weight * (acc + gap)).sum()), color=ORANGE, linewidth=2, linestyle='--')
    bottom.set_xlabel('confidence', fontsize=LABEL)
    bottom.tick_params(labelbottom=True)  # sharex leaves them to the last line


def reliability_diagram(panels: list[Panel], path: str | Path, heading: str = '') -> None:
    """Writes reliability diagrams side by side, six in a line, each above the histogram of its confidence.

    Blue bars are a bin's accuracy. A hatched box reaches from there to the bin's mean confidence: upwards and orange
    where the model claims too much, downwards and green where it claims too little. ECE of these bins is in the title.

    Args:
        panels: The diagrams.
        path: The PNG file to write; its folder must exist.
        heading: Of the whole picture.
    """
    if not panels:
        raise ValueError('panels is empty: there is no diagram to draw')
    columns = min(len(panels), 6)
    lines = -(-len(panels) // columns)
    titles = [literal(panel.title, 3.5, TITLE, lines=3) for panel in panels]
    notes = [f' ({literal(panel.note)})' if panel.note else '' for panel in panels]
    figure, axes = new_figure(
        0.9 + 3.9 * columns, (6.4 + 0.2 * max(title.count('\n') + 1 for title in titles)) * lines, 2 * lines, columns,
        heading, sharex=True, sharey='row', height_ratios=[3.4, 1] * lines,
    )
    pairs = [pair for line in range(lines) for pair in axes[2 * line:2 * line + 2].T]
    for axis in [axis for pair in pairs[len(panels):] for axis in pair]:
        axis.remove()
    for panel, title, note, (top, bottom) in zip(panels, titles, notes, pairs):
        _draw_bins(panel.bins, top, bottom)
        top.set_title(f'{title}\nECE {100 * panel.bins.ece:.1f} %{note}', fontsize=TITLE)
    for top, bottom in axes[:, 0].reshape(lines, 2):
        top.set_ylabel('accuracy', fontsize=LABEL)
        bottom.set_ylabel('share of\nsamples', fontsize=LABEL)
        bottom.locator_params(axis='y', nbins=3)
    figure.legend(
        handles=[
            Patch(color=BLUE, label='accuracy'),
            Patch(label='overconfident', **OVER),
            Patch(label='underconfident', **UNDER),
            Line2D([], [], color='black', linestyle='--', label='calibrated'),
            Line2D([], [], color=BLUE, linewidth=2, label='mean accuracy'),
            Line2D([], [], color=ORANGE, linewidth=2, linestyle='--', label='mean confidence'),
        ],
        loc='outside lower center',
        ncols={1: 2, 2: 3}.get(len(panels), 6),
        frameon=False,
        fontsize=SMALL,
    )
    save(figure, path)


def confidence_histogram(confidence: torch.Tensor, correct: torch.Tensor, path: str | Path, heading: str = '') -> None:
    """Writes the histograms (20 bins) of the confidence of right and of wrong predictions, each adding up to 1.

    Args:
        confidence: Top probabilities [N], in [0, 1].
        correct: Whether the prediction is right, [N], bool or 0/1.
        path: The PNG file to write.
        heading: Name of the model.
    """
    confidence, correct = check_pairs(confidence, correct)
    figure, axes = new_figure(5.2, 4.8, 2, 1, heading, sharex=True, sharey=True)
    for axis, label, chosen, colour in (
            (axes[0, 0], 'right', correct, BLUE),
            (axes[1, 0], 'wrong', ~correct, ORANGE),
    ):
        number = int(chosen.sum())
        share = torch.histc(confidence[chosen].float(), bins=20, min=0, max=1) / max(1, number)
        axis.bar((torch.arange(20) / 20).tolist(), share.tolist(), 0.05, align='edge', color=colour, edgecolor='white')
        axis.set_ylabel(f'share of {label}\n({number:,} images)', fontsize=LABEL)
    axes[0, 0].set_title('Confidence of right and wrong predictions', fontsize=LABEL)
    axes[0, 0].set_xlim(0, 1)
    axes[1, 0].set_xlabel('confidence', fontsize=LABEL)
    save(figure, path)


def risk_coverage_diagram(curves: list[tuple[str, torch.Tensor, torch.Tensor]], path: str | Path) -> None:
    """Writes risk-coverage curves in one picture.

    Args:
        curves: Name, confidence [N] and correct [N] of each model.
        path: The PNG file to write.
    """
    if not curves:
        raise ValueError('curves is empty: there is nothing to draw')
    figure, [[axis]] = new_figure(5.2, 4.0 + 0.25 * len(curves))
    lines, names = [], []  # as a label of a line that begins with an underscore would be left out of the legend
    for number, (name, confidence, correct) in enumerate(curves):
        coverage, risk = risk_coverage(confidence, correct)
        lines += axis.plot(coverage.numpy(), risk.numpy(), **line_style(number), linewidth=1.8)
        names.append(f'{literal(name, 3.0, SMALL)} (area {100 * float(risk.mean()):.1f} %)')
    axis.set_title('Error when only the most confident are kept', fontsize=TITLE)
    axis.set_xlabel('coverage', fontsize=LABEL)
    axis.set_ylabel('error of those kept', fontsize=LABEL)
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
    figure.legend(lines, names, loc='outside lower center', frameon=False, fontsize=SMALL)
    save(figure, path)


def class_diagram(
        predicted: torch.Tensor,
        confidence: torch.Tensor,
        correct: torch.Tensor,
        path: str | Path,
        class_names: list[str] | None = None,
        heading: str = '',
        limit: int = 30,
) -> None:
    """Writes accuracy and mean confidence of the images put into each class, the largest gaps on top.

    Args:
        predicted: Predicted classes [N].
        confidence: Top probabilities [N].
        correct: Whether the prediction is right, [N].
        path: The PNG file to write.
        class_names: Names by class number; the numbers if None.
        heading: Name of the model.
        limit: At most this many classes are drawn.
    """
    check_pairs(confidence, correct)
    predicted = torch.as_tensor(predicted).cpu()
    if predicted.shape != torch.as_tensor(confidence).shape:
        raise ValueError(f'predicted has shape {list(predicted.shape)}; expected [{len(confidence)}] like confidence')
    count = torch.bincount(predicted)
    acc = torch.bincount(predicted, torch.as_tensor(correct).cpu().double()) / count.clamp(min=1)
    conf = torch.bincount(predicted, torch.as_tensor(confidence).cpu().double()) / count.clamp(min=1)
    classes = [k for k in (acc - conf).abs().argsort(descending=True, stable=True).tolist() if count[k]]
    shown = classes[:limit][::-1]
    # The label at the side needs the height of five classes, however few there are.
    figure, [[axis]] = new_figure(6.2, 2.0 + 0.26 * max(len(shown), 5), heading=heading)
    rows = range(len(shown))
    axis.hlines(rows, acc[shown].tolist(), conf[shown].tolist(), color=GREY, linewidth=2)
    axis.plot(acc[shown].tolist(), rows, 'o', color=BLUE, markersize=7, label='accuracy', clip_on=False)
    axis.plot(
        conf[shown].tolist(), rows, 'D', color=ORANGE, markerfacecolor='white', markeredgewidth=1.8, markersize=6,
        label='mean confidence', clip_on=False,
    )
    names = [str(k) if class_names is None else literal(class_names[k], 2.0, SMALL) for k in shown]
    axis.set_yticks(rows, [f'{name} ({int(count[k])})' for name, k in zip(names, shown)])
    axis.set(xlim=(0, 1), ylim=(-0.6, len(shown) - 0.4))
    axis.set_ylabel('predicted class\n(number of images)', fontsize=LABEL)
    part = '' if len(shown) == len(classes) else f': the {len(shown)} largest gaps of {len(classes)} classes'
    axis.set_title(f'Calibration by class{part}', fontsize=LABEL, loc='right')  # long names leave it little room
    figure.legend(loc='outside lower center', ncols=2, frameon=False, fontsize=SMALL)
    save(figure, path)


NAMED_CLASSES = 30  # up to so many, a confusion matrix has their names and numbers
MATRIX_DOTS = 250  # a larger one is drawn with so many dots at most, each for several classes
LISTED_CONFUSIONS = 25


def _shade(matrix: np.ndarray, dot: int) -> np.ndarray:
    """Colours [D, D, 3] of a confusion matrix [K, K], a dot for `dot` x `dot` classes.

    Blue is the share of a class that is right (of a dot the mean), orange the share that goes into another class (of a
    dot the largest, since a single one would vanish in a mean). Both grow with the root: shares of some percent show.
    """
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    right, has_images = np.diag(share), matrix.any(1)
    wrong = share - np.diag(right)
    dots = -(-len(matrix) // dot)
    wrong = np.pad(wrong, (0, dots * dot - len(matrix))).reshape(dots, dot, dots, dot).max((1, 3))
    starts = np.arange(0, len(matrix), dot)
    mean = np.add.reduceat(right, starts) / np.maximum(np.add.reduceat(has_images.astype(int), starts), 1)
    white = np.ones(3)

    def tint(strength, colour):
        return white + np.sqrt(strength)[..., None] * (np.array(to_rgb(colour)) - white)

    colours = tint(wrong, ORANGE)
    rows = np.arange(dots)
    # Where classes of one dot are confused with each other, it shows the stronger of both.
    stronger = np.where((mean >= wrong[rows, rows])[:, None], tint(mean, BLUE), colours[rows, rows])
    colours[rows, rows] = stronger
    return colours


def confusion_diagram(
        matrix: torch.Tensor,
        path: str | Path,
        class_names: list[str] | None = None,
        heading: str = '',
) -> None:
    """Writes a confusion matrix: true classes as rows, predicted ones as columns.

    Few classes have their names at the sides and their numbers of images in the fields. Many have their numbers at the
    sides, and beside the matrix a list of what is confused most often, by name.

    Args:
        matrix: Numbers of images [K, K], int64.
        path: The PNG file to write.
        class_names: Names by class number; the numbers if None.
        heading: Name of the model.
    """
    counts = torch.as_tensor(matrix).cpu().numpy()
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.any():
        raise ValueError(f'matrix has shape {list(counts.shape)} and {counts.sum()} images; expected [K, K] and some')
    num_classes = len(counts)
    names = list(map(str, range(num_classes))) if class_names is None else class_names
    named, dot = num_classes <= NAMED_CLASSES, -(-num_classes // MATRIX_DOTS)
    if named:
        side = max(3.2, 0.42 * num_classes)
        figure, [[axis]] = new_figure(side + 2.4, side + 2.4)
    else:
        figure, [[axis, beside]] = new_figure(14, 8.2, 1, 2, width_ratios=[1.25, 1])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    # Classes lie at whole numbers, also where a dot holds several of them.
    edge = -(-num_classes // dot) * dot - 0.5
    axis.imshow(_shade(counts, dot), extent=(-0.5, edge, edge, -0.5), interpolation='nearest')
    axis.set(xlim=(-0.5, num_classes - 0.5), ylim=(num_classes - 0.5, -0.5))
    axis.set_xlabel('predicted class', fontsize=11)
    axis.set_ylabel('true class', fontsize=11)
    error = 1 - np.trace(counts) / counts.sum()
    title = f'{literal(heading, 5)}\n' if heading else ''
    axis.set_title(f'{title}{counts.sum():,} images, error {100 * error:.1f} %', fontsize=13)
    if named:
        shown = [literal(name, 2, 10) for name in names]
        axis.set_xticks(range(num_classes), shown, rotation=90 if max(map(len, shown)) > 3 else 0)
        axis.set_yticks(range(num_classes), shown)
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        for i, j in zip(*counts.nonzero()):
            axis.text(j, i, EngFormatter(sep='', places=0)(counts[i, j]) if counts[i, j] > 9999 else str(counts[i, j]),
                      ha='center', va='center', fontsize=9, color='white' if share[i, j] > 0.35 else 'black')
    else:
        axis.locator_params(integer=True, nbins=11)
        _list_confusions(beside, counts, names)
    dots = f', a dot for {dot} x {dot} classes' if dot > 1 else ''
    figure.legend(
        handles=[Patch(color=BLUE, label='right'),
                 Patch(color=ORANGE, label=f'wrong (darker: a larger share of the true class{dots})')],
        loc='outside lower center', ncols=2 if not named or num_classes > 8 else 1, frameon=False, fontsize=10,
    )
    save(figure, path)


def _list_confusions(axis: Axes, counts: np.ndarray, names: list[str]) -> None:
    """Fills axes with the most frequent confusions, as bars with the names of both classes above them."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind='stable')[:LISTED_CONFUSIONS]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, wrong.shape)) if wrong[i, j]]
    axis.set_axis_off()
    axis.set_title(f'The {len(pairs)} most frequent confusions' if pairs else 'Nothing is confused', fontsize=13)
    axis.set(xlim=(0, 1), ylim=(LISTED_CONFUSIONS - 0.4, -0.6))
    largest = max((wrong[pair] for pair in pairs), default=1)
    for row, (i, j) in enumerate(pairs):
        axis.barh(row + 0.28, wrong[i, j] / largest, 0.22, color=ORANGE)
        true, predicted = (f'{literal(names[k], 1.75, 9)} ({k})' if names[k] != str(k) else str(k) for k in (i, j))
        axis.text(0, row + 0.1, f'{true} \N{RIGHTWARDS ARROW} {predicted}', fontsize=9, va='bottom')
        axis.text(1, row + 0.1, f'{wrong[i, j]:,} of {counts[i].sum():,}', fontsize=9, va='bottom', ha='right',
                  color=GREY)


# ---------------------------------------------------------------------------------------------------------------------
# Training curves


class Curve(NamedTuple):
    """The training of one setting.

    Attributes:
        label: Its name.
        updates: Numbers of updates [N] at which it was evaluated.
        metrics: By metric (`error`, `ece`) its mean over seeds and its deviation, N of each, in percent. The deviation
            is None for one seed.
        warmup: Updates before CalibrateMix starts; None without it.
    """
    label: str
    updates: list[int]
    metrics: dict[str, tuple[list[float], list[float] | None]]
    warmup: int | None


def _draw_curves(curves: list[Curve], metric: str, axis: Axes) -> None:
    """One metric of all settings, and where their warmup ends: one grey line if it does so for all at once."""
    ends = {curve.warmup for curve in curves} - {None}
    for i, curve in enumerate(curves):
        style = line_style(i)
        mean, deviation = curve.metrics[metric]
        axis.plot(
            curve.updates, mean, **style, markersize=4, marker='o' if len(curve.updates) < 20 else None,
            label=literal(curve.label, CURVES_WIDTH - 1.2, SMALL),
        )
        if deviation is not None:
            low, high = ([m + sign * d for m, d in zip(mean, deviation)] for sign in (-1, 1))
            axis.fill_between(curve.updates, low, high, color=style['color'], alpha=0.12, linewidth=0)
        if len(ends) > 1 and curve.warmup is not None:
            axis.axvline(curve.warmup, **style, linewidth=1)
    if len(ends) == 1:
        axis.axvline(*ends, color=GREY, linestyle=(0, (1, 2)), linewidth=1.5, label='end of warmup')
    elif ends:
        axis.plot([], [], color='none', label='upright lines: end of warmup')
    axis.set_xlabel('updates', fontsize=LABEL)
    axis.set_xlim(left=0)
    axis.locator_params(axis='x', integer=True, nbins=7)


CURVES_WIDTH = 11.  # inches


def training_curves(panels: list[tuple[str, list[Curve]]], path: str | Path) -> None:
    """Writes error and ECE against updates side by side, a line of pictures for each panel.

    Args:
        panels: Heading and curves of each.
        path: The PNG file to write.
    """
    columns, heights = [], []
    for _, curves in panels:
        widest = max(sum(map(_width, _shown(curve.label))) for curve in curves) * SMALL / 72 + 0.8  # and its line
        columns.append(min(4, len(curves) + 1, max(1, int((CURVES_WIDTH - 0.4) / widest))))
        heights.append(4.2 + 0.2 * -(-(len(curves) + 1) // columns[-1]))
    figure = Figure(figsize=(CURVES_WIDTH, sum(heights)), dpi=150, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (heading, curves), part, ncols in zip(panels, parts, columns):
        part.suptitle(literal(heading, CURVES_WIDTH - 0.4, TITLE, lines=2), fontsize=TITLE)
        [[left, right]] = new_axes(part, 1, 2)
        _draw_curves(curves, 'error', left)
        _draw_curves(curves, 'ece', right)
        left.set_ylabel('error %', fontsize=LABEL)
        right.set_ylabel('ECE %', fontsize=LABEL)
        right.set_ylim(bottom=0)
        part.legend(
            *left.get_legend_handles_labels(), loc='outside lower center', ncols=ncols, frameon=False, fontsize=SMALL,
            handlelength=3,
        )
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Error and ECE


class Move(NamedTuple):
    """From a base method to what was added to it, with one seed.

    Attributes:
        method: Name of the base method.
        variant: Name of what was added.
        base: Error and ECE of the base method, in percent.
        other: Of the variant.
    """
    method: str
    variant: str
    base: tuple[float, float]
    other: tuple[float, float]


def error_ece_diagram(panels: list[tuple[str, list[Move]]], path: str | Path) -> None:
    """Writes ECE against error, side by side: a mark a method and seed, and an arrow from it to each variant.

    Args:
        panels: Heading and moves of each.
        path: The PNG file to write.
    """
    width = CURVES_WIDTH if len(panels) > 1 else 7.5
    variants = list(dict.fromkeys(move.variant for _, moves in panels for move in moves))
    methods = dict.fromkeys(move.method for _, moves in panels for move in moves)
    shapes = dict(zip(methods, cycle('osD^vP*X<>pdhH8')))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(width, 5.2 * rows + 0.2 * len(variants) + 0.1 * len(methods), rows, columns)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for (heading, moves), axis in zip(panels, axes.flat):
        axis.set_title(literal(heading, width / columns - 0.6, LABEL, lines=2), fontsize=LABEL)
        for move in moves:
            colour, marker = line_style(variants.index(move.variant))['color'], shapes[move.method]
            axis.annotate('', move.other, move.base, arrowprops=dict(arrowstyle='->', color=colour, alpha=0.6))
            axis.plot(*move.other, marker=marker, markersize=5, color=colour, linestyle='none')
            axis.plot(*move.base, marker=marker, markersize=6, color=GREY, fillstyle='none', linestyle='none')
        axis.set_xlabel('error %, a mark for each run', fontsize=LABEL)
        axis.set_ylabel('ECE %', fontsize=LABEL)
        axis.margins(x=0.08)
        axis.set_ylim(0, 1.08 * max(point[1] for move in moves for point in (move.base, move.other)) or 1)
    marks = [Line2D([], [], marker=marker, markersize=6, color=GREY, fillstyle='none', linestyle='none')
             for marker in shapes.values()]
    marks += [Line2D([], [], **dict(line_style(i), linestyle='-')) for i in range(len(variants))]
    names = [f'{literal(method, width - 2, SMALL)} alone' for method in shapes]
    names += [f'to {literal(variant, width - 1.2, SMALL)}' for variant in variants]
    widest = max(sum(map(_width, _shown(name))) for name in names) * SMALL / 72 + 0.8  # and its mark
    ncols = min(3, len(names), max(1, int((width - 0.4) / widest)))
    figure.legend(marks, names, loc='outside lower center', ncols=ncols, frameon=False, fontsize=SMALL)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Contact sheet

SHEET_COLUMNS = 8
CELL = (1.35, 1.85)  # inches


class Cell(NamedTuple):
    """A labeled image on a contact sheet.

    Attributes:
        image: Shown as it is, so shrink it before: a sheet holds all of them at once.
        label: Name of the class that it was given.
        true_label: Name of the right class where that is known to be another one, else None.
        note: Stands below, in one line or two.
    """
    image: Image.Image
    label: str
    true_label: str | None
    note: str


def contact_sheet(parts: list[tuple[str, list[Cell]]], path: str | Path) -> None:
    """Writes groups of images with their labels, one above the other; those of wrong labels are framed.

    Args:
        parts: Title and images of each group.
        path: The PNG file to write.
    """
    sheet_width = SHEET_COLUMNS * CELL[0]
    titles = [literal(title, sheet_width - 0.4, TITLE - 1, lines=2) for title, _ in parts]
    heights = [max(1, math.ceil(len(cells) / SHEET_COLUMNS)) * CELL[1] + 0.6 + 0.2 * title.count('\n')
               for title, (_, cells) in zip(titles, parts)]
    figure = Figure(figsize=(sheet_width, sum(heights)), dpi=150, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    panels = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights).flatten()
    for panel, title, (_, cells) in zip(panels, titles, parts):
        panel.suptitle(title, fontsize=TITLE - 1)
        lines = max(1, math.ceil(len(cells) / SHEET_COLUMNS))
        axes = panel.subplots(lines, SHEET_COLUMNS, squeeze=False).flatten()
        for axis in axes:
            axis.set_axis_off()
        for axis, cell in zip(axes, cells):
            side = max(cell.image.size)
            square = ImageOps.pad(cell.image, (side, side), color='white')  # so that captions stand in a line
            axis.imshow(np.asarray(square), interpolation='nearest' if side < 64 else 'antialiased')
            axis.set_axis_on()
            axis.set(xticks=[], yticks=[])
            wrong = cell.true_label is not None
            names = [cell.label] + ([f'true: {cell.true_label}'] if wrong else [])
            style = dict(color=ORANGE, fontweight='bold') if wrong else {}
            # Bold letters are wider than the plain ones that are measured.
            width = 0.85 * CELL[0] if wrong else 0.95 * CELL[0]
            axis.set_title('\n'.join(literal(name, width, 8, lines=2) for name in names), fontsize=8, **style)
            note = '\n'.join(literal(line, 0.95 * CELL[0], 8) for line in cell.note.split('\n'))
            axis.set_xlabel(note, fontsize=8, color=GREY)
            axis.spines[:].set(color=ORANGE if wrong else '0.8', linewidth=3 if wrong else 0.8)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Cost


def complexity_diagram(panels: dict[str, dict[int, list[float]]], path: str | Path) -> None:
    """Writes how a step's time grows with each of several sizes: medians, and quartiles as bars.

    Args:
        panels: By the name of a size, the measured milliseconds of each of its values.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(13, 3), dpi=120, layout='constrained')
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, found) in zip(axes, panels.items()):
        low, middle, high = np.percentile(list(found.values()), (25, 50, 75), axis=1)
        axis.errorbar(list(found), middle, [middle - low, high - middle], marker='o', capsize=3)
        axis.set(xscale='log', xlabel=title)
        axis.set_xticks(list(found), [EngFormatter(sep='')(value) for value in found])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yscale('log')
    axes[0].set_ylabel('ms a step')
    save(figure, path)
