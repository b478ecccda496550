"""Pictures, by what can be measured on them."""
import ast
import itertools
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.image import imread
from matplotlib.text import Text
from PIL import Image

import figures
import metrics

# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def colour_share(path, rgb):
    picture = imread(path)[..., :3]
    return (np.abs(picture - np.array(rgb) / 255).max(axis=2) < 0.02).mean()


def test_the_reliability_diagram_shows_over_and_underconfidence_in_their_colours(tmp_path):
    confidence = torch.linspace(0.3, 0.9, 61)
    orange, green = (0xF6, 0xCB, 0xB0), (0xBF, 0xE6, 0xDA)
    for name, correct in (('over', 0), ('under', 1)):
        bins = metrics.reliability_bins(confidence, torch.full((61,), correct))
        figures.reliability_diagram([figures.Panel(name, bins)], tmp_path / f'{name}.png')
    assert colour_share(tmp_path / 'over.png', orange) > 5 * colour_share(tmp_path / 'over.png', green)
    assert colour_share(tmp_path / 'under.png', green) > 5 * colour_share(tmp_path / 'under.png', orange)


def test_pictures_are_written_for_hard_inputs_too(tmp_path):
    saturated = torch.ones(30)
    correct = torch.arange(30) % 3 > 0
    panels = [
        figures.Panel('equal width', metrics.reliability_bins(saturated, correct)),
        figures.Panel('equal mass', metrics.equal_mass_bins(saturated, correct)),
        figures.Panel('one sample', metrics.reliability_bins([0.5], [1])),
    ]
    figures.reliability_diagram(panels[:1], tmp_path / 'one.png')
    figures.reliability_diagram(panels, tmp_path / 'three.png')
    assert imread(tmp_path / 'three.png').shape[1] > 2 * imread(tmp_path / 'one.png').shape[1]
    figures.confidence_histogram(saturated, torch.ones(30), tmp_path / 'all_right.png')
    figures.risk_coverage_diagram([('a', saturated, correct), ('b', [0.5], [0])], tmp_path / 'risk.png')
    figures.class_diagram(torch.arange(30) % 7 + 1, saturated, correct, tmp_path / 'class.png', limit=4)
    figures.class_diagram(torch.zeros(30, dtype=torch.int64), saturated, correct, tmp_path / 'named.png', ['cat'])
    for name in ('all_right', 'risk', 'class', 'named'):
        assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')


# ---------------------------------------------------------------------------------------------------------------------
# Names and places

HARD = (
    '$', 'a$b', 'cost_$5_and_$6', r'$\frac{1}{2}$', r'a\$b\$', r'\alpha^2_{x}', '100%', '{}[]()', '~#&', 'a_b^c',
    'naïve café', "it's \"quoted\"", '<b>|</b>', '–—…',
)
LONG = 'fixmatch+calibratemix-2024-03-01_seed0_lr0.03_wd0.0005_of_a_run_with_a_long_name'
NAMES = [*HARD, LONG, 'W' * 60, 'two\nlines\tand a tab', 'bytes\udcff.png']


def drawing(text: str, **options) -> bytes:
    figure = Figure(figsize=(3, 0.4))
    figure.text(0.02, 0.3, text, fontsize=13, **options)
    buffer = BytesIO()
    figure.savefig(buffer, format='rgba')
    return buffer.getvalue()


def test_names_are_drawn_letter_by_letter():
    for name in HARD:
        assert drawing(figures.literal(name)) == drawing(name, parse_math=False), name
    assert drawing('$x^2$') != drawing('$x^2$', parse_math=False)


def test_what_cannot_be_seen_and_no_letter_is_told_by_its_code():
    assert figures.literal('two\nlines\tand\x7f') == r'two\nlines\tand\x7f'
    assert figures.literal('bytes\udcff.png') == r'bytes\udcff.png'


@pytest.fixture
def few_fonts(monkeypatch):
    """As on a machine that has no fonts but those of matplotlib."""
    caches = (figures._usual, figures._others, figures._family, figures._width)
    own = [font for font in fontManager.ttflist if font.name.startswith(('DejaVu', 'STIX', 'cm', 'Last'))]
    monkeypatch.setattr(fontManager, 'ttflist', own)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def font_of_one_letter(path: Path, letter: str) -> None:
    """A font that has a letter, drawn as a full square, and no other."""
    builder, pen = FontBuilder(1000), TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder.setupGlyphOrder(['.notdef', 'square'])
    builder.setupCharacterMap({ord(letter): 'square'})
    builder.setupGlyf({'.notdef': TTGlyphPen(None).glyph(), 'square': pen.glyph()})
    builder.setupHorizontalMetrics({'.notdef': (500, 0), 'square': (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=-200)
    builder.setupNameTable({'familyName': 'One Letter', 'styleName': 'Regular'})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.mark.filterwarnings('error')
def test_a_letter_is_drawn_in_a_font_that_has_it_and_else_told_by_its_code(few_fonts, tmp_path):
    shown = (torch.tensor([0, 1]), torch.tensor([0.9, 0.8]), torch.tensor([1, 0]))
    assert figures.literal('数据 中') == r'\u6570\u636e \u4e2d'
    figures.class_diagram(*shown, tmp_path / 'code.png', ['中' * 20, 'b'], heading='中')
    without = colour_share(tmp_path / 'code.png', (0, 0, 0))

    font_of_one_letter(tmp_path / 'one.ttf', '中')
    fontManager.addfont(tmp_path / 'one.ttf')
    for function in (figures._others, figures._family, figures._width):
        function.cache_clear()
    assert figures.literal('数据 中') == r'\u6570\u636e 中'
    assert figures._width('中') == pytest.approx(1, abs=1e-4)
    figures.class_diagram(*shown, tmp_path / 'font.png', ['中' * 9, 'b'], heading='中')
    assert colour_share(tmp_path / 'font.png', (0, 0, 0)) > 1.5 * without  # ten full squares


@pytest.mark.parametrize('lines', [1, 2, 3])
@pytest.mark.parametrize('inches, size', [(1.2, 8), (2., 10), (5., 13)])
def test_a_name_fits_its_place_and_keeps_both_ends(inches, size, lines):
    renderer, font = RendererAgg(100, 100, 72), FontProperties(size=size)
    for name in [*NAMES, LONG.replace('_', ' '), LONG * 5]:
        fitted = figures.literal(name, inches, size, lines)
        rows = fitted.replace(r'\$', '$').split('\n')
        widths = [renderer.get_text_width_height_descent(row, font, False)[0] for row in rows]
        assert len(rows) <= lines and max(widths) <= 72 * inches * 1.03
        whole, one = figures.literal(name).replace(r'\$', '$'), ''.join(rows).replace(' ', '')
        if '…' not in one.replace('–—…', ''):
            assert one == whole.replace(' ', '')
        else:
            assert whole[:4] == rows[0][:4] and whole[-4:] == rows[-1][-4:]


def models(number: int, classes: int = 10) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Predictions, confidence and right or wrong of made-up models."""
    found = []
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(300, classes, generator=generator)
        confidence, correct = metrics.confidence_and_correct(logits, logits.roll(seed + 1, 0).argmax(1))
        found.append((logits.argmax(1), confidence, correct))
    return found


@pytest.fixture
def texts_of(monkeypatch):
    """Draws without writing a file; returns the texts after a look at their places: all inside, none on another."""
    saved, drawn, draw_text = [], {}, Text.draw
    monkeypatch.setattr(figures, 'save', lambda figure, path: saved.append(figure))
    monkeypatch.setattr(Text, 'draw', lambda text, renderer: (drawn.update({text: 1}), draw_text(text, renderer)))

    def check(draw, *arguments, **options) -> list[str]:
        draw(*arguments, 'unused.png', **options)
        check.figure = figure = saved.pop()
        figure.draw_without_rendering()
        places = {text: text.get_window_extent() for text in drawn if text.get_visible() and text.get_text()}
        drawn.clear()
        for text, place in places.items():
            assert place.x0 >= 0 and place.y0 >= 0, text
            assert place.x1 <= figure.bbox.x1 and place.y1 <= figure.bbox.y1, text
        for (one, a), (other, b) in itertools.combinations(places.items(), 2):
            assert min(a.x1, b.x1) - max(a.x0, b.x0) < 1 or min(a.y1, b.y1) - max(a.y0, b.y0) < 1, (one, other)
        return [text.get_text() for text in places]

    return check


@pytest.mark.parametrize('classes', [1, 2, 10, 100])
def test_pictures_of_one_run_name_it_and_show_every_label_whole(classes, texts_of):
    [(predicted, confidence, correct)] = models(1, classes)
    names = list(itertools.islice(itertools.cycle(NAMES), classes))
    for heading in ('run', LONG, 'cost_$5', '数据集' * 5):
        for draw, width, arguments in (
                (figures.class_diagram, 5.8, (predicted, confidence, correct)),
                (figures.confidence_histogram, 4.8, (confidence, correct)),
        ):
            options = dict(class_names=names) if draw is figures.class_diagram else {}
            shown = texts_of(draw, *arguments, heading=heading, **options)
            assert figures.literal(heading, width, 13, 2) in shown


@pytest.mark.parametrize('number', [1, 2, 6, 7])
def test_pictures_of_several_runs_show_every_name_whole(number, texts_of):
    found = models(number)
    names = ['run', LONG, 'cost_$5_and_$6', '数据集_半监督_校准_混合_运行', 'W' * 60, r'a^2_b%{x}\frac', 'seven']
    panels = [figures.Panel(name, metrics.reliability_bins(confidence, correct), '95 %: 14.2 to 16.0')
              for name, (_, confidence, correct) in zip(names, found)]
    shown = texts_of(figures.reliability_diagram, panels, heading='after temperature scaling')
    titles = [text for text in shown if '\nECE ' in text]
    assert len(titles) == number and titles[0].count('\n') == 1 and 'after temperature scaling' in shown
    assert all(title.endswith(' % (95 %: 14.2 to 16.0)') for title in titles)
    width, height = texts_of.figure.get_size_inches()
    assert width == pytest.approx(0.9 + 3.9 * min(number, 6)) and 6.6 <= height / (1 + number // 7) < 7.1
    curves = [(name, confidence, correct) for name, (_, confidence, correct) in zip(names, found)]
    shown = texts_of(figures.risk_coverage_diagram, curves)
    assert sum('(area' in text for text in shown) == number
    lines = texts_of.figure.axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == number


@pytest.mark.parametrize('settings', [
    [['FixMatch, topk 0.05, lr 0.03, opt sgd, weight decay 0.0005'],
     ['SoftMatch + CalibrateMix, topk 0.15, warmup epochs 1, lr 0.1, opt adamw, weight decay 0.001']],
    [['FixMatch', 'FixMatch + CalibrateMix']],
    [[f'method {i}, ' + LONG for i in range(6)]],
    [['cost_$5 and $6'], ['数据集'], ['W' * 200]],
])
def test_training_curves_take_the_page_whatever_the_settings_are_called(settings, texts_of):
    panels = [
        (f'digits, 20 labels, {labels[0]}', [
            figures.Curve(label, [5, 10, 20], dict(error=([50., 40., 30. + i], None), ece=([9., 8., 7.], [1., 1., 1.])),
                          warmup=5 * i if i else None)
            for i, label in enumerate(labels)
        ]) for labels in settings
    ]
    shown = texts_of(figures.training_curves, panels)
    places = [axis.get_position() for axis in texts_of.figure.axes]
    assert len(places) == 2 * len(panels)
    for place in places:
        assert place.width > 0.38 and place.height * len(panels) > 0.4
    for (heading, curves) in panels:
        assert figures.literal(heading, 10.6, 13, 2) in shown
        for curve in curves:
            assert figures.literal(curve.label, 9.8, 10) in shown


@pytest.mark.parametrize('number', [1, 3])
def test_error_against_ece_has_a_mark_and_an_arrow_a_run_and_a_shape_a_method(number, texts_of):
    moves = [figures.Move(method, variant, (50. + i, 20. + 9 * k), (40. + i, 5.)) for i in (0, 1, 30)
             for k, method in enumerate(('FixMatch', 'cost_$5')[:number]) for variant in ('CalibrateMix', 'W' * 200)]
    shown = texts_of(figures.error_ece_diagram, [(f'digits {i}', moves) for i in range(number)])
    axes = [axis for axis in texts_of.figure.axes if axis.axison]
    assert len(axes) == number and {axis.get_title() for axis in axes} == {f'digits {i}' for i in range(number)}
    for axis in axes:
        marks = sorted(tuple(line.get_xydata()[0]) for line in axis.lines)
        assert marks == sorted(point for move in moves for point in (move.base, move.other))
        assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > 1.05 * max(ece for _, ece in marks)  # none is cut off
        arrows = [text for text in axis.texts if text.arrow_patch is not None]
        assert [(text.xyann, text.xy) for text in arrows] == [(move.base, move.other) for move in moves]
        assert len({line.get_marker() for line in axis.lines}) == min(number, 2)
    assert {'FixMatch alone', 'to CalibrateMix'} <= set(shown)
    assert (r'cost_\$5 alone' in shown) == (number > 1)


@pytest.mark.parametrize('name', [r'$\frac{$', 'US$ and CA$', LONG * 5])
def test_the_titles_of_a_contact_sheet_are_drawn_letter_by_letter_on_two_lines_at_most(name, texts_of):
    cell = figures.Cell(Image.new('RGB', (9, 9)), name, name, f'{name}\n{name}')
    titles = [f'{name}: the 1 most sure of 9', f'{name}: the 8 least sure']
    shown = texts_of(figures.contact_sheet, [(titles[0], [cell]), (titles[1], [cell] * 8)])
    assert {figures.literal(title, 10.4, 12, 2) for title in titles} <= set(shown)


@pytest.mark.parametrize('name', ['_run', '$x$'])
def test_a_legend_names_its_curves_whatever_sign_their_names_begin_with(name, texts_of):
    shown = texts_of(figures.risk_coverage_diagram, [(name, torch.tensor([0.9, 0.8]), torch.tensor([1, 0]))])
    assert any(text.startswith(figures.literal(name)) for text in shown)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes and imports
@pytest.mark.parametrize('num_classes', [2, 10, 100, 1000])
def test_a_single_confusion_is_seen_in_a_matrix_of_any_size(tmp_path, num_classes):
    matrix = 50 * torch.eye(num_classes, dtype=torch.int64)
    names = ['$a$, "b"\n', *map(str, range(1, num_classes))]
    path = tmp_path / 'confusion.png'
    figures.confusion_diagram(matrix, path, names, 'run $x$')
    legend = colour_share(path, (0xD5, 0x5E, 0x00)) * imread(path)[..., 0].size
    matrix[0, 1], matrix[0, 0] = 50, 0  # the very colour of the legend: all of a class goes to another
    figures.confusion_diagram(matrix, path, names, 'run $x$')
    picture = imread(path)
    dots = colour_share(path, (0xD5, 0x5E, 0x00)) * picture[..., 0].size - legend
    assert dots >= 9 and min(picture.shape[:2]) > 600


def test_a_dot_for_several_classes_shows_their_largest_confusion_and_their_mean_recall():
    generator = np.random.default_rng(0)
    matrix = generator.integers(0, 3, (7, 7)) + np.diag(generator.integers(2, 30, 7))
    matrix[4] = 0  # a class without images counts in no mean
    share = [[matrix[i, j] / max(1, matrix[i].sum()) for j in range(7)] for i in range(7)]
    found = figures._shade(matrix, 2)
    for a in range(4):
        for b in range(4):
            rows, columns = ([i for i in (2 * d, 2 * d + 1) if i < 7] for d in (a, b))
            strength = max(share[i][j] for i in rows for j in columns if i != j) if (a, b) != (3, 3) else 0
            colour = np.array([0xD5, 0x5E, 0x00]) / 255
            if a == b:
                recall = np.mean([share[i][i] for i in rows if matrix[i].any()])
                if recall >= strength:
                    strength, colour = recall, np.array([0x00, 0x72, 0xB2]) / 255
            assert found[a, b] == pytest.approx(1 + strength ** 0.5 * (colour - 1)), (a, b)


@pytest.mark.parametrize('call, message', [
    (lambda: figures.confusion_diagram(torch.zeros(3, 3), 'x.png'), '0 images'),
    (lambda: figures.confusion_diagram(torch.ones(3, 2), 'x.png'), r'shape \[3, 2\]'),
    (lambda: figures.reliability_diagram([], 'x.png'), 'panels is empty'),
    (lambda: figures.risk_coverage_diagram([], 'x.png'), 'curves is empty'),
    (lambda: figures.class_diagram([0], [0.5, 0.5], [1, 1], 'x.png'), r'predicted has shape \[1\]'),
])
def test_mistakes_raise_and_say_where(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pictures_do_without_pyplot_and_import_nothing_of_ours_but_metrics():
    tree = ast.parse(Path(figures.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {path.stem for path in Path(figures.__file__).parent.glob('*.py')}
    assert modules & ours == {'metrics'} and 'matplotlib.pyplot' not in modules
