#!/usr/bin/env python3
"""Tables and pictures from finished runs.

    python report.py output/table3_baselines/cpu --output output/table3_baselines/cpu

Reads each run's args.yaml, labels.json, summary.csv and last/metrics.json: the weights at the end of training, since
best/ was chosen on the very images that are reported. Figures are those of --test-split, where a run had one, else of
its evaluation split; curves are always of the latter. A run that has not reached its last update, nor the end of its
--patience, is left out and named, also below the table.

Runs that differ by nothing but their seed (or label seed, fold or file) are one cell of the table: mean and standard
deviation (n - 1 in the denominator) over them. A cell of a single run is its value alone, since one run has no
deviation. Of runs that are equal in all of that the first counts. A cell without runs is shown as –. A mean of error,
ECE or NLL is in bold if it is the best of its column beyond the spread: best mean + its deviation < every other mean -
its deviation. Nothing is bold beside a cell of a single run. Rates are in percent.

Writes to --output:
    table.md, table.tex   the table; the LaTeX needs the package booktabs
    table.csv             a row per cell: n, means and deviations
    runs.csv              a row per run
    comparison.csv        name and metrics of each run, in the order given
    reliability.png       reliability diagrams side by side, the images of all seeds pooled; a file for each of --rows
    curves.png            error and ECE against updates, mean and deviation over seeds, the end of warmup marked
    error_ece.png         ECE against error, with an arrow from each run of a base method alone to those with the same
                          seed that add something; where there are such
"""
import argparse
import csv
import json
import math
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from figures import Curve, Move, Panel, error_ece_diagram, reliability_diagram, training_curves
from methods import ALGORITHMS, looks_at, older_presets, published, warmup_updates
from metrics import ReliabilityBins
from program import ArgumentParser, UsageError, show

COLUMNS = ('run', 'error', 'ece', 'nll', 'confidence')  # of comparison.csv
SHOWN = {'error': 'error %', 'ece': 'ECE %', 'nll': 'NLL'}  # in the table; less is better in all of them
METRICS = ('error', 'ece', 'ece_10', 'nll', 'brier', 'confidence')
CLASS_METRICS = ('balanced_accuracy', 'macro_f1', 'ece_balanced', 'tail_error')  # where all runs have them
OF_THE_RUN = ('num_updates', 'class_names', 'out_of_patience')  # in metrics.json, on whatever split is reported
DIGITS = {'nll': 3, 'brier': 3}
NAMES = {'supervised': 'Supervised', 'pseudo_label': 'Pseudo-Label', 'fixmatch': 'FixMatch', 'flexmatch': 'FlexMatch',
         'softmatch': 'SoftMatch', 'freematch': 'FreeMatch', 'marginmatch': 'MarginMatch', 'uda': 'UDA',
         'adamatch': 'AdaMatch', 'dash': 'Dash', 'defixmatch': 'DeFixMatch', 'pi_model': 'Pi-Model',
         'meanteacher': 'Mean Teacher', 'vat': 'VAT', 'mixmatch': 'MixMatch', 'remixmatch': 'ReMixMatch'}
MISSING = '–'
# Arguments that make another run of the same setting, or change no result.
REPLICATE = ('seed', 'label_seed', 'label_fold', 'labels_file')
IGNORED = (
    *REPLICATE, 'data_dir', 'extra_val_dir', 'dataset_download', 'output', 'experiment', 'device', 'aug_device',
    'workers', 'pin_mem', 'calmix_bank_shards', 'dist_timeout', 'log_interval', 'val_interval', 'recovery_interval',
    'checkpoint_hist', 'save_margins', 'validation_batch_size', 'eval_metric', 'log_tensorboard', 'log_wandb',
    'wandb_project', 'wandb_tags', 'wandb_resume_id',
)
# Arguments that dataset, labels, algorithm and variant stand for.
NAMED = ('dataset', 'num_labels', 'labels_per_class', 'label_fraction', 'algorithm', 'calibratemix', 'calmix_preset',
         'calmix_pairing', 'label_smoothing', 'logit_margin_penalty')


# --- Runs -------------------------------------------------------------------------------------------------------------

def find_runs(paths: list[Path]) -> list[Path]:
    """The run folders among the paths and, in natural order, those below the others."""
    def natural(path):
        return [float(part) if i % 2 else part for i, part in enumerate(re.split(r'(\d+(?:\.\d+)?)', str(path)))]

    found = []
    for path in paths:
        inside = [path]
        if not (path / 'args.yaml').is_file():
            inside = sorted((file.parent for file in path.rglob('args.yaml')), key=natural) or [path]
        found += [folder for folder in inside if folder not in found]
    return found


def check_numbers(metrics: dict, curve: list[dict]) -> None:
    """Raises ValueError, KeyError or TypeError unless all figures that are reported are there and finite."""
    known = ('num_updates', *METRICS, *(key for key in CLASS_METRICS if key in metrics))
    bad = [key for key in known if not isinstance(metrics.get(key), (int, float)) or not math.isfinite(metrics[key])]
    for key in ReliabilityBins._fields:
        values = torch.tensor(metrics['bins'][key] if 'bins' in metrics else [], dtype=torch.float64)
        if values.shape != (15 + (key == 'edges'),) or not values.isfinite().all():
            bad.append(f'{key} of the bins')
    if bad:
        raise ValueError(f'no finite numbers for {", ".join(bad)}')
    if not all(math.isfinite(value) for row in curve for value in row.values()):
        raise ValueError('summary.csv has numbers that are not finite')


def read_run(folder: Path) -> dict:
    """Arguments, metrics, learning curve and number of labels of a finished run, with its name.

    Raises:
        UsageError: If the folder holds no run, one that is not finished, or one whose figures are damaged.
    """
    path = folder / 'last' / 'metrics.json'
    try:
        metrics = dict(json.loads(path.read_text()))
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        missing = [key for key in ('data_dir', 'calmix_warmup_epochs', *NAMED) if key not in args]
        if missing:
            raise KeyError(f'args.yaml has no {", ".join(missing)}')
        args.update(older_presets(args))  # else it would be averaged with runs that are trained otherwise
        labels = json.loads((folder / 'labels.json').read_text())['num_labels']
        with open(folder / 'summary.csv', newline='') as file:
            curve = [{key: float(row[key]) for key in ('num_updates', 'eval_error', 'eval_ece')}
                     for row in csv.DictReader(file)]
        if 'bins' in metrics.get('test', {}):
            own = {key: metrics[key] for key in OF_THE_RUN if key in metrics}
            metrics = dict(metrics['test'], split=metrics['test']['source'], **own)
        check_numbers(metrics, curve)
        done, updates = metrics['num_updates'], args['epochs'] * args['train_steps_per_epoch']
        unfinished = done < updates and not metrics.get('out_of_patience')
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f'{folder}: no run with an evaluation ({path}: {" ".join(str(error).split())})') from error
    if unfinished:
        raise UsageError(f'{folder}: not finished, at update {done} of {updates}')
    return dict(run=folder.name, folder=folder, args=args, labels=labels, metrics=metrics, curve=curve)


def variant(args: dict) -> str:
    """What is added to the base method."""
    parts = []
    if args['calibratemix']:
        preset = '' if args['calmix_preset'] == 'paper' else f' ({args["calmix_preset"]})'
        parts.append(('random mixup' if args['calmix_pairing'] == 'random' else 'CalibrateMix') + preset)
    if args['label_smoothing']:
        parts.append(f'label smoothing {args["label_smoothing"]:g}')
    if args['logit_margin_penalty']:
        parts.append(f'logit margin penalty {args["logit_margin_penalty"]:g}')
    return ' + '.join(parts) or 'alone'


def end_of_warmup(args: dict) -> int | None:
    """The update at which CalibrateMix joins the base method."""
    return warmup_updates(argparse.Namespace(**args)) if args['calibratemix'] else None


def add_settings(runs: list[dict]) -> list[str]:
    """Gives each run its settings, by which runs are grouped; returns their names.

    dataset, labels, algorithm and variant, and every other argument that differs among runs of one data set and number
    of labels. An argument is compared only among the runs that look at it (`looks_at`), and is None (–) in the others.
    Where runs differ because each has the value that its method has by default, the method's name says it.
    """
    differ = []
    # A folder or file goes by its name, if no other one has the same.
    places = {name for name in (run['args']['dataset'] or run['args']['data_dir'] or '' for run in runs)
              if os.path.isabs(name)}
    alike = Counter(Path(name).name for name in places)
    for run in runs:
        args, dataset = run['args'], run['args']['dataset'] or run['args']['data_dir'] or ''
        dataset = Path(dataset).name if alike[Path(dataset).name] == 1 and dataset in places else dataset
        run['settings'] = dict(dataset=dataset, labels=run['labels'], algorithm=args['algorithm'],
                               variant=variant(args))
        run['defaults'] = published(args['algorithm'], args['dataset'] or '') if args['algorithm'] in ALGORITHMS else {}
    for key in {key: None for run in runs for key in run['args'] if key not in IGNORED + NAMED}:
        values, given = {}, {}
        for run in runs:
            # A run of an older version, without the argument, is not set apart by it.
            if key in run['args'] and looks_at(key, run['args']):
                block, value = (run['settings']['dataset'], run['labels']), json.dumps(run['args'][key])
                default = key in run['defaults'] and run['args'][key] == run['defaults'][key]
                values.setdefault(block, set()).add(value)
                given.setdefault(block, set()).add('the default' if default else value)
        if any(len(values[block]) > 1 and len(given[block]) > 1 for block in values):
            differ.append(key)
    for run in runs:
        for key in differ:
            value = run['args'].get(key) if looks_at(key, run['args']) else None
            run['settings'][key] = value if isinstance(value, (int, float, str, type(None))) else json.dumps(value)
    return ['dataset', 'labels', 'algorithm', 'variant', *differ]


def group(runs: list[dict], keys: list[str]) -> dict[tuple, list[dict]]:
    """Runs by their values of these settings, in the order of the first of each."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run['settings'][key] for key in keys), []).append(run)
    return groups


def tell_images(runs: list[dict]) -> list[str]:
    """A line for each data set whose runs were not all evaluated on the same images and classes, as far as is known."""
    told = []
    for (dataset,), found in group(runs, ['dataset']).items():
        images, classes = {}, {}
        for run in found:
            metrics = run['metrics']
            images.setdefault((metrics.get('count'), metrics.get('split')), []).append(run['run'])
            classes.setdefault(json.dumps(metrics.get('class_names')), []).append(run['run'])
        parts = [f'{count} images of {split} ({one_line(names[0])}{" and others" * (len(names) > 1)})'
                 for (count, split), names in images.items()]
        if len(images) > 1:
            told.append(f'{one_line(dataset)}: not all runs were evaluated on the same images: {", ".join(parts)}')
        elif len(classes) > 1:
            told.append(f'{one_line(dataset)}: not all runs have the same classes, such as '
                        f'{" and ".join(one_line(names[0]) for names in list(classes.values())[:2])}')
    return told


def drop_equal(runs: list[dict]) -> tuple[list[dict], list[dict]]:
    """The runs without those whose settings and seed an earlier one has, and those: twice in a cell, a run would make
    its deviation too small.
    """
    first = {}
    keys = add_settings(runs)
    for run in runs:
        setting = (*(run['settings'][key] for key in keys), *(run['args'].get(key) for key in REPLICATE))
        run['equal_to'] = first.setdefault(json.dumps(setting), run)
    return [run for run in runs if run['equal_to'] is run], [run for run in runs if run['equal_to'] is not run]


# --- Table ------------------------------------------------------------------------------------------------------------

def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which a single value does not have."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def best(cells: list[tuple[float, float | None] | None]) -> int | None:
    """Which of the means and deviations is the smallest beyond the spread, None for none; a None is an empty cell."""
    filled = [i for i, cell in enumerate(cells) if cell is not None]
    if len(filled) < 2 or any(cells[i][1] is None for i in filled):
        return None
    first = min(filled, key=lambda i: cells[i][0])
    reach = sum(cells[first])
    return first if all(reach < cells[i][0] - cells[i][1] for i in filled if i != first) else None


def text(value) -> str:
    if value is None:
        return MISSING
    return f'{value:.4g}' if isinstance(value, float) else NAMES.get(value, str(value))


def build_table(
        runs: list[dict],
        keys: list[str],
        columns: list[str],
) -> tuple[str, list[str], list[list[tuple[str, bool]]]]:
    """Caption, header and lines of cells (text, bold): settings first, then the metrics of each block of columns."""
    line_keys = [key for key in keys if key not in columns]
    blocks, lines = list(group(runs, columns)), list(group(runs, line_keys))
    cells = group(runs, columns + line_keys)
    sizes = Counter(len(found) for found in cells.values())
    usual = max(sizes, key=lambda n: (sizes[n], n))
    names = [', '.join(f'{text(value)} {key}' if key == 'labels' else text(value) for key, value in zip(columns, block))
             for block in blocks]
    header = [key.replace('_', '-') for key in line_keys]
    rows = [[(text(value), False) for value in line] for line in lines]
    for block, name in zip(blocks, names):
        found = [cells.get(block + line, []) for line in lines]
        for metric, title in SHOWN.items():
            header.append(title if len(blocks) == 1 else f'{title} ({name})')
            values = [mean_and_deviation([run['metrics'][metric] for run in cell]) if cell else None for cell in found]
            bold, digits = best(values), DIGITS.get(metric, 2)
            for i, (row, cell, value) in enumerate(zip(rows, found, values)):
                shown = MISSING
                if value is not None:
                    shown = f'{value[0]:.{digits}f}' + ('' if value[1] is None else f' ± {value[1]:.{digits}f}')
                    shown += '' if len(cell) == usual else f' (n={len(cell)})'
                row.append((shown, i == bold))
    caption = f'{names[0]}: ' if len(blocks) == 1 else ''
    if list(sizes) == [1]:
        caption += 'one run each, so there is no standard deviation'
    else:
        caption += f'mean ± standard deviation, n = {usual} seed{"s" if usual > 1 else ""}'
        caption += ' unless stated' if len(sizes) > 1 else ''
        caption += '; a single run has no deviation' if 1 in sizes else ''
    return caption, header, rows


def one_line(value: str) -> str:
    """The text, with the codes of line ends, tabs and other signs that would break a table's line."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in value)


def as_markdown(caption: str, header: list[str], rows: list[list[tuple[str, bool]]]) -> str:
    def escape(value):
        # An underscore within a word is one; at its edge it would start emphasis.
        return re.sub(r'[\\`*|<$]|(?<![^\W_])_|_(?![^\W_])', r'\\\g<0>', one_line(value))

    lines = [[escape(name) for name in header]]
    lines += [[f'**{escape(cell)}**' if bold else escape(cell) for cell, bold in row] for row in rows]
    width = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ['-' * w for w in width])
    body = ['| ' + ' | '.join(cell.ljust(w) for cell, w in zip(line, width)) + ' |' for line in lines]
    return '\n'.join([escape(caption), '', *body])


LATEX = {'\\': r'\textbackslash{}', '^': r'\textasciicircum{}', '~': r'\textasciitilde{}', '<': r'\textless{}',
         '>': r'\textgreater{}', '|': r'\textbar{}', '-': '-{}', '±': r'$\pm$', MISSING: '--'}


def as_latex(caption: str, header: list[str], rows: list[list[tuple[str, bool]]]) -> str:
    def escape(value):
        return re.sub(rf'-(?=-)|[\\{{}}_%&#$^~<>|±{MISSING}]', lambda m: LATEX.get(m[0], '\\' + m[0]), one_line(value))

    def line(cells):
        return ' & '.join(cells) + r' \\'

    body = [line([rf'\textbf{{{escape(cell)}}}' if bold else escape(cell) for cell, bold in row]) for row in rows]
    return '\n'.join([
        f'% {one_line(caption)}', rf'\begin{{tabular}}{{{"l" * len(header)}}}', r'\toprule', line(map(escape, header)),
        r'\midrule', *body, r'\bottomrule', r'\end{tabular}',
    ])


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def measured(runs: list[dict]) -> list[str]:
    """The metrics that go into the files: those of classes only if every run has them."""
    return [*METRICS, *(key for key in CLASS_METRICS if all(key in run['metrics'] for run in runs))]


def run_row(run: dict, metrics: list[str]) -> dict:
    settings = dict(run['settings'])
    first = {key: settings.pop(key) for key in ('dataset', 'algorithm', 'variant', 'labels')}
    values = {key: f'{run["metrics"][key]:.4f}' for key in metrics}
    return dict(first, seed=run['args']['seed'], **values, updates=run['metrics']['num_updates'],
                warmup_updates=end_of_warmup(run['args']), **settings, run=run['run'])


def cell_row(keys: list[str], values: tuple, runs: list[dict], metrics: list[str]) -> dict:
    row = dict(zip(keys, values), n=len(runs))
    for metric in metrics:
        mean, deviation = mean_and_deviation([run['metrics'][metric] for run in runs])
        row[f'{metric}_mean'] = f'{mean:.4f}'
        row[f'{metric}_sd'] = '' if deviation is None else f'{deviation:.4f}'
    return row


# --- Pictures ---------------------------------------------------------------------------------------------------------

def pool(runs: list[dict]) -> ReliabilityBins:
    """Bins of the images of all runs together."""
    bins = [ReliabilityBins(**{key: torch.tensor(value, dtype=torch.int64 if key == 'count' else torch.float64)
                               for key, value in run['metrics']['bins'].items()}) for run in runs]
    count = sum(b.count for b in bins)
    accuracy, confidence = (sum(b.count * getattr(b, key) for b in bins) / count.clamp(min=1)
                            for key in ('accuracy', 'confidence'))
    return ReliabilityBins(count, accuracy, confidence, bins[0].edges)


def title(keys: list[str], values: tuple) -> str:
    """Settings in one line, such as FixMatch + CalibrateMix, topk 0.1."""
    found = {key: value for key, value in zip(keys, values) if value is not None}
    base = ' + '.join(text(found.pop(key)) for key in ('algorithm', 'variant') if found.get(key, 'alone') != 'alone')
    found.pop('variant', None)
    plain = {'dataset': '', 'labels': ' labels'}
    rest = [text(value) + plain[key] if key in plain else
            f'{key.removeprefix("calmix_").replace("_", " ")} {text(value)}' for key, value in found.items()]
    return ', '.join([base] * bool(base) + rest)


def varying(runs: list[dict], keys: list[str]) -> list[str]:
    """The base method and variant, and the settings in which these runs differ."""
    return [key for key in keys if key in ('algorithm', 'variant') or len(group(runs, [key])) > 1]


def heading(runs: list[dict], rows: list[str]) -> str:
    """What these runs of one combination of the `rows` settings have in common."""
    keys = [*rows, *(key for key in ('dataset', 'labels') if key not in rows and len(group(runs, [key])) == 1)]
    return title(keys, tuple(runs[0]['settings'][key] for key in keys))


def draw_reliability(runs: list[dict], keys: list[str], rows: list[str], folder: Path) -> list[Path]:
    """One picture for each combination of the `rows` settings, named after those of them that vary."""
    paths, groups = [], group(runs, rows)
    varies = [len(set(values)) > 1 for values in zip(*groups)]
    for values, found in groups.items():
        panel_keys = varying(found, keys)
        panels = [
            Panel(title(panel_keys, panel), pool(same), f'{len(same)} seeds pooled' if len(same) > 1 else '')
            for panel, same in group(found, panel_keys).items()
        ]
        name = '-'.join(['reliability', *(str(value) for value, other in zip(values, varies) if other)])
        name = re.sub(r'[^\w.+-]+', '-', name).encode()[:200].decode(errors='ignore')  # a file's name has an end
        taken = sum(path.name.startswith(name) for path in paths)
        paths.append(folder / (f'{name}-{taken + 1}.png' if folder / f'{name}.png' in paths else f'{name}.png'))
        reliability_diagram(panels, paths[-1], heading(found, rows))
    return paths


def curves(runs: list[dict], keys: list[str]) -> list[Curve]:
    """One for each setting of these runs, over its seeds, at the updates that all of them have."""
    found, line_keys = [], varying(runs, keys)
    for line, same in group(runs, line_keys).items():
        updates = sorted(set.intersection(*({row['num_updates'] for row in run['curve']} for run in same)))
        metrics = {}
        for metric in ('error', 'ece'):
            by_update = [{row['num_updates']: row[f'eval_{metric}'] for row in run['curve']} for run in same]
            points = [mean_and_deviation([values[update] for values in by_update]) for update in updates]
            metrics[metric] = [m for m, _ in points], [d for _, d in points] if len(same) > 1 else None
        found.append(Curve(title(line_keys, line), updates, metrics, end_of_warmup(same[0]['args'])))
    return found


def moves(runs: list[dict], keys: list[str]) -> list[Move]:
    """From each run of a base method alone to those that differ by nothing but what they add to it."""
    own = [key for key in varying(runs, keys) if key == 'variant' or key.startswith('calmix_')]

    def shared(run):
        return json.dumps([[run['settings'][key] for key in keys if key not in own],
                           [run['args'].get(key) for key in REPLICATE]])

    def point(run):
        return run['metrics']['error'], run['metrics']['ece']

    bases = {shared(run): point(run) for run in runs if run['settings']['variant'] == 'alone'}
    return [
        Move(text(run['settings']['algorithm']), title(own, tuple(run['settings'][key] for key in own)),
             bases[shared(run)], point(run))
        for run in runs if run['settings']['variant'] != 'alone' and shared(run) in bases
    ]


def write_report(
        runs: list[dict],
        output: Path,
        rows: list[str],
        columns: list[str],
        notes: Sequence[str] = (),
) -> tuple[str, list[Path]]:
    """Writes all files; returns the table as Markdown, and their paths. The notes are lines below the table.

    Raises:
        UsageError: If rows or columns name no setting, or the folder cannot be made.
        OSError: If a file cannot be written.
    """
    keys = add_settings(runs)
    for key in {*rows, *columns} - {*keys}:
        raise UsageError(f'--rows, --columns: {key} is not among what tells these runs apart: {", ".join(keys)}')
    cells = group(runs, keys)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f'--output {output}: cannot be made: {error.strerror}') from error
    table = build_table(runs, keys, columns)
    markdown = as_markdown(*table) + ''.join(f'\n\n{note}' for note in notes)
    latex = as_latex(*table) + ''.join(f'\n% {note}' for note in notes)
    (output / 'table.md').write_text(markdown + '\n', encoding='utf-8')
    (output / 'table.tex').write_text(latex + '\n', encoding='utf-8')
    write_csv(output / 'table.csv', [cell_row(keys, values, found, measured(runs)) for values, found in cells.items()])
    write_csv(output / 'runs.csv', [run_row(run, measured(runs)) for run in runs])
    write_csv(output / 'comparison.csv', [
        {'run': run['run'], **{key: f'{run["metrics"][key]:.4f}' for key in COLUMNS[1:]}} for run in runs
    ])
    pictures = draw_reliability(runs, keys, rows, output)
    panels = [(heading(found, rows), curves(found, keys)) for found in group(runs, rows).values()]
    training_curves(panels, output / 'curves.png')
    pictures.append(output / 'curves.png')
    blocks = [(heading(found, columns), moves(found, keys)) for found in group(runs, columns).values()]
    blocks = [block for block in blocks if block[1]]
    if blocks:
        error_ece_diagram(blocks, output / 'error_ece.png')
        pictures.append(output / 'error_ece.png')
    names = ('table.md', 'table.tex', 'table.csv', 'runs.csv', 'comparison.csv')
    return markdown, [*(output / name for name in names), *pictures]


def _parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description='Tables and pictures of finished runs.')
    parser.add_argument('runs', metavar='RUN_OR_FOLDER', nargs='+', type=Path,
                        help='run folders, or folders with runs in them, in the order of the table')
    parser.add_argument('--output', metavar='DIR', type=Path, required=True, help='where the files go')
    parser.add_argument('--rows', metavar='SETTING', nargs='*', default=['dataset', 'labels', 'algorithm'],
                        help='settings of which each combination has pictures of its own: dataset, labels, algorithm, '
                             'variant or an argument that differs (default: dataset labels algorithm)')
    parser.add_argument('--columns', metavar='SETTING', nargs='*', default=['dataset', 'labels'],
                        help='settings of which each combination has columns of its own in the table; all others make '
                             'its lines (default: dataset labels)')
    args = parser.parse_args(argv)
    args.rows, args.columns = ([name.replace('-', '_') for name in names] for names in (args.rows, args.columns))
    return args


def main(args: argparse.Namespace) -> None:
    runs, left_out = [], {}
    folders = find_runs(args.runs)
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UsageError as error:
            left_out[folder] = error
    try:
        if not runs:
            raise next(iter(left_out.values()))
        runs, equal = drop_equal(runs)
        for run in equal:
            left_out[run['folder']] = (f'{run["folder"]} has the settings and the seed of {run["equal_to"]["folder"]}, '
                                       'which is in the table')
        for reason in left_out.values():
            print(f'report.py: left out: {reason}', file=sys.stderr)
        notes = tell_images(runs)
        if left_out:
            names = ', '.join(one_line(folder.name) for folder in folders if folder in left_out)
            notes.append(f'Left out, {len(left_out)} of {len(folders)} runs: {names}')
        table, paths = write_report(runs, args.output, args.rows, args.columns, notes)
    except UsageError as error:
        print(f'report.py: error: {error}', file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f'report.py: error: {error.filename or args.output} cannot be written: {error.strerror}', file=sys.stderr)
        sys.exit(1)
    show(f'{table}\n\n' + '\n'.join(map(str, paths)))


if __name__ == '__main__':
    main(_parse_args())
