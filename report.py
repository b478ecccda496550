#!/usr/bin/env python3
"""Tables and pictures from finished runs.

    python report.py output/quickstart/fixmatch output/quickstart/fixmatch+calibratemix --output output/quickstart

Reads `last/metrics.json` of each run folder: the weights at the end of training, since best/ was chosen on the very
images that are reported. Prints the table, and writes comparison.csv (percent but for nll) and reliability.png.
"""
import argparse
import csv
import json
import sys
from pathlib import Path

import torch

from data import UsageError
from metrics import ReliabilityBins, reliability_diagram

COLUMNS = ('run', 'error', 'ece', 'nll', 'confidence')


def read_run(folder: Path) -> dict:
    """Metrics of a run's last weights, with its name.

    Raises:
        UsageError: If the folder holds no finished evaluation.
    """
    path = folder / 'last' / 'metrics.json'
    try:
        return dict(json.loads(path.read_text()), run=folder.name)
    except (OSError, ValueError) as error:
        raise UsageError(f'{folder}: no run with an evaluation ({path}: {error})') from error


def write_report(runs: list[dict], output: Path) -> str:
    """Writes comparison.csv and reliability.png; returns the table as text."""
    output.mkdir(parents=True, exist_ok=True)
    rows = [{'run': run['run'], **{key: f'{run[key]:.4f}' for key in COLUMNS[1:]}} for run in runs]
    with open(output / 'comparison.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    panels = []
    for run in runs:
        bins = ReliabilityBins(**{key: torch.tensor(value) for key, value in run['bins'].items()})
        panels.append((run['run'], bins))
    reliability_diagram(panels, output / 'reliability.png')

    width = max(len(run['run']) for run in runs)
    lines = [f'{"run":{width}}  error %  ECE %    NLL  confidence %']
    for run in runs:
        lines.append(f'{run["run"]:{width}}  {run["error"]:7.2f}  {run["ece"]:5.2f}  {run["nll"]:5.3f}  '
                     f'{run["confidence"]:12.2f}')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description='Table and reliability diagrams of finished runs.', allow_abbrev=False)
    parser.add_argument('runs', metavar='RUN', nargs='+', type=Path, help='run folders, in the order of the table')
    parser.add_argument('--output', metavar='DIR', type=Path, required=True, help='where the files go')
    args = parser.parse_args()
    try:
        print(write_report([read_run(folder) for folder in args.runs], args.output))
    except UsageError as error:
        print(f'report.py: error: {error}', file=sys.stderr)
        sys.exit(2)
    print(f'{args.output / "comparison.csv"}\n{args.output / "reliability.png"}')


if __name__ == '__main__':
    main()
