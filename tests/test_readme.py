"""The README's commands: all flags are known, and those that can run here are run with smaller numbers."""
import csv
import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
from conftest import ROOT
from PIL import Image
from timm.models import save_for_hf

BLOCKS = re.findall(r'```bash\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
PARSERS = {'train_ssl.py': 'create_parser', 'validate.py': 'create_validate_parser',
           'predict.py': 'create_predict_parser', 'benchmark.py': 'create_parser'}


def block_with(words: str) -> str:
    [block] = [block for block in BLOCKS if words in block]
    return block


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with the project's files, in which a command of the README leaves what it writes."""
    for entry in ROOT.iterdir():
        if entry.name not in ('output', '.git'):
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


def run_block(block: str, place: Path, changes: dict[str, str]) -> str:
    """Runs a block with some words changed; returns what it printed."""
    for old, new in changes.items():
        assert old in block, old
        block = block.replace(old, new)
    done = subprocess.run(['bash', '-ec', block], cwd=place, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_flag_that_the_readme_gives_a_program_is_one_of_its_own():
    seen = set()
    for block in BLOCKS:
        for line in block.replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            for program in PARSERS.keys() & {*words}:
                parser = getattr(importlib.import_module(program[:-3]), PARSERS[program])()
                known = {option for action in parser._actions for option in action.option_strings}
                asked = [word.partition('=')[0] for word in words[words.index(program) + 1:]]
                assert {word for word in asked if re.match(r'--?[a-z]', word)} <= known, (program, line)
                seen.add(program)
    assert seen == PARSERS.keys()


def test_the_commands_for_own_photos_train_report_and_predict(place):
    generator = np.random.default_rng(0)
    for name in ('labeled/cat', 'labeled/dog', 'unlabeled', 'val/cat', 'val/dog'):
        (place / 'photos' / name).mkdir(parents=True)
        for i in range(6):
            image = Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8))
            image.save(place / 'photos' / name / f'{i}.jpg')
    # Stands for weights that would be downloaded.
    save_for_hf(timm.create_model('test_efficientnet', num_classes=1000), place / 'weights', safe_serialization=True)
    printed = run_block(block_with('predict.py NEW_PHOTOS'), place, {
        'tf_efficientnet_lite0': 'local-dir:weights',
        'NEW_PHOTOS': 'photos/unlabeled',
        'PHOTOS': 'photos',
        '--epochs 4 --train-steps-per-epoch 25': '--epochs 1 --train-steps-per-epoch 3 -j 0 --device cpu',
        '--img-size 128': '--img-size 32',
    })
    with open(place / 'output' / 'predict' / 'predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {row['label'] for row in rows} <= {'cat', 'dog'}
    assert 'balanced acc' in printed and 'pseudo' in printed
    assert (place / 'output' / 'report' / 'confusion.png').is_file()
    assert sum(len(files) for _, _, files in os.walk(place / 'output' / 'sorted')) == 6


def test_the_commands_for_wrong_labels_rank_them(place):
    run_block(block_with('mislabeled.py output'), place, {'--epochs 4 --train-steps-per-epoch 100':
                                                          '--epochs 1 --train-steps-per-epoch 4 -j 0 --device cpu'})
    with open(place / 'output' / 'mislabeled' / 'mislabeled.csv', newline='') as file:
        assert len(list(csv.DictReader(file))) == 1297


def test_the_launchers_print_the_commands_of_a_table(place):
    first = block_with('DRY_RUN=1').splitlines()[0]
    printed = run_block(first, place, {})
    assert printed.count('train_ssl.py') == 54 and '--model wide_resnet28_2' in printed
