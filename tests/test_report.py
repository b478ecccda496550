"""The table and picture of finished runs, and the quickstart that ends in them."""
import argparse
import csv
import json
import os
import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run_script
from PIL import Image

import report
import train_ssl
from methods import ALGORITHMS, LOOKED_AT_BY
from metrics import reliability_bins
from program import UsageError


def test_the_quickstart_ends_in_a_table_a_csv_file_and_a_picture(tmp_path):
    """The launcher itself, from another folder, with few updates; a second call only reports."""
    command = ['bash', ROOT / 'launch/quickstart.sh', '--epochs', '2', '--train-steps-per-epoch', '3',
               '--calmix-warmup-epochs', '1', '--workers', '0']
    environment = dict(os.environ, OUTPUT=str(tmp_path / 'a folder'))
    tables = []
    for _ in range(2):
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        tables.append(result.stdout)
    assert tables[0] == tables[1] and result.stderr.count('is finished') == 2
    folder = tmp_path / 'a folder'
    with open(folder / 'comparison.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['run'] for row in rows] == ['fixmatch', 'fixmatch+calibratemix']
    assert list(rows[0]) == ['run', 'error', 'ece', 'nll', 'confidence']
    for row in rows:
        metrics = json.loads((folder / row['run'] / 'last/metrics.json').read_text())
        assert {key: f'{metrics[key]:.4f}' for key in ('error', 'ece', 'nll', 'confidence')}.items() <= row.items()
        assert f'{metrics["ece"]:.2f}' in tables[0]
    with Image.open(folder / 'reliability.png') as picture:
        assert picture.width > picture.height > 300


def test_a_folder_without_a_run_is_named_in_one_line(tmp_path):
    result = run_script('report.py', tmp_path, '--output', tmp_path / 'out')
    assert result.returncode == 2 and result.stdout == ''
    assert result.stderr.startswith(f'report.py: error: {tmp_path}: no run') and len(result.stderr.splitlines()) == 1


# --- Made-up runs -----------------------------------------------------------------------------------------------------

@pytest.fixture
def make_run(tmp_path):
    """Writes a run folder with given figures, as far as report.py reads it."""
    def make(name, *arguments, error=10., ece=5., nll=0.5, seed=0, updates=None, epochs=2, curve=None):
        folder = tmp_path / 'runs' / name
        (folder / 'last').mkdir(parents=True)
        args = train_ssl._parse_args(['--dataset', 'digits', '--seed', str(seed), '--epochs', str(epochs),
                                      '--train-steps-per-epoch', '5', *arguments])
        (folder / 'args.yaml').write_text(yaml.safe_dump(vars(args)))
        (folder / 'labels.json').write_text(json.dumps({'num_labels': args.num_labels or 130}))
        generator = torch.Generator().manual_seed(seed)
        confidence = torch.rand(50, generator=generator)
        bins = reliability_bins(confidence, torch.rand(50, generator=generator) < confidence)
        metrics = dict(epoch=1, num_updates=5 * epochs if updates is None else updates, error=error, ece=ece, nll=nll,
                       ece_10=ece, brier=0.2, confidence=95.)
        metrics['bins'] = {key: value.tolist() for key, value in bins._asdict().items()}
        (folder / 'last' / 'metrics.json').write_text(json.dumps(metrics))
        rows = [f'{5 * (i + 1)},{value},{value / 2}' for i, value in enumerate(curve or [error] * epochs)]
        (folder / 'summary.csv').write_text('\n'.join(['num_updates,eval_error,eval_ece', *rows]) + '\n')
        return folder

    make.root = tmp_path / 'runs'
    return make


def write(*folders, output, rows=('dataset', 'labels', 'algorithm'), columns=('dataset', 'labels')):
    return report.write_report([report.read_run(folder) for folder in folders], output, list(rows), list(columns))


def markdown_cells(table: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines() if line[:1] == '|']
    assert len({len(line) for line in lines}) == 1 and set(''.join(lines[1])) == {'-'}
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_means_and_deviations_over_seeds_are_numpy_s(make_run, tmp_path):
    values = np.random.default_rng(0).uniform(1, 50, (2, 3, 3))
    folders = [
        make_run(f'{flags}-{seed}', *flags.split(), seed=seed, **dict(zip(('error', 'ece', 'nll'), values[i, seed])))
        for i, flags in enumerate(('--algorithm fixmatch', '--algorithm softmatch')) for seed in range(3)
    ]
    table, _ = write(*folders, output=tmp_path / 'out')
    mean, deviation = values.mean(1), values.std(1, ddof=1)
    for row, m, d in zip(markdown_cells(table), mean, deviation):
        shown = [row[key].strip('*') for key in ('error %', 'ECE %', 'NLL')]
        assert shown == [f'{m[0]:.2f} ± {d[0]:.2f}', f'{m[1]:.2f} ± {d[1]:.2f}', f'{m[2]:.3f} ± {d[2]:.3f}']
    with open(tmp_path / 'out' / 'table.csv', newline='') as file:
        for row, m, d in zip(csv.DictReader(file), mean, deviation):
            assert row['n'] == '3'
            for i, key in enumerate(('error', 'ece', 'nll')):
                assert float(row[f'{key}_mean']) == pytest.approx(m[i], abs=1e-4)
                assert float(row[f'{key}_sd']) == pytest.approx(d[i], abs=1e-4)
    with open(tmp_path / 'out' / 'runs.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['algorithm'], row['seed'], row['updates']) for row in rows] == [
        (algorithm, str(seed), '10') for algorithm in ('fixmatch', 'softmatch') for seed in range(3)]
    assert 'n = 3 seeds' in table


def test_figures_of_rare_classes_go_into_the_files_where_all_runs_have_them(make_run, tmp_path):
    def columns(name):
        with open(tmp_path / 'out' / name, newline='') as file:
            return {key: value for key, value in next(csv.DictReader(file)).items() if 'tail' in key or 'bal' in key}

    folders = [make_run(str(seed), '--imbalance-factor', '50', seed=seed) for seed in range(2)]
    for seed, (folder, tail) in enumerate(zip(folders, (40., 60.))):
        path = folder / 'last' / 'metrics.json'
        path.write_text(json.dumps(dict(json.loads(path.read_text()), balanced_accuracy=70. + seed, tail_error=tail)))
    write(*folders, output=tmp_path / 'out')
    assert columns('runs.csv') == dict(balanced_accuracy='70.0000', tail_error='40.0000')
    assert columns('table.csv') == dict(balanced_accuracy_mean='70.5000', balanced_accuracy_sd='0.7071',
                                        tail_error_mean='50.0000', tail_error_sd='14.1421')
    write(*folders, make_run('older', seed=2), output=tmp_path / 'out')
    assert columns('runs.csv').keys() == {'imbalance_factor'}


def test_a_run_of_an_older_version_without_an_argument_is_in_the_cell_of_the_newer_ones(make_run, tmp_path):
    old, new, other = make_run('old'), make_run('new', seed=1), make_run('other', '--label-noise', '0.2')
    args = yaml.safe_load((old / 'args.yaml').read_text())
    del args['label_noise']
    (old / 'args.yaml').write_text(yaml.safe_dump(args))
    table, _ = write(old, new, output=tmp_path / 'out')
    assert 'label-noise' not in table and len(markdown_cells(table)) == 1
    table, _ = write(old, new, other, output=tmp_path / 'out')  # where it matters, what is not known is not guessed
    assert [row['label-noise'] for row in markdown_cells(table)] == ['–', '0', '0.2']


@pytest.mark.parametrize('cells, bold', [
    ([(10., 1.), (12.5, 1.)], 0),  # 11 < 11.5
    ([(10., 1.), (12., 1.)], None),  # 11 = 11: no difference beyond the spread
    ([(10., 1.), (11.5, 1.)], None),
    ([(13., .1), (12.5, .1), (20., 9.)], None),  # the third reaches down to 11
    ([(13., .1), (12.5, .1), (20., 7.)], 1),  # 12.6 < 12.9 and < 13
    ([(10., None), (90., 1.)], None),  # a single run has no spread
    ([(10., 1.), (90., None)], None),
    ([(10., 1.), None, (90., 1.)], 0),
    ([(10., 1.), None], None),  # nothing to be better than
    ([None, None], None),
])
def test_bold_is_the_best_beyond_the_spread(cells, bold):
    assert report.best(cells) == bold


@pytest.mark.parametrize('change, told', [
    (dict(count=12), 'evaluated on the same images: 500 images of test (r0 and others), 12 images of test (r2)'),
    (dict(split='val'), 'evaluated on the same images: 500 images of test (r0 and others), 500 images of val (r2)'),
    (dict(class_names=['b', 'a']), 'have the same classes, such as r0 and r2'),
    ({}, ''),
])
def test_runs_that_were_evaluated_on_other_images_are_told_below_the_table(make_run, change, told, tmp_path, capsys):
    folders = [make_run(f'r{seed}', seed=seed) for seed in range(3)]
    for folder, changed in zip(folders, ({}, {}, change)):
        path = folder / 'last' / 'metrics.json'
        about = dict(count=500, split='test', class_names=['a', 'b'])
        path.write_text(json.dumps({**json.loads(path.read_text()), **about, **changed}))
    report.main(report._parse_args([*map(str, folders), '--output', str(tmp_path / 'out')]))
    printed = capsys.readouterr().out
    for text in (printed, *((tmp_path / 'out' / name).read_text() for name in ('table.md', 'table.tex'))):
        below = [line for line in text.splitlines() if 'not all runs' in line]
        assert len(below) == bool(told) and all(line.removeprefix('% ').startswith('digits: not') for line in below)
        assert all(line.endswith(told) for line in below)


def test_figures_are_those_of_the_test_split_where_a_run_had_one(train, tmp_path):
    run = train('r', '--val-fraction', '0.3', '--test-split', 'test')
    metrics = json.loads((run / 'last' / 'metrics.json').read_text())
    found = report.read_run(run)['metrics']
    assert found['count'] == 500 != metrics['count'] and found['split'] == 'test'
    assert found['error'] == metrics['test']['error'] and sum(found['bins']['count']) == 500
    table, _ = write(run, output=tmp_path / 'out')
    assert markdown_cells(table)[0]['error %'] == f'{metrics["test"]["error"]:.2f}'


def test_no_figure_of_the_evaluation_split_stands_beside_those_of_the_test_split(make_run, tmp_path):
    folder = make_run('r')
    path = folder / 'last' / 'metrics.json'
    found = json.loads(path.read_text())
    figures = {key: found[key] for key in ('error', 'ece', 'ece_10', 'nll', 'brier', 'confidence', 'bins')}
    about = dict(tail_error=40., macro_f1=70., count=30, split='val', class_names=['a', 'b'])
    path.write_text(json.dumps(dict(found, **about, test=dict(figures, error=8., source='test'))))
    metrics = report.read_run(folder)['metrics']
    assert metrics['error'] == 8 and metrics['split'] == 'test' and metrics['class_names'] == ['a', 'b']
    assert not {'tail_error', 'macro_f1', 'count'} & metrics.keys()
    write(folder, output=tmp_path / 'out')
    assert 'tail_error' not in (tmp_path / 'out' / 'runs.csv').read_text()


def test_bold_and_missing_cells_in_all_forms_of_the_table(make_run, tmp_path):
    folders = [make_run(f'a{seed}', '--num-labels', '20', seed=seed, error=10 + seed) for seed in range(2)]
    folders += [make_run(f'b{seed}', '--num-labels', '20', '--calibratemix', seed=seed, error=5 + seed)
                for seed in range(2)]
    folders += [make_run('c', '--num-labels', '40', '--calibratemix', error=4)]
    table, _ = write(*folders, output=tmp_path / 'out')
    alone, calmix = markdown_cells(table)
    assert alone['error % (digits, 20 labels)'] == '10.50 ± 0.71' and alone['error % (digits, 40 labels)'] == '–'
    assert calmix['error % (digits, 20 labels)'] == '**5.50 ± 0.71**'
    assert calmix['error % (digits, 40 labels)'] == '4.00 (n=1)'
    assert 'n = 2 seeds unless stated; a single run has no deviation' in table
    assert (tmp_path / 'out' / 'table.md').read_text() == table + '\n'

    latex = (tmp_path / 'out' / 'table.tex').read_text().splitlines()
    assert latex[0].startswith('% ') and latex[1] == r'\begin{tabular}{llllllll}' and latex[-1] == r'\end{tabular}'
    lines = [line for line in latex if line.endswith(r'\\')]
    assert len(lines) == 3 and {len(re.findall(r'(?<!\\)&', line)) for line in lines} == {7}
    assert r'\textbf{5.50 $\pm$ 0.71}' in lines[2] and lines[1].count(' -- ') == 3
    for line in latex[1:]:  # nothing that LaTeX would take for its own
        assert not re.search(r'(?<!\\)[%#_]', line) and line.count('{') == line.count('}')


def test_single_runs_have_no_deviation_and_the_caption_says_so(make_run, tmp_path):
    table, _ = write(make_run('a', error=13.8), make_run('b', '--calibratemix', error=9), output=tmp_path / 'out')
    assert [row['error %'] for row in markdown_cells(table)] == ['13.80', '9.00'] and '±' not in table
    assert table.startswith('digits, 130 labels: one run each, so there is no standard deviation\n')


NAME = r'co|st_$5_\and{中}_%&#^~--<b>*`x`' + '\n'


def test_names_are_literal_in_tables_files_and_pictures(make_run, tmp_path, monkeypatch):
    drawn = []
    for name in ('reliability_diagram', 'training_curves'):
        draw = getattr(report, name)
        monkeypatch.setattr(report, name, lambda *args, draw=draw: (drawn.append(args), draw(*args)))
    folders = [make_run(str(i), '--dataset', '', '--data-dir', f'/data/{name}', '--num-labels', '20')
               for i, name in enumerate([NAME, 'other_data'])]
    table, paths = write(*folders, output=tmp_path / 'out')
    assert drawn[0][2] == f'FixMatch, {NAME}, 20 labels' and drawn[2][0][0][0] == drawn[0][2]
    assert all(path.stat().st_size > 10_000 for path in paths if path.suffix == '.png')
    for file, column in (('table.csv', 'dataset'), ('runs.csv', 'dataset')):
        with open(tmp_path / 'out' / file, newline='', encoding='utf-8') as rows:
            assert [row[column] for row in csv.DictReader(rows)] == [NAME, 'other_data']
    header, *lines = [line for line in table.splitlines() if line.startswith('|')]
    shown = re.sub(r'\\(\W|_)', r'\1', header)  # as Markdown reads it
    assert f'error % ({NAME.strip()}\\n, 20 labels)' in shown
    assert {len(re.findall(r'(?<!\\)\|', line)) for line in (header, *lines)} == {9}
    assert 'error % (other_data, 20 labels)' in table  # no underscore became a hyphen
    latex = (tmp_path / 'out' / 'table.tex').read_text(encoding='utf-8').splitlines()
    escaped = (r'co\textbar{}st\_\$5\_\textbackslash{}and\{中\}\_\%\&\#\textasciicircum{}\textasciitilde{}-{}-'
               r'\textless{}b\textgreater{}*`x`\textbackslash{}n')
    assert f'error \\% ({escaped}, 20 labels)' in latex[3] and latex[3].endswith(r'\\') and latex[4] == r'\midrule'


@pytest.mark.parametrize('letter', '\\$_^%&#{}~<>|')
def test_no_sign_of_latex_is_left_bare(letter):
    """What stands for a letter is a command or the letter after a backslash."""
    row = report.as_latex('c', ['a'], [[(f'x{letter}y', False)]]).splitlines()[5]
    assert row.startswith('x\\') and row.endswith('y \\\\')
    stands = row[1:-len('y \\\\')]
    assert re.fullmatch(r'\\text[a-z]+\{\}', stands) or stands == '\\' + letter


def test_pictures_of_names_that_a_file_name_cannot_tell_apart_are_all_kept(make_run, tmp_path, monkeypatch):
    for draw in ('reliability_diagram', 'training_curves'):
        monkeypatch.setattr(report, draw, lambda panels, path, *_: path.touch(exist_ok=False))
    folders = [make_run(str(i), '--dataset', '', '--data-dir', f'/data/{name}')
               for i, name in enumerate(['a$b', 'a%b', 'a-b', 'c' * 250])]
    _, paths = write(*folders, output=tmp_path / 'out', rows=['dataset'])
    names = [path.name for path in paths if path.name.startswith('reliability')]
    assert names[:3] == ['reliability-a-b.png', 'reliability-a-b-2.png', 'reliability-a-b-3.png']
    assert len(names) == 4 and all((tmp_path / 'out' / name).is_file() for name in names)


def test_arguments_that_differ_make_lines_of_their_own(make_run, tmp_path):
    """But not those of the machine, nor CalibrateMix's between runs with and without it."""
    folders = [make_run('a', '--workers', '2', '--output', 'x'), make_run('b', '--label-smoothing', '0.1')]
    folders += [make_run(f'c{k}', '--calibratemix', '--calmix-warmup-epochs', '1', '--calmix-topk', k)
                for k in ('0.05', '0.15')]
    folders += [make_run('d', '--calibratemix', '--calmix-warmup-epochs', '1', '--calmix-pairing', 'random')]
    table, _ = write(*folders, output=tmp_path / 'out')
    rows = markdown_cells(table)
    assert [(row['variant'], row['calmix-topk']) for row in rows] == [
        ('alone', '–'), ('label smoothing 0.1', '–'), ('CalibrateMix', '0.05'), ('CalibrateMix', '0.15'),
        ('random mixup', '–')]
    assert list(rows[0]) == ['algorithm', 'variant', 'calmix-topk', 'error %', 'ECE %', 'NLL']


def test_runs_of_older_presets_are_not_averaged_with_todays(make_run):
    folders = [make_run(name, '--calibratemix', '--calmix-preset', preset) for name, preset in (
        ('today', 'paper'), ('older', 'paper'), ('authors', 'authors-code'), ('older-authors', 'authors-code'),
        ('steered', 'steered'), ('older-steered', 'steered'))]
    for folder, gone in zip(folders[1::2], ('mixed_statistics', 'mixed_statistics', 'mask_scale')):
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        del args[f'calmix_{gone}']
        (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    runs = [report.read_run(folder) for folder in folders]
    groups = report.group(runs, report.add_settings(runs))
    assert [[run['run'] for run in group] for group in groups.values()] == [
        ['today'], ['older'], ['authors', 'older-authors'], ['steered'], ['older-steered']]


def test_a_method_s_arguments_tell_its_own_runs_apart_alone_and_only_if_they_were_given(make_run):
    """Methods with defaults of their own stand beside each other without a column that says so."""
    def settings(*folders):
        runs = [report.read_run(folder) for folder in folders]
        return report.add_settings(runs), [run['settings'] for run in runs]

    by_default = [make_run(name, '--algorithm', name) for name in ('fixmatch', 'uda', 'pi_model', 'supervised')]
    assert settings(*by_default)[0] == ['dataset', 'labels', 'algorithm', 'variant']
    older = ('--freematch-fairness', '0.01', '--softmatch-usb-stats', '--vat-eps', '3', '--temperature', '0.9')
    folders = [make_run('older', *older), make_run('free', '--algorithm', 'freematch'),
               make_run('free-older', '--algorithm', 'freematch', *older), make_run('half', '--threshold', '0.8'),
               make_run('adjusted', '--logit-adjustment', '1', '--stat-momentum', '0.5')]
    keys, found = settings(*by_default, *folders)
    assert {*keys[4:]} == {'threshold', 'freematch_fairness', 'logit_adjustment', 'stat_momentum'}
    assert found[4] == found[0]
    assert [[run[key] for key in ('threshold', 'freematch_fairness', 'stat_momentum')] for run in found] == [
        [0.95, None, None], [0.8, None, None], [None, None, None], [None, None, None], [0.95, None, None],
        [None, 0.001, 0.9], [None, 0.01, 0.9], [0.8, None, None], [0.95, None, 0.5]]


def test_the_arguments_that_a_method_looks_at_are_named_for_it():
    """What its constructor reads; those that train on views twice share one, and read more than they look at."""
    class Told(argparse.Namespace):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    own = {key: methods for key, methods in LOOKED_AT_BY.items() if methods is not True}
    for name, method in ALGORITHMS.items():
        if method is not None:
            args, read = Told(**vars(train_ssl._parse_args(['--algorithm', name]))), set()
            method(10, 4, args)
            named = {key for key, methods in own.items() if name in methods}
            idle = {'temperature', 'mixmatch_alpha'} if name in ('pi_model', 'meanteacher', 'vat') else set()
            assert read & own.keys() - idle == named, name


def test_unfinished_runs_are_left_out_and_named(make_run, tmp_path, capsys):
    make_run('done')
    make_run('half', updates=5)
    (make_run('broken') / 'summary.csv').unlink()
    report.main(report._parse_args([str(make_run.root), '--output', str(tmp_path / 'out')]))
    out, err = capsys.readouterr()
    told = err.splitlines()
    assert len(markdown_cells(out)) == 1
    assert len(told) == 2 and all(line.startswith('report.py: left out: ') for line in told)
    assert f'{make_run.root / "half"}: not finished, at update 5 of 10' in told[1] and 'broken' in told[0]


@pytest.mark.parametrize('content', ['', '[]', 'epochs: 2\ntrain_steps_per_epoch: 5\n'])
def test_a_run_with_broken_arguments_is_left_out(make_run, tmp_path, capsys, content):
    make_run('done')
    (make_run('broken') / 'args.yaml').write_text(content)
    report.main(report._parse_args([str(make_run.root), '--output', str(tmp_path / 'out')]))
    out, err = capsys.readouterr()
    assert len(markdown_cells(out)) == 1
    assert len(err.splitlines()) == 1 and 'report.py: left out: ' in err and 'broken' in err


@pytest.mark.parametrize('change, told', [
    (None, 'no finite numbers for error, ece, ece_10, nll, brier, confidence, count of the bins'),
    (dict(nll=float('nan')), 'no finite numbers for nll)'),
    (dict(error='10', brier=None), 'no finite numbers for error, brier)'),
    (dict(num_updates='40'), 'no finite numbers for num_updates)'),
    (dict(tail_error=float('inf')), 'no finite numbers for tail_error)'),
    (dict(bins={}), "'count'"),
    (dict(bins=dict(count=[1] * 15, accuracy=[1] * 15, confidence=[float('nan')] * 15, edges=[0] * 15)),
     'no finite numbers for confidence of the bins, edges of the bins)'),
])
def test_a_run_with_damaged_figures_is_left_out_with_the_reason_and_the_others_stay(make_run, change, told, tmp_path,
                                                                                    capsys):
    for seed in range(2):
        make_run(f'done{seed}', seed=seed)
    path = make_run('broken', seed=2) / 'last' / 'metrics.json'
    content = {'num_updates': 40} if change is None else dict(json.loads(path.read_text()), **change)
    path.write_text(json.dumps(content))
    report.main(report._parse_args([str(make_run.root), '--output', str(tmp_path / 'out')]))
    out, err = capsys.readouterr()
    assert 'n = 2 seeds' in out and 'Left out, 1 of 3 runs: broken' in out
    assert len(err.splitlines()) == 1 and 'report.py: left out: ' in err and told in err


def test_a_run_whose_curve_or_metrics_are_no_numbers_is_left_out(make_run, tmp_path, capsys):
    make_run('done')
    make_run('curve', curve=[float('nan'), 1.])
    (make_run('list') / 'last' / 'metrics.json').write_text('[1]')
    report.main(report._parse_args([str(make_run.root), '--output', str(tmp_path / 'out')]))
    out, err = capsys.readouterr()
    assert len(markdown_cells(out)) == 1 and len(err.splitlines()) == 2
    assert 'summary.csv has numbers that are not finite' in err


def test_folders_of_the_same_name_are_not_taken_for_the_same_data(make_run, tmp_path):
    folders = [make_run(f'{i}', '--dataset', '', '--data-dir', place, seed=i)
               for i, place in enumerate(['/a/images', '/b/images', '/b/images', '/c/other'])]
    table, _ = write(*folders, output=tmp_path / 'out')
    assert [row['dataset'] for row in csv.DictReader(open(tmp_path / 'out' / 'table.csv'))] == [
        '/a/images', '/b/images', 'other']


def test_runs_in_a_folder_stand_in_natural_order(make_run):
    for name in ('k10', 'k2.5', 'k0', 'k7.5'):
        make_run(name)
    assert [path.name for path in report.find_runs([make_run.root])] == ['k0', 'k2.5', 'k7.5', 'k10']
    assert [path.name for path in report.find_runs([make_run.root / 'k10', make_run.root])][0] == 'k10'


def test_of_two_equal_runs_one_is_left_out_and_named_and_the_others_stay(make_run, tmp_path, capsys):
    make_run('a', error=10.)
    make_run('b', error=30.)  # the seed and all else of a
    make_run('c', error=20., seed=1)
    report.main(report._parse_args([str(make_run.root), '--output', str(tmp_path / 'out')]))
    out, err = capsys.readouterr()
    a, b = (make_run.root / name for name in 'ab')
    assert err == f'report.py: left out: {b} has the settings and the seed of {a}, which is in the table\n'
    row, = csv.DictReader(open(tmp_path / 'out' / 'table.csv'))
    assert (row['n'], float(row['error_mean'])) == ('2', 15)
    for name in ('table.md', 'table.tex'):
        assert 'Left out, 1 of 3 runs: b\n' in (tmp_path / 'out' / name).read_text()
    assert [row['run'] for row in csv.DictReader(open(tmp_path / 'out' / 'runs.csv'))] == ['a', 'c']


def test_the_best_nll_is_marked_as_the_best_error_is(make_run, tmp_path):
    folders = [make_run(f'{flag}{seed}', *flag.split(), seed=seed, nll=nll + 0.01 * seed)
               for flag, nll in (('', 0.5), ('--calibratemix', 0.3)) for seed in (0, 1)]
    table, _ = write(*folders, output=tmp_path / 'out')
    assert [line['NLL'] for line in markdown_cells(table)] == ['0.505 ± 0.007', '**0.305 ± 0.007**']


def test_a_setting_that_does_not_exist_is_refused(make_run, tmp_path):
    with pytest.raises(UsageError, match='--rows, --columns: lr is not among .*: dataset, labels'):
        write(make_run('a'), output=tmp_path, rows=['lr'])


def test_an_output_that_cannot_be_written_is_told_in_one_line(make_run, tmp_path, capsys):
    run = str(make_run('a'))
    (tmp_path / 'file').touch()
    (tmp_path / 'out' / 'table.csv').mkdir(parents=True)
    for output, status, said in (('file', 2, '--output .*file: cannot be made: File exists'),
                                 ('out', 1, '.*table.csv cannot be written: Is a directory')):
        with pytest.raises(SystemExit) as stopped:
            report.main(report._parse_args([run, '--output', str(tmp_path / output)]))
        assert stopped.value.code == status
        assert re.fullmatch(f'report.py: error: {said}\n', capsys.readouterr().err)


def test_pooled_bins_are_the_bins_of_all_images(make_run):
    runs = [report.read_run(make_run(f'{seed}', seed=seed)) for seed in range(3)]
    pairs = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        confidence = torch.rand(50, generator=generator)
        pairs.append((confidence, torch.rand(50, generator=generator) < confidence))
    want = reliability_bins(*(torch.cat(part) for part in zip(*pairs)))
    got = report.pool(runs)
    assert torch.equal(got.count, want.count)
    for key in ('accuracy', 'confidence', 'edges'):
        torch.testing.assert_close(getattr(got, key).double(), getattr(want, key).double())


@pytest.mark.parametrize('flags', [
    ('--calibratemix',), ('--calibratemix', '--calmix-preset', 'authors-code'),
    ('--calibratemix', '--calmix-warmup-epochs', '0.7'), (),
])
def test_the_marked_end_of_warmup_is_that_of_training(flags):
    args = train_ssl._parse_args(['--epochs', '8', '--train-steps-per-epoch', '100', *flags])
    datasets = SimpleNamespace(labeled=range(4), unlabeled=range(4), labeled_to_unlabeled=None)
    calmix = train_ssl.build_calmix(args, datasets, 3, SimpleNamespace(process_index=0, num_processes=1))
    assert report.end_of_warmup(vars(args)) == (None if calmix is None else calmix.warmup_steps)


def test_pictures_one_for_each_row_and_the_curves(make_run, tmp_path):
    folders = [make_run(f'{algorithm}{"-".join(flags)}{seed}', '--algorithm', algorithm, *flags, seed=seed, epochs=4,
                        curve=[50, 40, 30, 10 + seed])
               for algorithm in ('fixmatch', 'softmatch') for flags in ((), ('--calibratemix',)) for seed in range(2)]
    _, paths = write(*folders, output=tmp_path / 'out')
    pictures = [path.name for path in paths if path.suffix == '.png']
    assert pictures == ['reliability-fixmatch.png', 'reliability-softmatch.png', 'curves.png', 'error_ece.png']
    sizes = []
    for name in pictures:
        with Image.open(tmp_path / 'out' / name) as picture:
            sizes.append(picture.size)
    assert sizes[0] == sizes[1] and sizes[0][0] > 1000 and sizes[2][1] > 1000
    _, paths = write(*folders, output=tmp_path / 'all', rows=[])
    assert [path.name for path in paths if path.suffix == '.png'] == ['reliability.png', 'curves.png', 'error_ece.png']
    _, paths = write(folders[0], output=tmp_path / 'one')
    assert [path.name for path in paths if path.suffix == '.png'] == ['reliability.png', 'curves.png']


def test_an_arrow_leads_from_a_base_method_to_what_was_added_with_the_same_seed_and_settings(make_run):
    runs = [report.read_run(make_run(str(i), *flags, seed=seed, error=error)) for i, (flags, seed, error) in enumerate([
        (('--calibratemix', '--calmix-topk', '0.1'), 0, 11), ((), 0, 10), ((), 1, 20), (('--calibratemix',), 1, 21),
        (('--label-smoothing', '0.1'), 1, 22), (('--calibratemix',), 2, 31),
        (('--algorithm', 'softmatch', '--calibratemix'), 0, 41), (('--lr', '0.5'), 2, 50),
        (('--lr', '0.5', '--calibratemix'), 2, 51),
    ])]
    found = report.moves(runs, report.add_settings(runs))
    assert [(move.method, move.variant, move.base[0], move.other[0]) for move in found] == [
        ('FixMatch', 'CalibrateMix, topk 0.1', 10, 11), ('FixMatch', 'CalibrateMix', 20, 21),
        ('FixMatch', 'label smoothing 0.1', 20, 22), ('FixMatch', 'CalibrateMix', 50, 51),
    ]
    ece = runs[1]['metrics']['ece']
    assert found[0].base == (10, ece)
