import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import train_in_process
from images import noise, plain
from PIL import Image

import train_ssl
from filelists import list_files, match_names, read_names
from inputs import open_pictures
from labels import find_named, match_classes
from program import UsageError
from sources import ImageError, create_source, known_facts, open_source, unlabeled_split

ROOT = Path(__file__).resolve().parent.parent
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(autouse=True, scope='module')
def datasets_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp('datasets')
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(autouse=True)
def told_from_info_on(caplog):
    caplog.set_level('INFO')


def encoded(color):
    buffer = io.BytesIO()
    plain(color).save(buffer, 'PNG')
    return buffer.getvalue()


def write_table(file, colors=(RED, GREEN), **columns):
    """Encoded images and further columns; a column of class labels is given as (numbers, names)."""
    kinds, rows = {}, {}
    for key, value in columns.items():
        if isinstance(value, tuple):
            value, kinds[key] = value[0], datasets.ClassLabel(names=list(value[1]))
        rows[key] = value
    features = pa.table(rows).schema
    features = datasets.Features({**datasets.Features.from_arrow_schema(features), **kinds, 'image': datasets.Image()})
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [dict(bytes=encoded(color), path=None) for color in colors]
    datasets.Dataset.from_dict(dict(rows, image=images), features=features).to_parquet(str(file))
    return file


def labels_of(count=2, names='ab'):
    return [i % len(names) for i in range(count)], names


def write_pictures(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(1, 8, seed=i)[0]).save(root / name)


def refused(message, *args, **kwargs):
    with pytest.raises(UsageError, match=message) as error:
        create_source(*args, **kwargs)
    assert '\n' not in str(error.value)


# --- Shards -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('files, message', [
    (['train-00000-of-00005', 'train-00001-of-00005', 'train-00003-of-00005'],
     'split train has 3 of its 5 shards; missing: train-00002-of-00005.parquet, train-00004-of-00005.parquet'),
    (['data/train-00000-of-00001', 'data/train-00000-of-00002', 'data/train-00001-of-00002'],
     'several sets side by side: 1 of a set of 1, 2 of a set of 2'),
    (['train', 'train-00000-of-00001'], 'side by side: 1 of a set of 1, train.parquet'),
    (['train-00000-of-00002-0a1b', 'train-00000-of-00002-ffff', 'train-00001-of-00002-0a1b'], 'shard 0 2 times'),
    (['colour/train-00000-of-00001', 'shape/train-00000-of-00001'],
     'several folders, colour, shape, .*configurations .*--dataset hfds/.*:colour'),
    (['train-1-of-3', 'train-3-of-3'], 'missing: train-2-of-3.parquet'),
])
def test_shards_that_are_not_one_complete_set_are_refused(tmp_path, files, message):
    for file in files:
        write_table(tmp_path / f'{file}.parquet', label=labels_of())
    refused(message, str(tmp_path), None, 'train')


def test_a_configuration_is_chosen_and_what_the_readme_declares_counts(tmp_path):
    write_table(tmp_path / 'colour' / 'train-00000-of-00001.parquet', label=labels_of(names='rg'))
    write_table(tmp_path / 'shape' / 'train-00000-of-00001.parquet', label=labels_of(names='xy'))
    refused('choose one as --dataset hfds/.*:colour', f'hfds/{tmp_path}', None, 'train')
    assert create_source(f'hfds/{tmp_path}:colour', None, 'train').class_names == ['r', 'g']
    (tmp_path / 'README.md').write_text('---\nconfigs:\n- config_name: colour\n  data_files: colour/*.parquet\n'
                                        '- config_name: shape\n  data_files: shape/*.parquet\n---\n')
    refused('configurations colour, shape; choose one, as --dataset hfds/.*:colour', f'hfds/{tmp_path}', None, 'train')
    assert create_source(f'hfds/{tmp_path}:shape', None, 'train').class_names == ['x', 'y']


def test_shards_that_the_user_names_are_a_choice_and_what_they_lack_is_told(tmp_path, caplog):
    for i in (0, 1, 2):
        write_table(tmp_path / f'train-0000{i}-of-00003.parquet', label=labels_of())
    assert len(create_source(str(tmp_path / 'train-0000[01]-*.parquet'), None, 'train')) == 4
    assert 'has 2 of its 3 shards; missing: train-00002-of-00003.parquet' in caplog.text
    for i in (0, 1, 3):
        write_table(tmp_path / 'plain' / f'train-{i}.parquet', label=labels_of())
    create_source(str(tmp_path / 'plain'), None, 'train')
    assert 'numbered 0 to 3, without 2' in caplog.text


def test_reports_that_were_written_into_the_data_are_no_data_and_a_stray_table_is_named(tmp_path, caplog):
    write_pictures(tmp_path, *(f'{split}/{name}/0.png' for split in ('train', 'val') for name in 'ab'))
    (tmp_path / 'output' / 'validate').mkdir(parents=True)
    table = pa.table(dict(index=[0], confidence=[.5]))
    pq.write_table(table, tmp_path / 'output' / 'validate' / 'predictions.parquet')
    pq.write_table(table, tmp_path / 'predictions.parquet')
    assert create_source('', str(tmp_path), 'train').class_names == ['a', 'b']
    assert 'predictions.parquet: not read, as by its name it is a report and no part of the data' in caplog.text
    pq.write_table(table, tmp_path / 'odd.PARQUET')
    refused('odd.PARQUET: none of its columns index, confidence holds images; is it no part of the data', '',
            str(tmp_path), 'train')
    write_table(tmp_path / 't' / 'NEW.PARQUET', label=labels_of())
    assert create_source(str(tmp_path / 't' / 'NEW.PARQUET'), None, 'train').class_names == ['a', 'b']
    assert len(open_pictures(str(tmp_path / 't' / 'NEW.PARQUET'))) == 2


def test_pictures_below_a_folder_that_also_has_tables_are_counted(tmp_path, caplog):
    write_pictures(tmp_path, *(f'{split}/{name}/0.png' for split in ('train', 'val') for name in ('cat', 'dog')))
    for split in ('train', 'val'):
        write_table(tmp_path / f'{split}.parquet', label=labels_of())
    assert create_source('', str(tmp_path), 'train').class_names == ['a', 'b']
    told = '4 pictures below it are left out, such as train/cat/0.png, as tables lie there, which are the data: ' \
           'train.parquet, val.parquet; move these away'
    assert told in caplog.text
    write_pictures(tmp_path / 'photos', '0.png', '1.png')
    write_table(tmp_path / 'photos' / 'test.parquet', label=labels_of())
    assert len(open_pictures(str(tmp_path / 'photos'))) == 2
    assert 'photos: 2 pictures below it are left out, such as 0.png' in caplog.text
    (tmp_path / 'hub').mkdir()
    shutil.copy(tmp_path / 'train.parquet', tmp_path / 'hub')
    (tmp_path / 'hub' / 'README.md').write_text('# A set\n')
    caplog.clear()
    assert len(create_source(str(tmp_path / 'hub'), None, 'train')) == 2 and not caplog.messages


def test_hidden_files_and_folders_beside_tables_are_no_data(tmp_path, caplog):
    file = write_table(tmp_path / 'data' / 'train-00000-of-00001.parquet', label=labels_of())
    for hidden in ('.ipynb_checkpoints/train-00000-of-00001.parquet', 'data/._train-00000-of-00001.parquet',
                   'data/@eaDir/train-00000-of-00001.parquet', '__MACOSX/train-00000-of-00001.parquet'):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / hidden)
    assert len(create_source(str(tmp_path), None, 'train')) == 2
    (tmp_path / 'data' / 'old').mkdir()
    shutil.copy(file, tmp_path / 'data' / 'old')
    assert len(create_source(str(tmp_path), None, 'train')) == 2 and '1 .parquet files in deeper folders' in caplog.text


def test_classes_in_another_order_in_another_shard_are_mapped_by_name(tmp_path, caplog):
    write_table(tmp_path / 'train-00000-of-00002.parquet', label=([0, 1], 'ab'))
    write_table(tmp_path / 'train-00001-of-00002.parquet', (GREEN, RED), label=([0, 1], 'ba'))
    source = create_source(str(tmp_path), None, 'train')
    assert source.class_names == ['a', 'b'] and source.targets.tolist() == [0, 1, 1, 0]
    assert [source.image(i).getpixel((2, 2)) for i in range(4)] == [RED, GREEN, GREEN, RED]
    assert 'another order' in caplog.text and source.dataset.cache_files
    write_table(tmp_path / 'train-00001-of-00002.parquet', label=([0, 1], 'bc'))
    refused('other classes in column label than in .*00000-of-00002.parquet: only one of the two has a, c',
            str(tmp_path), None, 'train')


@pytest.mark.parametrize('name', ['', 'hfds/', 'readme'])
def test_a_changed_table_with_its_time_kept_is_the_new_data(tmp_path, name):
    file, new = tmp_path / 'set' / 'train.parquet', tmp_path / 'new.parquet'
    write_table(file, label=([0, 1], 'ab'))
    if name == 'readme':
        (tmp_path / 'set' / 'README.md').write_text('---\nconfigs:\n- config_name: default\n  data_files: "*.parquet"\n'
                                                    '---\n')
    name = f'{name and "hfds/"}{tmp_path / "set"}'
    assert create_source(name, None, 'train').targets.tolist() == [0, 1]
    write_table(new, (GREEN, RED), label=([1, 0], 'ab'))
    os.utime(new, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    assert new.stat().st_size == file.stat().st_size  # as bad as it gets: neither time nor size tell them apart
    subprocess.run(['cp', '-p', new, file], check=True)
    source = create_source(name, None, 'train')
    assert source.targets.tolist() == [1, 0] and source.image(0).getpixel((2, 2)) == GREEN


def test_pointers_of_git_lfs_are_told_as_such(tmp_path):
    pointer = b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n'
    for name in ('train.parquet', 'labels.csv', 'a/train-00000-of-00001.arrow'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(pointer)
    for name in ('train.parquet', 'labels.csv', 'a'):
        refused('a pointer of Git LFS', str(tmp_path / name), None, 'train')
    write_pictures(tmp_path / 'f' / 'train', 'a/0.png', 'b/0.png')
    (tmp_path / 'f' / 'train' / 'a' / '0.png').write_bytes(pointer)
    source = create_source(str(tmp_path / 'f'), None, 'train')
    with pytest.raises(ImageError, match='0.png.*pointer of Git LFS'):
        source.image(0)


def test_a_cache_that_cannot_be_written_names_hf_home(tmp_path, monkeypatch):
    write_table(tmp_path / 'train.parquet', label=labels_of())
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'file' / 'cache')
    refused('the cache cannot be written .Not a directory.; set HF_HOME', str(tmp_path), None, 'train')


PRINT_TURN = '''
import os, sys, time
rank = int(os.environ['RANK'])
os.environ['LOCAL_RANK'] = str(max(0, rank - 1))  # two machines, of one process and of two
from program import once_a_machine, setup_accelerator
accelerator = setup_accelerator('cpu')
with once_a_machine(accelerator):
    start = time.time()
    time.sleep(0.3)
    print(rank, start, time.time(), flush=True)
'''


def test_what_is_downloaded_is_so_once_a_machine(tmp_path):
    (tmp_path / 'turns.py').write_text(PRINT_TURN)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '3',
               str(tmp_path / 'turns.py')]
    environment = dict(os.environ, ACCELERATE_USE_CPU='true', PYTHONPATH=str(ROOT))
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True).stdout
    turns = sorted(tuple(map(float, line.split())) for line in told.splitlines())
    assert [int(rank) for rank, _, _ in turns] == [0, 1, 2]
    assert all(end <= start for (_, _, end), (_, start, _) in zip(turns, turns[1:]))


# --- Columns ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('column', ['label', 'labels', 'target', 'cls', 'class', 'fine_label', 'category'])
def test_a_sole_label_column_is_taken(tmp_path, column):
    write_table(tmp_path / 'train.parquet', **{column: [1, 0], 'id': [7, 8]})
    assert create_source(str(tmp_path), None, 'train').targets.tolist() == [1, 0]


@pytest.mark.parametrize('columns', [('fine_label', 'coarse_label'), ('label', 'coarse_label'), ('label', 'target')])
def test_two_label_columns_are_a_question(tmp_path, columns):
    write_table(tmp_path / 'train.parquet', **{columns[0]: [1, 0], columns[1]: [0, 0]})
    refused(f'{" and ".join(columns)} may each be the label column; choose one .--target-key', str(tmp_path), None,
            'train')
    assert create_source(str(tmp_path), None, 'train', target_key=columns[1]).targets.tolist() == [0, 0]
    if columns[0] == 'fine_label':
        assert create_source('cifar100', str(tmp_path), 'train').targets.tolist() == [1, 0]


def test_an_image_column_of_that_name_comes_before_others_and_else_it_is_a_question(tmp_path):
    cells = dict(mask=[encoded(BLUE)] * 2, image=[encoded(RED)] * 2, label=[0, 1])
    pq.write_table(pa.table(cells), tmp_path / 'train.parquet')
    assert create_source(str(tmp_path), None, 'train').image(0).getpixel((2, 2)) == RED
    assert create_source(str(tmp_path), None, 'train', input_key='mask').image(0).getpixel((2, 2)) == BLUE
    cells['photo'] = cells.pop('image')
    pq.write_table(pa.table(cells), tmp_path / 'train.parquet')
    refused('columns mask, photo hold images; choose one .--input-key', str(tmp_path), None, 'train')


def test_words_are_numbered_by_the_training_splits_sorted_names_in_every_split(tmp_path):
    write_table(tmp_path / 'train.parquet', (RED,) * 5, label=['c10', 'c9', None, '', 'C1'])
    write_table(tmp_path / 'test.parquet', label=['c10', 'c9'])
    write_table(tmp_path / 'extra.parquet', label=['zebra', 'C1'])
    write_table(tmp_path / 'valid.parquet', label=['c9', 'C1'])

    def source(split):
        return create_source(str(tmp_path), None, split, train_split='train[:60%]')

    assert source('train').class_names == ['C1', 'c9', 'c10'] and source('train').targets.tolist() == [2, 1, -1, -1, 0]
    for split, targets in (('test', [2, 1]), ('test[1:]', [1]), ('valid', [1, 0]), ('train[4:]', [0])):
        assert source(split).class_names == ['C1', 'c9', 'c10'] and source(split).targets.tolist() == targets
    # A name that the training split lacks makes the classes differ, which every program tells by name.
    assert source('extra').class_names == ['C1', 'c9', 'c10', 'zebra'] and source('extra').targets.tolist() == [3, 0]
    assert source('train+test').targets.tolist() == [2, 1, -1, -1, 0, 2, 1]


def test_truth_values_and_pandas_categories_are_labels(tmp_path):
    image = [encoded(RED)] * 2
    pq.write_table(pa.table(dict(image=image, label=[True, False])), tmp_path / 'train.parquet')
    assert create_source(str(tmp_path), None, 'train').targets.tolist() == [1, 0]
    category = pa.array(['dog', 'cat']).dictionary_encode()
    pq.write_table(pa.table(dict(image=image, label=category)), tmp_path / 'train.parquet')
    source = create_source(str(tmp_path), None, 'train')
    assert source.class_names == ['cat', 'dog'] and source.targets.tolist() == [1, 0]


def test_labels_that_count_from_one_are_told(tmp_path, caplog):
    write_table(tmp_path / 'train.parquet', (RED,) * 3, label=[1, 2, 3])
    create_source(str(tmp_path), None, 'train', train_split='train')
    assert 'class 0 has no image; do the labels count from 1?' in caplog.text and '4 classes, 0 to 3' in caplog.text
    write_table(tmp_path / 'train.parquet', label=[-2, 3])
    refused('a label in column label is -2', str(tmp_path), None, 'train')


def test_a_training_split_without_any_label_says_so(tmp_path, train):
    write_table(tmp_path / 'train.parquet', label=[-1, -1])
    write_table(tmp_path / 'test.parquet', label=[0, 1])
    for options in (('--num-labels', '2'), ()):
        with pytest.raises(UsageError, match='no image of split train has a label.*--unlabeled-split'):
            train('r', '--dataset', tmp_path, *options)


@pytest.mark.parametrize('name, digits', [
    ('ylecun/mnist', True), ('mnist', True), ('Fhrozen/MNIST', True), ('tanganke/emnist_letters', True),
    ('ufldl-stanford/svhn:full_numbers', True), ('svhn', True), ('flwrlabs/usps', True), ('someone/optdigits', True),
    ('tanganke/kmnist', True), ('zalando-datasets/fashion_mnist', False), ('albertvillanova/medmnist-v2', False),
    ('uoft-cs/cifar10', False), ('mnist/flowers', False),
])
def test_hub_sets_of_digits_are_not_mirrored(name, digits):
    assert (known_facts(f'hfds/{name}').get('hflip', 0.5) == 0) == digits


# --- Tables of file and label -----------------------------------------------------------------------------------------

@pytest.fixture
def photos(tmp_path):
    write_pictures(tmp_path, 'p/a0.png', 'p/a1.png', 'p/b0.png', 'p/b 1.png', 'p/deep/u0.png', 'p/u1.png')
    return tmp_path


CSV = 'file_name,label,split\np/a0.png,cat,train\np/b0.png,dog,train\np/u1.png,,train\np/a1.png,dog,test\n'


@pytest.mark.parametrize('form', ['csv', 'tsv', 'jsonl', 'semicolon', 'excel', 'metadata'])
def test_a_table_of_files_gives_pictures_labels_and_splits(photos, form, caplog):
    file = photos / f'labels.{form if form in ("tsv", "jsonl") else "csv"}'
    if form == 'jsonl':
        keys, *rows = (line.split(',') for line in CSV.splitlines())
        rows = [{key: cell or None for key, cell in zip(keys, row)} for row in rows]
        file.write_text('\n'.join(map(json.dumps, rows)))
    else:
        text = CSV.replace(',', {'tsv': '\t', 'semicolon': ';'}.get(form, ','))
        file.write_text(text, encoding='utf-8-sig' if form == 'excel' else 'utf-8')
    name = str(file)
    if form == 'metadata':  # as datasets has it, beside the pictures
        file.rename(photos / 'metadata.csv')
        name = str(photos)
    train, test = (create_source(name, None, split, train_split='train') for split in ('train', None))
    assert train.class_names == test.class_names == ['cat', 'dog']
    assert train.targets.tolist() == [0, 1, -1] and test.targets.tolist() == [1]
    assert train.where(1) == str(photos / 'p' / 'b0.png')
    assert np.array_equal(train.image(1), Image.open(photos / 'p' / 'b0.png'))
    assert ("separated by ';'" in caplog.text) == (form == 'semicolon')
    assert ('2 pictures beside it have no row and are left out' in caplog.text) == (form == 'metadata')


@pytest.mark.parametrize('text, message', [
    ('a,b\nx,y\n', r'no column of files in its first line; it has a, b \(expected file_name, .*--input-key'),
    ('file_name,kind\np/a0.png,x\n', r'no label column; it has file_name, kind \(--target-key'),
    ('filename,path,label\np/a0.png,x,y\n', 'filename and path may each be the column of files; .*--input-key'),
    ('path,label,target\np/a0.png,x,y\n', 'label and target may each be the label column; .*--target-key'),
    ('path,label\np/a0.png,x\nq.png,x\np/no.png,x\n',
     r'2 of 3 files are missing, such as line 3: q.png .*--data-dir.*--skip-missing'),
    ('path,label\nq.png,x\n', '1 of 1 files are missing.*--data-dir names another folder.$'),
    ('path,label\np/a0.png,x\n\n./p/a0.png,y\n', 'lines 2 and 4: a0.png has two labels, x and y'),
    ('path,label\np/a0.png,x\np/a0.png,\n', r'lines 2 and 3: a0.png has two labels, x and \(no label\)'),
    ('path,label,split\np/a0.png,x,train\np/a0.png,x,test\n', 'a0.png is in two splits, train and test'),
    ('path,label\np/a0.png,x\np/b0.png\n', 'line 3: 1 cells, and the first line has 2'),
    ('path,label\np/a0.png,x\n,y\n', 'line 3: no file in column path'),
    ('path,label\n', 'no rows in it'),
    ('path,label\np/a0.png,x\np/b0.png,"cat\np/a1.png,dog\n', 'line 3: unexpected end of data .a quotation mark opens'),
    ('path,label\np/a0.png,"cat\np/b0.png,"dog"\np/a1.png,dog\n', 'line 2: .* expected after .* or not at its end'),
    ('path,label\np/a0.png,"cat\np/b0.png,dog"\n', "line 2: a label of several lines, 'cat.np/b0.png,dog'; is a quota"),
    ('path,label\n"p/a0.png\np/b0.png",x\n', 'line 2: column path has no name of a file'),
    ('path,label\np/a0.png,1\np/b0.png,-2.0\n', 'line 3: the label is -2.0; expected 0 or more, or -1 for no label'),
    ('path,label,label\np/a0.png,x,y\n', 'two columns are called label'),
    ('path,label,,\np/a0.png,x,,\n', 'columns 3 and 4 have no name; are there too many commas'),
    (b'path,label\np/a0.png,\xe9t\xe9\n', 'not in UTF-8'),
])
def test_a_table_that_does_not_fit_is_refused_by_line(photos, text, message):
    (photos / 'l.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(message, str(photos / 'l.csv'), None, 'train')


@pytest.mark.parametrize('text, message', [
    ('{"path": "p/a0.png", "label": ["x", "y"]}', 'line 1: a list of labels; .*multi-label'),
    ('{"path": "p/a0.png"}\n[1]', 'line 2: expected an object'),
    ('{"path": "p/a0.png"}\n\n{', 'line 3: no JSON'),
    ('{"path": "p/a0.png", "label": "x", "box": %s}' % ('[' * 100_000), 'line 1: no JSON'),
    ('{"path": ["p/a0.png"], "label": "x"}', r"line 1: column path has no name of a file: \['p/a0.png'\]"),
    ('{"path": "p/a\\u00000.png", "label": "x"}', 'line 1: column path has no name of a file'),
    ('{"path": "p/a0.png", "label": "x", "split": ["train"]}', 'line 1: column split has no name of a split'),
    ('{"path": "p/a0.png", "label": "x"}\n{"path": "p/b0.png", "label": "\\ud800"}', 'line 2: half a character in col'),
])
def test_json_lines_that_do_not_fit_are_refused_by_line(photos, text, message):
    (photos / 'l.jsonl').write_text(text)
    refused(message, str(photos / 'l.jsonl'), None, 'train')


def test_an_empty_split_is_train_however_it_is_written_and_counted(photos, caplog):
    (photos / 'l.csv').write_text('path,label,split\np/a0.png,x,train\np/b0.png,y,\np/u1.png,y,NaN\np/a1.png,x,test\n')
    source = create_source(str(photos / 'l.csv'), None, 'train')
    assert source.targets.tolist() == [0, 1, 1]
    assert '2 rows with an empty split (or NaN) count as train' in caplog.text


def test_lists_and_captions_beside_the_label_of_a_row_are_no_hindrance(photos, caplog):
    rows = [dict(file_name=f'p/{name}.png', label=name[0], bbox=[1, 2.5], more=dict(a=[1]), caption='two\nlines')
            for name in ('a0', 'b0', 'a1')]
    (photos / 'l.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    source = create_source(str(photos / 'l.jsonl'), None, 'train')
    assert source.class_names == ['a', 'b'] and source.targets.tolist() == [0, 1, 0]
    assert '3 of 3 rows have a cell of several lines, such as line 1; if none should, a quotation' in caplog.text
    caplog.clear()
    (photos / 'l.csv').write_text('file_name, label, note\np/a0.png, "a, b", "said ""hi"""\np/b0.png, c, 12" long\n')
    source = create_source(str(photos / 'l.csv'), None, 'train')
    assert source.class_names == ['a, b', 'c'] and 'several lines' not in caplog.text


@pytest.mark.parametrize('label, names, targets, told', [
    ([0, 1, -1, 1], ['0', '1'], [0, 1, -1, 1], '1 rows whose label is -1 have no label'),
    ([2., float('nan'), 10., 2.], ['2', '10'], [0, -1, 1, 0], 'labels such as 2.0 are taken as whole numbers'),
    ([1, 1., None, 3], ['1', '3'], [0, 0, -1, 1], 'labels such as 1.0 are taken as whole numbers'),
    (['7', 'nan', '7', 'N/A'], ['7'], [0, -1, 0, -1], '2 rows whose label is nan, N/A have no label'),
    (['cat', 'None', '-1', 'cat'], ['-1', 'cat', 'None'], [1, 2, 0, 1],
     'column label holds None, -1 among other words, 2 times; that counts as a class'),
    (['007', '7', '007', '7'], ['007', '7'], [0, 1, 0, 1], ''),
    ([.5, 1., .5, 2.], ['0.5', '1.0', '2.0'], [0, 1, 0, 2], 'numbers with fractions, such as 0.5; each counts'),
])
@pytest.mark.parametrize('form', ['csv', 'jsonl', 'parquet', 'words of a table of images'])
def test_numbers_and_words_that_mean_no_label_are_the_same_in_every_table_of_files(photos, form, label, names, targets,
                                                                                  told, caplog):
    paths = ['p/a0.png', 'p/b0.png', 'p/a1.png', 'p/u1.png']
    file = photos / f'metadata.{form}'
    if form == 'csv':
        rows = ['file_name,label', *(f'{path},{"" if cell is None else cell}' for path, cell in zip(paths, label))]
        file.write_text('\n'.join(rows))
    elif form == 'words of a table of images':
        words = [None if cell is None else str(cell) for cell in label]
        pq.write_table(pa.table(dict(image=[encoded(RED)] * 4, label=words)), photos / 'train.parquet')
    elif form == 'jsonl':
        file.write_text('\n'.join(json.dumps(dict(file_name=path, label=cell)) for path, cell in zip(paths, label)))
    else:
        pq.write_table(pa.table(dict(file_name=paths, label=label)), file)
    source = create_source(str(photos), None, 'train')
    assert sorted(source.class_names) == sorted(names)
    assert [source.class_names[k] if k >= 0 else '' for k in source.targets] == [names[k] if k >= 0 else '' for k in
                                                                                 targets]
    assert told in caplog.text


def test_words_of_a_split_are_read_as_those_of_training(tmp_path):
    write_table(tmp_path / 'train.parquet', (RED,) * 3, label=['1.0', 'nan', '2.0'])
    write_table(tmp_path / 'val.parquet', label=['-1', '2'])
    assert create_source(str(tmp_path), None, 'val', train_split='train').targets.tolist() == [-1, 1]
    write_table(tmp_path / 'train.parquet', (RED,) * 3, label=['cat', 'nan', '2.0'])
    val = create_source(str(tmp_path), None, 'val', train_split='train')
    assert val.class_names == ['2.0', 'cat', 'nan', '2'] and val.targets.tolist() == [-1, 3]
    write_table(tmp_path / 'val.parquet', label=['nan', '2.0'])
    assert create_source(str(tmp_path), None, 'val', train_split='train').targets.tolist() == [2, 0]
    write_table(tmp_path / 'train.parquet', label=['1', '-5'])
    refused('the label is -5; expected 0 or more, or -1 for no label', str(tmp_path), None, 'train')


@pytest.mark.filterwarnings('error')
def test_words_of_any_kind_of_arrow_are_labels_and_an_infinite_one_is_refused_in_one_line(tmp_path):
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        image = [encoded(RED)] * 3
        pq.write_table(pa.table(dict(image=image, label=pa.array(['b', 'a', ''], kind))), tmp_path / 'train.parquet')
        source = create_source(str(tmp_path), None, 'train')
        assert source.class_names == ['a', 'b'] and source.targets.tolist() == [1, 0, -1]
    for odd in (float('inf'), 1e300):
        pq.write_table(pa.table(dict(image=image, label=[0., odd, None])), tmp_path / 'train.parquet')
        refused('labels in column label must be whole numbers or words, not float64', str(tmp_path), None, 'train')


def test_a_folder_or_a_link_to_nothing_is_no_file_of_its_name(tmp_path):
    write_pictures(tmp_path, 'p0.png', 'p0/deep.png', 'p1.png', 'x.png/deep.png')
    (tmp_path / 'l.csv').write_text('id,label\np0,a\np1,b\n')
    source = create_source(str(tmp_path / 'l.csv'), None, 'train')
    assert [os.path.basename(path) for path in source.file_paths()] == ['p0.png', 'p1.png']
    (tmp_path / 'm.csv').write_text('id,label\np0,a\nx.png,b\n')
    refused('1 of 2 files are missing, such as line 3: x.png', str(tmp_path / 'm.csv'), None, 'train')
    for name, target in (('l.png', 'p1.png'), ('loop.png', 'loop.png'), ('nothing.png', 'nowhere.png')):
        (tmp_path / name).symlink_to(target)
    (tmp_path / 'm.csv').write_text('id,label\nl,a\nloop,b\nnothing,b\n')
    refused('2 of 3 files are missing, such as line 3: loop', str(tmp_path / 'm.csv'), None, 'train')


def test_a_column_of_splits_that_is_called_otherwise_is_told(photos, caplog):
    (photos / 'l.csv').write_text('file_name,label,subset\np/a0.png,a,train\np/b0.png,b,Test\n')
    assert len(create_source(str(photos / 'l.csv'), None, 'train')) == 2
    assert 'column subset looks like splits (test, train) and is not read as such; call it split' in caplog.text


def test_metadata_with_two_label_columns_is_a_question(photos):
    (photos / 'metadata.csv').write_text('file_name,label,target\np/a0.png,a,b\n')
    refused('label and target may each be the label column; choose one', str(photos), None, 'train')


def test_names_are_the_same_in_either_form_of_unicode(tmp_path, caplog):
    one, other = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))
    assert one != other
    write_pictures(tmp_path, f'f/train/{other}/0.png', 'f/train/z/1.png', f'f/val/{one}/0.png', 'f/val/z/{other}.png')
    splits = [create_source(str(tmp_path / 'f'), None, split) for split in ('train', 'val')]
    assert splits[0].class_names == splits[1].class_names == [one, 'z']
    (tmp_path / 'map.txt').write_text(f'z\n{one}\n')
    source = create_source(str(tmp_path / 'f'), None, 'train', class_map=str(tmp_path / 'map.txt'))
    assert source.class_names == ['z', one] and source.targets.tolist() == [1, 0]
    (tmp_path / 'l.csv').write_text(f'file_name,label\nf/train/{one}/0.png,{one}\nf/train/z/1.png,{other}\n')
    source = create_source(str(tmp_path / 'l.csv'), None, 'train')
    assert source.class_names == [one] and source.targets.tolist() == [0, 0]
    assert '1 of 2 file names have accents in another form of Unicode than the files' in caplog.text
    write_table(tmp_path / 't' / 'train.parquet', label=[f' {one}', other])
    assert create_source(str(tmp_path / 't'), None, 'train').class_names == [one]
    write_table(tmp_path / 'c' / 'train-0-of-2.parquet', label=([0, 1], [one, 'z']))
    write_table(tmp_path / 'c' / 'train-1-of-2.parquet', label=([0, 1], ['z', other]))
    source = create_source(str(tmp_path / 'c'), None, 'train')
    assert source.class_names == [one, 'z'] and source.targets.tolist() == [0, 1, 1, 0]
    assert match_names([f'{other}/0.png'], [f'/d/{one}/0.png', '/d/z/0.png'], 'f') == [0]
    assert match_names([f'{one}.png'], [f'/d/{other}.png', '/d/z.png'], 'f') == [0]
    mapped = match_classes(splits[0], ['z', other], 2, 'here')  # as of an older run's checkpoint
    assert mapped.tolist() == [1, 0]


def test_what_a_table_leaves_out_or_takes_otherwise_is_told(photos, caplog):
    text = 'image,class\np\\a0.png,1.0\np/b0,2.0\n"p/b 1.png",\np/gone.png,1.0\np/a0.png,1.0\n'
    (photos / 'l.csv').write_text(text)
    source = create_source(str(photos / 'l.csv'), None, 'train', skip_missing=True)
    assert source.class_names == ['1', '2'] and source.targets.tolist() == [0, 1, -1]
    for note in ('1 of 5 files are missing, such as line 5: p/gone.png', '1 of 5 file names have backslashes',
                 '1 of 5 file names have no ending', r'1 rows repeat another one and count once: lines 6 (as 2)',
                 'labels such as 1.0 are taken as whole numbers'):
        assert note in caplog.text


def test_paths_are_relative_to_data_dir_and_the_first_folder_may_be_the_split(photos):
    write_pictures(photos / 'root', 'train/0.png', 'val/1.png')
    (photos / 'l.csv').write_text('path,y_label\ntrain/0.png,b\nval/1.png,b\n')
    source = create_source(str(photos / 'l.csv'), str(photos / 'root'), None)
    assert source.split == 'val' and source.where(0) == str(photos / 'root' / 'val' / '1.png')
    (photos / 'l.csv').write_text('path,label\na0.png,b\n')
    assert create_source(str(photos / 'l.csv'), str(photos / 'p'), 'train').class_names == ['b']


def test_a_changed_table_of_files_is_read_again(photos):
    file = photos / 'l.csv'
    for label in 'xy':
        file.write_text(f'path,label\np/a0.png,{label}\n')
        os.utime(file, (1e9, 1e9))
        assert create_source(str(file), None, 'train').class_names == [label]


def test_pictures_below_unlabeled_dir_that_no_row_names_are_unlabeled_too(photos, caplog):
    (photos / 'l.csv').write_text(CSV)
    (photos / 'p' / '.hidden.png').write_bytes(b'')
    (photos / 'p' / 'notes.txt').write_text('')
    args = train_ssl._parse_args(['--dataset', str(photos / 'l.csv'), '--unlabeled-dir', str(photos / 'p')])
    train, unlabeled, evaluation = (open_source(args, split) for split in ('train', unlabeled_split(args), None))
    assert len(train) == 3 and len(evaluation) == 1 and unlabeled.targets.tolist() == [0, 1, -1, -1, -1]
    assert [os.path.basename(path) for path in unlabeled.file_paths()[3:]] == ['b 1.png', 'u0.png']
    assert '4 of its 6 pictures are in a split' in caplog.text and '1 no pictures (.txt)' in caplog.text
    (photos / 'l.csv').write_text(CSV.replace('file_name,label', 'picture,kind'))
    keys = dict(input_key='picture', target_key='kind', unlabeled_dir=str(photos / 'p'))
    source = create_source(str(photos / 'l.csv'), None, 'train+unlabeled-dir', **keys)
    assert source.targets.tolist() == [0, 1, -1, -1, -1]
    write_pictures(photos / 'f', 'train/a/0.png', 'train/b/0.png', 'val/a/0.png', 'pool/0.png', 'pool/x/0.png')
    source = create_source(str(photos / 'f'), None, 'unlabeled-dir', unlabeled_dir=str(photos / 'f'))
    assert [Path(path).relative_to(photos / 'f').parts[0] for path in source.file_paths()] == ['pool', 'pool']
    refused('--unlabeled-dir nowhere: no such folder', 'digits', None, 'unlabeled-dir', unlabeled_dir='nowhere')


def test_metadata_in_a_splits_folder_counts_before_folders_and_without_labels_is_not_read(tmp_path, caplog):
    write_pictures(tmp_path, *(f'{split}/{name}/0.png' for split in ('train', 'test', 'more') for name in 'ab'))
    (tmp_path / 'train' / 'metadata.csv').write_text('file_name,label\na/0.png,dog\nb/0.png,cat\n')
    pq.write_table(pa.table(dict(file_name=['a/0.png', 'b/0.png'], label=['cat', 'cat'])),
                   tmp_path / 'test' / 'metadata.parquet')
    (tmp_path / 'more' / 'metadata.csv').write_text('file_name,caption\na/0.png,hello\n')
    train, test, more = (create_source(str(tmp_path), None, s, train_split='train') for s in ('train', 'test', 'more'))
    assert train.class_names == test.class_names == ['cat', 'dog'] and more.class_names == ['a', 'b']
    assert train.targets.tolist() == [1, 0] and test.targets.tolist() == [0, 0]
    assert 'metadata.csv: not read, as no column of labels is known in it' in caplog.text


def test_metadata_with_words_as_labels_is_read_through_datasets_too(photos):
    (photos / 'metadata.csv').write_text('file_name,label\np/a0.png,dog\np/b0.png,cat\n')
    for name in (f'hfds/{photos}', str(photos)):
        source = create_source(name, None, 'train')
        assert source.class_names == ['cat', 'dog'] and sorted(source.targets.tolist()) == [0, 1]


def test_a_folder_read_through_datasets_never_takes_deeper_folders_for_the_classes(tmp_path):
    write_pictures(tmp_path, *(f'{split}/{name}/0.png' for split in ('train', 'val') for name in ('cat', 'dog')))
    assert create_source(f'hfds/{tmp_path}', None, 'train').class_names == ['cat', 'dog']
    deep = tmp_path / 'deep'
    write_pictures(deep, *(f'{split}/{name}/{part}/0.png' for split in ('train', 'val') for name in ('cat', 'dog')
                           for part in ('day', 'night')))
    refused(r'takes the innermost folders for the classes there \(day, night\); --data-dir .*deep takes the first',
            f'hfds/{deep}', None, 'train')
    assert create_source('', str(deep), 'train').class_names == ['cat', 'dog']


# --- The same pictures ------------------------------------------------------------------------------------------------

FORMS = ['folder', 'csv', 'jsonl', 'metadata', 'parquet', 'words', 'arrow', 'save_to_disk', 'torchvision']


@pytest.fixture(scope='module')
def same_pictures(tmp_path_factory):
    """24 pictures of two classes, two thirds for training, in nine forms; how each is named as a data set."""
    root = tmp_path_factory.mktemp('forms')
    rows = {'train': [], 'test': []}
    for i, pixels in enumerate(noise(24, 32)):
        split, name = ('train', 'test')[i % 3 == 2], ('cat', 'dog')[i // 12]
        path = f'{split}/{name}/{i:02d}.png'
        (root / 'folder' / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / 'folder' / path)
        rows[split].append((path, name, pixels))
    lines = [dict(path=path, label=name, split=split) for split in rows for path, name, _ in rows[split]]
    (root / 'folder.csv').write_text('path,label,split\n' + ''.join(','.join(line.values()) + '\n' for line in lines))
    (root / 'folder.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    shutil.copytree(root / 'folder', root / 'metadata')
    (root / 'metadata' / 'metadata.csv').write_text((root / 'folder.csv').read_text().replace('path', 'file_name', 1))
    tables = {}
    for split in rows:
        images = [dict(bytes=(root / 'folder' / path).read_bytes(), path=None) for path, _, _ in rows[split]]
        for form, kind in (('parquet', datasets.ClassLabel(names=['cat', 'dog'])), ('words', datasets.Value('string'))):
            features = datasets.Features(image=datasets.Image(), label=kind)
            labels = [name if form == 'words' else ['cat', 'dog'].index(name) for _, name, _ in rows[split]]
            tables[split] = datasets.Dataset.from_dict(dict(image=images, label=labels), features=features)
            (root / form).mkdir(exist_ok=True)
            tables[split].to_parquet(str(root / form / f'{split}.parquet'))
        tables[split] = datasets.Dataset.from_parquet(str(root / 'parquet' / f'{split}.parquet'))
    datasets.DatasetDict(tables).save_to_disk(root / 'save_to_disk')
    (root / 'arrow').mkdir()
    for split in rows:
        [file] = (root / 'save_to_disk' / split).glob('*.arrow')
        shutil.copy(file, root / 'arrow' / f'{split}.arrow')
    batches = root / 'torchvision' / 'cifar-10-batches-py'
    batches.mkdir(parents=True)
    parts = np.array_split(np.arange(16), 5)
    for file, split, which in [(f'data_batch_{i}', 'train', part) for i, part in enumerate(parts, 1)] + [
            ('test_batch', 'test', np.arange(8))]:
        pixels = np.stack([rows[split][i][2] for i in which]).transpose(0, 3, 1, 2).reshape(len(which), -1)
        labels = [['cat', 'dog'].index(rows[split][i][1]) for i in which]
        (batches / file).write_bytes(pickle.dumps(dict(data=pixels, labels=labels)))
    (batches / 'batches.meta').write_bytes(pickle.dumps(dict(label_names=['cat', 'dog'])))
    names = {form: ('--dataset', root / form) for form in FORMS}
    names.update(csv=('--dataset', root / 'folder.csv', '--data-dir', root / 'folder'),
                 jsonl=('--dataset', root / 'folder.jsonl', '--data-dir', root / 'folder'),
                 torchvision=('--dataset', 'torch/cifar10', '--data-dir', root / 'torchvision'))
    return names


ONE_STEP = (  # without a data set's own statistics
    '--num-labels', '4', '--img-size', '32', '--epochs', '1', '--train-steps-per-epoch', '1', '--mean', '0.5',
    '--std', '0.5',
)


@pytest.fixture(scope='module')
def of_folder(same_pictures, tmp_path_factory):
    return summary_of(train_in_process('folder', *same_pictures['folder'], *ONE_STEP,
                                       output=tmp_path_factory.mktemp('run')), same_pictures['folder'])


def summary_of(run, named):
    """What a run and its data are, whatever form they are in."""
    args = train_ssl._parse_args(list(map(str, named)))
    train, evaluation = open_source(args, 'train'), open_source(args, None)
    labels = json.loads((run / 'labels.json').read_text())
    metrics = json.loads((run / 'last' / 'metrics.json').read_text())
    return dict(
        names=train.class_names,
        counts=[source.targets.bincount().tolist() for source in (train, evaluation)],
        labeled=[(train.image(i).tobytes(), target) for i, target in zip(labels['index'], labels['target'])],
        metrics={key: value for key, value in metrics.items() if isinstance(value, (int, float))},
    )


@pytest.mark.parametrize('form', FORMS[1:])
def test_the_same_pictures_in_another_form_give_the_same_run(same_pictures, of_folder, train, form):
    other = summary_of(train(form, *same_pictures[form], *ONE_STEP), same_pictures[form])
    assert other == of_folder and other['names'] == ['cat', 'dog'] and other['counts'] == [[8, 8], [4, 4]]
    assert len(other['labeled']) == 4 and other['metrics']['top1'] >= 0


# --- Lists of names, ground truth -------------------------------------------------------------------------------------

@pytest.fixture
def wnids(tmp_path):
    """ImageNet's layout, with a flat folder for evaluation."""
    write_pictures(tmp_path / 'train', *(f'{w}/{w}_{i}.JPEG' for w in ('n01440764', 'n02084071') for i in (3, 44)))
    write_pictures(tmp_path / 'val', *(f'ILSVRC2012_val_0000000{i}.JPEG' for i in (1, 2, 3)))
    return tmp_path


@pytest.mark.parametrize('name, text', [
    ('1percent.txt', 'n01440764_44.JPEG\nn02084071_3.JPEG\n\nn09999999_1.JPEG\nn01440764_44.JPEG\n'),
    ('list.csv', 'file_name,other\nn01440764_44.JPEG,1\nx/n02084071_3.JPEG,1\ny.JPEG,1\nn01440764_44.JPEG,1\n'),
    ('bare.csv', 'n01440764_44.JPEG\nn02084071_3.JPEG\ny.JPEG\nn01440764_44.JPEG\n'),
])
def test_a_labels_file_may_list_names_of_files(wnids, caplog, name, text):
    (wnids / name).write_text(text)
    source = create_source(str(wnids), None, 'train')
    assert find_named(str(wnids / name), source).tolist() == [1, 2]
    assert re.search(r'2 labeled images; 1 of 4 names are not in the training split, such as (n09999999_1|y).JPEG; 1 '
                     'names stand there again', caplog.text)


def test_a_listed_file_that_is_held_out_is_not_said_to_have_no_label(wnids):
    (wnids / 'l.txt').write_text('n01440764_44.JPEG\n')
    source = create_source(str(wnids), None, 'train')
    source.targets[1] = -1
    for held_out, reason in ((False, 'training split'), (True, r'training split, or are held out .*--val-fraction\)')):
        with pytest.raises(UsageError, match=f'1 of the 1 images have no label in the {reason}, such as .*_44.JPEG'):
            find_named(str(wnids / 'l.txt'), source, held_out=held_out)


def test_lists_of_names_are_ambiguous_unknown_or_of_images_without_names(tmp_path):
    paths = ['/d/a/0.png', '/d/b/0.png', 'n01440764_7_n01440764.JPEG', '/e/1.png']
    assert match_names(['b/0.png', 'n01440764_7.JPEG', 'x/1.png'], paths, 'f') == [1, 2, 3]
    with pytest.raises(UsageError, match='f: 0.png may be 2 files, such as /d/a/0.png and /d/b/0.png; write it with'):
        match_names(['0.png'], paths, 'f')
    with pytest.raises(UsageError, match='none of its 1 names is that of a file .* as 0.png; it begins with z.png'):
        match_names(['z.png'], paths, 'f')
    (tmp_path / 'l.txt').write_text('a.png\n')
    write_table(tmp_path / 'train.parquet', label=labels_of())
    with pytest.raises(UsageError, match='names of files, which the images of this data set do not have'):
        find_named(str(tmp_path / 'l.txt'), create_source(str(tmp_path), None, 'train'))
    (tmp_path / 'l.txt').write_text('\n')
    with pytest.raises(UsageError, match='l.txt: nothing in it'):
        read_names(tmp_path / 'l.txt')


def test_a_name_in_another_folder_of_the_training_split_is_not_its_namesake(caplog):
    paths = ['train/cat/1.png', 'train/cat/2.png', 'train/dog/2.png', 'train/dog/3.png']
    names = ['dog/1.png', 'x\\cat\\3.png', '/else/cat/1.png', 'dog/2.png', './3.png']
    assert match_names(names, paths, 'f') == [0, 2, 3]
    assert caplog.messages == ['f: 3 labeled images; 2 of 5 names are not in the training split, such as dog/1.png']
    with pytest.raises(UsageError, match='f: none of its 1 names'):
        match_names(['dog/1.png'], paths, 'f')
    assert match_names(['other/1.png', 'train/cat/2.png', 'cat/2.png'], paths, 'f') == [0, 1]
    assert '1 names have another folder than their file, such as other/1.png for train/cat/1.png' in caplog.text


def test_a_run_takes_its_labeled_images_from_a_list_of_names(same_pictures, train, tmp_path):
    (tmp_path / 'l.txt').write_text('00.png\n13.png\n15.png\n')
    named = (*same_pictures['folder'], '--labels-file', tmp_path / 'l.txt')
    run = train('r', *named, *ONE_STEP[2:], without='--num-labels')
    assert json.loads((run / 'labels.json').read_text())['index'] == [0, 9, 10]


SYNSETS = 'n02084071 1 dog\nn01440764 2 tench\nn03000000 3 more\n'


@pytest.mark.parametrize('form', ['kaggle', 'csv', 'wnids', 'numbers', 'mat'])
def test_a_flat_evaluation_folder_takes_its_labels_from_a_file(wnids, form):
    pick = ['n02084071', 'n01440764', 'n02084071']
    names = [f'ILSVRC2012_val_0000000{i}' for i in (1, 2, 3)]
    file = wnids / 'devkit' / 'data' / ('truth.csv' if form in ('kaggle', 'csv') else 'truth.txt')
    file.parent.mkdir(parents=True)
    if form == 'kaggle':  # in an order of its own, without endings, with boxes
        rows = [f'{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8 \n' for name, wnid in reversed(list(zip(names, pick)))]
        file.write_text('ImageId,PredictionString\n' + ''.join(rows))
    elif form == 'csv':
        file.write_text('file_name,label\n' + ''.join(f'{name}.JPEG,{wnid}\n' for name, wnid in zip(names, pick)))
    elif form == 'wnids':
        file.write_text('\n'.join(pick))
    else:
        file.write_text('1\n2\n1\n')
    if form == 'numbers':
        (file.parent / 'map_clsloc.txt').write_text(SYNSETS)
    if form == 'mat':
        scipy_io = pytest.importorskip('scipy.io')
        kind = [('ILSVRC2012_ID', float), ('WNID', object), ('words', object), ('num_children', float)]
        rows = [(1, 'n02084071', 'dog', 0), (2, 'n01440764', 'tench', 0), (1001, 'n00000001', 'x', 2)]
        scipy_io.savemat(file.parent / 'meta.mat', dict(synsets=np.array(rows, kind)))
    for dataset, data_dir in (('imagenet', wnids), (str(wnids), None)):
        source = create_source(dataset, data_dir and str(data_dir), None, val_labels=str(file), train_split='train')
        assert source.class_names == ['n01440764', 'n02084071'] and source.split == 'val'
        targets = {Path(path).stem: int(t) for path, t in zip(source.file_paths(), source.targets)}
        assert targets == dict(zip(names, [1, 0, 1]))


@pytest.mark.parametrize('text, message', [
    ('1\n2\n1\n', 'numbers of ILSVRC.s own order, .*meta.mat or map_clsloc.txt .lines of wnid and number. beside it'),
    ('n02084071\n', '1 lines do not fit the 3 pictures of'),
    ('', 'nothing in it'),
])
def test_ground_truth_that_does_not_fit_is_refused(wnids, text, message):
    (wnids / 'truth.txt').write_text(text)
    refused(message, str(wnids), None, 'val', val_labels=str(wnids / 'truth.txt'), train_split='train')
    (wnids / 'truth.csv').write_text('path,label\nILSVRC2012_val_00000001.JPEG,n02084071\n')
    refused('2 pictures of .* have no row, such as .*00000002.JPEG', str(wnids), None, 'val',
            val_labels=str(wnids / 'truth.csv'))
    refused('labels to the pictures of a flat folder, and .* is none', 'digits', None, 'test', val_labels='x.txt')


def test_a_list_of_files_knows_what_it_names(photos):
    (photos / 'l.csv').write_text(CSV)
    listed = list_files(photos / 'l.csv')
    assert {os.path.basename(path) for path in listed.files()} == {'a0.png', 'b0.png', 'u1.png', 'a1.png'}
    assert torch.equal(create_source(str(photos / 'l.csv'), None, 'train').targets, torch.tensor([0, 1, -1]))
