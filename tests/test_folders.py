"""Image folders and pictures as users have them: one test per promise of how they are read."""
import io
import logging
import os
import pickle
import re
import struct
import tempfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from images import noise, plain
from PIL import Image
from torchvision import transforms

import data
import folders
import inputs
import mislabeled
import sources
import splits
import train_ssl
import validate
from folders import is_hidden, list_pictures, natural_key
from pictures import LOOKED_AT, bits_in_use, decode_image, picture_extensions, spread_indices
from program import UsageError, readable
from seeds import seeded
from sources import ArraySource, ImageError, create_source, locate, plain_folder
from views import build_views

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
ARGUMENTS = ('--model', 'wide_resnet10_1', '--img-size', '16', '-b', '4', '--mu', '2', '--epochs', '1',
             '--train-steps-per-epoch', '2', '--num-labels', '4')


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory, monkeypatch):
    """A cache and a memory of what was told for each test."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('datasets'))
    folders.tell.cache_clear()


def save(path, color=RED, size=(6, 5), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    plain(color, size).save(path, **options)


def make(root, *names):
    for name in names:
        save(root / name)


def opened(root, split='train', **options):
    return create_source('', str(root), split, **options)


def files(source, below):
    return [os.path.relpath(source.where(i), below) for i in range(len(source))]


# --- The listing ------------------------------------------------------------------------------------------------------

DIRS = st.sampled_from(['a', 'b', 'B', 'c9', 'c10', 'sp ace', 'é', 'caf\udce9', '$x_^', '²', '.git', '@eaDir'])
FILES = st.sampled_from(['1.png', '2.JPG', '10.webp', 'x.bmp', 'y.TIFF', 'z.gif', 'j.jfif', '\udcff.png',
                         'new\nline.png', 'n.txt', 'none', 'd.xml', '._x.jpg', 'Thumbs.db', '.png'])
PATHS = st.lists(st.tuples(st.lists(DIRS, min_size=1, max_size=3), st.none() | FILES), max_size=14)
LINKS = st.lists(st.tuples(st.integers(0, 99), st.sampled_from(['l1', 'l2.png']), st.integers(0, 99)), max_size=2)


def plant(root, paths, links):
    """A split in root, a pool beside it, and links from the one to anything, also to parents and to nothing."""
    split = root / 'train'
    (root / 'pool' / 'deep').mkdir(parents=True)
    (root / 'pool' / 'deep' / 'p.png').touch()
    split.mkdir()
    for folder, name in paths:
        path = split.joinpath(*folder)
        path.mkdir(parents=True, exist_ok=True)
        if name:
            (path / name).touch()
    there = sorted(root.rglob('*'))
    places = sorted({split, *(path for path in there if path.is_dir() and split in path.parents)})
    for at, name, to in links:
        place = places[at % len(places)]
        target = [*there, root, split, root / 'nothing'][to % (len(there) + 3)]
        if not os.path.lexists(place / name):
            (place / name).symlink_to(target)
    return split


def walk(split):
    """All pictures by a plain walk, as real paths with the class folder of each way to them; and the class folders."""
    ways, classes = {}, set()
    for path, dirs, names in os.walk(split, followlinks=True):
        real = os.path.realpath(path)
        dirs[:] = [d for d in dirs if not is_hidden(d) and not (real + '/').startswith(
            os.path.realpath(os.path.join(path, d)) + '/')]
        first = os.path.relpath(path, split).split('/')[0]
        classes.update(dirs if path == str(split) else ())
        for name in names:
            if os.path.splitext(name)[1].lower() in picture_extensions() and not is_hidden(name):
                if os.path.isfile(os.path.join(path, name)):
                    ways.setdefault(os.path.realpath(os.path.join(path, name)), set()).add(first)
    return ways, classes


@settings(max_examples=100, deadline=None, derandomize=True)
@given(PATHS, LINKS)
def test_a_listing_is_that_of_a_plain_walk_with_each_picture_once(paths, links):
    with tempfile.TemporaryDirectory() as root:
        split = plant(Path(root), paths, links)
        found = list_pictures(str(split))
        ways, classes = walk(split)
        real = [os.path.realpath(split / path) for path in found.pictures]
        assert sorted(real) == sorted(ways)
        for path, at in zip(found.pictures, real):
            assert (path.split('/')[0] if '/' in path else '.') in ways[at]
        # A link to a folder that is a class already is no class of its own.
        assert set(found.classes) <= classes and all((split / name).is_symlink() for name in classes - {*found.classes})
        assert found.pictures == sorted(found.pictures, key=natural_key)
        listed = [path for path, _, names in os.walk(split) for _ in names]
        assert sum(map(len, found.left_out.values())) + len(found.pictures) >= len(listed) - sum(
            any(map(is_hidden, Path(path).relative_to(split).parts)) for path in listed)


@pytest.mark.parametrize('name, hidden', [
    ('.ipynb_checkpoints', True), ('._x.jpg', True), ('.DS_Store', True), ('@eaDir', True), ('__MACOSX', True),
    ('Thumbs.db', True), ('desktop.ini', True), ('$RECYCLE.BIN', True), ('cat', False), ('_cat', False),
    ('@cat', False), ('$', False), ('x.jpg', False),
])
def test_hidden_and_system_names(name, hidden):
    assert is_hidden(name) == hidden


def test_names_sort_as_timm_sorts_them():
    from timm.utils.misc import natural_key as timms
    names = ['c10', 'c9', 'C1', 'c01', 'a', 'a b', 'a1b2', 'a1b10', 'n02', '10', '9', '', 'é', 'x007y', '٣', '12a']
    assert sorted(names, key=natural_key) == sorted(names, key=lambda name: (timms(name), name))
    with pytest.raises(ValueError):
        timms('²')
    assert natural_key('²')


def test_every_format_that_pillow_opens_counts_and_the_rest_is_told_in_one_line(tmp_path, caplog):
    for ending in ('webp', 'bmp', 'tiff', 'tif', 'gif', 'jfif', 'jpg', 'PNG', 'ppm'):
        save(tmp_path / 'train' / 'a' / f'x.{ending}', format='JPEG' if ending == 'jfif' else None)
    for name in ('a/labels.txt', 'a/x.xml', 'a/README', 'b/y.h5', 'list.csv'):
        (tmp_path / 'train' / name).parent.mkdir(exist_ok=True)
        (tmp_path / 'train' / name).write_text('?')
    save(tmp_path / 'train' / 'b' / 'only.webp')
    make(tmp_path, 'train/c/x.png')
    source = opened(tmp_path)
    assert source.class_names == ['a', 'b', 'c'] and source.targets.bincount().tolist() == [9, 1, 1]
    assert {source.image(i).size for i in range(11)} == {(6, 5)}
    assert caplog.messages == [f'{tmp_path}/train: left out: 5 no pictures (.csv, .h5, .txt, .xml, without an ending)']


def test_the_class_is_the_first_folder_however_deep_the_pictures_lie(tmp_path):
    make(tmp_path, 'train/cat/day/1.png', 'train/cat/night/2.png', 'train/dog/day/3.png', 'train/dog/4.png')
    make(tmp_path, 'tiny/n1/images/n1_0.JPEG', 'tiny/n2/images/n2_0.JPEG', 'tiny/n2/images/n2_1.JPEG')
    for split, names, targets in (('train', ['cat', 'dog'], [0, 0, 1, 1]), ('tiny', ['n1', 'n2'], [0, 1, 1])):
        source = opened(tmp_path, split)
        assert source.class_names == names and source.targets.tolist() == targets


def test_hidden_and_system_files_are_ignored_at_every_level(tmp_path, caplog):
    make(tmp_path, 'train/a/1.png', 'train/b/2.png')
    make(tmp_path, *(f'{at}{name}/9.png' for at in ('', 'train/', 'train/a/')
                     for name in ('.ipynb_checkpoints', '@eaDir', '__MACOSX')))
    (tmp_path / 'train' / 'a' / '._1.jpg').write_bytes(b'\0\5\26\7')
    for at in ('train', 'train/b'):
        (tmp_path / at / 'Thumbs.db').write_text('')
    source = opened(tmp_path)
    assert source.class_names == ['a', 'b'] and files(source, tmp_path / 'train') == ['a/1.png', 'b/2.png']
    assert len(caplog.messages) == 1 and 'left out: 9 hidden or of the system (' in caplog.text
    with pytest.raises(UsageError, match='no split x; it has train$'):
        opened(tmp_path, 'x')
    assert files(plain_folder(str(tmp_path)), tmp_path) == ['train/a/1.png', 'train/b/2.png']


def test_hidden_copies_beside_parquet_files_are_ignored(tmp_path):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b']))
    buffer = io.BytesIO()
    plain(RED).save(buffer, 'PNG')
    image = dict(bytes=buffer.getvalue(), path=None)
    rows = datasets.Dataset.from_dict(dict(image=[image] * 2, label=[0, 1]), features)
    for name in ('train.parquet', '._train.parquet', '.ipynb_checkpoints/train-copy.parquet', '@eaDir/train.parquet'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows.to_parquet(str(tmp_path / name))
    assert len(opened(tmp_path)) == 2


def test_empty_classes_keep_their_numbers_and_are_named(tmp_path, caplog):
    make(tmp_path, 'train/a/1.png', 'train/c/2.png', 'val/b/1.png', 'val/c/2.png')
    (tmp_path / 'train' / 'b').mkdir()
    (tmp_path / 'val' / 'a').mkdir()
    train, val = opened(tmp_path), opened(tmp_path, 'val')
    assert train.class_names == val.class_names == ['a', 'b', 'c']
    assert train.targets.tolist() == [0, 2] and val.targets.tolist() == [1, 2]
    assert caplog.messages == [
        f'{tmp_path}/train: no picture in 1 of 3 classes, which keep their numbers: b',
        f'{tmp_path}/val: no picture in 1 of 3 classes, which keep their numbers: a',
    ]


def test_each_file_counts_once_whatever_links_there_are(tmp_path, caplog):
    make(tmp_path, 'train/a/1.png', 'train/a/2.png', 'train/b/3.png', 'val/a/9.png', 'store/c/4.png', 'store/5.png')
    train = tmp_path / 'train'
    for link, target in {
        'a/up': train, 'a/root': tmp_path, 'b/itself': train / 'b', 'a/b_again': train / 'b', 'again': train / 'a',
        'c': tmp_path / 'store' / 'c', 'b/c_deep': tmp_path / 'store' / 'c', 'b/one.png': tmp_path / 'store' / '5.png',
        'b/two.png': tmp_path / 'store' / '5.png', 'a/same.png': train / 'b' / '3.png', 'a/gone.png': tmp_path / 'gone',
    }.items():
        (train / link).symlink_to(target)
    source = opened(tmp_path)
    assert files(source, train) == ['a/1.png', 'a/2.png', 'b/3.png', 'b/one.png', 'c/4.png']
    assert source.class_names == ['a', 'b', 'c']
    assert '8 links to what is listed already' in caplog.text and '1 links to nothing (gone.png)' in caplog.text


def test_file_names_of_any_bytes_are_read(tmp_path, caplog):
    make(tmp_path, 'train/b/1.png')
    odd = tmp_path / 'train' / os.fsdecode(b'caf\xe9') / os.fsdecode(b'\xff%41 \n.png')
    save(odd, GREEN)
    save(odd.with_name('plain.png'), BLUE)
    source = opened(tmp_path)
    assert source.class_names == ['b', r'caf\xe9'] and source.targets.tolist() == [0, 1, 1]
    colours = {source.image(i).getpixel((0, 0)) for i in (1, 2)}
    assert colours == {GREEN, BLUE} and source.where(2) == rf'{tmp_path}/train/caf\xe9/\xff%41 \n.png'
    odd.write_bytes(b'no picture')
    with pytest.raises(ImageError) as error:
        source.image(2)
    assert r'\xff%41 \n.png' in str(error.value) and '\n' not in str(error.value)
    assert readable('a\tb\u202e') == r'a\tb\u202e'


def test_a_run_on_file_names_that_are_not_utf8_trains(tmp_path, train):
    for split in ('train', 'val'):
        for name in (b'a', b'b\xe9'):
            for i in range(3):
                save(tmp_path / 'set' / split / os.fsdecode(name) / os.fsdecode(b'\xe9%d.png' % i),
                     (80 * i, len(name), len(split)))
    folder = train('odd', '--dataset', tmp_path / 'set', *ARGUMENTS)
    assert (folder / 'last' / 'metrics.json').exists()


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    make(tmp_path, 'train/a/1.png', 'train/b/1.png')

    def refuse(path, scan=os.scandir):
        if str(path).endswith('/b'):
            raise PermissionError(13, 'Permission denied')
        return scan(path)
    monkeypatch.setattr(folders.os, 'scandir', refuse)
    with pytest.raises(UsageError, match='train/b: cannot be read: Permission denied'):
        list_pictures(str(tmp_path / 'train'))


def test_the_kept_index_of_linked_folders_notices_changes_in_them(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, 'INDEX_FROM', 2)
    make(tmp_path, 'store/deep/1.png', 'train/b/2.png')
    (tmp_path / 'train' / 'a').symlink_to(tmp_path / 'store')

    def age():
        for entry in (tmp_path, *tmp_path.rglob('*')):
            os.utime(entry, (1.5e9 + len(list(tmp_path.rglob('*'))),) * 2)
    age()
    assert opened(tmp_path).dataset.cache_files and len(opened(tmp_path)) == 2
    make(tmp_path, 'store/deep/3.png')
    age()
    assert files(opened(tmp_path), tmp_path / 'train') == ['a/deep/1.png', 'a/deep/3.png', 'b/2.png']


def test_what_is_left_out_is_told_from_a_kept_index_too_and_once_a_process(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(folders, 'INDEX_FROM', 1)
    make(tmp_path, 'train/a/1.png')
    (tmp_path / 'train' / 'a' / 'x.txt').write_text('')
    for entry in (tmp_path, *tmp_path.rglob('*')):
        os.utime(entry, (1.5e9, 1.5e9))
    for _ in range(2):
        opened(tmp_path), opened(tmp_path)
        assert len(caplog.messages) == 1
        caplog.clear()
        folders.tell.cache_clear()
    monkeypatch.setenv('RANK', '1')
    opened(tmp_path)
    assert not caplog.messages


# --- Class maps -------------------------------------------------------------------------------------------------------

def test_a_class_map_names_the_classes_and_what_it_leaves_out_is_counted(tmp_path, caplog):
    make(tmp_path, *(f'train/{name}/{i}.png' for name in 'abc' for i in range(2)), 'val/b/1.png', 'val/d/2.png')
    (tmp_path / 'map.txt').write_text('\ufeffc\r\nb\r\ne\r\n\r\n')
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps(dict(c=0, b=1, e=2)))
    for file in ('map.txt', 'map.pkl'):
        caplog.clear()
        given = str(tmp_path / file)
        train, val = opened(tmp_path, class_map=given), opened(tmp_path, 'val', class_map=given)
        assert train.class_names == val.class_names == ['c', 'b', 'e']
        assert train.targets.tolist() == [1, 1, 0, 0] and val.targets.tolist() == [1]
        assert caplog.messages == [
            f'{tmp_path}/train: --class-map {given} leaves out 1 of 3 class folders, with 2 pictures: a',
            f'{tmp_path}/train: no picture in 1 of 3 classes, which keep their numbers: e',
            f'{tmp_path}/val: --class-map {given} leaves out 1 of 2 class folders, with 1 pictures: d',
            f'{tmp_path}/val: no picture in 2 of 3 classes, which keep their numbers: c, e',
        ]


@pytest.mark.parametrize('name, content, message', [
    ('map.txt', b'a 0\nb 1\n', r'names \(a 0, b 1\) is a class folder in .*train \(a, b\); in a .txt file each'),
    ('map.txt', b'\n\n', 'expected class names, and whole numbers'),
    ('map.txt', b'\xe9\n', 'no class map'),
    ('map.csv', b'a,0\n', r'no class map: Unsupported class map file extension \(.csv\).*expected .txt'),
    ('map.pkl', pickle.dumps(['a', 'b']), 'no class map: Invalid class map file, expected a dict'),
    ('map.pkl', pickle.dumps({0: 'a', 1: 'b'}), 'expected class names, and whole numbers'),
    ('map.pkl', pickle.dumps(dict(a=0, b=1.5)), 'expected class names, and whole numbers'),
    ('map.pkl', b'junk', 'no class map'),
    ('map.pkl', pickle.dumps(Path('x')), 'no class map: Global pathlib'),
    ('map.txt', None, 'no class map: Cannot locate'),
])
def test_a_class_map_of_another_form_is_told_as_such(tmp_path, name, content, message):
    make(tmp_path, 'train/a/1.png', 'train/b/1.png')
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        opened(tmp_path, class_map=str(tmp_path / name))
    assert f'--class-map {tmp_path / name}' in str(error.value) and '\n' not in str(error.value)


def test_a_class_map_may_join_classes_and_a_gap_in_it_is_told(tmp_path, caplog):
    make(tmp_path, 'train/a/1.png', 'train/b/1.png', 'train/c/1.png')
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps(dict(a=0, b=1, c=1)))
    source = opened(tmp_path, class_map=str(tmp_path / 'map.pkl'))
    assert source.class_names == ['a', 'b, c'] and source.targets.tolist() == [0, 1, 1] and not caplog.messages
    (tmp_path / 'gap.txt').write_text('a\n\nb\nc\n')
    source = opened(tmp_path, class_map=str(tmp_path / 'gap.txt'))
    assert source.class_names is None and source.targets.tolist() == [0, 2, 3]
    assert 'no class has the number 1 (an empty line' in caplog.text


def test_a_class_map_leaves_out_no_unlabeled_picture_and_the_training_split_keeps_its_places(tmp_path):
    make(tmp_path, *(f'{split}/{name}/{i}.png' for split in ('train', 'pool', 'other') for name in 'abc'
                     for i in range(2) if split != 'other' or name == 'a'))
    (tmp_path / 'map.txt').write_text('c\nb\n')
    options = dict(class_map=str(tmp_path / 'map.txt'), flat=True, train_split='train')
    assert opened(tmp_path, 'pool', **options).targets.tolist() == [-1, -1, 1, 1, 0, 0]
    assert opened(tmp_path, 'other', **options).targets.tolist() == [-1, -1]
    train, joined = opened(tmp_path, **options), opened(tmp_path, 'train+pool', **options)
    assert len(train) == 4 and joined.targets.tolist() == [1, 1, 0, 0, -1, -1, 1, 1, 0, 0]
    assert [joined.where(int(i)) for i in locate(train, joined)] == [train.where(i) for i in range(4)]


# --- Unlabeled pictures -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('split', ['pool', 'images/flat', 'absolute', 'train+pool', 'un+labeled'])
def test_a_flat_folder_that_unlabeled_split_names_is_unlabeled(tmp_path, train, split):
    root, outside = tmp_path / 'set', tmp_path / 'elsewhere'
    make(root, *(f'{part}/{name}/{i}.png' for part in ('train', 'val') for name in 'ab' for i in range(3)))
    for folder in (root / 'pool', root / 'images' / 'flat', outside, root / 'un+labeled'):
        make(folder, '1.png', '2.png', 'deeper/3.png')
    given = str(outside) if split == 'absolute' else split
    args = train_ssl._parse_args(['--data-dir', str(root), '--unlabeled-split', given])
    unlabeled = splits.open_sources(args).unlabeled
    labeled = [0, 0, 0, 1, 1, 1] if split == 'train+pool' else []
    assert unlabeled.targets.tolist() == [*labeled, -1, -1, -1]
    if split == 'absolute':
        for picture in root.glob('val/*/*.png'):  # other pictures than the labeled ones
            save(picture, GREEN)
        folder = train('pool', '--dataset', '', '--data-dir', root, '--unlabeled-split', given, *ARGUMENTS)
        assert yaml.safe_load((folder / 'args.yaml').read_text())['unlabeled_split'] == given


def test_pictures_outside_of_class_folders_are_refused_with_the_flag_for_unlabeled_ones(tmp_path):
    make(tmp_path, 'train/1.png', 'train/a/2.png')
    with pytest.raises(UsageError, match=r'train: images lie directly in it, such as 1.png; .*--unlabeled-split\)'):
        opened(tmp_path)
    with pytest.raises(UsageError, match='no split some/where; it has train; a folder of images elsewhere'):
        opened(tmp_path, 'some/where')


def test_a_folder_named_by_its_path_is_the_split_that_lies_there(tmp_path):
    make(tmp_path, 'train/a/1.png', 'train/b/2.png', 'x[1]/a/1.png')
    assert opened(tmp_path, str(tmp_path / 'train')).split == 'train'
    assert len(opened(tmp_path, str(tmp_path / 'train') + '[:1]')) == 1 and len(opened(tmp_path, 'x[1]')) == 1


def test_a_folder_of_class_folders_is_the_training_split_of_a_run_that_holds_a_part_out(tmp_path, caplog):
    make(tmp_path, *(f'zoo/{name}/{i}.png' for name in 'ab' for i in range(4)), 'zoo2/test/a/1.png', 'zoo2/b/1.png')
    make(tmp_path, 'test/c/1.png')  # of something else
    asked = train_ssl._parse_args(['--data-dir', str(tmp_path / 'zoo')])
    with pytest.raises(UsageError, match='no split train; it has a, b. If these are classes: --val-fraction 0.2'):
        splits.open_sources(asked)
    asked = train_ssl._parse_args(['--data-dir', str(tmp_path / 'zoo'), '--val-fraction', '0.25'])
    with caplog.at_level(logging.INFO):
        opened = splits.open_sources(asked)
    assert (opened.train.class_names, opened.train.targets.tolist().count(-1)) == (['a', 'b'], 2)
    assert sorted(opened.evaluation.targets.tolist()) == [0, 1]
    assert (asked.data_dir, asked.train_split) == (str(tmp_path / 'zoo'), '../zoo')
    assert 'so its 2 folders are taken for classes: a, b' in caplog.text
    asked = train_ssl._parse_args(['--data-dir', str(tmp_path / 'zoo2'), '--val-fraction', '0.25'])
    with pytest.raises(UsageError, match='no split train; it has b, test$'):
        splits.open_sources(asked)


def test_labeled_and_unlabeled_are_the_splits_where_there_is_no_train(tmp_path, caplog):
    make(tmp_path, 'labeled/a/1.png', 'labeled/b/2.png', 'val/a/5.png', 'val/b/6.png')
    make(tmp_path, 'unlabeled/3.png', 'unlabeled/4.png')
    args = train_ssl._parse_args(['--data-dir', str(tmp_path)])
    with caplog.at_level(logging.INFO):
        opened = splits.open_sources(args)
    train, unlabeled = opened.train, opened.unlabeled
    assert train.targets.tolist() == [0, 1] and unlabeled.targets.tolist() == [-1, -1]
    assert (args.train_split, args.unlabeled_split) == ('labeled', 'unlabeled')
    assert '--train-split labeled is taken' in caplog.text and '--unlabeled-split unlabeled is taken' in caplog.text
    caplog.clear()
    asked = ['--train-split', 'labeled', '--unlabeled-split', 'unlabeled']
    args = train_ssl._parse_args(['--data-dir', str(tmp_path), *asked])
    assert splits.open_sources(args).unlabeled.targets.tolist() == [-1, -1] and not caplog.messages
    (tmp_path / 'labeled').rename(tmp_path / 'train')
    args = train_ssl._parse_args(['--data-dir', str(tmp_path)])
    assert splits.open_sources(args).unlabeled.targets.tolist() == [0, 1] and args.unlabeled_split is None
    assert 'split unlabeled is not used; --unlabeled-split train+unlabeled takes it' in caplog.text


# --- Runs and reports -------------------------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path, train, monkeypatch):
    """A run that was given its data as a relative path, and the folder where it was started."""
    for split in ('train', 'val'):
        for k, name in enumerate('ab'):
            for i in range(4):
                save(tmp_path / 'here' / 'set' / split / name / f'{i}.png', (200 * k, 40 * i, len(split)))
    monkeypatch.chdir(tmp_path / 'here')
    return train('run', '--dataset', 'set', *ARGUMENTS, '--save-margins')


def test_a_run_with_a_relative_folder_is_evaluated_from_another_one(tmp_path, run, monkeypatch, capsys):
    monkeypatch.chdir('/')
    evaluate = ['--checkpoint', str(run / 'last'), '--results-dir', str(tmp_path / 'val'), '-j', '0', '--device', 'cpu']
    find = [str(run), '--results-dir', str(tmp_path / 'wrong')]
    validate.main(validate._parse_args(evaluate))
    assert f'8 images of {tmp_path}/here/set val' in capsys.readouterr().out
    mislabeled.main(mislabeled._parse_args(find))
    (tmp_path / 'here' / 'set').rename(tmp_path / 'moved')
    message = rf'/here/set.*\(as {run}/args.yaml has it; --data-dir says where the images are now'
    for program, arguments in ((validate, evaluate), (mislabeled, find)):
        with pytest.raises(UsageError, match=message):
            program.main(program._parse_args(arguments))
    mislabeled.main(mislabeled._parse_args([*find, '--data-dir', str(tmp_path / 'moved')]))


def test_a_run_knows_its_folder_by_either_flag(tmp_path, monkeypatch):
    make(tmp_path, 'set/train/a/1.png', 'set/val/a/1.png', 'other/val/a/1.png')
    monkeypatch.chdir(tmp_path)
    args = train_ssl._parse_args(['--dataset', 'set'])
    train_ssl.open_sources(args)
    assert (args.dataset, args.data_dir) == ('', str(tmp_path / 'set'))
    run = dict(vars(args))
    for flags, own in (([], True), (['--dataset', 'set'], True), (['--dataset', 'other'], False)):
        chosen = validate.choose_data(validate._parse_args(['--checkpoint', 'x', *flags]), run)
        where = run['data_dir'] if own else str(tmp_path / 'other')
        assert chosen.own == own and (chosen.dataset or chosen.data_dir) == where


def test_an_ood_folder_is_listed_as_a_split_is(tmp_path, caplog):
    make(tmp_path, '1.png', 'b/2.webp', 'b/c/3.JPG', '.ipynb_checkpoints/4.png', '@eaDir/1.png', 'b/._2.jpg')
    (tmp_path / 'b' / 'about.txt').write_text('')
    (tmp_path / 'b' / 'loop').symlink_to(tmp_path)
    source = inputs.open_pictures(str(tmp_path))
    assert files(source, tmp_path) == ['1.png', 'b/2.webp', 'b/c/3.JPG'] and source.targets.tolist() == [-1] * 3
    assert len(caplog.messages) == 1 and '1 no pictures (.txt)' in caplog.text


# --- Pixels -----------------------------------------------------------------------------------------------------------

def grey(values, form='PNG', dtype=np.uint16):
    buffer = io.BytesIO()
    Image.fromarray(np.array([values], dtype)).save(buffer, form)
    return buffer.getvalue()


def png(size, rows):
    """A square colour picture of 16 bits, which Pillow does not write."""
    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', size, size, 16, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))


@pytest.mark.parametrize('form, dtype', [('PNG', np.uint16), ('TIFF', np.uint16), ('TIFF', np.int32)])
@pytest.mark.parametrize('values, expected', [
    ([0, 128, 255], [0, 128, 255]), ([0, 512, 1023], [0, 128, 255]), ([0, 2048, 4095], [0, 128, 255]),
    ([0, 8192, 16383], [0, 128, 255]), ([0, 16384, 32768, 65535], [0, 64, 128, 255]), ([0, 0], [0, 0]),
])
def test_deep_greyscale_is_scaled_by_the_range_in_use(form, dtype, values, expected):
    assert np.asarray(decode_image(grey(values, form, dtype)))[0, :, 0].tolist() == expected


def test_32_bit_whole_numbers_are_scaled_too_and_negative_ones_refused():
    for values, expected in (([0, 2 ** 19, 2 ** 20 - 1], [0, 128, 255]), ([0, 2 ** 30, 2 ** 31 - 1], [0, 64, 127])):
        assert np.asarray(decode_image(grey(values, 'TIFF', np.int32)))[0, :, 0].tolist() == expected
    with pytest.raises(ValueError, match='below 0'):
        decode_image(grey([-5, 9], 'TIFF', np.int32))
    assert np.asarray(decode_image(grey([0, 65535]), bits=18))[0, :, 0].tolist() == [0, 63]
    assert [bits_in_use(v) for v in (0, 255, 256, 1023, 1024, 65535, 65536)] == [8, 8, 10, 10, 12, 16, 18]


def test_a_tiff_of_16_bits_whose_zero_is_white_is_turned_as_pillow_turns_one_of_8():
    for dtype, scale in ((np.uint8, 1), (np.uint16, 257)):
        buffer = io.BytesIO()
        Image.fromarray(np.array([[0, 64 * scale, 255 * scale]], dtype)).save(buffer, 'TIFF', tiffinfo={262: 1})
        entry = struct.pack('<HHII', 262, 3, 1, 1)  # tag, short, one of them, its value
        assert buffer.getvalue().count(entry) == 1
        content = buffer.getvalue().replace(entry, struct.pack('<HHII', 262, 3, 1, 0))
        assert np.asarray(decode_image(content))[0, :, 0].tolist() == [255, 191, 0]


def test_transparent_pictures_are_counted(tmp_path, caplog):
    for i, alpha in enumerate((255, 0)):
        (tmp_path / 'train' / 'a').mkdir(parents=True, exist_ok=True)
        Image.new('RGBA', (6, 5), (*RED, alpha)).save(tmp_path / 'train' / 'a' / f'{i}.png')
    save(tmp_path / 'train' / 'a' / '2.png')
    opened(tmp_path)
    assert caplog.messages == [
        f'{tmp_path} train: 1 of 3 pictures looked at have transparent parts, such as {tmp_path}/train/a/1.png; there '
        'the colour is taken that the file has below (often black)'
    ]


def test_dark_pictures_of_a_set_are_scaled_as_its_bright_ones_and_it_is_told_once(tmp_path, caplog):
    for i, largest in enumerate([100, 900, 4095, 300]):
        (tmp_path / 'train' / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / 'train' / 'ab'[i % 2] / f'{i}.png').write_bytes(grey([0, largest]))
    for split in ('train', 'train', 'train[:50%]', 'train+train'):
        source = opened(tmp_path, split)
        assert [int(np.asarray(source.image(i)).max()) for i in range(2)] == [100 >> 4, 255]
    assert caplog.messages == [f'{tmp_path} train: greyscale of more than 8 bits, whose largest value is 4095 (in 4 '
                               'pictures looked at): taken as 12 bits, of which the upper 8 are kept']


def test_one_range_holds_for_all_pictures_of_a_set_and_what_is_cut_is_told(tmp_path, caplog):
    """Also for one that is brighter than those looked at, which are 32 of 40."""
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    unseen = min({*range(40)} - {*spread_indices(40, LOOKED_AT)})
    for i in range(40):
        values = [512, 1000, 4095 if i == unseen else 800]
        (tmp_path / 'train' / 'a' / f'{i}.png').write_bytes(grey(values))
    source = opened(tmp_path)
    assert {tuple(np.asarray(source.image(i))[0, :2, 0]) for i in range(40)} == {(128, 250)}
    assert np.asarray(source.image(unseen)).max() == 255
    assert 'taken as 10 bits, of which the upper 8 are kept; what is above 1023 in others is cut' in caplog.text
    bright = ArraySource(np.zeros((1, 2, 2), np.uint8), [0], None, 'bright')
    bright.bits = 12
    splits.use_bits(bright, 10)
    assert 'taken as 10 bits, as in training; what is above 1023 is cut' in caplog.text


def test_colour_of_16_bits_that_comes_out_nearly_black_is_told(tmp_path, caplog):
    for value, told in ((65000, 0), (4095, 1)):
        folders.tell.cache_clear()
        (tmp_path / 'train' / 'a').mkdir(parents=True, exist_ok=True)
        (tmp_path / 'train' / 'a' / '1.png').write_bytes(png(4, (b'\0' + struct.pack('>H', value) * 12) * 4))
        opened(tmp_path)
        assert len(caplog.messages) == told
    assert 'colour of 16 bits' in caplog.text and 'no value is above 15 of 255' in caplog.text


@pytest.mark.parametrize('form', ['gif', 'tiff', 'webp'])
def test_files_of_several_pages_are_counted_and_give_the_first(tmp_path, form, caplog):
    """Of all files of such a kind, also where none is among those that any set has looked at."""
    frames = [Image.new('L', (4, 4), value) for value in (250, 90, 10)]
    for i in range(100):
        save(tmp_path / 'train' / 'a' / f'{i}.png')
    for i, number in enumerate((1, 3, 2)):
        frames[0].save(tmp_path / 'train' / 'a' / f'{i}.{form}', save_all=True, append_images=frames[1:number])
    source = opened(tmp_path)
    inputs.open_pictures(str(tmp_path / 'train'))
    told = [line for line in caplog.messages if 'several' in line]
    several = str(tmp_path / 'train' / 'a' / f'1.{form}')
    assert len(told) == 2 and told[0] == f'{tmp_path} train: {told[1]}'
    assert re.fullmatch(rf'2 of \d+ files looked at hold .*, such as {several}; the first of each is taken', told[1])
    assert abs(int(np.asarray(source.image(source.file_paths().index(several))).max()) - 250) < 3


def test_a_huge_picture_is_refused_with_the_flag_that_allows_it(tmp_path):
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    (tmp_path / 'train' / 'a' / '1.png').write_bytes(png(14000, b''))
    with pytest.raises(ImageError, match='14000 x 14000 pixels are more than 178956970; --max-pixels 196000000 allows'):
        opened(tmp_path).image(0)
    save(tmp_path / 'train' / 'a' / '1.png', size=(20, 10))
    args = train_ssl._parse_args(['--data-dir', str(tmp_path), '--max-pixels', '199'])
    with pytest.raises(ImageError, match='20 x 10 pixels are more than 199'):
        sources.open_source(args, 'train').image(0)
    for split in ('train', 'train+train', 'train[:1]'):
        args = train_ssl._parse_args(['--data-dir', str(tmp_path), '--max-pixels', '200'])
        assert sources.open_source(args, split).image(0).size == (20, 10)


def strips():
    gradient = np.linspace(0, 255, 900)[None, :, None] * [1, 0.5, 0.2] + noise(1, 900)[0][:3] / 20
    for pixels in (gradient, gradient[:1], gradient[:2].transpose(1, 0, 2)):
        yield Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic', 'nearest', 'lanczos'])
@pytest.mark.parametrize('kind', ['weak', 'eval'])
def test_the_views_of_a_strip_are_those_of_the_whole_scaled_up(monkeypatch, kind, interpolation):
    view = build_views(32, (0.5,) * 3, interpolation=interpolation, crop_pct=0.875)[kind]
    for image in strips():
        for seed in range(4):
            monkeypatch.setattr('views.LONG', 16)
            with seeded(seed):
                part = view(image).int()
            monkeypatch.setattr('views.LONG', 10 ** 9)
            with seeded(seed):
                whole = view(image).int()
            assert part.shape == whole.shape == (3, 32, 32) and (part - whole).abs().max() <= 1


def test_a_strip_takes_the_memory_of_a_view(monkeypatch):
    views = build_views(224, (0.5,) * 3, crop_pct=0.875)
    image, made = Image.effect_noise((4000, 1), 50).convert('RGB'), []

    def noting(original):
        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            made.append(result.width * result.height)
            return result
        return wrapped

    for name in ('resize', 'crop'):
        monkeypatch.setattr(Image.Image, name, noting(getattr(Image.Image, name)))
    for name in ('weak', 'strong', 'eval'):
        assert views[name](image).shape == (3, 224, 224)
    assert 3 <= len(made) and max(made) <= 2 * 256 * 256  # scaled up as a whole, 200 million


def test_a_set_of_strips_is_not_decoded_as_a_whole():
    source = ArraySource(np.zeros((2, 1, 4000, 3), np.uint8), [0, 1], None, 'strips')
    dataset = data.ViewDataset(source, {})
    assert data.decode_all(dataset, lambda image: pytest.fail('scaled up')) is None


def test_timms_other_evaluation_transforms_are_left_as_they_are():
    from timm.data import create_transform

    from views import bound_memory
    for mode in ('squash', 'border'):
        steps = create_transform(32, crop_mode=mode, normalize=False).transforms
        assert bound_memory(steps) == steps
    steps = [transforms.Resize((8, 8)), transforms.CenterCrop(8)]
    assert bound_memory(steps) == steps
