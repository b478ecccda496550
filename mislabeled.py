#!/usr/bin/env python3
"""Finds wrong labels: ranks the labeled images of runs by AUM (Pleiss et al. 2020, arXiv 2001.10528).

    python train_ssl.py ... --save-margins --aum-threshold-samples 1 --experiment first
    python train_ssl.py ... --save-margins --aum-threshold-samples 2 --experiment second
    python mislabeled.py output/train/first output/train/second --results-dir DIR

An image's AUM is the mean over the runs that trained it with its own label. The threshold is the 99th percentile of the
AUM that a run's threshold samples reach in their extra class, a label that is wrong for sure; what lies below is
flagged. A run does not judge its own threshold samples, the other run does. Without threshold samples there is the
ranking alone.

It warns where the threshold is not to be trusted: if it flags most labels, or the network learned few of them.

Writes mislabeled.csv, the most suspicious label first, and contact_sheet.png with both ends of the ranking. If labels
were flipped on purpose (train_ssl.py --label-noise), prints how many of them are found.
"""
import csv
import json
import math
import os
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from timm.utils import setup_default_logging

from checkpoint import read_args
from digests import from_text, place_pictures
from figures import Cell, contact_sheet
from metrics import auroc, average_precision
from program import ArgumentParser, UsageError, name_some, replace_file, run_program, show
from sources import SOURCE_FLAGS, Source, open_run_source, open_source

COLUMNS = ('rank', 'index', 'label', 'class', 'true_label', 'true_class', 'aum', 'flagged', 'flipped', 'image', 'file')

MOST_FLAGGED = LEAST_LEARNED = 0.5  # shares of the labels beyond which the threshold is not to be trusted


def _parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description='Finds wrong labels by the margins of training.')
    parser.add_argument('runs', metavar='RUN', nargs='+', type=Path,
                        help='run folders of train_ssl.py --save-margins, all with the same labels')
    parser.add_argument('--results-dir', metavar='DIR', type=Path, required=True, help='where the files go')
    parser.add_argument('--num-images', type=int, metavar='N', default=32,
                        help='images at each end of the ranking on the contact sheet (default: 32)')
    parser.add_argument('--threshold-percentile', type=float, metavar='P', default=99.,
                        help='of the AUM of the threshold samples; less flags less (default: 99)')
    parser.add_argument('--data-dir', metavar='DIR', default=None,
                        help='as train_ssl.py --data-dir (default: the run\'s)')
    args = parser.parse_args(argv)
    if args.num_images < 1:
        parser.error(f'--num-images {args.num_images}: expected 1 or more')
    if not 0 <= args.threshold_percentile <= 100:
        parser.error(f'--threshold-percentile {args.threshold_percentile}: expected a number in [0, 100]')
    return args


@dataclass
class Margins:
    """The labeled images of a run, by index.

    Attributes:
        where: Data set and split.
        index: Positions in the split, [L] int64.
        label: Given labels, [L] int64.
        aum: [L] float64, of a threshold sample that of the extra class; NaN if never seen.
        threshold_sample: [L] bool.
        flipped: [L] bool, None if not known.
        true_label: [L] int64, None if not known.
        rows, digests: Which of the images have a digest of their content, [d] int64, and those, [d] int64.
        class_names: Of the run, None if not known.
    """
    where: str
    index: np.ndarray
    label: np.ndarray
    aum: np.ndarray
    threshold_sample: np.ndarray
    flipped: np.ndarray | None
    true_label: np.ndarray | None
    rows: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    digests: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    class_names: list[str] | None = None


def read_margins(folder: Path) -> Margins:
    """The labeled part of a run's margins.parquet.

    Raises:
        UsageError: If the file is missing or is none of train_ssl.py's.
    """
    path = folder / 'margins.parquet'
    if not path.is_file():
        raise UsageError(f'{folder}: no margins.parquet in it; train with --save-margins')
    try:
        table = pq.read_table(path)
        about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        table = table.filter(pc.equal(table['set'], 'labeled')).sort_by('index')
        column = {name: table[name].to_numpy() for name in (
            'index', 'label', 'margin', 'threshold_sample', 'flipped', 'true_label',
        )}
        where = f'{about["dataset"]} {about["split"]}'
        digest = table['digest'] if 'digest' in table.column_names else pa.nulls(len(table))  # an older file has none
        rows = torch.from_numpy(np.flatnonzero(digest.is_valid()))
        digests = from_text(digest.drop_null().to_pylist())
        class_names = json.loads(about.get('class_names', 'null'))
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        reason = ' '.join(str(error).split())
        raise UsageError(f'{path}: not written by train_ssl.py --save-margins ({reason})') from error
    if not len(table):
        raise UsageError(f'{path}: no labeled image in it')
    known = not table['flipped'].null_count
    return Margins(
        where,
        column['index'],
        column['label'],
        column['margin'].astype(np.float64),
        column['threshold_sample'].astype(bool),
        column['flipped'].astype(bool) if known else None,
        column['true_label'].astype(np.int64) if known else None,
        rows,
        digests,
        class_names,
    )


def check_same_labels(folders: list[Path], runs: list[Margins]) -> None:
    """Raises UsageError unless all runs have the labels of the first."""
    for folder, run in zip(folders, runs):
        if run.class_names != runs[0].class_names:
            raise UsageError(f'{folder} has other classes than {folders[0]}, or in another order: '
                             f'{name_some(run.class_names or ["no names"])}; '
                             f'{name_some(runs[0].class_names or ["no names"])}')
        if run.where != runs[0].where:
            raise UsageError(f'{folder} has labels of {run.where}, {folders[0]} of {runs[0].where}')
        if not (np.array_equal(run.index, runs[0].index) and np.array_equal(run.label, runs[0].label)):
            raise UsageError(f'{folder} has other labels than {folders[0]}: train both with the same --label-seed or '
                             '--labels-file')
        if not torch.equal(run.digests, runs[0].digests):
            raise UsageError(f'{folder} has other pictures than {folders[0]}: the data changed between the runs')


@dataclass
class Ranking:
    """What several runs say about the labels, most suspicious first; images without an AUM come last.

    Attributes:
        index, label, flipped, true_label: As in Margins.
        aum: Mean over the runs, [L] float64; NaN for images that no run trained with their label.
        flagged: Below the threshold, [L] bool; None if no run has threshold samples. False where not judged.
        judged: [L] bool, by a run that has threshold samples.
        thresholds: Of the runs that have one.
    """
    index: np.ndarray
    label: np.ndarray
    flipped: np.ndarray | None
    true_label: np.ndarray | None
    aum: np.ndarray
    flagged: np.ndarray | None
    judged: np.ndarray
    thresholds: list[float]


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where there is nothing else."""
    number = (~np.isnan(values)).sum(0)
    return np.where(number, np.nansum(values, 0) / np.maximum(number, 1), np.nan)


def rank_labels(runs: list[Margins], percentile: float = 99.) -> Ranking:
    """Ranks the labels by mean AUM, and flags them by the rule of threshold samples (Pleiss et al. 2020, section 3.2).

    A run's threshold is the percentile of the AUM of its threshold samples. An image that several runs judge is flagged
    if its AUM lies below their thresholds on average.
    """
    aum = np.stack([np.where(run.threshold_sample, np.nan, run.aum) for run in runs])
    thresholds = np.full(len(runs), np.nan)
    for row, run in enumerate(runs):
        reached = run.aum[run.threshold_sample & ~np.isnan(run.aum)]
        if len(reached):
            thresholds[row] = np.percentile(reached, percentile)
    above = _mean(aum - thresholds[:, None])
    mean = _mean(aum)
    order = np.argsort(mean, kind='stable')
    first = runs[0]
    return Ranking(
        first.index[order],
        first.label[order],
        None if first.flipped is None else first.flipped[order],
        None if first.true_label is None else first.true_label[order],
        mean[order],
        None if np.isnan(thresholds).all() else above[order] < 0,
        ~np.isnan(above[order]),
        thresholds[~np.isnan(thresholds)].tolist(),
    )


def find_figures(ranking: Ranking) -> dict[str, float]:
    """How many of the labels known to be flipped are found, among those that have an AUM or are judged.

    Returns:
        auroc and average_precision of the ranking; precision_at_flipped, its precision (and recall) at as many images
        as are flipped; precision and recall of the flags. NaN where there is nothing to divide by.
    """
    ranked = ~np.isnan(ranking.aum)
    score, flipped = torch.from_numpy(-ranking.aum[ranked]), torch.from_numpy(ranking.flipped[ranked])
    number = int(flipped.sum())
    both = 0 < number < len(flipped)
    figures = dict(
        auroc=auroc(score, flipped) if both else math.nan,
        average_precision=average_precision(score, flipped) if both else math.nan,
        precision_at_flipped=float(flipped[:number].double().mean()) if number else math.nan,
    )
    if ranking.flagged is not None:
        found = (ranking.flagged & ranking.flipped).sum()
        among = (ranking.judged & ranking.flipped).sum()
        figures.update(
            precision=float(found / ranking.flagged.sum()) if ranking.flagged.any() else math.nan,
            recall=float(found / among) if among else math.nan,
        )
    return figures


def find_doubts(ranking: Ranking) -> list[str]:
    """Why the threshold should not be trusted, if there is a reason.

    The rule takes most labels to be right, and their margins to be learned better than those of a class that is wrong
    for sure. A run that is too short or does not learn makes the two look alike, and most labels are then flagged.
    """
    doubts = []
    flagged = ranking.flagged.sum() / ranking.judged.sum()
    if flagged > MOST_FLAGGED:
        doubts.append(f'it flags {100 * flagged:.0f} % of the labels, and is made for sets of which most are right; go '
                      'by the ranking')
    ranked = ~np.isnan(ranking.aum)
    learned = (ranking.aum[ranked] > 0).mean()
    if learned < LEAST_LEARNED:
        doubts.append(f'while it trained the network favoured the given label for {100 * learned:.0f} % of the images '
                      'only (AUM above 0); train longer, or with a better recipe. The ranking may still help')
    return doubts


def tell(ranking: Ranking, num_runs: int, where: str, percentile: float) -> str:
    """The figures as text."""
    known = '' if ranking.flipped is None else f', {ranking.flipped.sum()} of them flipped'
    lines = [f'{len(ranking.index)} labels of {where}{known}; margins of {num_runs} run{"s" * (num_runs > 1)}']
    unranked = int(np.isnan(ranking.aum).sum())
    if unranked:
        lines.append(f'{unranked} have no AUM: each run given has them as threshold samples, or never saw them')
    if ranking.thresholds:
        told = ', '.join(f'{threshold:.2f}' for threshold in ranking.thresholds)
        lines.append(f'{ranking.flagged.sum()} of {ranking.judged.sum()} judged lie below the threshold: AUM {told}, '
                     f'percentile {percentile:g} of the threshold samples')
        lines += [f'Do not trust the threshold: {doubt}' for doubt in find_doubts(ranking)]
    if ranking.flipped is None:
        return '\n'.join(lines)
    figures = find_figures(ranking)
    figures = {name: '-' if math.isnan(value) else f'{100 * value:.2f}' for name, value in figures.items()}
    number = int(ranking.flipped[~np.isnan(ranking.aum)].sum())
    at = figures['precision_at_flipped']
    lines += [
        f'AUROC {figures["auroc"]} %, average precision {figures["average_precision"]} %',
        f'{"":24}images  precision %  recall %',
        f'{"the first by rank":24}{number:6}  {at:>11}  {at:>8}',
    ]
    if ranking.flagged is not None:
        lines.append(f'{"below the threshold":24}{ranking.flagged.sum():6}  {figures["precision"]:>11}  '
                     f'{figures["recall"]:>8}')
    return '\n'.join(lines)


def class_name(source: Source, label: int) -> str:
    return source.class_names[label] if source.class_names else str(label)


def write_ranking(path: Path, ranking: Ranking, source: Source) -> None:
    """Writes mislabeled.csv; cells are empty where a thing is not known.

    `image` says where the image lies, a file or a row; `file` is its file's name where the set has such names.
    """
    files = source.file_paths()
    with open(path, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        for row, index in enumerate(ranking.index.tolist()):
            ranked = not np.isnan(ranking.aum[row])
            writer.writerow(dict(
                rank=row + 1 if ranked else '',
                index=index,
                label=ranking.label[row],
                true_label='' if ranking.true_label is None else ranking.true_label[row],
                **({} if not source.class_names else {
                    'class': class_name(source, ranking.label[row]),
                    'true_class': '' if ranking.true_label is None else class_name(source, ranking.true_label[row]),
                }),
                aum=f'{ranking.aum[row]:.6g}' if ranked else '',
                flagged=int(ranking.flagged[row]) if ranking.judged[row] else '',
                flipped='' if ranking.flipped is None else int(ranking.flipped[row]),
                image=source.where(index),
                file='' if files is None else files[index],
            ))


def draw_contact_sheet(path: Path, ranking: Ranking, source: Source, num_images: int) -> None:
    """Writes a picture of the most suspicious and the easiest images with their labels and AUM.

    Where wrong labels are known, they are framed, and the true one is told.

    Raises:
        ImageError: If one of the images cannot be decoded.
    """
    def cell(row):
        wrong = ranking.flipped is not None and ranking.flipped[row]
        note = ', flagged' if ranking.flagged is not None and ranking.flagged[row] else ''
        image = source.image(int(ranking.index[row]))
        image.thumbnail((192, 192))  # never enlarges
        return Cell(
            image,
            class_name(source, ranking.label[row]),
            class_name(source, ranking.true_label[row]) if wrong else None,
            f'{row + 1}: {ranking.aum[row]:.2f}{note}\n{os.path.basename(source.where(int(ranking.index[row])))}',
        )

    ranked = int((~np.isnan(ranking.aum)).sum())
    number = min(num_images, (ranked + 1) // 2)
    parts = []
    for title, rows in (
            (f'The {number} most suspicious of {len(ranking.index)} labels (lowest AUM)', range(number)),
            (f'The {min(number, ranked - number)} easiest (highest AUM)',
             range(ranked - 1, max(ranked - number, number) - 1, -1)),
    ):
        if ranking.flipped is not None:
            wrong = int(ranking.flipped[list(rows)].sum())
            title += f', {wrong} known to be wrong' + (' (framed, with the true label)' if wrong else '')
        parts.append((title, [cell(row) for row in rows]))
    contact_sheet(parts, path)


def main(args: Namespace) -> None:
    for folder, times in Counter(folder.resolve() for folder in args.runs).items():
        if times > 1:
            raise UsageError(f'{folder} is given {times} times; each run counts once')
    runs = [read_margins(folder) for folder in args.runs]
    check_same_labels(args.runs, runs)
    ranking = rank_labels(runs, args.threshold_percentile)
    if np.isnan(ranking.aum).all():
        raise UsageError(f'{args.runs[0]}: no labeled image has an AUM yet; train longer')
    data = Namespace(**{**SOURCE_FLAGS, **read_args(args.runs[0] / 'args.yaml')})
    data.data_dir = args.data_dir or data.data_dir
    source = open_source(data, data.train_split) if args.data_dir else open_run_source(
        data, data.train_split, args.runs[0])
    first = runs[0]
    if first.index.max() >= len(source) and not len(first.digests):
        raise UsageError(f'{first.where} has {len(source)} images here, but {args.runs[0]} an image of index '
                         f'{first.index.max()}: the data set has changed')
    if not len(first.digests):
        show(f'{args.runs[0] / "margins.parquet"}: it does not tell its pictures, and they are taken by position')
    else:
        what = f'{args.runs[0] / "margins.parquet"}'
        index = place_pictures(what, source, torch.tensor(first.index), first.rows, first.digests)
        place = dict(zip(first.index.tolist(), index.tolist()))
        ranking.index = np.array([place[i] for i in ranking.index.tolist()])
    source.class_names = first.class_names or source.class_names
    try:
        args.results_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f'--results-dir {args.results_dir}: cannot be made: {error.strerror}') from error
    table, sheet = args.results_dir / 'mislabeled.csv', args.results_dir / 'contact_sheet.png'
    replace_file(table, lambda part: write_ranking(part, ranking, source))
    replace_file(sheet, lambda part: draw_contact_sheet(part, ranking, source, args.num_images))
    show(tell(ranking, len(runs), runs[0].where, args.threshold_percentile))
    show(f'{table}\n{sheet}')


if __name__ == '__main__':
    setup_default_logging()
    run_program(lambda: main(_parse_args()))
