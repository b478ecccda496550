import inspect
import io
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from images import noise, noise_source, plain
from PIL import Image
from PIL import features as pillow
from torch.utils.data import get_worker_info
from torchvision import datasets as tv_datasets
from torchvision import transforms
from torchvision.transforms import functional

import folders
import seeds
import sources
from data import EndlessBatches, ViewDataset, create_loader, evaluation_batches
from inputs import PlainFolder
from labels import read_fold, read_labels, select_labeled, write_labels
from program import UsageError
from sources import KNOWN, HFSource, ImageError, create_source, decode_image
from views import build_views

ROOT = Path(__file__).resolve().parent.parent
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(autouse=True, scope='session')
def datasets_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp('datasets')
    yield
    datasets.config.HF_DATASETS_CACHE = before


def encoded(image, form='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_images(folder, colors, form='png', start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, color in enumerate(colors, start):
        plain(color).save(folder / f'{i:03d}.{form}', quality=95)


def write_parquet(file, column='image', labels=(0, 1), colors=(RED, GREEN), label_column='label', names=('a', 'b')):
    """Hub style: encoded images and class labels, with the metadata of `datasets`."""
    features = datasets.Features({column: datasets.Image(), label_column: datasets.ClassLabel(names=list(names))})
    rows = {column: [dict(bytes=encoded(plain(c)), path=None) for c in colors], label_column: list(labels)}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))


def colour(source, index):
    """Colour in the middle of an image."""
    image = source.image(index)
    return image.getpixel((image.width // 2, image.height // 2))


def close(a, b, by=12):
    return all(abs(x - y) <= by for x, y in zip(a, b))


def age(root, seconds=3600):
    """Makes everything below look unchanged for a while; what has just changed is not kept in the cache."""
    for entry in (root, *root.rglob('*')):
        os.utime(entry, (1.6e9 - seconds, 1.6e9 - seconds))


# --- Labels -----------------------------------------------------------------------------------------------------------

TARGETS = torch.arange(400) % 10

PRINT_DRAWS = '''
import torch
from data import EndlessBatches
from labels import select_labeled
from seeds import item_seed
batches = iter(EndlessBatches(50, 8, stream='unlabeled', seed=1))
print([select_labeled(torch.arange(400) % 10, 40, 10, 1).tolist(), item_seed(1, 'unlabeled', 2, 3), next(batches)])
'''


def test_forty_labels_are_four_a_class_and_the_same_in_every_process():
    index = select_labeled(TARGETS, 40, 10, seed=1)
    assert torch.equal(TARGETS[index].bincount(), torch.full((10,), 4))
    assert len(index.unique()) == 40 and torch.equal(index, index.sort().values)
    assert not torch.equal(index, select_labeled(TARGETS, 40, 10, seed=2))
    environment = dict(os.environ, PYTHONHASHSEED='12345')  # this process has another
    command = [sys.executable, '-c', PRINT_DRAWS]
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    batches = iter(EndlessBatches(50, 8, stream='unlabeled', seed=1))
    assert told == f'{[index.tolist(), seeds.item_seed(1, "unlabeled", 2, 3), next(batches)]}\n'


@pytest.mark.parametrize('num_labels', [10, 43, 99])
def test_a_remainder_goes_to_as_many_classes_at_random(num_labels):
    extra = []
    for seed in range(5):
        counts = TARGETS[select_labeled(TARGETS, num_labels, 10, seed)].bincount(minlength=10)
        assert counts.sum() == num_labels and counts.max() - counts.min() == (num_labels % 10 > 0)
        extra.append(tuple((counts > counts.min()).tolist()))
    assert num_labels % 10 == 0 or len(set(extra)) > 1


def test_images_without_a_label_are_never_drawn():
    targets = torch.where(torch.arange(400) < 300, -1, TARGETS)
    index = select_labeled(targets, 40, 10, 0)
    assert (index >= 300).all() and torch.equal(targets[index].bincount(), torch.full((10,), 4))


def test_labels_per_class_take_the_same_number_of_each():
    targets = torch.tensor([0] * 50 + [1] * 5 + [2] * 20)
    assert targets[select_labeled(targets, None, 3, 0, labels_per_class=5)].bincount().tolist() == [5, 5, 5]


@pytest.mark.parametrize('fraction, counts', [(0.1, [9, 1, 1, 3]), (0.01, [1, 1, 1, 1]), (1.0, [92, 5, 1, 25])])
def test_a_label_fraction_is_proportional_and_at_least_one_a_class(fraction, counts):
    targets = torch.tensor([-1] * 7 + [0] * 92 + [1] * 5 + [2] + [3] * 25)
    index = select_labeled(targets, None, 4, 3, label_fraction=fraction)
    assert targets[index].bincount().tolist() == counts and len(index.unique()) == len(index)


@pytest.mark.parametrize('options, message', [
    (dict(num_labels=9), '--num-labels 9: at least one for each of the 10 classes'),
    (dict(num_labels=410), 'asks for 41 images of class 0, which has 40'),
    (dict(num_labels=None, labels_per_class=41), '--labels-per-class 41: asks for 41 images of class 0, which has 40'),
    (dict(num_labels=None, labels_per_class=0), '--labels-per-class 0'),
    (dict(num_labels=None, label_fraction=1.5), '--label-fraction 1.5'),
    (dict(num_labels=None, label_fraction=0.0), '--label-fraction 0.0'),
    (dict(num_labels=22, num_classes=11), 'images of class 10, which has 0'),
    (dict(num_labels=None, label_fraction=0.1, num_classes=11), 'asks for 1 images of class 10, which has 0'),
])
def test_labels_that_cannot_be_drawn_are_an_error(options, message):
    with pytest.raises(UsageError, match=message):
        select_labeled(TARGETS, **dict(dict(num_classes=10, seed=0), **options))


def test_labels_file_round_trip(tmp_path):
    index = select_labeled(TARGETS, 40, 10, 1)
    flipped = (TARGETS[index] + 1) % 10  # labels of its own, as in a study of label noise
    write_labels(tmp_path / 'labels.json', index, flipped, dataset='toy', num_classes=10, num_images=400)
    read_index, read_target, original = read_labels(tmp_path / 'labels.json', TARGETS, 10)
    assert torch.equal(read_index, index) and torch.equal(read_target, flipped) and original is None
    write_labels(tmp_path / 'labels.json', index, flipped, TARGETS[index], num_classes=10, num_images=400)
    assert torch.equal(read_labels(tmp_path / 'labels.json', TARGETS, 10)[2], TARGETS[index])


@pytest.mark.parametrize('content, message', [
    (None, 'FileNotFoundError'),
    ('{', 'JSONDecodeError'),
    ('[1, 2]', 'expected index and target lists'),
    ('{"index": [1]}', 'expected index and target lists'),
    ('{"index": [1, "x"], "target": [1, 1]}', 'expected index and target lists'),
    ('{"index": [1e30], "target": [1]}', 'whole numbers'),
    ('{"index": [100000000000000000000], "target": [1]}', 'expected index and target lists'),
    ('{"index": [1.5], "target": [1]}', 'whole numbers'),
    ('{"index": [], "target": []}', 'not empty'),
    ('{"index": [1, 2], "target": [1]}', 'of one length'),
    ('{"index": [[1]], "target": [[1]]}', 'of one length'),
    ('{"index": [3, 3], "target": [1, 1]}', 'twice'),
    ('{"index": [400], "target": [1]}', 'outside of the 400 images'),
    ('{"index": [-1], "target": [1]}', 'outside of the 400 images'),
    ('{"index": [1], "target": [10]}', 'outside of the 10 classes'),
    ('{"index": [1], "target": [1], "original": [10]}', 'outside of the 10 classes'),
    ('{"index": [1], "target": [1], "original": [1, 2]}', 'original must be'),
    ('{"index": [1], "target": [1], "original": [1.5]}', 'original must be'),
    ('{"index": [1], "target": [1], "num_images": 500}', 'num_images is 500, here 400'),
    ('{"index": [1], "target": [1], "num_classes": 100}', 'num_classes is 100, here 10'),
])
def test_a_labels_file_that_does_not_fit_is_an_error(tmp_path, content, message):
    file = tmp_path / 'labels.json'
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        read_labels(file, TARGETS, 10)
    assert str(file) in str(error.value) and '\n' not in str(error.value)


# --- Endless batches --------------------------------------------------------------------------------------------------

def draw(source, batch_size, number, workers=0, processes=1, start=0, seed=0, stream='unlabeled'):
    """Batches of all processes, each with the passes that its items belong to."""
    views = build_views(16, (0.5,) * 3)
    dataset = ViewDataset(source, dict(weak=views['weak'], strong=views['strong']), seed=seed, stream=stream)
    drawn = []
    for rank in range(processes):
        keys = EndlessBatches(len(source), batch_size, rank, processes, seed, stream, start)
        loader = create_loader(dataset, keys, workers)
        drawn += [
            dict(batch, data_pass=torch.tensor([data_pass for data_pass, _ in key]))
            for _, batch, key in zip(range(number), loader, keys)
        ]
    return drawn


def items_by_pass(batches):
    passes = {}
    for batch in batches:
        for data_pass, index, strong in zip(batch['data_pass'].tolist(), batch['index'].tolist(), batch['strong']):
            passes.setdefault(data_pass, []).append((index, strong))
    return passes


@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('workers', [0, 2])
def test_every_pass_has_each_id_once_in_another_order_with_other_views(workers, processes):
    passes = items_by_pass(draw(noise_source(12), 4, 9, workers, processes))
    assert len(passes) == 3 * processes
    orders = [[index for index, _ in items] for items in passes.values()]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    for i in range(12):
        views = [strong.numpy().tobytes() for items in passes.values() for index, strong in items if index == i]
        assert len(set(views)) == len(passes)


def test_workers_and_processes_do_not_change_the_data():
    source = noise_source(12)
    alone = draw(source, 4, 6)
    shared = draw(source, 2, 6, workers=2, processes=2)
    for i, batch in enumerate(alone):
        halves = shared[i], shared[6 + i]
        for key in ('index', 'weak', 'strong', 'target'):
            assert torch.equal(batch[key], torch.cat([half[key] for half in halves]))


@pytest.mark.parametrize('workers, processes', [(0, 1), (2, 1), (0, 2)])
def test_a_resume_continues_to_the_pixel(workers, processes):
    source = noise_source(12)
    straight, resumed = draw(source, 2, 12, 0, processes), draw(source, 2, 9, workers, processes, start=3)
    straight = [batch for rank in range(processes) for batch in straight[12 * rank + 3:12 * rank + 12]]
    for a, b in zip(straight, resumed, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_pool_smaller_than_the_batch_is_gone_through_again():
    passes = items_by_pass(draw(noise_source(5), 8, 5))
    orders = [tuple(index for index, _ in items) for items in passes.values()]
    assert [sorted(order) for order in orders] == [list(range(5))] * 8
    assert len(set(orders)) > 1


def test_an_empty_pool_is_an_error():
    with pytest.raises(UsageError, match='the unlabeled set is empty'):
        EndlessBatches(0, 4, stream='unlabeled')


@pytest.mark.parametrize('length, batch_size, processes', [(9, 2, 1), (9, 2, 2), (9, 2, 3), (3, 4, 1), (3, 4, 5)])
def test_evaluation_counts_every_image_once(length, batch_size, processes):
    parts = [evaluation_batches(length, batch_size, rank, processes) for rank in range(processes)]
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(length))
    assert all(0 < len(batch) <= batch_size for part in parts for batch in part)
    loader = create_loader(ViewDataset(noise_source(length), dict(image=transforms.PILToTensor())), parts[0])
    assert sum(len(batch['index']) for batch in loader) == -(-length // processes)


# --- Random streams ---------------------------------------------------------------------------------------------------

def first_number(image):
    return torch.tensor([random.random(), get_worker_info().id if get_worker_info() else 0], dtype=torch.float64)


def first_numbers(rank=0, processes=1, workers=4, seed=0, stream='unlabeled', number=8):
    dataset = ViewDataset(noise_source(8, 4), dict(strong=first_number), seed=seed, stream=stream)
    keys = EndlessBatches(8, 1, rank, processes, seed, stream)
    loader = create_loader(dataset, keys, workers)
    return [(key[0], *batch['strong'][0].tolist()) for _, batch, key in zip(range(number), loader, keys)]


@pytest.mark.filterwarnings('ignore:This DataLoader will create')
def test_ranks_workers_and_epochs_draw_sixteen_different_numbers():
    drawn = first_numbers(0, 2) + first_numbers(1, 2)
    assert {data_pass for (data_pass, _), _, _ in drawn} == {0, 1}
    assert {worker for _, _, worker in drawn} == {0, 1, 2, 3}
    assert len(drawn) == len({number for _, number, _ in drawn}) == 16


def test_streams_and_seeds_draw_different_orders_and_numbers():
    one, same = first_numbers(workers=0), first_numbers(workers=0)
    assert one == same
    for other in (first_numbers(workers=0, stream='labeled'), first_numbers(workers=0, seed=1)):
        assert [key for key, _, _ in other] != [key for key, _, _ in one]
        assert not {number for _, number, _ in other} & {number for _, number, _ in one}


@pytest.mark.parametrize('workers', [0, 2])
def test_global_generators_are_left_alone(workers):
    def states():
        return random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    source = noise_source(12)
    before = states()
    draw(source, 4, 4, workers)
    select_labeled(TARGETS, 40, 10, 0)
    assert states() == before


def test_a_view_set_can_be_sent_to_a_spawned_worker():
    views = build_views(16, (0.5,) * 3)
    del views['resize']
    dataset = ViewDataset(create_source('digits', None, 'test'), views, seed=3, stream='unlabeled')
    sent = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(sent[5, 7][name], dataset[5, 7][name]) for name in ('weak', 'strong', 'eval'))


# --- Decoding ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('form', ['PNG', 'TIFF'])
def test_sixteen_bits_are_scaled_to_eight(form):
    image = Image.fromarray(np.array([[0, 16384, 32768, 65535]], np.uint16))
    grey = np.asarray(decode_image(encoded(image, form)))
    assert grey.shape == (1, 4, 3) and (abs(grey[0].astype(int) - [[0], [64], [128], [255]]) <= 1).all()


def palette(**options):
    return encoded(plain((250, 128, 10)).quantize(4), **options)


@pytest.mark.filterwarnings('error::UserWarning')
@pytest.mark.parametrize('content, expected', [
    (palette(), (250, 128, 10)),
    (palette(transparency=bytes([40])), (250, 128, 10)),
    (encoded(Image.new('CMYK', (6, 5), (0, 255, 255, 0)), 'JPEG'), (255, 0, 0)),
    (encoded(Image.new('RGBA', (6, 5), (250, 128, 10, 40))), (250, 128, 10)),
    (encoded(Image.new('LA', (6, 5), (77, 40))), (77, 77, 77)),
    (encoded(Image.new('L', (6, 5), 77)), (77, 77, 77)),
    (encoded(Image.new('L', (6, 5), 77), 'JPEG'), (77, 77, 77)),
    (encoded(Image.new('1', (6, 5), 1)), (255, 255, 255)),
    (encoded(plain((250, 128, 10)), 'WEBP', lossless=True), (250, 128, 10)),
    (encoded(plain((250, 128, 10)), 'GIF'), (250, 128, 10)),
], ids=['palette', 'palette-transparent', 'cmyk', 'rgba', 'la', 'grey-png', 'grey-jpeg', 'bilevel', 'webp', 'gif'])
def test_every_mode_becomes_rgb(tmp_path, content, expected):
    image = decode_image(content)
    assert image.mode == 'RGB' and image.size == (6, 5) and close(image.getpixel((2, 2)), expected)
    (tmp_path / 'image').write_bytes(content)
    assert np.array_equal(decode_image(tmp_path / 'image'), image)


@pytest.mark.parametrize('least, width', [(None, 400), (300, 400), (150, 200), (149, 200), (75, 100), (10, 50)])
def test_a_jpeg_is_decoded_at_a_smaller_scale_but_never_below_what_is_needed(least, width):
    pixels = np.asarray(Image.fromarray(noise(1, 6)[0]).resize((400, 300), Image.Resampling.BICUBIC))
    content = encoded(Image.fromarray(pixels), 'JPEG', quality=95)
    image = decode_image(content, least)
    assert image.size == (width, 3 * width // 4 + (width == 50))
    expected = decode_image(content).reduce(400 // width)
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 2
    assert decode_image(encoded(Image.fromarray(pixels), 'PNG'), least).size == (400, 300)


def test_floating_point_pixels_are_refused():
    with pytest.raises(ValueError, match='no known range'):
        decode_image(encoded(Image.new('F', (4, 4), 0.5), 'TIFF'))


def test_exif_orientation_is_honoured_by_folders_and_tables_alike(tmp_path):
    image = plain(BLUE, (20, 10))
    image.paste(RED, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown after a quarter turn clockwise: the left half comes to the top
    content = encoded(image, 'JPEG', exif=exif, quality=95)
    for label in 'ab':
        (tmp_path / 'folder' / 'train' / label).mkdir(parents=True)
        (tmp_path / 'folder' / 'train' / label / '0.jpg').write_bytes(content)
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))
    rows = dict(image=[dict(bytes=content, path=None)], label=[0])
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / 'train.parquet'))
    pictures = [
        create_source(str(tmp_path / 'folder'), None, 'train').image(0),
        create_source(str(tmp_path / 'train.parquet'), None, 'train').image(0),
        create_source(f'hfds/{tmp_path / "folder"}', None, 'train').image(0),
    ]
    assert pictures[0].size == (10, 20)
    assert close(pictures[0].getpixel((5, 3)), RED, 30) and close(pictures[0].getpixel((5, 16)), BLUE, 30)
    assert all(np.array_equal(pictures[0], picture) for picture in pictures)


# --- Broken images ----------------------------------------------------------------------------------------------------

@pytest.fixture
def twenty(tmp_path):
    """Folder of 20 JPEGs in two classes; the 8th is cut in half."""
    for i in range(20):
        folder = tmp_path / 'train' / 'ab'[i // 10]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(1, 24, seed=i)[0]).save(folder / f'{i:02d}.jpg')
    bad = tmp_path / 'train' / 'a' / '07.jpg'
    bad.write_bytes(bad.read_bytes()[:bad.stat().st_size // 2])
    return tmp_path


def eval_loader(folder, workers, **options):
    dataset = ViewDataset(create_source(str(folder), None, 'train'), {'image': build_views(16, (0.5,) * 3)['eval']},
                          **options)
    return create_loader(dataset, evaluation_batches(20, 4), workers)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_truncated_image_stops_with_its_file_and_index(twenty, workers):
    batches = list(eval_loader(twenty, workers))
    assert [isinstance(batch, ImageError) for batch in batches] == [False, True, False, False, False]
    assert 'image 7 ' in str(batches[1]) and str(twenty / 'train' / 'a' / '07.jpg') in str(batches[1])


@pytest.mark.parametrize('workers', [0, 2])
def test_skipping_a_truncated_image_moves_no_other_index(twenty, workers):
    batches = list(eval_loader(twenty, workers, skip_bad=True))
    index, skipped, target, image = (
        torch.cat([batch[key] for batch in batches]) for key in ('index', 'skipped', 'target', 'image')
    )
    assert index.tolist() == [*range(7), 8, *range(8, 20)]
    assert skipped.tolist() == [-1] * 7 + [7] + [-1] * 12
    assert target.tolist() == [0] * 10 + [1] * 10
    source = create_source(str(twenty), None, 'train')
    view = build_views(16, (0.5,) * 3)['eval']
    assert all(torch.equal(picture, view(source.image(i))) for i, picture in zip(index.tolist(), image))


@pytest.mark.skipif(not pillow.check('avif'), reason='this Pillow reads no AVIF')
def test_a_broken_avif_stops_with_its_file_as_any_other(tmp_path):
    """Its decoder raises errors of another kind."""
    content = bytearray(encoded(Image.fromarray(noise(1, 32)[0]), 'AVIF'))
    raised = set()
    for i in range(20, len(content), 7):
        broken = bytearray(content)
        broken[i] ^= 0xff
        (tmp_path / 'x.avif').write_bytes(broken)
        try:
            PlainFolder([str(tmp_path / 'x.avif')]).image(0)
        except ImageError as error:
            assert f'image 0 ({tmp_path}/x.avif) cannot be decoded' in str(error)
            raised.add(type(error.__cause__))
    assert RuntimeError in raised


def test_each_of_several_broken_images_in_a_row_is_reported(twenty):
    for name in ('b/19', 'a/08'):
        (twenty / 'train' / f'{name}.jpg').write_bytes(b'no image')
    index = torch.tensor([0, 7, 8, 9, 19])
    source = create_source(str(twenty), None, 'train')
    dataset = ViewDataset(source, {'image': transforms.PILToTensor()}, index, skip_bad=True)
    items = [dataset[i] for i in range(5)]
    assert [item['skipped'] for item in items] == [-1, 7, 8, -1, 19]  # numbers of the source
    assert [item['index'] for item in items] == [0, 3, 3, 3, 0]  # positions in this set
    only_bad = ViewDataset(source, {'image': transforms.PILToTensor()}, torch.tensor([7, 8]), skip_bad=True)
    assert 'none of the 2 images' in str(only_bad[0])


def test_a_broken_row_is_named(tmp_path):
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))
    cells = [dict(bytes=encoded(plain(RED)), path='x.png'), dict(bytes=encoded(plain(RED))[:45], path='y.png'), None]
    datasets.Dataset.from_dict(dict(image=cells, label=[0, 1, 1]), features=features).to_parquet(
        str(tmp_path / 'train.parquet')
    )
    source = create_source(str(tmp_path), None, 'train')
    assert source.image(0).size == (6, 5)
    for i in (1, 2):
        with pytest.raises(ImageError, match=rf'image {i} \(row {i} of {tmp_path} train\) cannot be decoded'):
            source.image(i)


# --- Sources ----------------------------------------------------------------------------------------------------------

def test_bundled_digits():
    train, test = create_source('digits', None, 'train'), create_source('digits', None, None)
    assert len(train) == 1297 and len(test) == 500 and train.class_names == [str(i) for i in range(10)]
    assert train.image(0).size == (8, 8) and train.targets.bincount().min() > 100
    pixels = torch.stack([functional.pil_to_tensor(train.image(i)) for i in range(0, 1297, 4)]) / 255
    assert abs(pixels.mean() - KNOWN['digits']['mean'][0]) < 0.01
    assert abs(pixels.std() - KNOWN['digits']['std'][0]) < 0.01


@pytest.mark.parametrize('name, split, options, message', [
    ('digit', 'train', {}, 'known are digits, cifar10, .*hfds/<hub name or folder>, torch/'),
    ('', 'train', {}, 'no images are given: --data-dir FOLDER'),
    ('no.parquet', 'train', {}, 'no such file'),
    ('digits', 'val', {}, 'digits: no split val; it has test, train'),
    ('digits', 'train+val', {}, 'no split val; it has test, train'),
    ('digits', 'val[:5]', {}, 'no split val'),
    ('digits', 'train[:x]', {}, 'no slice of the 1297 images'),
    ('digits', 'train[5000:]', {}, 'no slice of the 1297 images'),
    ('digits', 'train', dict(input_key='picture'), 'no image column picture; it has image, label'),
    ('digits', 'train', dict(input_key='label'), 'column label holds no images; it has image, label'),
    ('digits', 'train', dict(target_key='digit'), 'no label column digit; it has image, label'),
    ('digits', 'train', dict(target_key='image'), 'labels in column image must be whole numbers'),
    ('torch/omniglot', 'train', {}, 'torch/omniglot: unknown; there are cifar10, '),
    ('torch/cifar10', 'val', {}, 'no split val; it has train, test'),
    ('torch/cifar10', 'train', {}, '--dataset-download'),
    ('wds/imagenet', 'train', {}, 'no index'),
    ('webvision', 'train', {}, 'no WebVision in it .*expected info/train_filelist_google.txt'),
    ('cifar10', 'train', dict(data_dir='nowhere'), 'nowhere: no such folder'),
    ('cifar10', 'train', {}, r'hub \(uoft-cs/cifar10\) cannot be reached.*--data-dir DIR, with cifar-10-batches-py'),
    ('imagenet', 'train', {}, r'cannot be reached.*<split>/<class>/<image>'),
    ('hfds/some/where', 'train', {}, r'hub \(some/where\) cannot be reached.*--dataset DIR'),
    ('hfds/nowhere/', 'train', {}, 'hfds/nowhere'),
    ('hfds/', 'train', {}, 'the name of a data set of the hub, or a folder, has to follow hfds/'),
    ('hfds', 'train', {}, 'the name of a data set of the hub, or a folder, has to follow hfds/'),
    ('hfds/:cropped', 'train', {}, 'the name of a data set of the hub, or a folder, has to follow hfds/'),
])
def test_what_cannot_be_opened_is_told_in_one_line(tmp_path, monkeypatch, name, split, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as error:
        create_source(name, **dict(dict(data_dir=None, split=split), **options))
    assert '\n' not in str(error.value)


def test_slices_and_joined_splits(tmp_path):
    source = create_source('digits', None, 'test[:20%]+train[-10:]+test[3:4]')
    train, test = create_source('digits', None, 'train'), create_source('digits', None, 'test')
    assert len(source) == 111 and source.class_names == train.class_names
    for i, part, index in ((0, test, 0), (99, test, 99), (100, train, 1287), (109, train, 1296), (110, test, 3)):
        assert np.array_equal(source.image(i), part.image(index)) and source.targets[i] == part.targets[index]
    assert source.where(110) == 'row 0 of digits test[3:4]'


def test_splits_of_other_classes_are_joined_by_the_names_of_their_classes(tmp_path, caplog):
    for split, names in (('train', 'abc'), ('extra', 'bc'), ('more', 'abc')):
        for name in names:
            write_images(tmp_path / split / name, [RED])
    source = create_source(str(tmp_path), None, 'train+extra+more')
    assert source.targets.tolist() == [0, 1, 2, 1, 2, 0, 1, 2] and source.class_names == ['a', 'b', 'c']
    assert 'extra: its classes are not those of train' in caplog.text


@pytest.mark.parametrize('split, other', [
    ('train', 'train'), ('train', 'test'), ('train', 'test+train'), ('train[:30%]', 'train'),
    ('train', 'train[-100:]+test[:7]+train[5:20]'), ('train[100:200]', 'train[150:]+test'),
    ('test[3:9]+train', 'train'),
])
def test_an_image_is_located_in_another_source_of_the_same_data(split, other):
    source, other = create_source('digits', None, split), create_source('digits', None, other)
    where = [other.where(i) for i in range(len(other))]

    def pixels(of):  # told apart by content, of which the digits have no two alike
        return [of.image(i).tobytes() for i in range(len(of))]
    places = {content: i for i, content in enumerate(pixels(other))}
    assert len(places) == len(where)
    assert sources.locate(source, other).tolist() == [places.get(content, -1) for content in pixels(source)]


def test_an_empty_split_is_an_error():
    with pytest.raises(UsageError, match='digits test.:0%.: no image in it'):
        create_source('digits', None, 'test[:0%]')


def test_labels_need_not_be_there_where_they_are_not_asked_for(tmp_path):
    image = pa.array([encoded(plain(RED)), encoded(plain(GREEN))])
    pq.write_table(pa.table(dict(image=image, kind=['a', 'b'])), tmp_path / 'train.parquet')
    with pytest.raises(UsageError, match='no label column; it has image, kind .--target-key'):
        create_source(str(tmp_path), None, 'train')
    assert create_source(str(tmp_path), None, 'train', labeled=False).targets.tolist() == [-1, -1]
    with pytest.raises(UsageError, match='name it with --ood-split'):
        create_source(str(tmp_path), None, None, labeled=False)


def test_lists_as_labels_and_a_loading_script_are_told_in_one_line(tmp_path):
    image = [dict(bytes=encoded(plain(RED)), path=None)]
    rows = datasets.Dataset.from_dict(dict(image=image, label=[[0, 1]])).cast_column('image', datasets.Image())
    with pytest.raises(UsageError, match='column label holds lists of labels; .*multi-label.*--target-key'):
        sources.HFSource(rows, 'toy')
    (tmp_path / 'toy').mkdir()
    (tmp_path / 'toy' / 'toy.py').write_text('')
    with pytest.raises(UsageError, match='scripts are no longer supported'):
        create_source(f'hfds/{tmp_path / "toy"}', None, 'train')


@pytest.mark.parametrize('name', ['SVHN', 'STL10', 'CIFAR100', 'MNIST'])
def test_torchvisions_own_spelling_of_a_set_implies_the_same_as_ours(name):
    assert sources.known_facts(f'torch/{name}') == sources.known_facts(f'torch/{name.lower()}') != {}


def test_folders_have_classes_in_timms_order(tmp_path):
    for name, color in {'c10': RED, 'c9': GREEN, 'C1': BLUE}.items():
        write_images(tmp_path / 'train' / name, [color] * 2)
    source = create_source('', str(tmp_path), 'train')
    assert source.class_names == ['C1', 'c9', 'c10'] and source.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert [colour(source, i) for i in (0, 2, 4)] == [BLUE, GREEN, RED]
    assert source.where(5) == str(tmp_path / 'train' / 'c10' / '001.png')
    (tmp_path / 'map.txt').write_text('c10\nc9\n')
    mapped = create_source('', str(tmp_path), 'train', class_map=str(tmp_path / 'map.txt'))
    assert mapped.class_names == ['c10', 'c9'] and mapped.targets.tolist() == [1, 1, 0, 0]
    with pytest.raises(UsageError, match='none of the splits train is named as one for evaluation; .*--val-split'):
        create_source('', str(tmp_path), None)
    with pytest.raises(UsageError, match='class map'):
        create_source('', str(tmp_path), 'train', class_map='no.txt')


def test_folders_without_class_folders_are_an_error_unless_unlabeled(tmp_path):
    write_images(tmp_path / 'train', [RED])
    write_images(tmp_path / 'unlabeled', [RED, GREEN])
    (tmp_path / 'val').mkdir()
    with pytest.raises(UsageError, match='expected one folder per class'):
        create_source(str(tmp_path), None, 'train')
    with pytest.raises(UsageError, match='no picture in it'):
        create_source(str(tmp_path), None, 'val')
    source = create_source(str(tmp_path), None, 'unlabeled')
    assert source.targets.tolist() == [-1, -1] and source.class_names is None and colour(source, 1) == GREEN
    write_images(tmp_path / 'val', [RED])
    with pytest.raises(UsageError, match='no data set in it; expected .*<split>/<class>/<image>'):
        create_source(str(tmp_path / 'val'), None, 'train')


def test_null_labels_are_unlabeled_and_other_labels_must_be_whole(tmp_path):
    cells = [dict(bytes=encoded(plain(RED)), path=None)] * 3

    def source(label, feature='int64'):
        features = datasets.Features(image=datasets.Image(), label=datasets.Value(feature))
        return HFSource(datasets.Dataset.from_dict(dict(image=cells, label=label), features=features), 'toy')

    assert source([2, None, 0]).targets.tolist() == [2, -1, 0]
    assert source([2., 1., 0.], 'float32').targets.tolist() == [2, 1, 0]
    with pytest.raises(UsageError, match='whole numbers or words, not float32'):
        source([0.5, 1, 0], 'float32')


def test_tables_written_without_datasets_hold_images_too(tmp_path):
    content = [encoded(plain(color)) for color in (RED, GREEN)]
    for kind, column in {
        'binary': pa.array(content, pa.binary()),
        'struct': pa.array([dict(bytes=c, path='x') for c in content]),
    }.items():
        file = tmp_path / kind / 'train.parquet'
        file.parent.mkdir()
        pq.write_table(pa.table(dict(id=[1, 2], picture=column, label=[1, 0])), file)
        source = create_source(str(file), None, 'train')
        assert [colour(source, i) for i in (0, 1)] == [RED, GREEN] and source.targets.tolist() == [1, 0]
    file.write_bytes(b'PAR1 not really')
    with pytest.raises(UsageError, match='train.parquet: cannot be read') as error:
        create_source(str(file), None, 'train')
    assert '\n' not in str(error.value)


# --- Layouts ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('files, splits', [
    (['train.parquet', 'test.parquet', 'unlabeled.parquet'], ['test', 'train', 'unlabeled']),
    (['data/train-00000-of-00002.parquet', 'data/train-00001-of-00002-0ab1.parquet', 'data/test-0-of-1.parquet'],
     ['test', 'train']),
    (['train/0000.parquet', 'train/0001.parquet', 'validation/0000.parquet'], ['train', 'validation']),
    (['toy-train.parquet', 'toy-test_00000.parquet'], ['test', 'train']),
    (['data/train_0-00000-of-00001.parquet', 'data/train_1-00000-of-00001.parquet'], ['train_0', 'train_1']),
    (['everything.parquet'], ['train']),
    (['part-000.parquet', 'part-001.parquet'], ['train']),
    (['train/part-00000.parquet', 'train/part-00001.parquet', 'test/part-00000.parquet'], ['test', 'train']),
    (['val/images.parquet'], ['val']),
])
def test_the_split_of_a_table_is_read_off_its_name(tmp_path, files, splits):
    for file in files:
        write_parquet(tmp_path / file)
    with pytest.raises(UsageError, match=f'no split none; it has {", ".join(splits)}$'):
        create_source(str(tmp_path), None, 'none')
    source = create_source(str(tmp_path), None, splits[0])
    shards = sum(1 for file in files if splits[0] in file or len(splits) == 1)
    assert len(source) == 2 * shards and source.class_names in (['a', 'b'], None)


def test_a_parquet_file_a_glob_and_a_folder_are_the_same_set(tmp_path):
    write_parquet(tmp_path / 'train-00000-of-00002.parquet')
    write_parquet(tmp_path / 'train-00001-of-00002.parquet', colors=(BLUE, BLUE))
    write_parquet(tmp_path / 'test.parquet')
    one = create_source(str(tmp_path / 'train-00000-of-00002.parquet'), None, 'train')
    assert [colour(one, i) for i in range(2)] == [RED, GREEN]
    for name in (str(tmp_path / '*.parquet'), str(tmp_path), f'hfds/{tmp_path}', f'HFDS/{tmp_path}'):
        source = create_source(name, None, 'train')
        assert [colour(source, i) for i in range(4)] == [RED, GREEN, BLUE, BLUE]
        assert source.targets.tolist() == [0, 1, 0, 1] and len(create_source(name, None, None)) == 2
    assert source.dataset.cache_files  # memory-mapped


def test_arrow_files_and_saved_data_sets(tmp_path):
    write_parquet(tmp_path / 'p' / 'train.parquet')
    table = create_source(str(tmp_path / 'p'), None, 'train').dataset
    table = datasets.Dataset.from_parquet(str(tmp_path / 'p' / 'train.parquet'))
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / 'dict')
    table.save_to_disk(tmp_path / 'one')
    (tmp_path / 'arrow').mkdir()
    for split in ('train', 'test'):
        source = next((tmp_path / 'dict' / split).glob('*.arrow'))
        (tmp_path / 'arrow' / f'toy-{split}.arrow').write_bytes(source.read_bytes())
    for folder in ('dict', 'arrow', 'one'):
        source = create_source('cifar10', str(tmp_path / folder), 'train')
        assert [colour(source, i) for i in (0, 1)] == [RED, GREEN] and source.dataset.cache_files
    for folder in ('dict', 'arrow'):
        assert colour(create_source('', str(tmp_path / folder), None), 0) == GREEN


@pytest.mark.parametrize('name, column, label_column', [
    ('cifar10', 'img', 'label'), ('cifar100', 'img', 'fine_label'), ('stl10', 'image', 'label'),
    ('imagenet', 'image', 'label'),
])
def test_copies_of_the_hubs_repositories(tmp_path, name, column, label_column):
    for split in ('train', 'test'):
        write_parquet(tmp_path / 'data' / f'{split}-00000-of-00001.parquet', column, label_column=label_column)
    source = create_source(name, str(tmp_path), 'train')
    assert colour(source, 1) == GREEN and source.targets.tolist() == [0, 1] and source.class_names == ['a', 'b']
    assert len(create_source(name, str(tmp_path), None)) == 2


def test_a_copy_of_the_hubs_house_numbers_has_a_folder_for_cropped_digits(tmp_path):
    names = [str(i) for i in range(11)]
    write_parquet(tmp_path / 'cropped_digits' / 'train-00000-of-00001.parquet', labels=(10, 3), names=names)
    write_parquet(tmp_path / 'cropped_digits' / 'extra-00000-of-00001.parquet', labels=(1, 2), names=names)
    write_parquet(tmp_path / 'full_numbers' / 'train-00000-of-00001.parquet', labels=(5, 5), names=names)
    assert create_source('svhn', str(tmp_path), 'train').targets.tolist() == [0, 3]
    assert create_source('svhn', str(tmp_path), 'train+extra').targets.tolist() == [0, 3, 1, 2]


def write_cifar(root, hundred):
    """torchvision's own files: pickles of rows of 3 * 32 * 32 bytes, channel by channel."""
    folder = root / ('cifar-100-python' if hundred else 'cifar-10-batches-py')
    folder.mkdir(parents=True)
    files = ['train', 'test'] if hundred else [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']
    for n, file in enumerate(files):
        rows = noise(2, seed=n).transpose(0, 3, 1, 2).reshape(2, -1)
        labels = {'fine_labels': [n, 7], 'coarse_labels': [0, 0]} if hundred else {'labels': [n, 7]}
        (folder / file).write_bytes(pickle.dumps({'data': rows, **labels}))
    names = {'fine_label_names' if hundred else 'label_names': [f'c{i}' for i in range(100 if hundred else 10)]}
    (folder / ('meta' if hundred else 'batches.meta')).write_bytes(pickle.dumps(names))
    return folder


@pytest.mark.parametrize('hundred', [False, True])
def test_torchvisions_cifar_files(tmp_path, hundred):
    folder, name = write_cifar(tmp_path, hundred), 'cifar100' if hundred else 'cifar10'
    for full_name in (name, f'torch/{name}', f'torch/{name.upper()}'):
        train = create_source(full_name, str(tmp_path), 'train')
        assert train.targets.tolist() == [0, 7] if hundred else train.targets.tolist() == [0, 7, 1, 7, 2, 7, 3, 7, 4, 7]
        assert np.array_equal(train.image(1), noise(2, seed=0)[1]) and train.class_names[3] == 'c3'
        assert np.array_equal(create_source(full_name, str(tmp_path), None).image(0), noise(2, seed=len(train) // 2)[0])
    file = folder / ('train' if hundred else 'data_batch_2')
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match=f'{name}: train cannot be read from {tmp_path}'):
        create_source(name, str(tmp_path), 'train')


def test_torchvisions_house_numbers_have_label_0_for_10(tmp_path):
    scipy_io = pytest.importorskip('scipy.io')
    for n, split in enumerate(('train', 'test', 'extra')):
        content = dict(X=noise(3, seed=n).transpose(1, 2, 3, 0), y=np.array([[10], [1], [9]], np.uint8))
        scipy_io.savemat(tmp_path / f'{split}_32x32.mat', content)
    for name in ('svhn', 'torch/svhn'):
        source = create_source(name, str(tmp_path), 'train')
        assert source.targets.tolist() == [0, 1, 9]
        assert np.array_equal(source.image(2), noise(3, seed=0)[2])
        assert len(create_source(name, str(tmp_path), 'train+extra')) == 6


@pytest.fixture
def stl10(tmp_path):
    """STL-10's own files: columns first, channel by channel, labels from 1 on."""
    folder = tmp_path / 'stl10_binary'
    folder.mkdir()
    for n, (split, number) in enumerate(dict(train=4, test=2, unlabeled=3).items()):
        noise(number, 96, seed=n).transpose(0, 3, 2, 1).tofile(folder / f'{split}_X.bin')
    np.array([1, 10, 2, 2], np.uint8).tofile(folder / 'train_y.bin')
    np.array([3, 1], np.uint8).tofile(folder / 'test_y.bin')
    (folder / 'class_names.txt').write_text('\n'.join(f'c{i}' for i in range(10)))
    (folder / 'fold_indices.txt').write_text('2 0 \n3 1 \n9 1 \n')
    return tmp_path


def test_stl10s_own_files_join_train_and_unlabeled(stl10):
    for name in ('stl10', 'torch/stl10'):
        source = create_source(name, str(stl10), KNOWN[name]['unlabeled_split'])
        assert source.targets.tolist() == [0, 9, 1, 1, -1, -1, -1] and source.class_names[1] == 'c1'
        assert np.array_equal(source.image(3), noise(4, 96, seed=0)[3])
        assert np.array_equal(source.image(6), noise(3, 96, seed=2)[2])
        assert source.where(6) == 'row 2 of stl10 unlabeled'
        assert create_source(name, str(stl10), None).targets.tolist() == [2, 0]
    with pytest.raises(UsageError, match='no slices'):
        create_source('stl10', str(stl10), 'train[:2]')


def test_stl10s_predefined_folds(stl10):
    assert read_fold(str(stl10), 0, 4).tolist() == [0, 2] and read_fold(str(stl10), 1, 4).tolist() == [1, 3]
    for fold, message in ((3, 'folds 0 to 2'), (-1, 'folds 0 to 2'), (2, 'does not fit a training split of 4 images')):
        with pytest.raises(UsageError, match=message):
            read_fold(str(stl10), fold, 4)
    with pytest.raises(UsageError, match='own files have it'):
        read_fold(str(stl10 / 'stl10_binary'), 0, 4)


@pytest.mark.parametrize('name', sources.TORCHVISION)
def test_torchvision_has_the_sets_that_are_offered(name):
    cls = getattr(tv_datasets, sources.TORCHVISION[name][0])
    parameters = inspect.signature(cls).parameters
    assert parameters.keys() & {'train', 'split', 'version'}
    arrays = ('cifar10', 'cifar100', 'fashion_mnist', 'kmnist', 'mnist', 'qmnist', 'stl10', 'svhn', 'usps')
    assert ('loader' in parameters) != (name in arrays)


def test_torchvisions_idx_files_and_image_lists(tmp_path):
    raw = tmp_path / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    pixels = noise(3, 28)[..., 0]
    for prefix in ('train', 't10k'):
        head = np.array([0x803, 3, 28, 28], '>i4').tobytes()
        (raw / f'{prefix}-images-idx3-ubyte').write_bytes(head + pixels.tobytes())
        (raw / f'{prefix}-labels-idx1-ubyte').write_bytes(np.array([0x801, 3], '>i4').tobytes() + bytes([9, 0, 4]))
    source = create_source('torch/fashion_mnist', str(tmp_path), 'train')
    assert source.targets.tolist() == [9, 0, 4] and np.array_equal(np.asarray(source.image(1))[..., 2], pixels[1])

    food = tmp_path / 'food-101'
    write_images(food / 'images' / 'pie', [RED, GREEN], 'jpg')
    write_images(food / 'images' / 'soup', [BLUE], 'jpg')
    (food / 'meta').mkdir()
    for split in ('train', 'test'):
        (food / 'meta' / f'{split}.json').write_text(json.dumps({'pie': ['pie/000', 'pie/001'], 'soup': ['soup/000']}))
    nette = tmp_path / 'imagenette2' / 'val'  # its class names are tuples of synonyms
    for name in tv_datasets.Imagenette._WNID_TO_CLASS:
        write_images(nette / name, [RED], 'JPEG')
    (tmp_path / 'imagenette2' / 'train').mkdir()
    assert create_source('torch/imagenette', str(tmp_path), 'val').class_names[0] == 'tench, Tinca tinca'

    source = create_source('torch/food101', str(tmp_path), 'test')
    assert source.class_names == ['pie', 'soup'] and source.targets.tolist() == [0, 0, 1]
    assert close(colour(source, 1), GREEN) and source.where(2) == str(food / 'images' / 'soup' / '000.jpg')


def test_imagenet_in_wnid_folders(tmp_path):
    for wnid, color in {'n02084071': RED, 'n01440764': GREEN}.items():
        write_images(tmp_path / 'train' / wnid, [color] * 2, 'JPEG')
        write_images(tmp_path / 'val' / wnid, [color], 'JPEG')
    Image.new('L', (9, 9), 50).save(tmp_path / 'train' / 'n01440764' / '100.JPEG')
    Image.new('CMYK', (9, 9), (0, 255, 255, 0)).save(tmp_path / 'train' / 'n01440764' / '101.JPEG')
    for name in ('imagenet', 'torch/imagenet', 'torch/image_folder'):
        source = create_source(name, str(tmp_path), 'train')
        assert source.class_names == ['n01440764', 'n02084071'] and source.targets.tolist() == [0, 0, 0, 0, 1, 1]
        assert close(colour(source, 2), (50,) * 3) and close(colour(source, 3), RED) and close(colour(source, 4), RED)
        assert create_source(name, str(tmp_path), None).targets.tolist() == [0, 1]


@pytest.fixture
def webvision(tmp_path):
    """WebVision's lists and folders; labels 0, 49 and 50."""
    lists = dict(
        train_filelist_google=['google/q0001/a.jpg 0', 'google/q0001/b.jpg 49', 'google/q0002/c.jpg 50'],
        train_filelist_flickr=['flickr/q0001/a.jpg 49', 'flickr/q0002/d e.jpg 50'],
        val_filelist=['val000001.jpg 50', 'val000002.jpg 49'],
    )
    (tmp_path / 'info').mkdir()
    (tmp_path / 'info' / 'synsets.txt').write_text(''.join(f'n{i:08d} some, words\n' for i in range(61)))
    for n, (name, lines) in enumerate(lists.items()):
        (tmp_path / 'info' / f'{name}.txt').write_text('\n'.join(lines) + '\n')
        for i, line in enumerate(lines):
            file = tmp_path / ('val_images_256' if 'val' in name else '') / line.rsplit(maxsplit=1)[0]
            file.parent.mkdir(parents=True, exist_ok=True)
            plain((80 * n, 40 * i, 0), (40, 40)).save(file, quality=95)
    age(tmp_path)
    return tmp_path


@pytest.mark.parametrize('name, split, targets, last', [
    ('webvision', 'train', [0, 49, 50, 49, 50], (80, 40, 0)),
    ('webvision', 'google', [0, 49, 50], (0, 80, 0)),
    ('webvision', 'flickr', [49, 50], (80, 40, 0)),
    ('webvision', None, [50, 49], (160, 40, 0)),
    ('webvision-mini', 'train', [0, 49], (0, 40, 0)),
    ('webvision-mini', 'google+flickr', [0, 49, 49], (80, 0, 0)),
    ('webvision-mini', 'val', [49], (160, 40, 0)),
])
def test_webvision_from_its_lists(webvision, name, split, targets, last):
    source = create_source(name, str(webvision), split)
    assert source.targets.tolist() == targets and close(colour(source, len(source) - 1), last)
    assert source.class_names == [f'n{i:08d}' for i in range(50 if 'mini' in name else 61)]


def test_webvision_s_names_are_read_whatever_their_letters_and_refused_with_a_blank_line(webvision):
    names = webvision / 'info' / 'synsets.txt'
    names.write_bytes(b'n0 caf\xe9\n' + b''.join(b'n%d x\n' % i for i in range(1, 61)) + b'\n \n')
    assert create_source('webvision', str(webvision), 'train').class_names[:2] == ['n0', 'n1']
    names.write_text('n0 a\n\nn1 b\n')
    with pytest.raises(UsageError, match='synsets.txt: a line in it is blank'):
        create_source('webvision', str(webvision), 'train')


def test_missing_images_of_webvision_are_counted_or_left_out(webvision, caplog):
    (webvision / 'google' / 'q0001' / 'b.jpg').unlink()
    (webvision / 'flickr' / 'q0001' / 'a.jpg').unlink()
    (webvision / 'flickr' / 'q0001').rmdir()
    with pytest.raises(UsageError, match='2 of 5 images are missing, such as google/q0001/b.jpg, flickr/q0001/a.jpg '
                                         r'\(--skip-missing'):
        create_source('webvision', str(webvision), 'train')
    source = create_source('webvision', str(webvision), 'train', skip_missing=True)
    assert source.targets.tolist() == [0, 50, 50] and '2 of 5 images' in caplog.text
    (webvision / 'info' / 'train_filelist_flickr.txt').unlink()
    with pytest.raises(UsageError, match='no split train; it has google, val'):
        create_source('webvision', str(webvision), 'train')
    (webvision / 'info' / 'train_filelist_google.txt').write_text('google/q0001/a.jpg 0\ngoogle/q0001/a.jpg\n')
    with pytest.raises(UsageError, match='filelist_google.txt: expected lines of path and label, not "google/q0001'):
        create_source('webvision', str(webvision), 'google')


def test_only_the_first_five_missing_images_are_named(webvision):
    lines = ''.join(f'google/q0009/{i}.jpg 0\n' for i in range(9))
    (webvision / 'info' / 'train_filelist_google.txt').write_text(lines)
    with pytest.raises(UsageError, match='9 of 9 .*such as google/q0009/0.jpg, .*google/q0009/4.jpg [^,]*$'):
        create_source('webvision', str(webvision), 'google')


@pytest.mark.parametrize('kind', ['webvision', 'folder'])
def test_a_large_listing_is_kept_until_a_folder_changes(request, monkeypatch, tmp_path, kind):
    monkeypatch.setattr(folders, 'INDEX_FROM', 2)
    if kind == 'webvision':
        name, root = 'webvision', request.getfixturevalue('webvision')
        new = root / 'google' / 'q0002' / 'new.jpg'
        lists, changes = root / 'info' / 'train_filelist_google.txt', ['list', 'file']
    else:
        name, root, changes = '', tmp_path, ['file', 'folder']
        write_images(root / 'train' / 'a', [RED] * 2)
        write_images(root / 'train' / 'b', [GREEN] * 2)
        new = root / 'train' / 'b' / 'new.png'
        age(root)
    first = create_source(name, str(root), 'train')
    assert first.dataset.cache_files
    listed, (module, function) = [], (os, 'listdir') if kind == 'webvision' else (folders, 'list_pictures')
    original = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *a, **k: listed.append(a) or original(*a, **k))
    second = create_source(name, str(root), 'train')
    assert not listed and torch.equal(second.targets, first.targets) and second.class_names == first.class_names
    assert all(colour(second, i) == colour(first, i) for i in range(len(first)))
    assert len(pickle.dumps(second.dataset)) < 10_000  # a spawned worker maps the file as well
    for n, change in enumerate(changes):
        if change == 'list':
            touched = lists
            lists.write_text(lists.read_text() + 'google/q0001/a.jpg 3\n')
        elif change == 'folder':
            touched = root / 'train'
            write_images(root / 'train' / 'c', [BLUE])
            os.utime(root / 'train' / 'c', (1.5e9, 1.5e9))
        else:
            touched = new.parent
            plain(BLUE).save(new)
        os.utime(touched, (1.5e9 + n, 1.5e9 + n))  # changed, and long enough ago to be kept
        del listed[:]
        third = create_source(name, str(root), 'train')
        assert listed and third.dataset.cache_files
    assert len(third) == len(first) + (1 if kind == 'webvision' else 2)


def test_a_class_map_in_the_folder_is_watched_too(monkeypatch, tmp_path):
    monkeypatch.setattr(folders, 'INDEX_FROM', 2)
    for name in 'ab':
        write_images(tmp_path / 'train' / name, [RED])
    for n, order in enumerate(['a\nb\n', 'b\na\n']):
        (tmp_path / 'train' / 'map.txt').write_text(order)
        age(tmp_path, n)
        source = create_source('', str(tmp_path), 'train', class_map='map.txt')
        assert source.dataset.cache_files and source.class_names == order.split()


def test_a_listing_is_kept_only_once_it_is_settled_and_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(folders, 'INDEX_FROM', 2)
    monkeypatch.chdir(tmp_path)
    write_images(Path('set') / 'train' / 'a', [RED, GREEN])
    assert not create_source('set', None, 'train').dataset.cache_files  # more may come within the clock's tick
    age(tmp_path)
    kept = create_source('set', None, 'train')
    monkeypatch.chdir('/')
    again = create_source(str(tmp_path / 'set'), None, 'train')
    assert kept.dataset.cache_files == again.dataset.cache_files != []
    assert colour(again, 1) == GREEN and again.where(1) == str(tmp_path / 'set' / 'train' / 'a' / '001.png')


# --- Real images ------------------------------------------------------------------------------------------------------

def test_real_photographs_in_folders(shared_data):
    train, val = (create_source('', str(shared_data / 'ants_bees'), split) for split in ('train', 'val'))
    assert train.class_names == val.class_names == ['ants', 'bees'] and len(train) + len(val) == 180
    views = build_views(32, (0.5,) * 3)
    dataset = ViewDataset(train, {kind: views[kind] for kind in ('weak', 'strong', 'eval')})
    batch = next(iter(create_loader(dataset, EndlessBatches(len(train), 8))))
    assert {batch[name].shape for name in ('weak', 'strong', 'eval')} == {(8, 3, 32, 32)}


def test_real_cifar10(shared_data):
    folder = shared_data / 'cifar10'
    by_name, by_hfds = create_source('cifar10', str(folder), 'test'), create_source(f'hfds/{folder}', None, None)
    assert by_name.targets.bincount().tolist() == [1000] * 10 and torch.equal(by_name.targets, by_hfds.targets)
    assert np.array_equal(by_name.image(17), by_hfds.image(17)) and by_name.class_names[0] == 'airplane'
    pixels = torch.stack([functional.pil_to_tensor(by_name.image(i)) for i in range(500)]) / 255
    for key, measured in dict(mean=pixels.mean((0, 2, 3)), std=pixels.std((0, 2, 3))).items():
        assert torch.allclose(measured, torch.tensor(KNOWN['cifar10'][key]), atol=0.03)


def test_real_imagenet_photographs_decode(shared_data):
    files = sorted((shared_data / 'imagenet_samples').glob('*/*.JPEG'))[::12]
    view = build_views(32, (0.5,) * 3)['eval']
    grey = 0
    for file in files:
        image = decode_image(file)
        grey += Image.open(file).mode == 'L'
        assert image.mode == 'RGB' and view(image).shape == (3, 32, 32)
    assert len(files) > 10
