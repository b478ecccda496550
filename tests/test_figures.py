"""Pictures, by what can be measured on them."""
import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import figures
import metrics


def colour_share(path, rgb):
    picture = imread(path)[..., :3]
    return (np.abs(picture - np.array(rgb) / 255).max(axis=2) < 0.02).mean()


def test_the_reliability_diagram_shows_over_and_underconfidence_in_their_colours(tmp_path):
    confidence = torch.linspace(0.3, 0.9, 61)
    orange, green = (0xF6, 0xCB, 0xB0), (0xBF, 0xE6, 0xDA)
    for name, correct in (('over', 0), ('under', 1)):
        bins = metrics.reliability_bins(confidence, torch.full((61,), correct))
        figures.reliability_diagram([(name, bins)], tmp_path / f'{name}.png')
    assert colour_share(tmp_path / 'over.png', orange) > 5 * colour_share(tmp_path / 'over.png', green)
    assert colour_share(tmp_path / 'under.png', green) > 5 * colour_share(tmp_path / 'under.png', orange)


def test_more_than_six_reliability_diagrams_take_another_line(tmp_path):
    panels = [('', metrics.reliability_bins([0.5], [1]))] * 7
    figures.reliability_diagram(panels[:6], tmp_path / 'six.png')
    figures.reliability_diagram(panels, tmp_path / 'seven.png')
    (height, width, _), (higher, same, _) = (imread(tmp_path / f'{name}.png').shape for name in ('six', 'seven'))
    assert same == width and higher == 2 * height


def test_pictures_are_written_for_hard_inputs_too(tmp_path):
    saturated = torch.ones(30)
    correct = torch.arange(30) % 3 > 0
    panels = [
        ('equal width', metrics.reliability_bins(saturated, correct)),
        ('equal mass', metrics.equal_mass_bins(saturated, correct)),
        ('one sample', metrics.reliability_bins([0.5], [1])),
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
