"""Image sets: where the pictures and their labels come from.

An image set is a `Source`: a table of the `datasets` library (parquet and arrow files, the hub, or the listing of image
files in folders), or arrays. All of them decode through `decode_image`, so that the same file gives the same picture
wherever it lies. Tables stay memory-mapped: neither processes nor workers copy them.
"""
import argparse
import inspect
import io
import json
import logging
import os
import re
import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from glob import glob
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image, ImageOps
from pyarrow import csv
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision import datasets as tv_datasets

from program import RunError, UsageError
from seeds import item_seed

_logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).resolve().parent / 'digits'
_IMAGENET = dict(img_size=224, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)

# What a data set's name implies. hflip is 0 where a mirrored image shows another class or none; hub is the repository
# (and configuration) that the name stands for; files tells torchvision's own copy in a folder.
KNOWN = {
    'digits': dict(img_size=8, mean=(0.3053,) * 3, std=(0.3758,) * 3, hflip=0.),
    'cifar10': dict(
        img_size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
        hub='uoft-cs/cifar10', files='cifar-10-batches-py',
    ),
    'cifar100': dict(
        img_size=32, mean=(0.5071, 0.4866, 0.4409), std=(0.2673, 0.2564, 0.2762),
        hub='uoft-cs/cifar100', files='cifar-100-python',
    ),
    'svhn': dict(
        img_size=32, mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970), hflip=0.,
        hub='ufldl-stanford/svhn:cropped_digits', files='*_32x32.mat',
    ),
    'stl10': dict(
        img_size=96, mean=(0.4467, 0.4398, 0.4066), std=(0.2603, 0.2566, 0.2713), unlabeled_split='train+unlabeled',
        hub='jxie/stl10', files='stl10_binary',
    ),
    'imagenet': dict(_IMAGENET, hub='ILSVRC/imagenet-1k'),
    'webvision': _IMAGENET,
    'webvision-mini': _IMAGENET,
}
SHORT_NAMES = tuple(KNOWN)
KNOWN.update({f'torch/{name}': KNOWN[name] for name in ('cifar10', 'cifar100', 'svhn', 'stl10', 'imagenet')})
KNOWN.update({f'torch/{name}': dict(hflip=0.) for name in ('mnist', 'kmnist', 'qmnist', 'usps')})
KNOWN.update({f'hfds/{KNOWN[name]["hub"]}': KNOWN[name] for name in SHORT_NAMES if 'hub' in KNOWN[name]})


def known_facts(name: str) -> dict:
    """What is in KNOWN of a data set; torchvision's may be spelt as its classes are, such as torch/SVHN."""
    prefix, slash, rest = name.partition('/')
    prefix = prefix.lower() if slash else prefix
    return KNOWN.get(prefix + slash + (rest.lower() if prefix == 'torch' else rest), {})


# torchvision's sets that have splits and labels, and give arrays or (through their loader) paths.
TORCHVISION = {
    'cifar10': ('CIFAR10', 'train test'),
    'cifar100': ('CIFAR100', 'train test'),
    'country211': ('Country211', 'train valid test'),
    'dtd': ('DTD', 'train val test'),
    'fashion_mnist': ('FashionMNIST', 'train test'),
    'fgvc_aircraft': ('FGVCAircraft', 'train val trainval test'),
    'flowers102': ('Flowers102', 'train val test'),
    'food101': ('Food101', 'train test'),
    'imagenette': ('Imagenette', 'train val'),
    'inat': ('INaturalist', '2017 2018 2019 2021_train 2021_train_mini 2021_valid'),
    'inaturalist': ('INaturalist', '2017 2018 2019 2021_train 2021_train_mini 2021_valid'),
    'kmnist': ('KMNIST', 'train test'),
    'mnist': ('MNIST', 'train test'),
    'places365': ('Places365', 'train-standard train-challenge val'),
    'qmnist': ('QMNIST', 'train test'),
    'rendered_sst2': ('RenderedSST2', 'train val test'),
    'stanford_cars': ('StanfordCars', 'train test'),
    'stl10': ('STL10', 'train test unlabeled'),
    'svhn': ('SVHN', 'train test extra'),
    'usps': ('USPS', 'train test'),
}
# Where evaluation looks when no split is named: the first of these that exists.
VAL_SPLITS = ('validation', 'val', 'valid', 'test')
INDEX_FROM = 50_000  # image files from which on their listing is kept on disk




class ImageError(RunError):
    """An image that cannot be decoded; names the file or row."""


def decode_image(data: bytes | str | Path | np.ndarray, least: int | None = None) -> Image.Image:
    """Encoded bytes, a path or a uint8 `[H, W, 3]` or `[H, W]` array to an upright 8-bit RGB picture.

    Honours the EXIF orientation, scales 16-bit greyscale down (PIL would clip it to white), resolves palettes and CMYK,
    and drops an alpha channel. With `least`, a JPEG is decoded at a half, a quarter or an eighth of its size as long as
    its sides keep that many pixels, which costs that much less.

    Raises:
        OSError, ValueError or another error of PIL if the data is no complete image.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data).convert('RGB')
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        if least is not None:
            image.draft(None, (least, least))
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I'):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        elif image.mode == 'F':
            raise ValueError('floating-point pixels have no known range; store the image with 8 or 16 bits')
        if image.mode in ('P', 'PA', 'LA'):
            image = image.convert('RGBA')
        return image.convert('RGB')


# --- Sources ----------------------------------------------------------------------------------------------------------

class Source:
    """An image set; subclasses set `targets` and `class_names` and define two methods.

    `targets` is `[N]` int64 (-1: no label), `class_names` a list or None. `data(index)` returns the undecoded image, as
    `decode_image` takes it, and `where(index)` the file or row behind an index, for messages. A source that
    `create_source` opened also knows the split that it is of, and where in it its first image stands.
    """
    targets: torch.Tensor
    class_names: list[str] | None
    split: str | None = None
    start: int = 0

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int, least: int | None = None) -> Image.Image:
        """RGB picture of an index; `least` as of `decode_image`.

        Raises:
            ImageError: If it cannot be decoded.
        """
        try:
            return decode_image(self.data(index), least)
        except (
                OSError, SyntaxError, ValueError, EOFError, NotImplementedError, struct.error,
                Image.DecompressionBombError,
        ) as error:
            raise ImageError(f'image {index} ({self.where(index)}) cannot be decoded: {error}') from error


class HFSource(Source):
    """A map-style data set of the `datasets` library: memory-mapped arrow, images left encoded until asked for.

    Args:
        dataset: Image files in an `Image` column, or as written without that library: bytes, or a struct of bytes and
            path.
        name: For messages.
        input_key: Image column; default: the first one.
        target_key: Label column, whole numbers or null; default: label, else fine_label.
        labeled: Without, all targets are -1, whatever the columns say.

    Raises:
        UsageError: If there is no image, or a column is missing or of the wrong kind, listing the columns there are.
    """

    def __init__(
            self,
            dataset: datasets.Dataset,
            name: str,
            input_key: str | None = None,
            target_key: str | None = None,
            labeled: bool = True,
    ):
        if not len(dataset):
            raise UsageError(f'{name}: no image in it')
        columns = ', '.join(dataset.column_names)
        image_columns = [key for key, feature in dataset.features.items() if _holds_images(feature)]
        input_key = input_key or next(iter(image_columns), None)
        if input_key not in dataset.column_names:
            raise UsageError(f'{name}: no image column {input_key or ""}; it has {columns} (--input-key)')
        if input_key not in image_columns:
            raise UsageError(f'{name}: column {input_key} holds no images; it has {columns} (--input-key)')
        self.targets, self.class_names = torch.full((len(dataset),), -1), None
        if labeled:
            target_key = target_key or ('label' if 'label' in dataset.column_names else 'fine_label')
            if target_key not in dataset.column_names:
                raise UsageError(f'{name}: no label column {target_key}; it has {columns} (--target-key)')
            feature = dataset.features[target_key]
            target = dataset.select_columns([target_key]).with_format('arrow')[:].column(target_key).to_numpy()
            if np.issubdtype(target.dtype, np.floating):  # whole numbers with nulls arrive as floats
                target = np.nan_to_num(target, nan=-1)
            if not np.issubdtype(target.dtype, np.number) or (target != target.astype(np.int64)).any():
                kind = getattr(feature, 'dtype', type(feature).__name__)
                raise UsageError(f'{name}: labels in column {target_key} must be whole numbers, not {kind}')
            self.targets = torch.from_numpy(target.astype(np.int64))
            self.class_names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        self.name, self.input_key, self.dataset = name, input_key, dataset.select_columns([input_key])
        if isinstance(dataset.features[input_key], datasets.Image):
            self.dataset = self.dataset.cast_column(input_key, datasets.Image(decode=False))

    def data(self, index: int) -> bytes | str:
        cell = self.dataset[index][self.input_key]
        if isinstance(cell, dict):
            cell = cell['path'] if cell['bytes'] is None else cell['bytes']
        if not cell:
            raise ValueError('the cell is empty')
        return cell

    def where(self, index: int) -> str:
        cell = self.dataset[index][self.input_key]
        if isinstance(cell, dict) and cell['bytes'] is None and cell['path']:
            return cell['path']
        return f'row {index} of {self.name}'


def _holds_images(feature) -> bool:
    if isinstance(feature, dict):
        return {'bytes', 'path'} <= feature.keys()
    return isinstance(feature, datasets.Image) or getattr(feature, 'dtype', '') in ('binary', 'large_binary')


class ArraySource(Source):
    """Images of one size in an array, uint8 `[N, H, W, 3]` or `[N, H, W]`."""

    def __init__(self, images: np.ndarray, targets: Sequence[int], class_names: list[str] | None, name: str):
        self.images, self.class_names, self.name = images, class_names, name
        self.targets = torch.as_tensor(targets, dtype=torch.int64)

    def data(self, index: int) -> np.ndarray:
        return self.images[index]

    def where(self, index: int) -> str:
        return f'row {index} of {self.name}'


class JoinedSource(Source):
    """Several sources, one after the other. A part whose classes are not those of the first counts as unlabeled."""

    def __init__(self, parts: Sequence[Source]):
        self.parts = parts
        self.targets = torch.cat([part.targets for part in parts])
        self.starts = np.cumsum([0, *map(len, parts)]).tolist()
        labeled = [(start, part) for start, part in zip(self.starts, parts) if (part.targets >= 0).any()]
        self.class_names = labeled[0][1].class_names if labeled else None
        for start, part in labeled[1:]:
            if part.class_names != self.class_names:
                _logger.warning(f'{part.split}: its classes are not those of {labeled[0][1].split}, and its images '
                                'count as unlabeled (image folders: --class-map gives both the same)')
                self.targets[start:start + len(part)] = -1

    def _find(self, index: int) -> tuple[Source, int]:
        part = bisect_right(self.starts, index) - 1
        return self.parts[part], index - self.starts[part]

    def data(self, index: int) -> bytes | str | np.ndarray:
        part, index = self._find(index)
        return part.data(index)

    def where(self, index: int) -> str:
        part, index = self._find(index)
        return part.where(index)


def locate(source: Source, other: Source) -> torch.Tensor:
    """Where each image of a source stands in another one of the same data set, `[N]` int64; -1: it does not."""
    def parts(of: Source) -> Iterable[tuple[int, Source]]:
        return zip(of.starts, of.parts) if isinstance(of, JoinedSource) else [(0, of)]

    position = torch.full((len(source),), -1)
    for at, part in parts(source):
        for other_at, other_part in parts(other):
            if part is not other_part and (part.split is None or part.split != other_part.split):
                continue
            first = max(part.start, other_part.start)
            end = min(part.start + len(part), other_part.start + len(other_part))
            if first < end:
                at_first, other_first = at + first - part.start, other_at + first - other_part.start
                position[at_first:at_first + end - first] = torch.arange(other_first, other_first + end - first)
    return position


# Each of the functions below returns what opens the splits of one kind of data set: a dict from a split's name to a
# function without arguments, which returns a table or a Source.

def hub_splits(name: str, repository: str, cache_dir: str | None = None) -> dict[str, Callable]:
    """A data set of the hub, or a folder in a form that `datasets` understands; '<path>[:config]'."""
    path, _, config = repository.partition(':')
    try:
        tables = datasets.load_dataset(path, config or None, cache_dir=cache_dir)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = ' '.join(str(error).split())  # a RuntimeError: the set has a loading script, which is not run any more
        if isinstance(error, ConnectionError):
            reason = f'the hub ({path}) cannot be reached and no copy is cached here'
        if isinstance(error, (ConnectionError, datasets.exceptions.DatasetNotFoundError)):
            flag = '--data-dir' if name in SHORT_NAMES else '--dataset'
            reason += f'; from files: {flag} DIR, with {local_layouts(name)} in DIR'
        raise UsageError(f'--dataset {name}: {reason}') from error
    return {split: partial(tables.__getitem__, split) for split in tables}


def local_layouts(name: str) -> str:
    """The forms in which a folder may hold a data set, for messages."""
    files = known_facts(name).get('files')
    own = f'{files} (torchvision\'s files), ' if files else ''
    return own + '<split>*.parquet, <split>*.arrow or <split>/<class>/<image>'


def folder_splits(root: Path, name: str = '', class_map: str = '') -> dict[str, Callable]:
    """A folder with parquet or arrow files, a data set saved by `datasets`, or image folders `<split>/<class>/`."""
    if not root.is_dir():
        raise UsageError(f'{root}: no such folder')
    if (root / 'dataset_dict.json').is_file():
        tables = datasets.load_from_disk(str(root))
        return {split: partial(tables.__getitem__, split) for split in tables}
    for pattern in ('*.parquet', '*/*.parquet', '*.arrow', '*/*.arrow', '*/*/*.parquet'):
        files = sorted(root.glob(pattern))
        if files:
            return table_splits(files, root)
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith('.'))
    if not folders:
        raise UsageError(f'{root}: no data set in it; expected {local_layouts(name)}')
    return {folder.name: partial(image_folder, folder, class_map) for folder in folders}


def table_splits(files: Sequence[Path], root: Path | None = None) -> dict[str, Callable]:
    """Parquet or arrow files, below root. A file's split is its name up to the number of the shard, or its last part if
    that is the name of a split (`cifar10-train-00000-of-00001`), or else its folder's name if that is one or its own is
    a number; a sole split with another name is train.
    """
    names = ('train', 'unlabeled', 'extra', *VAL_SPLITS)
    folders = {file.parent for file in files}
    in_folders = len(folders) > 1 or (root is not None and root not in folders)
    splits = {}
    for file in files:
        split = re.sub(r'[-_.]\d+(-of-\d+.*)?$', '', file.stem)
        split = file.parent.name if split.isdigit() else split
        last = re.split('[-_.]', split)[-1]
        if in_folders and last not in names and file.parent.name in names:
            last = file.parent.name
        splits.setdefault(last if last in names else split, []).append(str(file))
    if len(splits) == 1 and not splits.keys() & {*names}:
        splits = {'train': splits.popitem()[1]}
    return {split: partial(open_tables, paths) for split, paths in splits.items()}


def open_tables(files: Sequence[str]) -> datasets.Dataset:
    """Arrow files as they lie; parquet files through the cache of `datasets`, which holds them as arrow."""
    try:
        if files[0].endswith('.arrow'):
            return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
        return datasets.load_dataset('parquet', data_files={'train': list(files)}, split='train')
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        reason = ' '.join(str(error.__cause__ or error).split())
        raise UsageError(f'{files[0]}{" and others" * (len(files) > 1)}: cannot be read: {reason}') from error


def image_folder(folder: Path, class_map: str = '') -> datasets.Dataset:
    """Images in one folder per class; classes in timm's natural order. A folder unlabeled needs no classes."""
    folder = folder.absolute()  # as the listing may be read again from elsewhere

    def listing() -> tuple:
        try:
            reader = ReaderImageFolder(str(folder), class_map=class_map)
        except (RuntimeError, AssertionError, OSError) as error:
            raise UsageError(f'{folder}: {error}') from error
        if '' in reader.class_to_idx and not _is_unlabeled(folder.name):
            raise UsageError(f'{folder}: images lie directly in it; expected one folder per class')
        names = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
        if [reader.class_to_idx[name] for name in names] != list(range(len(names))):  # a class map may leave gaps
            names = None
        paths, labels = zip(*reader.samples)
        watched = [entry for entry, _, _ in os.walk(folder, followlinks=True)]
        if class_map:  # timm finds one in the folder too
            watched.append(class_map if os.path.exists(class_map) else str(folder / class_map))
        return pa.array(paths), pa.array(labels), names, watched, ''

    return file_index(('folder', str(folder), class_map), listing)


def webvision_splits(root: Path, mini: bool, skip_missing: bool) -> dict[str, Callable]:
    """WebVision 1.0 from its file lists: train (both parts), google, flickr, val.

    The mini variant has the first 50 classes, and its train is the Google part, as is usual.
    """
    google, flickr = 'train_filelist_google.txt', 'train_filelist_flickr.txt'
    train = [google] if mini else [google, flickr]
    lists = dict(train=train, google=[google], flickr=[flickr], val=['val_filelist.txt'])
    found = {split: files for split, files in lists.items() if all((root / 'info' / f).is_file() for f in files)}
    if not found:
        raise UsageError(
            f'{root}: no WebVision in it (--data-dir); expected info/{google}, info/{flickr}, info/val_filelist.txt, '
            'and the images in google/, flickr/ and val_images_256/'
        )
    return {split: partial(webvision, root, files, mini, skip_missing) for split, files in found.items()}


def webvision(root: Path, lists: Sequence[str], mini: bool, skip_missing: bool) -> datasets.Dataset:
    """Images of WebVision's file lists, whose lines are `path label`; classes in the order of info/synsets.txt."""
    root = root.absolute()
    folders = [root / 'val_images_256', root / 'val_images', root] if lists[0].startswith('val') else [root]
    base = next((folder for folder in folders if folder.is_dir()), root)

    def listing() -> tuple:
        rows = pa.concat_arrays([_read_file_list(root / 'info' / name) for name in lists])
        if mini:
            rows = rows.filter(pc.less(rows.field('label'), 50))
        parents = pc.unique(pc.replace_substring_regex(rows.field('path'), r'[^/]*$', '')).to_pylist()
        present = [
            pa.array([parent + name for name in os.listdir(base / parent)], pa.string())
            for parent in parents if (base / parent).is_dir()
        ]
        exists = pc.is_in(rows.field('path'), pa.chunked_array(present, pa.string()))
        missing, note = pc.sum(pc.invert(exists)).as_py() or 0, ''
        if missing:
            note = f'{base}: {missing} of {len(rows)} images are missing'
            if not skip_missing:
                first = ', '.join(rows.field('path').filter(pc.invert(exists))[:5].to_pylist())
                raise UsageError(f'{note}, such as {first} (--skip-missing leaves them out)')
            rows = rows.filter(exists)
        synsets = root / 'info' / 'synsets.txt'
        names = [line.split()[0] for line in synsets.read_text().splitlines()] if synsets.is_file() else []
        looked_at = {root, base, synsets, *(root / 'info' / name for name in lists)}
        looked_at |= {base / parent for parent in parents} | {(base / parent).parent for parent in parents}
        path = pc.binary_join_element_wise(f'{base}', rows.field('path'), '/')
        return path, rows.field('label'), names[:50] if mini else names, map(str, looked_at), note

    return file_index(('webvision', str(base), *lists, mini, skip_missing), listing)


def _read_file_list(file: Path) -> pa.StructArray:
    """Lines `path label` as a struct array of path and label."""
    try:
        table = csv.read_csv(
            file,
            read_options=csv.ReadOptions(column_names=['line']),
            parse_options=csv.ParseOptions(delimiter='\x01', quote_char=False),
            convert_options=csv.ConvertOptions(column_types={'line': pa.string()}),
        )
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f'{file}: {error}') from error
    lines = table.column('line').combine_chunks()
    rows = pc.extract_regex(lines, r'^(?P<path>.+?)\s+(?P<label>\d+)\s*$')
    if rows.null_count:
        raise UsageError(f'{file}: expected lines of path and label, not "{lines.filter(rows.is_null())[0]}"')
    return pa.StructArray.from_arrays([rows.field('path'), rows.field('label').cast(pa.int64())], ['path', 'label'])


def index_table(path: pa.Array, label: pa.Array, names: list[str] | None) -> pa.Table:
    """Paths `[N]` and labels `[N]` as the columns image and label of a table that `datasets` understands."""
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=names) if names else datasets.Value('int64'),
    )
    image = pa.StructArray.from_arrays([pa.nulls(len(path), pa.binary()), path], ['bytes', 'path'])
    return pa.table(dict(image=image, label=label)).cast(features.arrow_schema)


def file_index(key: tuple, listing: Callable[[], tuple]) -> datasets.Dataset:
    """Table of image files with columns image and label.

    A large listing is kept as an arrow file in the cache of `datasets` and memory-mapped. It is used again as long as
    no file or folder that it was made from has changed since.

    Args:
        key: Names the listing.
        listing: Returns paths `[N]` and labels `[N]` as arrow arrays, class names or None, the files and folders it
            was made from, and a note to log (or '').
    """
    file = Path(datasets.config.HF_DATASETS_CACHE) / 'calibratemix' / f'{item_seed(*key):016x}.arrow'
    if file.is_file():
        with pa.memory_map(str(file)) as kept:
            about = json.loads(pa.ipc.open_stream(kept).schema.metadata[b'calibratemix'])
        if about['times'] == _times(about['times']):
            if about['note']:
                _logger.warning(about['note'])
            return datasets.Dataset.from_file(str(file))
    started = time.time_ns()
    path, label, names, looked_at, note = listing()
    if note:
        _logger.warning(note)
    table = index_table(path, label, names)
    times = _times(looked_at)
    # What changed within the last second may change again without a new time.
    if len(table) < INDEX_FROM or max(times.values()) > started - 10 ** 9:
        return datasets.Dataset(table)
    about = json.dumps(dict(times=times, note=note))
    part = file.with_suffix(f'.{os.getpid()}')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        schema = table.schema.with_metadata({**table.schema.metadata, 'calibratemix': about})
        with pa.OSFile(str(part), 'wb') as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(table, max_chunksize=100_000)
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UsageError(f'{file}: cannot be written ({error.strerror}); set HF_HOME to another folder') from error
    return datasets.Dataset.from_file(str(file))


def _times(paths: Iterable[str]) -> dict[str, int]:
    return {path: os.stat(path).st_mtime_ns if os.path.exists(path) else 0 for path in paths}


def torch_splits(name: str, root: str, download: bool) -> dict[str, Callable]:
    """A set of torchvision's."""
    if name not in TORCHVISION:
        raise UsageError(f'--dataset torch/{name}: unknown; there are {", ".join(TORCHVISION)}, imagenet, image_folder')
    return {split: partial(open_torch, name, root, split, download) for split in TORCHVISION[name][1].split()}


def open_torch(name: str, root: str, split: str, download: bool) -> Source | datasets.Dataset:
    """Arrays of torchvision's smaller sets, paths of its larger ones."""
    cls = getattr(tv_datasets, TORCHVISION[name][0])
    parameters = inspect.signature(cls).parameters
    which = next(key for key in ('train', 'split', 'version') if key in parameters)
    kwargs = {which: split == 'train' if which == 'train' else split}
    if 'loader' in parameters:
        kwargs['loader'] = str  # the path in place of the picture
    try:
        if download:
            cls(root, download=True, **kwargs)
        if name == 'stl10':
            return stl10_files(Path(root) / 'stl10_binary', split)
        dataset = _without_checksums(cls)(root, **kwargs)
    except Exception as error:  # each set has its own ways to complain of missing or broken files
        raise UsageError(
            f'{name}: {split} cannot be read from {root}: {" ".join(str(error).split())} (--data-dir, '
            '--dataset-download)'
        ) from error
    names = getattr(dataset, 'classes', None)
    if names is not None:  # imagenette's are tuples of synonyms
        names = [name if isinstance(name, str) else ', '.join(name) for name in names]
    if 'loader' in parameters:
        paths, labels = zip(*(dataset[i] for i in range(len(dataset))))
        return datasets.Dataset(index_table(pa.array(map(str, paths)), pa.array(labels), names))
    images, labels = np.asarray(dataset.data), dataset.labels if name == 'svhn' else dataset.targets
    if name == 'svhn':
        images = images.transpose(0, 2, 3, 1)
    if name == 'qmnist':
        labels = labels[:, 0]
    return ArraySource(images, labels, names, f'{name} {split}')


def _without_checksums(cls: type) -> type:
    """The class without its checksums, so that changed copies are welcome: fewer images, other labels."""
    changed = {}
    for key in ('train_list', 'test_list'):
        if hasattr(cls, key):
            changed[key] = [[*entry[:-1], None] for entry in getattr(cls, key)]
    if hasattr(cls, 'split_list'):
        changed['split_list'] = {split: [*entry[:-1], None] for split, entry in cls.split_list.items()}
    if hasattr(cls, 'meta'):
        changed['meta'] = dict(cls.meta, md5=None)
    return type(cls.__name__, (cls,), changed)


def stl10_files(folder: Path, split: str) -> ArraySource:
    """STL-10's own files, memory-mapped: torchvision would hold 2.8 GB of unlabeled images in memory."""
    images = np.memmap(folder / f'{split}_X.bin', np.uint8, 'r').reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    if split == 'unlabeled':
        targets = np.full(len(images), -1)
    else:
        targets = np.fromfile(folder / f'{split}_y.bin', np.uint8).astype(np.int64) - 1
    names = folder / 'class_names.txt'
    return ArraySource(images, targets, names.read_text().split() if names.is_file() else None, f'stl10 {split}')


def _is_unlabeled(split: str) -> bool:
    return split.startswith('unlabel')


def find_splits(
        name: str,
        data_dir: str | None,
        class_map: str = '',
        download: bool = False,
        skip_missing: bool = False,
) -> dict[str, Callable]:
    """The splits of a data set and what opens them; see `create_source`."""
    prefix, _, rest = name.partition('/')
    prefix, facts, root = prefix.lower(), known_facts(name), Path(data_dir or '.')
    if name == 'digits':
        return folder_splits(BUNDLED)
    if name in ('webvision', 'webvision-mini'):
        return webvision_splits(root, name == 'webvision-mini', skip_missing)
    if name in SHORT_NAMES:
        if not data_dir:
            return hub_splits(name, facts['hub'])
        if 'files' in facts and any(root.glob(facts['files'])):
            return torch_splits(name, data_dir, download=False)
        config = facts['hub'].partition(':')[2]  # a copy of the hub's repository has a folder for each
        return folder_splits(root / config if (root / config).is_dir() else root, name, class_map)
    if prefix == 'hfds':
        return hub_splits(name, rest, data_dir)
    if prefix in ('hfids', 'tfds', 'wds'):
        raise UsageError(f'--dataset {name}: a stream, whose images have no index to keep margins by; take hfds/')
    if prefix == 'torch':
        if rest.lower() in ('imagenet', 'image_folder', 'folder'):
            return folder_splits(root, class_map=class_map)
        return torch_splits(rest.lower(), str(root), download)
    if name.endswith('.parquet'):
        files = [Path(file) for file in sorted(glob(name, recursive=True))]
        if not files:
            raise UsageError(f'--dataset {name}: no such file')
        return table_splits(files)
    root = Path(name or data_dir or '')
    if not (name or data_dir) or not root.is_dir():
        given = f'--dataset {name}' if name else f'--data-dir {data_dir or ""}'
        raise UsageError(
            f'{given}: neither a known data set nor a folder; known are {", ".join(SHORT_NAMES)}, '
            'hfds/<hub name or folder>, torch/<torchvision\'s name>, the path of a folder, and .parquet files'
        )
    return folder_splits(root, class_map=class_map)


def create_source(
        name: str,
        data_dir: str | None,
        split: str | None,
        input_key: str | None = None,
        target_key: str | None = None,
        class_map: str = '',
        download: bool = False,
        skip_missing: bool = False,
        labeled: bool = True,
) -> Source:
    """Opens one split of a data set.

    Args:
        name: One of
            - 'digits' (bundled);
            - 'cifar10', 'cifar100', 'svhn', 'stl10', 'imagenet': from data_dir if given, else from the hub;
            - 'webvision', 'webvision-mini': from data_dir;
            - 'hfds/<hub name or folder>[:config]', 'torch/<one of TORCHVISION>';
            - a folder in one of `folder_splits`'s forms, a .parquet file or a glob of them;
            - '' for a folder at data_dir.
        data_dir: Root of the files that belong to a name; cache of 'hfds/'.
        split: Exact name of a split, several joined by +, or a slice of one such as `train[:50%]` (not of torchvision's
            arrays); None picks the first of VAL_SPLITS that exists. A split called unlabeled has no labels.
        input_key: Image column; default: the first one.
        target_key: Label column; default: label, else fine_label.
        class_map: timm's class map file, for image folders.
        download: Lets torchvision download.
        skip_missing: Leaves out images of WebVision's lists that are not there.
        labeled: Without, labels need not be there.

    Raises:
        UsageError: If the name, the split or a column is unknown, listing what exists, or if the split is empty.
    """
    if split and '+' in split:
        return JoinedSource([
            create_source(name, data_dir, part, input_key, target_key, class_map, download, skip_missing, labeled)
            for part in split.split('+')
        ])
    shown = name or data_dir
    splits = find_splits(name, data_dir, class_map, download, skip_missing)
    there = ', '.join(list(splits)[:20]) + ', ...' * (len(splits) > 20)
    if split is None:
        split = next((s for s in VAL_SPLITS if s in splits), None)
        if split is None:
            raise UsageError(f'{shown}: none of the splits {there} is named as one for evaluation; name it with '
                             f'{"--val-split" if labeled else "--ood-split (predict.py: --split)"}')
    base, bracket, _ = split.partition('[')
    if base not in splits:
        raise UsageError(f'{shown}: no split {split}; it has {there}')
    opened = splits[base]()
    if isinstance(opened, Source):
        if bracket:
            raise UsageError(f'{shown}: no slices such as {split} of torchvision\'s arrays')
        opened.split = split
        return opened
    start = 0
    if bracket:
        try:
            [part] = datasets.ReadInstruction.from_spec('x' + split[len(base):]).to_absolute({'x': len(opened)})
            opened, start = opened.select(range(part.from_, part.to)), part.from_
        except (ValueError, AssertionError, IndexError) as error:
            raise UsageError(f'{shown}: {split} is no slice of the {len(opened)} images of {base}') from error
    labeled = labeled and not _is_unlabeled(base)
    source = HFSource(opened, f'{shown} {split}', input_key, target_key, labeled)
    source.split, source.start = base, start
    if name == 'svhn':
        source.targets[source.targets == 10] = 0  # as its own files number the digit 0
    return source


def unlabeled_split(args: argparse.Namespace) -> str:
    """The split of the unlabeled images: --unlabeled-split, else the data set's own, else the training split."""
    return args.unlabeled_split or known_facts(args.dataset).get('unlabeled_split', args.train_split)


# The flags by which a program names its images, with their defaults. A run's args.yaml holds them.
SOURCE_FLAGS = dict(
    dataset='',
    data_dir=None,
    train_split='train',
    val_split=None,
    unlabeled_split=None,
    input_key=None,
    target_key=None,
    class_map='',
    dataset_download=False,
    skip_missing=False,
    skip_bad_images=False,
)


def open_source(args: argparse.Namespace, split: str | None) -> Source:
    """A split of --dataset; `args` has the flags of SOURCE_FLAGS."""
    return create_source(
        args.dataset,
        args.data_dir,
        split,
        input_key=args.input_key,
        target_key=args.target_key,
        class_map=args.class_map,
        download=args.dataset_download,
        skip_missing=args.skip_missing,
    )
