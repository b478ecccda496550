"""Classes by name, data by content: what a run belongs to, and splits that cannot leak."""
import json
import logging
import os
import re
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT, TINY
from images import noise
from PIL import Image

import checkpoint
import digests
import mislabeled
import predict
import program
import sources
import splits
import train_ssl
import validate
from digests import Contents, digest_pictures, from_text, place_pictures, shared_pictures, to_text
from labels import Labels, match_classes, read_labels
from program import UsageError
from sources import (
    ArraySource,
    HFSource,
    JoinedSource,
    PartSource,
    create_source,
    is_published,
    locate,
    open_source,
    unlabeled_split,
)
from splits import hold_out

OWN = ('--img-size', '8', '--model', 'wide_resnet10_1', '-b', '4', '--mu', '2', '--epochs', '1',
       '--train-steps-per-epoch', '2', '--workers', '0', '--device', 'cpu', '--model-ema-warmup')


def write_set(root: Path, splits: dict[str, dict[str, int]], seed: int = 0) -> Path:
    """Image folders of noise: each split's number of pictures by class."""
    generator = np.random.default_rng(seed)
    for split, classes in splits.items():
        for name, number in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f'{i:03}.png')
    return root


@pytest.fixture
def own(tmp_path) -> Path:
    """Classes 1, 2 and 10 in two splits, and further splits to evaluate."""
    return write_set(tmp_path / 'own', dict(
        train={'1': 8, '2': 8, '10': 8},
        val={'1': 3, '2': 3, '10': 3},
        fewer={'2': 3, '10': 3},
        more={'2': 3, '10': 3, 'bees': 3},
        others={'x': 3, 'y': 3, 'z': 3},
    ))


def run_in_process(program, *arguments):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return program.main(program._parse_args([str(a) for a in arguments]))


@pytest.fixture
def train_own(tmp_path):
    def run(experiment: str, *arguments) -> Path:
        run_in_process(train_ssl, *OWN, '--output', tmp_path, '--experiment', experiment, *arguments)
        return tmp_path / experiment

    return run


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    for name in ('reliability_diagram', 'confidence_histogram', 'risk_coverage_diagram', 'class_diagram'):
        monkeypatch.setattr(validate, name, lambda *args, **kwargs: None)

    def run(*arguments) -> dict:
        where = tmp_path / 'results'
        run_in_process(validate, '--device', 'cpu', '-j', 0, '--bootstrap', 0, '--results-dir', where, *arguments)
        return json.loads((where / 'metrics.json').read_text())

    return run


def toy(targets, names, start=0):
    return ArraySource(noise(len(targets) + start, 4)[start:], targets, names, 'toy')


# --- Classes ----------------------------------------------------------------------------------------------------------

def test_classes_are_matched_by_name_and_what_differs_is_told(caplog):
    caplog.set_level(logging.INFO)
    source = toy([0, 1, 2, -1, 2], ['c', 'a', 'b'])
    assert match_classes(source, ['a', 'b', 'c'], 3, 'here').tolist() == [2, 0, 1, -1, 1]
    assert 'here: its classes stand in another order' in caplog.text
    caplog.clear()
    fewer = toy([0, 1], ['b', 'c'])
    assert match_classes(fewer, ['a', 'b', 'c'], 3, 'here').tolist() == [1, 2] and 'lacks 1 of the 3' in caplog.text
    with pytest.raises(UsageError, match=r'2 of 5 images are of classes that the run does not have: b; .* lacks d \('):
        match_classes(source, ['a', 'c', 'd'], 3, 'here', run='the run')
    assert match_classes(source, ['a', 'c', 'd'], 3, 'here', others='are left out').tolist() == [1, 0, -1, -1, -1]
    caplog.clear()
    assert match_classes(source, ['c', 'a', 'b'], 3, 'here').tolist() == [0, 1, 2, -1, 2] and not caplog.text


def test_classes_that_differ_in_capitals_only_are_told(own, train_own, tmp_path, caplog):
    shutil.copytree(own / 'val' / '10', own / 'val' / 'Ten')
    shutil.rmtree(own / 'val' / '10')
    shutil.move(own / 'train' / '10', own / 'train' / 'ten')
    with pytest.raises(UsageError, match=r'not have: Ten; .*ten \(names that differ in capitals only: Ten and ten'):
        train_own('r', '--data-dir', own)
    shutil.rmtree(own / 'val' / 'Ten')
    shutil.copytree(own / 'train' / 'ten', own / 'train' / 'Ten')
    train_own('r', '--data-dir', own)
    assert re.search('names differ in capitals only are different ones: (Ten and ten|ten and Ten)', caplog.text)
    assert '8 labeled pictures are the same as another one of another class, such as' in caplog.text


def test_classes_that_are_the_same_number_or_differ_in_blanks_only_are_told_and_blanks_shown(caplog):
    splits.tell_alike(['1', 'cat', '01', '001', 'cat ', '10', '2.0', '2', '0', '00'])
    assert caplog.messages == [
        'classes whose names differ in blanks at their ends only are different ones: cat and "cat "',
        'classes whose names are the same number are different ones: 1 and 01 and 001, 2.0 and 2, 0 and 00',
    ]
    for theirs, ours, message in ((' dog', 'dog', r'not have: " dog"; .*blanks at their ends only: " dog" and dog'),
                                  ('01', '1', 'not have: 01; .*names that are the same number: 01 and 1')):
        with pytest.raises(UsageError, match=message):
            match_classes(toy([0], [theirs]), [ours, 'x'], 2, 'here')


def test_pictures_of_the_training_split_that_a_run_never_sees_are_counted(own, train_own, caplog):
    shutil.move(own / 'more', own / 'unlabeled')
    shutil.move(own / 'train', own / 'labeled')
    train_own('r', '--data-dir', own, '--num-labels', 6)
    assert ('18 of the 24 images of labeled are neither labeled nor unlabeled ones; --unlabeled-split '
            'labeled+unlabeled takes them as the latter') in caplog.text
    caplog.clear()
    train_own('s', '--data-dir', own, '--num-labels', 6, '--unlabeled-split', 'labeled+unlabeled')
    assert 'neither labeled nor' not in caplog.text


def test_pictures_below_unlabeled_dir_that_a_flat_training_folder_has_count_once(own):
    flags = ['--data-dir', own / 'train', '--val-fraction', 0.25, '--unlabeled-dir', own]
    args = train_ssl._parse_args([*map(str, flags)])
    unlabeled = splits.open_sources(args).unlabeled.file_paths()
    assert len(unlabeled) == len(set(unlabeled)) == 24 + 9 + 6 + 9 + 9
    assert not any('..' in path for path in unlabeled)


def test_pictures_below_unlabeled_dir_that_the_unlabeled_split_has_count_once(own):
    shutil.move(own / 'more', own / 'unlabeled')
    flags = ['--data-dir', own, '--unlabeled-split', 'unlabeled', '--unlabeled-dir', own]
    args = train_ssl._parse_args([*map(str, flags)])
    found = open_source(args, unlabeled_split(args)).file_paths()
    assert len(found) == len(set(found)) == 9 + 6 + 9  # unlabeled, and what is in no split: fewer and others
    assert not any('/train/' in path or '/val/' in path for path in found)


@pytest.mark.parametrize('linked', ['the folder', 'a class', 'a picture'])
def test_pictures_below_unlabeled_dir_count_once_through_links_too(own, linked):
    given = own
    if linked == 'the folder':
        given = own.parent / 'link'
        given.symlink_to(own)
    elif linked == 'a class':
        shutil.move(own / 'train' / '1', own.parent / 'pool' / '1')
        (own / 'train' / '1').symlink_to(own.parent / 'pool' / '1')
        given = own.parent
    else:
        given = own.parent / 'pool'
        given.mkdir()
        (given / 'a.png').symlink_to(own / 'train' / '1' / '000.png')
        shutil.copy(own / 'more' / 'bees' / '000.png', given / 'b.png')
    args = train_ssl._parse_args(['--data-dir', str(own), '--unlabeled-dir', str(given)])
    source = open_source(args, unlabeled_split(args))
    assert len(source) == 24 + (1 if linked == 'a picture' else 6 + 9 + 9)  # in no split: fewer, more and others
    assert len(digest_pictures(source, torch.arange(len(source))).unique()) == len(source)


@pytest.mark.parametrize('flags, message', [
    (('--unlabeled-split', 'train+train'), r'split train\+train: 24 images of train are in two parts of it'),
    (('--unlabeled-split', 'train[:75%]+fewer+train[50%:]'), '6 images of train are in two parts of it, and each'),
    (('--val-split', 'val+val'), '9 images of val are in two parts of it'),
    (('--train-split', 'train+'), r'split train\+: a part of it has no name'),
    (('--train-split', ''), 'own: the name of the split is empty'),
])
def test_a_split_whose_parts_overlap_or_have_no_name_is_refused(own, flags, message):
    args = train_ssl._parse_args(['--data-dir', str(own), *flags])
    with pytest.raises(UsageError, match=message) as error:
        splits.open_sources(args)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('flags, message', [
    (('--dataset', 'digits', '--data-dir', 'OWN'), '--dataset digits and --data-dir .*: nothing would be read from'),
    (('--dataset', 'OWN', '--data-dir', 'OTHER'), '--dataset .*own and --data-dir .*other: nothing would be read from'),
    (('--dataset', 'p.parquet', '--data-dir', 'OWN'), '--dataset .*p.parquet and --data-dir'),
    (('--dataset', 'digits', '--class-map', 'm.txt'), '--class-map .*m.txt: numbers folders .*digits has none'),
    (('--dataset', 'OWN/l.csv', '--class-map', 'm.txt'), '--class-map .*m.txt: numbers folders .*own/l.csv has none'),
    (('--data-dir', 'OTHER', '--class-map', 'm.txt'), '--class-map .*m.txt: numbers folders .*other has none'),
    (('--dataset', 'torch/mnist', '--target-key', 'x'), '--target-key x: the arrays of torch/mnist have no columns'),
])
def test_flags_of_the_data_that_have_no_use_are_refused(own, flags, message, monkeypatch):
    (own.parent / 'other').mkdir()
    table = pa.table(dict(image=[path.read_bytes() for path in (own / 'train' / '1').iterdir()], label=[0, 1] * 4))
    pq.write_table(table, own.parent / 'other' / 'train.parquet')
    (own / 'l.csv').write_text('path,label\ntrain/1/000.png,a\n')
    monkeypatch.setattr(sources, 'open_torch', lambda *_: toy([0, 1], None))
    flags = [flag.replace('OWN', str(own)).replace('OTHER', str(own.parent / 'other')) for flag in flags]
    with pytest.raises(UsageError, match=message) as error:
        splits.open_sources(train_ssl._parse_args(flags))
    assert '\n' not in str(error.value)


def test_a_folder_named_twice_and_a_class_map_of_folders_are_no_mistake(own):
    (own / 'm.txt').write_text('10\n2\n1\n')
    args = train_ssl._parse_args(['--dataset', str(own), '--data-dir', str(own), '--class-map', str(own / 'm.txt')])
    assert splits.open_sources(args).train.class_names == ['10', '2', '1']


def test_labels_that_are_ids_make_no_head_of_that_size(tmp_path, train_own):
    image = [dict(bytes=path.read_bytes(), path=None)
             for path in sorted(write_set(tmp_path / 'f', dict(train={'a': 4, 'b': 4})).glob('*/*/*.png'))]
    given = ('r', '--dataset', tmp_path / 'p.parquet', '--val-split', 'train[50%:]', '--train-split', 'train[:50%]')
    for largest in (2 ** 40, 90):
        pq.write_table(pa.table(dict(image=image, label=[largest, 17] * 4)), tmp_path / 'p.parquet')
        with pytest.raises(UsageError, match=rf'labels up to {largest}, more classes than its 4 training images: are '
                                             f'they ids.*--num-classes {largest + 1} keeps'):
            train_own(*given)
    assert json.loads((train_own(*given, '--num-classes', 91) / 'labels.json').read_text())['num_classes'] == 91


def test_a_set_of_one_class_is_refused_by_that_reason(tmp_path, train_own):
    write_set(tmp_path / 'f', dict(train={'cat': 4}, val={'cat': 2}))
    with pytest.raises(UsageError, match='--train-split train has only one class, cat; a classifier needs two'):
        train_own('r', '--data-dir', tmp_path / 'f')


def test_sets_without_names_compare_by_number_and_say_so(caplog):
    caplog.set_level(logging.INFO)
    for names, ours in ((None, ['a', 'b', 'c']), (['a', 'b', 'c'], None), (None, None)):
        caplog.clear()
        assert match_classes(toy([2, 0, -1], names), ours, 3, 'here').tolist() == [2, 0, -1]
        assert 'by number' in caplog.text
    with pytest.raises(UsageError, match='labels up to 3, and the training split has 3 classes'):
        match_classes(toy([3], None), None, 3, 'here')


def test_names_that_are_whole_numbers_are_matched_with_the_numbers_that_they_say(caplog):
    caplog.set_level(logging.INFO)
    assert match_classes(toy([0, 1, -1], ['1', '2']), None, 3, 'here').tolist() == [1, 2, -1]
    assert match_classes(toy([2, 10, -1], None), ['1', '2', '10'], 3, 'here').tolist() == [1, 2, -1]
    assert 'its labels are numbers, and are matched with the names of the classes of the training split' in caplog.text
    with pytest.raises(UsageError, match='2 of 3 images are of classes that the training split does not have: 0, 3'):
        match_classes(toy([0, 1, 3], None), ['1', '2'], 2, 'here')
    joined = JoinedSource([toy([0, 1, 2], None), toy([0, 1], ['1', '2'])])
    assert joined.targets.tolist() == [0, 1, 2, 1, 2] and joined.class_names is None
    joined = JoinedSource([toy([0, 1], ['1', '2']), toy([0, 1, 2], None)])
    assert joined.targets.tolist() == [0, 1, -1, 0, 1] and joined.class_names == ['1', '2']
    args = train_ssl._parse_args(['--data-dir', 'nowhere'])
    for train, evaluated in ((toy([0, 1, 2], None), toy([0, 1], ['1', '2'])),
                             (toy([0, 1, 2], ['0', '1', '2']), toy([1, 2], None)),
                             (toy([0, 1], ['1', '2']), toy([1, 2], None))):
        expected = [1, 2] if len(train) == 3 else [0, 1]
        assert splits.agree_on_classes(args, splits.Sources(train, train, evaluated)) == len(train)
        assert evaluated.targets.tolist() == expected


def test_joined_splits_keep_labels_by_name():
    joined = JoinedSource([toy([0, 1], ['a', 'b']), toy([0, 1, 2], ['b', 'x', 'a'])])
    assert joined.targets.tolist() == [0, 1, 1, -1, 0] and joined.class_names == ['a', 'b']


def test_a_validation_split_without_a_class_keeps_the_numbers_of_training(own, caplog):
    args = train_ssl._parse_args(['--data-dir', str(own), '--val-split', 'fewer'])
    opened = splits.open_sources(args)
    assert splits.agree_on_classes(args, opened) == 3
    assert opened.train.class_names == ['1', '2', '10'] and opened.evaluation.targets.unique().tolist() == [1, 2]
    assert 'lacks 1 of the 3 classes of the training split (1)' in caplog.text


@pytest.mark.parametrize('flags, message', [
    (('--val-split', 'more'), '--val-split more: 3 of 9 images are of classes that the training split does not have: '
                              'bees; .* lacks 1'),
    (('--test-split', 'others'), '--test-split others: 9 of 9 images .*: x, y, z'),
    (('--extra-val', 'OTHERS'), r'--extra-val .*: none of its images shows a class of this run; its classes are x, y, '
                                'z, those of the run 1, 2, 10'),
    (('--val-split', 'train'), '24 of the 24 labeled training images are among the images to evaluate .train., such'),
    (('--train-split', 'train[:50%]', '--val-split', 'train[40%:]'), '2 of the 12 labeled'),
    (('--val-split', 'copy'), '9 pictures of copy are the same as labeled ones .*: .*copy.*png .as .*train.*png'
                              '.* and 6 more; take'),
    (('--val-fraction', '0.2', '--test-split', 'copy'), '7 pictures of copy are the same'),
    (('--test-split', 'val'), '--test-split val: best/ is chosen on it'),
    (('--num-labels', '6', '--train-split', 'fewer'), 'images are of classes that the training split does not have: 1'),
])
def test_what_does_not_belong_together_is_refused_by_name(own, train_own, flags, message):
    if 'OTHERS' in flags:
        write_set(own.parent / 'second', dict(val={'x': 2, 'y': 2, 'z': 2}))
        flags = [str(own.parent / 'second') if flag == 'OTHERS' else flag for flag in flags]
    if 'copy' in flags:
        for name in ('1', '2', '10'):
            (own / 'copy' / name).mkdir(parents=True)
            for i in range(3):
                shutil.copy(own / 'train' / name / f'00{i}.png', own / 'copy' / name / f'other{i}.png')
    with pytest.raises(UsageError, match=message):
        train_own('run', '--data-dir', own, *flags)


def copy_pictures(own: Path, split: str, pictures: dict[str, str]) -> Path:
    """Further pictures for a split of classes 1, 2 and 10: copies by their path below it, of paths below the root."""
    for name in ('1', '2', '10'):
        (own / split / name).mkdir(parents=True, exist_ok=True)
    for at, of in pictures.items():
        shutil.copy(own / of, own / split / at)
    return own


@pytest.mark.parametrize('where', ['val', 'train', 'test', 'extra'])
def test_one_labeled_picture_among_the_evaluated_ones_is_refused(own, train_own, where):
    """Of any evaluated set; in the training split it is a copy in the part that is held out."""
    flags = {'val': (), 'train': ('--val-fraction', '0.5'), 'test': ('--test-split', 'test'),
             'extra': ('--extra-val', own.parent / 'other')}[where]
    if where == 'extra':
        write_set(own.parent / 'other', dict(val={'1': 2, '2': 2}), seed=1)
        shutil.copy(own / 'train' / '2' / '004.png', own.parent / 'other' / 'val' / '1' / 'copy.png')
    elif where == 'train':
        copy_pictures(own, 'train', {f'2/copy{i}.png': f'train/2/00{i}.png' for i in range(8)})
    else:
        copy_pictures(own, where, {'1/copy.png': 'train/2/004.png'})
    named = 'held-out are the same as' if where == 'train' else r'1 pictures of .* \(as .*train/2/004.png\); take'
    with pytest.raises(UsageError, match=named):
        train_own('run', '--data-dir', own, *flags)
    if where == 'val':
        train_own('other', '--data-dir', own, '--train-split', 'train[:25%]')  # without that picture


def test_what_else_is_seen_before_it_is_evaluated_is_told_with_its_number(own, train_own, caplog):
    copy_pictures(own, 'pool', {f'1/{i}.png': f'val/10/00{i}.png' for i in range(2)})
    copy_pictures(own, 'pool', {'1/again.png': 'val/10/000.png', '2/own.png': 'train/1/000.png'})
    copy_pictures(own, 'test', {'1/a.png': 'val/1/000.png', '2/b.png': 'fewer/2/001.png'})
    copy_pictures(own, 'test', {'10/c.png': 'more/10/002.png'})
    write_set(own.parent / 'other', dict(val={'1': 2, '2': 2}), seed=1)
    shutil.copy(own / 'test' / '10' / 'c.png', own.parent / 'other' / 'val' / '1' / 'copy.png')
    train_own('run', '--data-dir', own, '--unlabeled-split', 'pool+fewer', '--test-split', 'test', '--extra-val',
              own.parent / 'other')
    told = [line for line in caplog.messages if 'too: ' in line]
    assert len(told) == 4
    assert told[0].startswith('2 of the 9 images to evaluate (val) are in the unlabeled set too: the network sees')
    assert told[1].startswith('1 of the 3 images to evaluate (test) are in the unlabeled set too')
    assert told[2] == ('1 of the 3 images of test are in val too: they are evaluated before the end, and best/ is '
                       'chosen on them by top1')
    assert told[3].startswith('1 of the 3 images of test are in --extra-val') and told[3].endswith('before the end')


def test_of_a_published_set_a_few_are_told_and_many_refused(own, monkeypatch, caplog):
    assert [is_published(name) for name in ('cifar10', 'hfds/mnist', 'torch/CIFAR10', f'hfds/{own}', f'{own}', 'x.csv',
                                            'torch/image_folder', '')] == [True] * 3 + [False] * 5
    pixels = noise(64, 4)
    train, test = ArraySource(pixels[:40], [0] * 40, None, 'a'), ArraySource(pixels[34:], [0] * 30, None, 'b')
    labels = Labels(torch.arange(38), torch.zeros(38), None, torch.zeros(38))
    args = train_ssl._parse_args(['--dataset', 'cifar10', '--val-split', 'test'])
    with pytest.raises(UsageError, match=r'4 pictures of test .*: row 0 of b \(as row 34 of a\), .* and 1 more; take'):
        splits.check_overlap(args, splits.Sources(train, train, test), labels, None)
    labels.index = torch.arange(37)
    splits.check_overlap(args, splits.Sources(train, train, test), labels, None)
    assert '3 pictures of test are the same as labeled ones' in caplog.text and 'the set is published so' in caplog.text
    args.dataset = f'{own}'
    with pytest.raises(UsageError, match='3 pictures of test'):
        splits.check_overlap(args, splits.Sources(train, train, test), labels, None)


def test_deep_greyscale_is_scaled_as_in_training_wherever_it_is_evaluated(tmp_path, train_own, evaluate, caplog):
    """Training holds values up to 4095, so 12 bits; the other pictures alone would point to 8 or 10."""
    generator = np.random.default_rng(0)

    def save(path, pixels):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    for split, largest, form in (('train', 4096, 'png'), ('val', 200, 'tiff'), ('ood', 900, 'tiff')):
        for i in range(6):
            pixels = generator.integers(0, largest, (8, 8), dtype=np.uint16)
            save(tmp_path / 'deep' / split / 'ab'[i % 2] / f'{i}.{form}', pixels)
            save(tmp_path / 'flat' / split / 'ab'[i % 2] / f'{i}.png', (pixels >> 4).astype(np.uint8))
    run = train_own('run', '--data-dir', tmp_path / 'deep', '--in-chans', '1')
    assert 'val/a/0' in caplog.text and 'taken as 12 bits, as in training' in caplog.text
    assert json.loads((run / 'last' / 'config.json').read_text())['grey_bits'] == 12
    logged = json.loads((run / 'last' / 'metrics.json').read_text())
    found = {}
    for kind in ('deep', 'flat'):
        flags = ('--checkpoint', run / 'last', '--data-dir', tmp_path / kind)
        found[kind] = [evaluate(*flags, '--split', 'val')['nll']]
        ending = 'tiff' if kind == 'deep' else 'png'
        run_in_process(predict, tmp_path / kind / 'ood' / 'a' / f'0.{ending}', '--checkpoint', run / 'last', '-j', 0,
                       '--results-dir', tmp_path / 'table', '--device', 'cpu', '--no-console-results')
        found[kind] += (tmp_path / 'table' / 'predictions.csv').read_text().splitlines()[1].split(',')[1:]
    assert found['deep'] == found['flat'] and found['deep'][0] == pytest.approx(logged['nll'], abs=1e-6)
    state = checkpoint.read_checkpoint(next(run.glob('checkpoint-*.safetensors')))
    assert state['identity']['bits'] == 12
    (run / 'last' / 'config.json').write_text('{"grey_bits": "twelve"}')
    with pytest.raises(UsageError, match='grey_bits is twelve; expected a whole number'):
        checkpoint.use_kept_bits(run / 'last', [])


def test_copies_of_imagenet_are_matched_by_number_where_they_share_no_name(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    words = toy([0, 49, 50, 999], [f'word {i}' for i in range(1000)])
    monkeypatch.setattr(splits, 'create_source', lambda *args, **kwargs: words)
    wnids = [f'n{i:08}' for i in range(50)]
    args = Namespace(dataset='webvision-mini', extra_val='imagenet', extra_val_dir=None, max_pixels=10 ** 6)
    _, index, targets = splits.match_extra(args, wnids, 50, 8)
    assert index.tolist() == targets.tolist()[:1] + [1] and targets.tolist() == [0, 49] and 'by number' in caplog.text
    with pytest.raises(UsageError, match='none of its images shows a class'):
        args = Namespace(dataset='own', extra_val='imagenet', extra_val_dir=None, max_pixels=10 ** 6)
        splits.match_extra(args, wnids, 50, 8)


def test_names_are_kept_with_labels_weights_metrics_checkpoint_and_margins(own, train_own):
    folder = train_own('run', '--data-dir', own, '--save-margins', '--num-classes', '4')
    names = ['1', '2', '10']
    assert json.loads((folder / 'labels.json').read_text())['class_names'] == names
    config = json.loads((folder / 'best/config.json').read_text())
    assert config['label_names'] == {'0': '1', '1': '2', '2': '10'} and config['num_classes'] == 4
    metrics = json.loads((folder / 'last/metrics.json').read_text())
    assert metrics['class_names'] == names and metrics['split'] == 'val' and metrics['count'] == 9
    assert (metrics['weights'], metrics['precision'], metrics['num_updates']) == ('average', 'float32', 2)
    assert metrics['best_chosen_by'] == 'top1 on val'
    state = checkpoint.read_checkpoint(folder / 'checkpoint-2.safetensors')
    assert state['identity']['class_names'] == names
    table = pq.read_table(folder / 'margins.parquet')
    assert json.loads(table.schema.metadata[b'class_names']) == names
    source = create_source('', str(own), 'train')
    assert table['digest'].to_pylist() == to_text(digest_pictures(source, torch.arange(24))) + [None] * 24


@pytest.mark.parametrize('flags', [(), ('--num-classes', '4')])
def test_validation_matches_a_runs_classes_by_name(own, train_own, evaluate, flags, caplog):
    folder = train_own('run', '--data-dir', own, *flags)
    first = evaluate('--checkpoint', folder / 'last')
    (own / 'map.txt').write_text('10\n1\n2\n')
    mapped = evaluate('--checkpoint', folder / 'last', '--class-map', own / 'map.txt')
    assert 'stand in another order than those of the model' in caplog.text
    assert mapped['error'] == first['error'] and mapped['nll'] == pytest.approx(first['nll'])
    assert mapped['class_names'] == ['1', '2', '10']
    table = pq.read_table(folder.parent / 'results' / 'predictions.parquet')
    source = create_source('', str(own), 'val', class_map=str(own / 'map.txt'))
    assert source.class_names == ['10', '1', '2']
    own_numbers = [['1', '2', '10'].index(source.class_names[k]) for k in source.targets.tolist()]
    assert table['target'].to_pylist() == own_numbers != source.targets.tolist()
    assert evaluate('--checkpoint', folder / 'last', '--split', 'fewer')['count'] == 6
    for split, told in (('more', 'does not have: bees; .* lacks 1'), ('others', 'x, y, z')):
        with pytest.raises(UsageError, match=told):
            evaluate('--checkpoint', folder / 'last', '--split', split)
    for split in ('train', 'val'):
        (own / split / '2').rename(own / split / 'two')
    with pytest.raises(UsageError, match='3 of 9 images are of classes that the model does not have: two; .* lacks 2'):
        evaluate('--checkpoint', folder / 'last')


def test_a_class_without_an_image_is_named(own, train_own, caplog):
    for file in (own / 'val' / '2').iterdir():
        file.unlink()
    args = train_ssl._parse_args(['--data-dir', str(own), '--train-split', 'train[:17]', '--val-split', 'train[17:]'])
    splits.agree_on_classes(args, splits.open_sources(args))
    assert '--val-split train[17:]: no image of 2 of the 3 classes that --train-split train[:17] has: 1' in caplog.text
    assert 'sorted by class? --val-fraction' in caplog.text


def test_labels_that_begin_at_one_are_told(caplog):
    train, evaluation = toy([1, 2, 3, 1], None), toy([1, 2], None)
    args = train_ssl._parse_args([])
    assert splits.agree_on_classes(args, splits.Sources(train, train, evaluation)) == 4
    assert 'no image of 1 of the 4 classes that the data set has: 0' in caplog.text


# --- Content ----------------------------------------------------------------------------------------------------------

def test_pictures_are_found_by_content_wherever_a_set_holds_them(own, caplog):
    source = create_source('', str(own), 'train')
    index = torch.tensor([3, 20, 7])
    known = digest_pictures(source, index)
    assert torch.equal(from_text(to_text(known)), known)
    rows = torch.arange(3)
    assert place_pictures('file', source, index, rows, known).tolist() == [3, 20, 7] and not caplog.text
    order = torch.randperm(24)
    moved = PartSource(source, order)
    found = place_pictures('file', moved, index, rows, known)
    assert order[found].tolist() == [3, 20, 7] and 'all 3 labeled pictures were found elsewhere' in caplog.text
    without = PartSource(source, order[order != 20])
    with pytest.raises(UsageError, match='file: the data has changed since: picture .*png. is another one, and 1 of'):
        place_pictures('file', without, index, rows, known)
    with pytest.raises(UsageError, match='give the data in the order that it had'):
        place_pictures('file', moved, index, rows[:2], known[:2])


def test_equal_pictures_keep_places_of_their_own():
    pixels = noise(2, 4)
    source = ArraySource(pixels[[0, 0, 1]], [0, 1, 0], None, 'toy')
    known = digest_pictures(source, torch.tensor([0, 1]))
    moved = ArraySource(pixels[[1, 0, 0]], [0, 1, 0], None, 'toy')
    assert place_pictures('file', moved, torch.tensor([0, 1]), torch.arange(2), known).tolist() == [1, 2]


@pytest.mark.parametrize('kind', ['table', 'files', 'arrays', 'joined', 'part'])
def test_shared_pictures_are_those_of_a_slow_comparison(own, kind, monkeypatch):
    """Beside tables of other chunks and of large_binary, cells that are short or empty, and a file that is gone."""
    encoded = [path.read_bytes() for path in sorted(own.glob('train/*/*.png'))]
    tables = [table_of(cells, kind) for cells, kind in ((encoded[:9], pa.binary()), (
        [*encoded[4:7], b'', b'short', *encoded[20:], *encoded[20:22]], pa.large_binary()))]
    files = create_source('', str(own), 'train'), create_source('', str(own), 'val')
    (own / 'train' / '10' / '003.png').unlink()
    for i in range(2):
        shutil.copy(own / 'train' / '2' / f'00{i}.png', own / 'val' / '1' / f'00{i}.png')
    arrays = ArraySource(noise(9, 5)[[3, 4, 4, 7]], [0] * 4, None, ''), ArraySource(noise(9, 5), [0] * 9, None, '')
    joined = JoinedSource([tables[0], files[1]]), JoinedSource([tables[1], files[0]])
    one, other = dict(table=tables, files=files, arrays=arrays, joined=joined, part=(
        PartSource(joined[0], torch.tensor([12, 9, 5, 3])), PartSource(joined[1], torch.arange(20))))[kind]
    content = [[raw(source.data_of([i])) for i in range(len(source))] for source in (one, other)]
    for source, data in zip((one, other), content):
        assert source.sizes(np.arange(len(source))).tolist() == list(map(len, data))
        assert source.sizes(np.array([2, 1])).tolist() == [len(data[2]), len(data[1])]
        tails = [int.from_bytes(d[-20:-12], 'little', signed=True) if len(d) >= 20 else 0 for d in data]
        if kind != 'arrays':
            assert source.tails(np.arange(len(source))).tolist() == tails
    expected = [(i, content[1].index(data)) for i, data in enumerate(content[0]) if data and data in content[1]]
    *found, least = shared_pictures(Contents(one), Contents(other), 50)
    assert list(zip(*(index.tolist() for index in found))) == expected and len(expected) > 1 and not least
    assert one.in_files() == (kind in ('files', 'joined', 'part'))
    index = torch.tensor([i for i, _ in expected[::-1]])
    assert shared_pictures(Contents(one, index), Contents(other))[0].tolist() == index.tolist()
    monkeypatch.setattr(digests, 'COMPARED_BYTES', len(content[0][expected[0][0]]) + 1)
    found, _, least = shared_pictures(Contents(one), Contents(other))
    assert len(found) <= 1 and {*found.tolist()} <= {*index.tolist()} and least == 'at least '
    monkeypatch.undo()
    found, _, least = shared_pictures(Contents(one), Contents(other), 1)
    assert {*found.tolist()} <= {*index.tolist()} and least == 'at least ' * one.in_files()
    monkeypatch.setattr(digests, 'COMPARED_MOST', 1)
    assert shared_pictures(Contents(one), Contents(other))[2] == 'at least '


def table_of(cells: list[bytes], kind: pa.DataType) -> HFSource:
    table = pa.table(dict(image=pa.chunked_array([pa.array(cells[:4], kind), pa.array(cells[4:], kind)])))
    return HFSource(datasets.Dataset(table), 'table', labeled=False)


def raw(found) -> bytes:
    [data] = found
    if isinstance(data, np.ndarray):
        return data.tobytes()
    if isinstance(data, bytes):
        return data
    return Path(data).read_bytes() if Path(data).exists() else b''


@pytest.mark.parametrize('change', ['another name', 'gone', 'another class order'])
def test_labels_follow_their_pictures_or_are_refused(own, train_own, change, caplog):
    folder = train_own('run', '--data-dir', own, '--num-labels', '6', '--label-seed', '1')
    content = json.loads((folder / 'labels.json').read_text())
    source = create_source('', str(own), 'train')
    wanted = {source.where(i): source.class_names[k] for i, k in zip(content['index'], content['target'])}
    first = Path(source.where(content['index'][0]))
    class_map = ''
    if change == 'another name':
        first.rename(first.with_name('zzz.png'))
        wanted[str(first.with_name('zzz.png'))] = wanted.pop(str(first))
    elif change == 'gone':
        first.unlink()
    else:
        (own / 'map.txt').write_text('10\n2\n1\n')
        class_map = str(own / 'map.txt')
    now = create_source('', str(own), 'train', class_map=class_map)
    if change == 'gone':
        with pytest.raises(UsageError, match=f'labels.json: the data has changed since: picture {content["index"][0]} '
                                             '.*1 of the 6 labeled pictures are nowhere'):
            read_labels(folder / 'labels.json', now, 3, now.class_names)
        with pytest.raises(UsageError, match='--resume .*: the data has changed: the training split had 24 images'):
            train_own('run', '--data-dir', own, '--num-labels', '6', '--label-seed', '1', '--resume', 'auto')
        return
    index, target, _ = read_labels(folder / 'labels.json', now, 3, now.class_names)
    assert {now.where(i): now.class_names[k] for i, k in zip(index.tolist(), target.tolist())} == wanted
    assert ('found elsewhere by content' if change == 'another name' else 'matched by name') in caplog.text
    with pytest.raises(UsageError, match='the data has changed: labeled picture' if change == 'another name' else
                       'other classes: in the order 1, 2, 10, here 10, 2, 1'):
        train_own('run', '--data-dir', own, '--num-labels', '6', '--label-seed', '1', '--resume', 'auto',
                  *(('--class-map', class_map) if class_map else ()))


def test_resume_is_refused_where_unlabeled_pictures_moved(own, train_own):
    flags = ('--data-dir', own, '--num-labels', '3', '--epochs', '2')
    folder = train_own('run', *flags)
    labeled = json.loads((folder / 'labels.json').read_text())['index']
    source = create_source('', str(own), 'train')
    a, b = [Path(source.where(i)) for i in range(24) if i not in labeled][:2]
    a.rename(own / 'part'), b.rename(a), (own / 'part').rename(b)
    with pytest.raises(UsageError, match='2 of 24 pictures of the unlabeled set that were looked at are other ones'):
        train_own('run', *flags, '--resume', 'auto', '--epochs', '3')


@pytest.mark.parametrize('change, told', [
    ('swapped', 'has other pictures, or the same in another order (2 of 9 looked at)'),
    ('replaced', 'has other pictures, or the same in another order (1 of 9 looked at)'),
    ('removed', 'had 9 images and has 8'),
    ('older', ''),
])
def test_a_resume_on_another_evaluation_set_is_told_and_best_starts_anew(
        own, train_own, change, told, caplog, monkeypatch):
    """A best metric of 1000 is never reached again."""
    def read(path, read=checkpoint.read_checkpoint):
        state = dict(read(path), best_metric=1000.)
        if change == 'older':
            del state['identity']['evaluated']
        return state

    flags = ('--data-dir', own, '--num-labels', '6')
    folder = train_own('run', *flags)
    a, b = own / 'val' / '1' / '000.png', own / 'val' / '2' / '000.png'
    if change == 'swapped':
        a.rename(own / 'part'), b.rename(a), (own / 'part').rename(b)
    elif change == 'replaced':
        shutil.copy(own / 'more' / 'bees' / '000.png', b)
    elif change == 'removed':
        b.unlink()
    monkeypatch.setattr(train_ssl, 'read_checkpoint', read)
    caplog.clear()
    train_own('run', *flags, '--resume', 'auto', '--epochs', '2')
    lines = [line for line in caplog.messages if 'best starts anew' in line]
    assert len(lines) == bool(told) and all(f'the evaluation set {told}: best starts anew' in line for line in lines)
    assert json.loads((folder / 'best' / 'metrics.json').read_text())['num_updates'] == (4 if told else 2)


def test_an_evaluation_set_of_other_labels_is_another_one():
    train, index = toy([0, 1], ['a', 'b']), torch.arange(2)
    labels = Labels(index, train.targets, None, train.targets)
    one, other = (splits.identify(splits.Sources(train, train, toy(targets, ['a', 'b'])), labels, None)
                  for targets in ([0, 1, 1], [0, 0, 1]))
    assert one.evaluates_other(other.state()) == 'has other labels' and not one.evaluates_other(one.state())


def test_margins_follow_their_pictures_or_are_refused(own, train_own, tmp_path, caplog):
    folder = train_own('run', '--data-dir', own, '--save-margins', '--epochs', '12')
    results = tmp_path / 'found'

    def images():
        mislabeled.main(mislabeled._parse_args([str(folder), '--results-dir', str(results)]))
        lines = (results / 'mislabeled.csv').read_text().splitlines()[1:]
        return [Path(line.split(',')[-1]) for line in lines]
    before = images()
    worst = before[0]
    worst.rename(worst.with_name('zzz.png'))
    after = images()
    assert after[0] == worst.with_name('zzz.png') and after[1:] == before[1:]
    assert 'found elsewhere by content' in caplog.text
    after[0].unlink()
    with pytest.raises(UsageError, match='margins.parquet: the data has changed since'):
        images()


# --- Held-out part ----------------------------------------------------------------------------------------------------

def test_a_held_out_part_has_the_same_share_of_every_class():
    targets = torch.tensor([0] * 100 + [1] * 50 + [2] * 3 + [3] + [-1] * 20)[torch.randperm(174)]
    index = hold_out(targets, 0.1, 5)
    assert targets[index].bincount(minlength=4).tolist() == [10, 5, 1, 0] and (index.diff() > 0).all()
    assert torch.equal(index, hold_out(targets, 0.1, 5)) and not torch.equal(index, hold_out(targets, 0.1, 6))
    assert targets[hold_out(targets, 0.99, 0)].bincount().tolist() == [99, 49, 2]


@pytest.mark.parametrize('unlabeled', [None, 'val+train'])
def test_held_out_images_choose_best_and_are_neither_labeled_nor_unlabeled(own, unlabeled):
    flags = ['--unlabeled-split', unlabeled] if unlabeled else []
    args = train_ssl._parse_args(['--data-dir', str(own), '--val-fraction', '0.25', *flags])
    config = train_ssl.DataConfig((3, 8, 8), (0.,) * 3, (1.,) * 3, 'bilinear', 1.)

    def pictures(dataset):
        return [dataset.source.image(i).tobytes() for i in dataset.index.tolist()]
    for args.exclude_labeled in (False, True):
        opened = splits.open_sources(args)
        splits.agree_on_classes(args, opened)
        sets = train_ssl.build_datasets(args, opened, 3, config)
        held, labeled, seen = map(pictures, (sets.evaluation, sets.labeled, sets.unlabeled))
        assert len(held) == 6 and sets.evaluation.targets.bincount().tolist() == [2, 2, 2]
        assert len(labeled) == 18 and not {*held} & {*labeled} and not {*held} & {*seen}
        if args.exclude_labeled:
            assert not {*labeled} & {*seen}
        else:
            assert [seen[i] for i in sets.labeled_to_unlabeled.tolist()] == labeled
        assert torch.equal(locate(opened.train, opened.evaluation)[opened.held_out], torch.arange(6))
        args.unlabeled_split = args.unlabeled_split or 'train[:100%]'
        if not unlabeled:
            break


def test_the_test_split_is_reported_once_and_validation_knows_the_held_out_part(own, train_own, evaluate, caplog):
    caplog.set_level(logging.INFO)
    flags = ('--data-dir', own, '--val-fraction', '0.25', '--test-split', 'val', '--num-labels', '6')
    whole = train_own('whole', *flags, '--epochs', '2')
    assert caplog.text.count('images of val: error') == 1
    assert 'chosen by top1 on held-out, 25 % of every class of train; val is reported once' in caplog.text
    last, best = (json.loads((whole / name / 'metrics.json').read_text()) for name in ('last', 'best'))
    assert last['count'] == 6 and last['test']['count'] == 9 and last['test']['source'] == 'val'
    assert last['best_chosen_by'] == best['best_chosen_by'] == 'top1 on held-out'
    held_out = json.loads((whole / 'labels.json').read_text())['held_out']
    found = evaluate('--checkpoint', whole / 'last')
    assert found['split'] == 'val' and found['error'] == pytest.approx(last['test']['error'])
    found = evaluate('--checkpoint', whole / 'last', '--split', 'held-out')
    assert found['count'] == 6 and found['nll'] == pytest.approx(last['nll'])
    caplog.clear()
    fitted = evaluate('--checkpoint', whole / 'best', '--calibration-split', 'held-out')
    assert fitted['calibration_images'] == 6 and fitted['chosen_by'] == 'top1 on held-out'
    evaluate('--checkpoint', whole / 'best', '--split', 'held-out')
    assert 'best/ was chosen by top1 on held-out, which is evaluated here' in caplog.text
    # Stopped and resumed: the same images, the same weights.
    train_own('half', *flags, '--epochs', '2', '--train-steps-per-epoch', '2')
    (whole.parent / 'half' / 'checkpoint-4.safetensors').unlink()
    half = train_own('half', *flags, '--epochs', '2', '--resume', 'auto')
    for name in ('labels.json', 'last/model.safetensors', 'best/model.safetensors', 'last/metrics.json'):
        assert (half / name).read_bytes() == (whole / name).read_bytes(), name
    assert held_out == json.loads((half / 'labels.json').read_text())['held_out']
    with pytest.raises(UsageError, match='--val-seed 0 -> 1'):
        train_own('half', *flags, '--epochs', '3', '--resume', 'auto', '--val-seed', '1')


def test_held_out_pictures_are_evaluated_wherever_they_stand_now_or_refused(own, train_own, evaluate, caplog):
    run = train_own('run', '--data-dir', own, '--val-fraction', '0.25', '--num-labels', '6')
    content = json.loads((run / 'labels.json').read_text())
    before = create_source('', str(own), 'train')
    wanted = digest_pictures(before, torch.tensor(content['held_out']))
    unseen = {*range(24)} - {*content['held_out']} - {*content['index']}
    first = Path(before.where(min(unseen)))
    first.rename(first.parents[1] / '10' / 'zzz.png')
    data = Namespace(**{**validate.SOURCE_FLAGS, 'data_dir': str(own)})
    found = validate.open_held_out(data, [run / 'last'])
    assert torch.equal(digest_pictures(found, torch.arange(6)), wanted)
    assert 'all 6 held-out pictures were found elsewhere by content' in caplog.text
    last = json.loads((run / 'last' / 'metrics.json').read_text())
    assert evaluate('--checkpoint', run / 'last', '--split', 'held-out')['nll'] == pytest.approx(last['nll'])
    Path(found.where(0)).write_bytes(first.parents[1].joinpath('10', 'zzz.png').read_bytes())
    with pytest.raises(UsageError, match='1 of the 6 held-out pictures are nowhere in it; give the data as it was$'):
        validate.open_held_out(data, [run / 'last'])
    older = {key: value for key, value in content.items() if key not in ('held_out_rows', 'held_out_digests')}
    (run / 'labels.json').write_text(json.dumps(older))
    with pytest.raises(UsageError, match='stand in another order than in the run'):
        validate.open_held_out(data, [run / 'last'])
    first.parents[1].joinpath('10', 'zzz.png').rename(first)
    assert validate.open_held_out(data, [run / 'last']).index.tolist() == content['held_out']


def test_a_best_that_the_test_split_chose_is_told(train, evaluate, caplog):
    caplog.set_level(logging.INFO)
    folder = train('run')
    assert 'best/ is chosen by top1 on test, the test split: there its score is too good' in caplog.text
    evaluate('--checkpoint', folder / 'best', '--split', 'test[:50]')
    assert 'best/ was chosen by top1 on test, which is evaluated here' in caplog.text
    caplog.clear()
    evaluate('--checkpoint', folder / 'last', '--split', 'train[:50]', '--train-split', 'train')
    assert 'too good' in caplog.text and 'are labeled images of its training' in caplog.text


# --- Precision and processes ------------------------------------------------------------------------------------------

@pytest.fixture
def as_tables(own) -> Path:
    """The folders train and val once more: a CSV with a column split, and parquet files, which may be a hub's."""
    names, root = ['1', '2', '10'], own.parent / 'tables'
    root.mkdir()
    lines = ['file_name,label,split']
    for split in ('train', 'val'):
        files = sorted((own / split).glob('*/*.png'))
        lines += [f'{file},{file.parent.name},{split}' for file in files]
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
        table = datasets.Dataset.from_dict(dict(
            image=[dict(bytes=file.read_bytes(), path=file.name) for file in files],
            label=[names.index(file.parent.name) for file in files],
        ), features)
        table.to_parquet(root / f'{split}.parquet')
    (root / 'list.csv').write_text('\n'.join(lines) + '\n')
    return root


@pytest.mark.parametrize('name', ['{}/list.csv', '{}/*.parquet', 'hfds/{}', '{}'])
def test_a_runs_own_data_set_is_known_by_a_relative_name_too(name, as_tables, train_own, evaluate, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(validate, 'fit_temperature', lambda logits, target: (1.5, False))  # two updates teach nothing
    trained = train_own('run', '--dataset', name.format(as_tables), '--num-labels', 6)
    found = {}
    for path in (as_tables, Path(os.path.relpath(as_tables, as_tables.parent))):
        monkeypatch.chdir(as_tables.parent)
        caplog.clear()
        arguments = ('--checkpoint', trained / 'last', '--dataset', name.format(path))
        found[path] = evaluate(*arguments, '--split', 'val', '--calibration-split', 'train', '--save-temperature')
        assert '18 of 24 calibration images are used: 0 are evaluated, 6 were labeled in training' in caplog.text
        assert 'labeled images of its training' not in caplog.text  # none among those evaluated
        caplog.clear()
        evaluate(*arguments, '--split', 'train')
        assert '6 of the 24 images of train are labeled images of its training' in caplog.text
        assert 'its temperature is not shown, as it was fitted on train' in caplog.text
    absolute, relative = found.values()
    assert absolute == relative


def test_a_temperature_is_not_shown_on_the_split_that_it_was_fitted_on_where_the_data_moved(own, train_own, evaluate,
                                                                                        monkeypatch, caplog):
    monkeypatch.setattr(validate, 'fit_temperature', lambda logits, target: (1.5, False))
    trained = train_own('run', '--data-dir', own, '--num-labels', 6)
    evaluate('--checkpoint', trained / 'last', '--calibration-split', 'train', '--save-temperature')
    own.rename(own.with_name('moved'))
    caplog.clear()
    evaluate('--checkpoint', trained / 'last', '--data-dir', own.with_name('moved'), '--split', 'train')
    assert 'its temperature is not shown, as it was fitted on train' in caplog.text


def test_what_was_held_out_and_its_split_share_a_saved_temperature_and_a_choice(own, train_own, evaluate, monkeypatch,
                                                                               caplog):
    monkeypatch.setattr(validate, 'fit_temperature', lambda logits, target: (1.5, False))
    trained = train_own('run', '--data-dir', own, '--val-fraction', 0.25, '--num-labels', 6)
    for fitted, evaluated in (('train', 'held-out'), ('held-out', 'train')):
        caplog.clear()
        arguments = ('--checkpoint', trained / 'last', '--split')
        evaluate(*arguments, 'val', '--calibration-split', fitted, '--save-temperature')
        assert 'is not shown' not in caplog.text and 'chosen by' not in caplog.text
        evaluate(*arguments, evaluated)
        assert f'is not shown, as it was fitted on {fitted}, which may hold images of {evaluated}' in caplog.text
        caplog.clear()
        evaluate('--checkpoint', trained / 'best', '--split', 'val', '--calibration-split', fitted)
        assert 'best/ was chosen by top1 on held-out, and temperature and thresholds are fitted on these' in caplog.text


def test_a_damaged_labels_file_is_told_where_it_says_what_was_held_out(own, train_own, evaluate):
    trained = train_own('run', '--data-dir', own, '--val-fraction', 0.25)
    file = trained / 'labels.json'
    whole = file.read_text()
    for damaged in (whole[:90], '[]', json.dumps(dict(json.loads(whole), held_out=3))):
        file.write_text(damaged)
        with pytest.raises(UsageError, match='labels.json: cannot be read'):
            evaluate('--checkpoint', trained / 'last', '--split', 'held-out')


def test_another_folder_as_data_dir_is_other_data_unless_a_labeled_picture_is_in_it(own, train_own, evaluate, caplog):
    caplog.set_level(logging.INFO)
    trained = train_own('run', '--data-dir', own)
    sizes = dict(train={'1': 3, '2': 9, '10': 9}, val={'1': 3, '2': 3, '10': 3})
    other = write_set(own.with_name('other'), sizes, seed=1)
    arguments = ('--checkpoint', trained / 'last', '--data-dir')
    assert evaluate(*arguments, other, '--split', 'train', '--calibration-split', 'val')['count'] == 21
    assert f'run: no labeled picture of its training was found in {other}: taken as other data' in caplog.text
    assert 'labeled images of its training' not in caplog.text and '9 of 9 calibration images are used' in caplog.text
    caplog.clear()
    own.rename(own.with_name('moved'))
    evaluate(*arguments, own.with_name('moved'), '--split', 'train')
    assert 'other data' not in caplog.text
    assert '24 of the 24 images of train are labeled images of its training, and 24 are in its training' in caplog.text


def test_calibration_images_without_a_label_are_counted_and_those_evaluated_are_refused(as_tables, train_own, evaluate,
                                                                                    caplog):
    caplog.set_level(logging.INFO)
    trained = train_own('run', '--dataset', as_tables / 'list.csv', '--num-labels', 6)
    rows = (as_tables / 'list.csv').read_text().splitlines()
    rows[1:3] = [row.replace(',1,train', ',,train') for row in rows[1:3]]
    (as_tables / 'list.csv').write_text('\n'.join(rows))
    arguments = ('--checkpoint', trained / 'last', '--dataset', as_tables / 'list.csv')
    evaluate(*arguments, '--split', 'val', '--calibration-split', 'train')
    assert 'run: 2 of 24 calibration images have no label and are left out' in caplog.text
    assert ' of 22 calibration images are used' in caplog.text
    with pytest.raises(UsageError, match='2 of the 24 images of split train have no label'):
        evaluate(*arguments, '--split', 'train')


def test_training_pictures_under_another_name_are_known_by_content(own, as_tables, train_own, evaluate, caplog):
    trained = train_own('run', '--data-dir', own, '--num-labels', 6)
    arguments = ('--checkpoint', trained / 'last', '--dataset', as_tables / 'list.csv')
    evaluate(*arguments, '--split', 'train')
    assert '6 of the 24 images of train are labeled images of its training: its score is too good' in caplog.text
    caplog.clear()
    evaluate(*arguments, '--split', 'val', '--calibration-split', 'train')
    assert ('6 of the 24 images of train are labeled images of its training: there it is right more often than '
            'elsewhere') in caplog.text
    assert 'images of val' not in caplog.text


@pytest.fixture
def flat_val(own) -> Path:
    """Where val has the pictures alone, and a file says what they show; test has folders of classes; flat has none."""
    shutil.move(own / 'fewer', own / 'test')
    lines = ['file_name,label']
    for i, path in enumerate(sorted((own / 'val').glob('*/*.png'))):
        lines.append(f'{i}.png,{path.parent.name}')
        path.rename(own / 'val' / f'{i}.png')
    for folder in (own / 'val').iterdir():
        if folder.is_dir():
            folder.rmdir()
    shutil.copytree(own / 'val', own / 'flat')
    (own / 'truth.csv').write_text('\n'.join(lines) + '\n')
    return own


def test_labels_of_a_runs_validation_split_are_used_for_no_other(flat_val, train_own, evaluate, monkeypatch, caplog):
    monkeypatch.chdir(flat_val)
    trained = train_own('run', '--data-dir', flat_val, '--num-labels', 6, '--val-split', 'val', '--val-labels',
                        'truth.csv', '--test-split', 'test')
    assert evaluate('--checkpoint', trained / 'last')['split'] == 'test'
    theirs = json.loads((trained / 'last' / 'metrics.json').read_text())['error']
    assert evaluate('--checkpoint', trained / 'last', '--split', 'val')['error'] == pytest.approx(theirs, abs=1e-3)
    caplog.set_level(logging.INFO)
    evaluate('--checkpoint', trained / 'last', '--calibration-split', 'val')
    assert '9 of 9 calibration images are used' in caplog.text
    with pytest.raises(UsageError, match='flat: images lie directly in it'):
        evaluate('--checkpoint', trained / 'last', '--split', 'flat')
    given = evaluate('--checkpoint', trained / 'last', '--split', 'flat', '--val-labels', 'truth.csv')
    assert given['error'] == pytest.approx(theirs, abs=1e-3)


def test_runs_with_other_labels_for_the_same_pictures_are_not_compared(flat_val, train_own, evaluate):
    truth = (flat_val / 'truth.csv').read_text()
    (flat_val / 'turned.csv').write_text(truth.replace(',1\n', ',x\n').replace(',2\n', ',1\n').replace(',x\n', ',2\n'))
    runs = [
        train_own(name, '--data-dir', flat_val, '--num-labels', 6, '--val-split', 'val', '--val-labels',
                  flat_val / f'{name}.csv', '--test-split', 'test') / 'last' for name in ('truth', 'turned')
    ]
    with pytest.raises(UsageError, match=r'truth has --val-labels .*truth\.csv and turned .*turned\.csv'):
        evaluate('--checkpoint', *runs, '--split', 'val')
    run_in_process(validate, '--device', 'cpu', '-j', 0, '--bootstrap', 0, '--results-dir', flat_val / 'results',
                   '--checkpoint', *runs)  # their test split has labels of its own
    assert json.loads((flat_val / 'results' / 'turned' / 'metrics.json').read_text())['count'] == 6


def test_validation_takes_the_runs_precision(train, evaluate):
    folder = train('run', '--amp')
    own_figures = json.loads((folder / 'last/metrics.json').read_text())
    assert own_figures['precision'] == 'bfloat16'
    same, other = evaluate('--checkpoint', folder / 'last'), evaluate('--checkpoint', folder / 'last', '--no-amp')
    assert same['precision'] == 'bfloat16' and same['nll'] == pytest.approx(own_figures['nll'], rel=1e-6)
    assert other['precision'] == 'float32' and other['nll'] != pytest.approx(own_figures['nll'], rel=1e-6)
    plain = train('plain')
    with pytest.raises(UsageError, match='run was trained with --amp, bfloat16 and plain with float32: .*--no-amp'):
        evaluate('--checkpoint', folder / 'last', plain / 'last')


def test_processes_that_would_each_be_alone_are_refused(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)  # a device that Accelerate has no group for
    with pytest.raises(UsageError, match='2 processes were launched, .* add --device cpu'):
        program.setup_accelerator()


def test_a_gpu_gets_the_settings_of_timms_training_script(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(program.Accelerator, 'device', torch.device('cuda'))
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = False
        program.setup_accelerator('cuda')
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.benchmark
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = before


@pytest.mark.skipif(torch.cuda.is_available(), reason='two processes would take two GPUs')
def test_the_launchers_line_for_one_machine_works_on_cpus_as_it_stands(tmp_path):
    tiny = list(TINY)
    del tiny[tiny.index('--device'):tiny.index('--device') + 2]
    environment = {key: value for key, value in os.environ.items() if key != 'ACCELERATE_USE_CPU'}
    done = subprocess.run(
        ['accelerate', 'launch', '--multi_gpu', '--num_processes', '2', str(ROOT / 'train_ssl.py'), *tiny,
         '--output', str(tmp_path), '--experiment', 'run'],
        env=environment, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0 and 'on each of 2 processes, device cpu' in done.stderr, done.stderr
