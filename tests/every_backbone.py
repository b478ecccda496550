"""Trains every family of timm for two steps, each at its smallest member, and counts. By hand, not in the suite:

    python tests/every_backbone.py [FAMILY ...] [--results-file results/backbones.csv]

With a results file, each family adds a row to it once it is done, and those that stand in it are not run again unless
they are named, so the hours can be taken in pieces. A family is a module of timm.models. The real train_ssl.py runs in
this process, on the bundled digits at 64 pixels or, where a network refuses these, at its own size. A family is
trained, refused in one line, or failed (exit status 1).
"""
import argparse
import contextlib
import csv
import io
import logging
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch
from accelerate.state import AcceleratorState, GradientState

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_ssl
import wide_resnet
from program import RunError, UsageError

FIELDS = ['family', 'model', 'result', 'seconds', 'reason']
# Words of names, from the smallest network up.
SIZES = 'test zepto atto femto pico nano xxxs xxs xs tiny t micro mini small s'.split()


def sounds_small(name: str) -> tuple[int, int]:
    """A key that orders the models of a family by what their names say of their size."""
    words = name.split('_')
    return min((SIZES.index(word) for word in words if word in SIZES), default=len(SIZES)), sum(
        int(number) for number in re.findall('[0-9]+', name))


def count_parameters(name: str) -> float:
    """Parameters of a model with ten classes, which is built without memory; infinite if it cannot be built so."""
    try:
        with torch.device('meta'):
            return sum(p.numel() for p in timm.create_model(name, num_classes=10).parameters())
    except Exception:  # a model that computes with its own numbers while it is built; others of its family will do
        return float('inf')


def smallest(names: list[str]) -> str:
    """Of the models whose names sound smallest the one that is; building all of a thousand would take an hour."""
    return min(sorted(names, key=sounds_small)[:4], key=count_parameters)


def train(name: str, img_size: int) -> str | None:
    """Two updates, an evaluation and all that a run writes; returns why the model was refused, or None."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with tempfile.TemporaryDirectory() as output:
        try:
            train_ssl.main(train_ssl._parse_args([
                '--dataset', 'digits', '--train-split', 'train[:60]', '--val-split', 'test[:4]', '--num-labels', '10',
                '--model', name, '--img-size', str(img_size), '-b', '2', '--mu', '1', '-vb', '4', '--epochs', '1',
                '--train-steps-per-epoch', '2', '--calibratemix', '--calmix-warmup-epochs', '0', '--workers', '0',
                '--device', 'cpu', '--output', output, '--lr', '0.001',
            ]))
        except UsageError as error:
            return str(error)
    return None


def try_family(family: str, img_size: int) -> dict[str, str]:
    """A row of FIELDS for the smallest member of a family: at `img_size`, or else at its own size."""
    name, started = smallest(timm.list_models(module=family)), time.perf_counter()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            own = timm.get_pretrained_cfg(name).input_size[1]
            refused = train(name, img_size)
            result, reason = f'trained at {img_size} px', ''
            if refused and own != img_size:
                reason, refused = refused, train(name, own)
                result = 'trained at its own size'
        if refused:
            result, reason = 'refused', refused
    except Exception as error:
        result, reason = 'failed', str(error) if isinstance(error, RunError) else traceback.format_exc()
    return dict(zip(FIELDS, (family, name, result, f'{time.perf_counter() - started:.1f}', reason)))


def read_rows(path: Path) -> dict[str, dict[str, str]]:
    """Rows of earlier calls by family; a family that stands in the file twice has its last row."""
    if not path.is_file():
        return {}
    with path.open(newline='', encoding='utf-8') as file:
        return {row['family']: row for row in csv.DictReader(file)}


def main() -> int:
    parser = argparse.ArgumentParser(description='Two training steps of every family of timm.')
    parser.add_argument('families', nargs='*', metavar='FAMILY', help='default: all of timm\'s')
    parser.add_argument('--img-size', type=int, metavar='N', default=64, help='default: 64')
    parser.add_argument('--results-file', type=Path, metavar='FILE.csv', help='append here, and go on from here')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    # wide_resnet is this project's own, which its import has put among timm's.
    modules = args.families or [family for family in timm.list_modules() if family != wide_resnet.__name__]
    families = [family for family in modules if timm.list_models(module=family)]
    rows = read_rows(args.results_file) if args.results_file else {}
    for family in families:
        if family in rows and family not in args.families:
            continue
        row = rows[family] = try_family(family, args.img_size)
        if args.results_file:
            new = not args.results_file.exists()
            with args.results_file.open('a', newline='', encoding='utf-8') as file:
                writer = csv.DictWriter(file, FIELDS)
                if new:
                    writer.writeheader()
                writer.writerow(row)
        print('{result:24}{family:28}{model:40}{seconds:>6} s  {reason}'.format(**row), flush=True)
    count = Counter(rows[family]['result'] for family in families)
    print(f'{len(families)} families: ' + ', '.join(f'{number} {result}' for result, number in count.items()))
    return 1 if count['failed'] else 0


if __name__ == '__main__':
    sys.exit(main())
