"""Everything that is drawn, as PNG. Colours and the look of all pictures are in one place, at the top.

Nothing here uses pyplot, so that no display and no global state is touched.
"""
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageOps

from metrics import ReliabilityBins, check_pairs, risk_coverage

# From the palette of Okabe and Ito (2008), whose colours colour-blind readers can tell apart.
BLUE = '#0072B2'
ORANGE = '#D55E00'
GREEN = '#009E73'
GREY = '#6E6E6E'
LINES = ((BLUE, '-'), (ORANGE, '--'), (GREEN, '-.'), ('#CC79A7', ':'), ('black', '-'), ('#E69F00', '--'))


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure (inches) and its axes [rows, columns]."""
    figure = Figure(figsize=(width, height), dpi=150, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[['top', 'right']].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(color='0.9', linewidth=0.8)
        axis.tick_params(labelsize=10)
    return figure, axes


def literal(text: str, inches: float = math.inf, size: float = 13) -> str:
    """A text for matplotlib that is drawn as it reads; if it needs more than this width it loses its middle."""
    text, limit = ' '.join(text.split()), max(3, int(min(inches * 72 / (0.55 * size), 1e9)))
    text = text if len(text) <= limit else f'{text[:(limit - 1) // 2]}…{text[-(limit // 2):]}'
    return text.replace('$', r'\$')  # two dollar signs would start mathematics


def reliability_diagram(panels: 'list[tuple[str, ReliabilityBins]]', path: str) -> None:
    """Writes reliability diagrams side by side, six in a line, each above the histogram of its confidence.

    Blue bars are a bin's accuracy. A hatched box reaches from there to the bin's mean confidence: upwards and orange
    where the model claims too much, downwards and green where it claims too little. ECE of these bins is in the title.

    Args:
        panels: Title and bins (`reliability_bins`, `equal_mass_bins`, `EvalMeter.bins`) of each diagram.
        path: The PNG file to write; its folder must exist.
    """
    if not panels:
        raise ValueError('panels is empty: there is no diagram to draw')
    over = {'facecolor': '#F6CBB0', 'edgecolor': ORANGE, 'hatch': '////', 'linewidth': 0.8}
    under = {'facecolor': '#BFE6DA', 'edgecolor': GREEN, 'hatch': '\\\\\\\\', 'linewidth': 0.8}
    columns = min(len(panels), 6)
    lines = -(-len(panels) // columns)
    figure, axes = new_figure(
        0.9 + 3.9 * columns, 6.6 * lines, 2 * lines, columns, sharex=True, sharey='row',
        height_ratios=[3.4, 1] * lines,
    )
    pairs = [pair for line in range(lines) for pair in axes[2 * line:2 * line + 2].T]
    for axis in [axis for pair in pairs[len(panels):] for axis in pair]:
        axis.remove()
    for (title, bins), (top, bottom) in zip(panels, pairs):
        filled = bins.count > 0
        # A bin of equal confidences has no width in an equal-mass diagram; it is drawn as a thin bar.
        width = bins.edges.diff().clamp(min=0.005)[filled].tolist()
        left = bins.edges[:-1][filled].clamp(max=0.995).tolist()
        acc, gap, weight = bins.accuracy[filled], bins.gap[filled], bins.weight[filled]
        top.bar(left, acc.tolist(), width, align='edge', color=BLUE, edgecolor='white', linewidth=0.6)
        for style, height in ((over, gap.clamp(min=0)), (under, gap.clamp(max=0))):
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
        top.set_title(f'{title}\nECE {100 * bins.ece:.1f} %', fontsize=13)
        bottom.bar(left, weight.tolist(), width, align='edge', color='0.75', edgecolor='white', linewidth=0.6)
        bottom.axvline(float((weight * acc).sum()), color=BLUE, linewidth=2)
        bottom.axvline(float((weight * (acc + gap)).sum()), color=ORANGE, linewidth=2, linestyle='--')
        bottom.set_xlabel('confidence', fontsize=11)
        bottom.tick_params(labelbottom=True)  # sharex leaves them to the last line
        top.set(xlim=(0, 1), ylim=(0, 1))
    for top, bottom in axes[:, 0].reshape(lines, 2):
        top.set_ylabel('accuracy', fontsize=11)
        bottom.set_ylabel('share of\nsamples', fontsize=11)
        bottom.locator_params(axis='y', nbins=3)
    figure.legend(
        handles=[
            Patch(color=BLUE, label='accuracy'),
            Patch(label='overconfident', **over),
            Patch(label='underconfident', **under),
            Line2D([], [], color='black', linestyle='--', label='calibrated'),
            Line2D([], [], color=BLUE, linewidth=2, label='mean accuracy'),
            Line2D([], [], color=ORANGE, linewidth=2, linestyle='--', label='mean confidence'),
        ],
        loc='outside lower center',
        ncols={1: 2, 2: 3}.get(len(panels), 6),
        frameon=False,
        fontsize=10,
    )
    figure.savefig(path)


def confidence_histogram(
        confidence: torch.Tensor,
        correct: torch.Tensor,
        path: str,
        title: str = 'Confidence of right and wrong predictions',
) -> None:
    """Writes the histograms (20 bins) of the confidence of right and of wrong predictions, each adding up to 1."""
    confidence, correct = check_pairs(confidence, correct)
    figure, axes = new_figure(5.2, 4.4, 2, 1, sharex=True, sharey=True)
    for axis, label, chosen, colour in (
            (axes[0, 0], 'right', correct, BLUE),
            (axes[1, 0], 'wrong', ~correct, ORANGE),
    ):
        number = int(chosen.sum())
        share = torch.histc(confidence[chosen].float(), bins=20, min=0, max=1) / max(1, number)
        axis.bar((torch.arange(20) / 20).tolist(), share.tolist(), 0.05, align='edge', color=colour, edgecolor='white')
        axis.set_ylabel(f'share of {label}\n({number:,} images)', fontsize=11)
    axes[0, 0].set_title(title, fontsize=13)
    axes[0, 0].set_xlim(0, 1)
    axes[1, 0].set_xlabel('confidence', fontsize=11)
    figure.savefig(path)


def risk_coverage_diagram(curves: 'list[tuple[str, torch.Tensor, torch.Tensor]]', path: str) -> None:
    """Writes risk-coverage curves in one picture.

    Args:
        curves: Label, confidence [N] and correct [N] of each model.
        path: The PNG file to write.
    """
    if not curves:
        raise ValueError('curves is empty: there is nothing to draw')
    figure, [[axis]] = new_figure(5.2, 4.0 + 0.25 * len(curves))
    for number, (label, confidence, correct) in enumerate(curves):
        coverage, risk = risk_coverage(confidence, correct)
        colour, line = LINES[number % len(LINES)]
        axis.plot(
            coverage.numpy(), risk.numpy(), color=colour, linestyle=line, linewidth=1.8,
            label=f'{label} (area {100 * float(risk.mean()):.1f} %)',
        )
    axis.set_title('Error when only the most confident are kept', fontsize=13)
    axis.set_xlabel('coverage', fontsize=11)
    axis.set_ylabel('error of those kept', fontsize=11)
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
    figure.legend(loc='outside lower center', frameon=False, fontsize=10)
    figure.savefig(path)


def class_diagram(
        predicted: torch.Tensor,
        confidence: torch.Tensor,
        correct: torch.Tensor,
        path: str,
        class_names: 'list[str] | None' = None,
        limit: int = 30,
) -> None:
    """Writes accuracy and mean confidence of the images put into each class, the largest gaps on top.

    Args:
        predicted: Predicted classes [N].
        confidence: Top probabilities [N].
        correct: Whether the prediction is right, [N].
        path: The PNG file to write.
        class_names: Names by class number; the numbers if None.
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
    figure, [[axis]] = new_figure(5.6, 1.6 + 0.26 * len(shown))
    rows = range(len(shown))
    axis.hlines(rows, acc[shown].tolist(), conf[shown].tolist(), color=GREY, linewidth=2)
    axis.plot(acc[shown].tolist(), rows, 'o', color=BLUE, markersize=7, label='accuracy', clip_on=False)
    axis.plot(
        conf[shown].tolist(), rows, 'D', color=ORANGE, markerfacecolor='white', markeredgewidth=1.8, markersize=6,
        label='mean confidence', clip_on=False,
    )
    names = [str(k) if class_names is None else class_names[k] for k in shown]
    axis.set_yticks(rows, [f'{name} ({int(count[k])})' for name, k in zip(names, shown)])
    axis.set(xlim=(0, 1), ylim=(-0.6, len(shown) - 0.4))
    axis.set_ylabel('predicted class (images)', fontsize=11)
    part = '' if len(shown) == len(classes) else f'\n(the {len(shown)} largest gaps of {len(classes)} classes)'
    axis.set_title(f'Calibration by class{part}', fontsize=13)
    figure.legend(loc='outside lower center', ncols=2, frameon=False, fontsize=10)
    figure.savefig(path)


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
    figure.savefig(path)


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


def training_curves(panels: list[tuple[str, list[Curve]]], path: str | Path) -> None:
    """Writes error and ECE against updates side by side, a line of pictures for each panel.

    Args:
        panels: Title and curves of each.
        path: The PNG file to write.
    """
    figure, axes = new_figure(13, 4.2 * len(panels), len(panels), 2)
    for (title, curves), pair in zip(panels, axes):
        ends = {curve.warmup for curve in curves} - {None}
        for i, curve in enumerate(curves):
            color, style = LINES[i % len(LINES)][0], LINES[(i + i // len(LINES)) % len(LINES)][1]
            for axis, (mean, deviation) in zip(pair, (curve.metrics['error'], curve.metrics['ece'])):
                axis.plot(curve.updates, mean, color=color, linestyle=style, markersize=4,
                          marker='o' if len(curve.updates) < 20 else None, label=curve.label)
                if deviation is not None:
                    low, high = ([m + sign * d for m, d in zip(mean, deviation)] for sign in (-1, 1))
                    axis.fill_between(curve.updates, low, high, color=color, alpha=0.12, linewidth=0)
                if len(ends) > 1 and curve.warmup is not None:
                    axis.axvline(curve.warmup, color=color, linestyle=style, linewidth=1)
        if len(ends) > 1:
            pair[1].plot([], [], color='none', label='upright: end of warmup')
        for axis, name in zip(pair, ('error %', 'ECE %')):
            if len(ends) == 1:
                axis.axvline(*ends, color=GREY, linestyle=(0, (1, 2)), linewidth=1.5, label='end of warmup')
            axis.set_title(title, fontsize=12)
            axis.set(xlabel='updates', ylabel=name)
            axis.set_xlim(left=0)
            axis.locator_params(axis='x', integer=True, nbins=7)
        pair[1].set_ylim(bottom=0)
        pair[1].legend(loc='center left', bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=10,
                       handlelength=3)
    figure.savefig(path)


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
        note: Stands below.
    """
    image: Image.Image
    label: str
    true_label: str | None
    note: str


def contact_sheet(parts: 'list[tuple[str, list[Cell]]]', path: str | Path) -> None:
    """Writes two groups of images with their labels, one above the other; those of wrong labels are framed.

    Args:
        parts: Title and images of both. The first has at least as many images.
        path: The PNG file to write.
    """
    lines = math.ceil(len(parts[0][1]) / SHEET_COLUMNS)
    figure = Figure(figsize=(SHEET_COLUMNS * CELL[0], 2 * (lines * CELL[1] + 0.6)), dpi=150, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)

    def caption(before, name):
        return textwrap.fill(before + name.replace('_', ' '), 16, max_lines=2, placeholder='…')

    for panel, (title, cells) in zip(figure.subfigures(2, 1), parts):
        panel.suptitle(title, fontsize=12)
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
            text = [caption('', cell.label)] + ([caption('true: ', cell.true_label)] if wrong else [])
            style = dict(color=ORANGE, fontweight='bold') if wrong else {}
            axis.set_title('\n'.join(text), fontsize=8, **style)
            axis.set_xlabel(cell.note, fontsize=8, color=GREY)
            axis.spines[:].set(color=ORANGE if wrong else '0.8', linewidth=3 if wrong else 0.8)
    figure.savefig(path, format='png')


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
    figure.savefig(path)
