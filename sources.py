"""Image sets: where the pictures and their labels come from.

An image set is a `Source`: a table of the `datasets` library (parquet and arrow files, the hub, or the listing of image
files in folders), or arrays. All of them decode through `decode_image`, so that the same file gives the same picture
wherever it lies. Tables stay memory-mapped: neither processes nor workers copy them.
"""
import argparse
import inspect
import logging
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from glob import glob
from itertools import groupby
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import datasets as tv_datasets

import filelists
from folders import from_stored, image_folder, index_table, is_hidden, list_pictures, tell, webvision_splits
from pictures import (
    DECODE_ERRORS,
    FRAME_ENDINGS,
    FRAMES_LOOKED_AT,
    LOOKED_AT,
    MAX_PIXELS,
    count_frames,
    count_transparent,
    decode_image,
    find_bits,
    spread_indices,
)
from program import RunError, UsageError, name_some, readable
from tables import (
    LFS_POINTER,
    VAL_SPLITS,
    cache_fault,
    choose_image_column,
    choose_label_column,
    digest_files,
    find_tables,
    is_unlabeled,
    read_targets,
    table_splits,
    tell_counting_from_one,
    training_class_names,
)

_logger = logging.getLogger(__name__)


class NoEvaluationSplit(UsageError):
    """A data set that has no split named as one for evaluation."""


BUNDLED = Path(__file__).resolve().parent / 'digits'
_IMAGENET = dict(img_size=224, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, numbering='imagenet')

# What a data set's name implies. hflip is 0 where a mirrored image shows another class or none; hub is the repository
# (and configuration) that the name stands for; files tells torchvision's own copy in a folder. Sets of one numbering
# have their classes in one order, whatever names they give them.
KNOWN = {
    'digits': dict(img_size=8, mean=(0.3053,) * 3, std=(0.3758,) * 3, hflip=0.),
    'cifar10': dict(
        img_size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
        hub='uoft-cs/cifar10', files='cifar-10-batches-py',
    ),
    'cifar100': dict(
        img_size=32, mean=(0.5071, 0.4866, 0.4409), std=(0.2673, 0.2564, 0.2762),
        hub='uoft-cs/cifar100', files='cifar-100-python', target_key='fine_label',
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
KNOWN.update({f'hfds/{name}': KNOWN[name] for name in ('cifar10', 'cifar100', 'svhn')})  # their older names on the hub
# The hub has many copies of the sets of digits and letters.
DIGITS = re.compile(r'(^|[-_.])([ekq]|not|color(ed)?[-_]?)?mnist|(^|[-_.])(usps|svhn)|digits')


def known_facts(name: str) -> dict:
    """What is in KNOWN of a data set; torchvision's may be spelt as its classes are, such as torch/SVHN.

    A repository of the hub whose name says digits is not to be mirrored.
    """
    prefix, slash, rest = name.partition('/')
    prefix = prefix.lower() if slash else prefix
    facts = KNOWN.get(prefix + slash + (rest.lower() if prefix == 'torch' else rest))
    if facts is None and prefix == 'hfds':
        repository = rest.partition(':')[0].rstrip('/').rpartition('/')[2].lower()
        facts = dict(hflip=0.) if DIGITS.search(repository) and 'fashion' not in repository else {}
    return facts or {}


def is_published(name: str) -> bool:
    """Whether a name stands for somebody's data set as it was published, of which no picture can be taken out."""
    prefix, slash, rest = name.partition('/')
    prefix = prefix.lower() if slash else ''
    if prefix == 'hfds':
        return not os.path.isdir(rest.partition(':')[0])
    return name in KNOWN or (prefix == 'torch' and rest.lower() in {*TORCHVISION, 'imagenet'})


UNLABELED_DIR = 'unlabeled-dir'  # the split that --unlabeled-dir adds
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


class ImageError(RunError):
    """An image that cannot be decoded; names the file or row."""


# --- Sources ----------------------------------------------------------------------------------------------------------

class Source:
    """An image set; subclasses set `targets` and `class_names` and define two methods.

    `targets` is `[N]` int64 (-1: no label), `class_names` a list or None. `data(index)` returns the undecoded image, as
    `decode_image` takes it, and `where(index)` the file or row behind an index, for messages. A source that
    `create_source` opened also knows the split that it is of, and where in it its first image stands. `bits` and
    `max_pixels` are `decode_image`'s.
    """
    targets: torch.Tensor
    class_names: list[str] | None
    split: str | None = None
    start: int = 0
    bits: int = 8
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.targets)

    def data_of(self, index: Sequence[int]) -> Iterable[bytes | str | np.ndarray]:
        """`data` of many indices; a subclass may have a faster way."""
        return map(self.data, index)

    def sizes(self, index: np.ndarray) -> np.ndarray:
        """Bytes of undecoded images, as `[n]` int64; 0 for what is not there. A subclass need not read them for it."""
        return np.array([_size(data) for data in self.data_of(index.tolist())], np.int64)

    def in_files(self) -> bool:
        """Whether images have to be opened to be looked into; those of tables and arrays lie in memory, or as if."""
        return False

    def tails(self, index: np.ndarray) -> np.ndarray:
        """A number for each undecoded image by a few bytes near its end, as `[n]` int64: equal for equal images, and
        seldom for others. There PNG has its checksum, and compressed data its most random part."""
        return np.array([_tail(data) for data in self.data_of(index.tolist())], np.int64)

    def image(self, index: int, least: int | None = None) -> Image.Image:
        """RGB picture of an index; `least` as of `decode_image`.

        Raises:
            ImageError: If it cannot be decoded.
        """
        try:
            return decode_image(self.data(index), least, self.bits, self.max_pixels)
        except DECODE_ERRORS as error:
            reason = 'a pointer of Git LFS, without the data (git lfs pull)' if self._is_pointer(index) else error
            raise ImageError(f'image {index} ({self.where(index)}) cannot be decoded: {reason}') from error

    def _is_pointer(self, index: int) -> bool:
        try:
            data = self.data(index)
            if isinstance(data, str):
                with open(data, 'rb') as file:
                    data = file.read(len(LFS_POINTER))
        except (OSError, ValueError):
            return False
        return isinstance(data, bytes) and data.startswith(LFS_POINTER)

    def ending_with(self, endings: Sequence[str]) -> Sequence[int]:
        """Positions of the images whose files' names end so, in lower case, as far as they have names."""
        return []

    def file_paths(self) -> list[str] | None:
        """The file behind every image, or its name where the set holds the bytes; None if it has no such names."""
        return None


def _size(data: bytes | str | np.ndarray) -> int:
    if isinstance(data, str):
        try:
            return os.stat(data).st_size if data else 0
        except OSError:  # reading the image for training tells of it, or steps over it
            return 0
    return memoryview(data).nbytes


def _tail(data: bytes | str | np.ndarray) -> int:
    if isinstance(data, np.ndarray):
        return int(_array_tails(data[None])[0])
    if isinstance(data, str):
        try:
            with open(data, 'rb') as file:
                file.seek(max(_size(data) - 20, 0))
                data = file.read(20)
        except OSError:
            data = b''
    return int.from_bytes(data[-20:-12], 'little', signed=True) if len(data) >= 20 else 0


def _array_tails(images: np.ndarray) -> np.ndarray:
    """Sums over the eights of bytes of images of one size, each times an odd number of its own, modulo 2^64."""
    content = np.ascontiguousarray(images).reshape(len(images), -1)
    content = np.ascontiguousarray(content[:, :content.shape[1] // 8 * 8]).view(np.uint64)
    factor = np.random.default_rng(0).integers(2 ** 63, size=content.shape[1], dtype=np.uint64) * 2 + 1
    return (content @ factor).view(np.int64)


class HFSource(Source):
    """A map-style data set of the `datasets` library: memory-mapped arrow, images left encoded until asked for.

    Args:
        dataset: Image files in an `Image` column, or as written without that library: bytes, or a struct of bytes and
            path.
        name: For messages.
        input_key: Image column; default: image or img, else the only one.
        target_key: Label column, see `read_targets`; default: the only one that looks like it.
        labeled: Without, all targets are -1, whatever the columns say.
        training_names: Returns the class names by which labels that are words are numbered; default: their own.

    Raises:
        UsageError: If there is no image, or a column is missing, of the wrong kind or one of several, listing them.
    """

    def __init__(
            self,
            dataset: datasets.Dataset,
            name: str,
            input_key: str | None = None,
            target_key: str | None = None,
            labeled: bool = True,
            training_names: Callable[[], list[str] | None] | None = None,
    ):
        if not len(dataset):
            raise UsageError(f'{name}: no image in it')
        input_key = choose_image_column(dataset.features, name, input_key)
        self.targets, self.class_names = torch.full((len(dataset),), -1), None
        if labeled:
            target_key = choose_label_column(dataset.features, name, target_key, input_key)
            self.targets, self.class_names = read_targets(dataset, target_key, name, training_names)
        self.name, self.input_key, self.dataset = name, input_key, dataset.select_columns([input_key])
        if isinstance(dataset.features[input_key], datasets.Image):
            self.dataset = self.dataset.cast_column(input_key, datasets.Image(decode=False))

    def file_paths(self) -> list[str] | None:
        column = self.dataset.with_format('arrow')[:].column(self.input_key)
        if not pa.types.is_struct(column.type):
            return None
        paths = pc.struct_field(column, 'path')
        return None if paths.null_count else [*map(from_stored, paths.to_pylist())]

    def ending_with(self, endings: Sequence[str]) -> Sequence[int]:
        column = self.dataset.with_format('arrow')[:].column(self.input_key)
        if not pa.types.is_struct(column.type):
            return []
        paths = pc.struct_field(column, 'path').cast(pa.string())  # written without any path, of no type
        ends = pc.ascii_lower(pc.utf8_slice_codeunits(paths, -max(map(len, endings)), None))
        found = [pc.ends_with(ends, ending) for ending in endings]
        return np.logical_or.reduce([mask.fill_null(False).to_numpy() for mask in found]).nonzero()[0]

    def data(self, index: int) -> bytes | str:
        cell = self.dataset[index][self.input_key]
        if isinstance(cell, dict):
            cell = from_stored(cell['path'] or '') if cell['bytes'] is None else cell['bytes']
        if not cell:
            raise ValueError('the cell is empty')
        return cell

    def data_of(self, index: Sequence[int]) -> Iterable[bytes | str]:
        table = self.dataset.with_format('arrow')
        for start in range(0, len(index), 1000):
            for cell in table[list(index[start:start + 1000])].column(self.input_key).to_pylist():
                if isinstance(cell, dict):
                    cell = from_stored(cell['path'] or '') if cell['bytes'] is None else cell['bytes']
                yield cell or b''

    def _cells(self) -> Iterable[tuple[int, pa.Array]]:
        """The bytes of all images in parts, each with where it starts; null where they are in a file."""
        start = 0
        for cells in self.dataset.with_format('arrow')[:].column(self.input_key).chunks:  # joined, they would be copied
            yield start, cells.field('bytes') if pa.types.is_struct(cells.type) else cells
            start += len(cells)

    def in_files(self) -> bool:
        return any(cells.null_count for _, cells in self._cells())

    def sizes(self, index: np.ndarray) -> np.ndarray:
        sizes = [pc.binary_length(cells).fill_null(-1).to_numpy(zero_copy_only=False) for _, cells in self._cells()]
        found = np.concatenate(sizes)[index].astype(np.int64)
        files = (found < 0).nonzero()[0]
        found[files] = [_size(data) for data in self.data_of(index[files].tolist())]
        return found

    def tails(self, index: np.ndarray) -> np.ndarray:
        found, missing = np.zeros(len(index), np.int64), np.ones(len(index), bool)
        for start, cells in self._cells():
            rows = ((start <= index) & (index < start + len(cells))).nonzero()[0]
            kind = np.int64 if pa.types.is_large_binary(cells.type) else np.int32
            _, offsets, content = cells.buffers()
            if not len(rows) or content is None:
                continue
            # Just these bytes are touched, as the table may be larger than the memory.
            offsets = np.frombuffer(offsets, kind)[cells.offset:].astype(np.int64)
            first, end = offsets[index[rows] - start], offsets[index[rows] - start + 1]
            rows, end = rows[end - first >= 20], end[end - first >= 20]
            place = end[:, None] - 20 + np.arange(8)
            found[rows], missing[rows] = np.frombuffer(content, np.uint8)[place].view('<i8')[:, 0], False
        files = missing.nonzero()[0]
        found[files] = [_tail(data) for data in self.data_of(index[files].tolist())]
        return found

    def where(self, index: int) -> str:
        cell = self.dataset[index][self.input_key]
        if isinstance(cell, dict) and cell['bytes'] is None and cell['path']:
            return readable(from_stored(cell['path']))
        return f'row {index} of {self.name}'


class ArraySource(Source):
    """Images of one size in an array, uint8 `[N, H, W, 3]` or `[N, H, W]`."""

    def __init__(self, images: np.ndarray, targets: Sequence[int], class_names: list[str] | None, name: str):
        self.images, self.class_names, self.name = images, class_names, name
        self.targets = torch.as_tensor(targets, dtype=torch.int64)

    def data(self, index: int) -> np.ndarray:
        return self.images[index]

    def sizes(self, index: np.ndarray) -> np.ndarray:
        return np.full(len(index), self.images[:1].nbytes)

    def tails(self, index: np.ndarray) -> np.ndarray:
        return _array_tails(self.images[index])

    def where(self, index: int) -> str:
        return f'row {index} of {self.name}'


class JoinedSource(Source):
    """Several sources, one after the other. Classes are those of the first that has labels, the others' are matched by
    name; images of classes that it lacks count as unlabeled."""

    def __init__(self, parts: Sequence[Source]):
        self.parts, self.bits = parts, max(part.bits for part in parts)
        self.targets = torch.cat([part.targets for part in parts])
        self.starts = np.cumsum([0, *map(len, parts)]).tolist()
        labeled = [(start, part) for start, part in zip(self.starts, parts) if (part.targets >= 0).any()]
        self.class_names = labeled[0][1].class_names if labeled else None
        for start, part in labeled[1:]:
            if part.class_names == self.class_names:
                continue
            mapped, names = align_numbers(part.targets, part.class_names, self.class_names)
            if names:
                mapped = renumber(mapped, names, self.class_names or [])
            elif self.class_names:
                mapped = torch.full_like(part.targets, -1)
            lost = (part.targets >= 0) & (mapped < 0)
            self.targets[start:start + len(part)] = mapped
            _logger.warning(f'{part.split}: its classes are not those of {labeled[0][1].split} and are matched by '
                            f'name; {int(lost.sum())} of its images have a class that is not there and count as '
                            'unlabeled (image folders: --class-map gives both the same)')

    def _find(self, index: int) -> tuple[Source, int]:
        part = bisect_right(self.starts, index) - 1
        return self.parts[part], index - self.starts[part]

    def data(self, index: int) -> bytes | str | np.ndarray:
        part, index = self._find(index)
        return part.data(index)

    def data_of(self, index: Sequence[int]) -> Iterable[bytes | str | np.ndarray]:
        for part, places in groupby(map(self._find, index), lambda found: found[0]):
            yield from part.data_of([place for _, place in places])

    def _of_parts(self, what: str, index: np.ndarray) -> np.ndarray:
        found = np.zeros(len(index), np.int64)
        for start, part in zip(self.starts, self.parts):
            rows = (start <= index) & (index < start + len(part))
            found[rows] = getattr(part, what)(index[rows] - start)
        return found

    def in_files(self) -> bool:
        return any(part.in_files() for part in self.parts)

    def sizes(self, index: np.ndarray) -> np.ndarray:
        return self._of_parts('sizes', index)

    def tails(self, index: np.ndarray) -> np.ndarray:
        return self._of_parts('tails', index)

    def where(self, index: int) -> str:
        part, index = self._find(index)
        return part.where(index)

    def file_paths(self) -> list[str] | None:
        paths = [part.file_paths() for part in self.parts]
        return None if None in paths else [path for part in paths for path in part]


class PartSource(Source):
    """Some images of a source, by index `[n]` int64."""

    def __init__(self, source: Source, index: torch.Tensor):
        self.source, self.index = source, index
        self.targets, self.class_names = source.targets[index], source.class_names
        self.bits, self.max_pixels = source.bits, source.max_pixels

    def data(self, index: int) -> bytes | str | np.ndarray:
        return self.source.data(int(self.index[index]))

    def data_of(self, index: Sequence[int]) -> Iterable[bytes | str | np.ndarray]:
        return self.source.data_of(self.index[torch.as_tensor(index)].tolist())

    def in_files(self) -> bool:
        return self.source.in_files()

    def sizes(self, index: np.ndarray) -> np.ndarray:
        return self.source.sizes(self.index.numpy()[index])

    def tails(self, index: np.ndarray) -> np.ndarray:
        return self.source.tails(self.index.numpy()[index])

    def file_paths(self) -> list[str] | None:
        paths = self.source.file_paths()
        return None if paths is None else [paths[i] for i in self.index.tolist()]

    def where(self, index: int) -> str:
        return self.source.where(int(self.index[index]))


def renumber(targets: torch.Tensor, names: list[str], wanted: list[str]) -> torch.Tensor:
    """Labels `[N]` int64 of classes `names` as the numbers of the same names in `wanted`; -1: no label or not there."""
    number = {name: i for i, name in enumerate(wanted)}
    return torch.tensor([*(number.get(name, -1) for name in names), -1])[targets]  # the last entry is for label -1


def align_numbers(
        targets: torch.Tensor,
        names: list[str] | None,
        wanted: list[str] | None,
) -> tuple[torch.Tensor, list[str] | None]:
    """Labels `[N]` int64 and their class names, to be matched with classes `wanted`, where one side has whole numbers
    for names and the other numbers without names: what is matched is then the number that a name says, and not its
    place. Anything else is returned as it is.
    """
    said = [int(name) for name in names or wanted or () if name.isdecimal()]
    if bool(names) == bool(wanted) or len({*said}) < len(names or wanted):
        return targets, names
    if names:
        return torch.tensor([*said, -1])[targets], None  # the last entry is for label -1
    found, place = targets.unique(return_inverse=True)
    known = dict(zip(said, wanted))
    without = int(len(found) > 0 and found[0] < 0)
    return place - without, [known.get(number, str(number)) for number in found[without:].tolist()]


def refuse_overlap(source: Source, split: str) -> None:
    """Raises UsageError if parts of a joined split share images, each of which would count twice."""
    parts = source.parts if isinstance(source, JoinedSource) else []
    for i, part in enumerate(parts):
        for other in parts[:i]:
            both = min(part.start + len(part), other.start + len(other)) - max(part.start, other.start)
            if part.split == other.split and both > 0:
                raise UsageError(f'split {split}: {both} images of {part.split} are in two parts of it, and each would '
                                 'count twice')


def locate(source: Source, other: Source) -> torch.Tensor:
    """Where each image of a source stands in another one of the same data set, `[N]` int64; -1: it does not."""
    def parts(of: Source) -> Iterable[tuple[int, Source]]:
        return zip(of.starts, of.parts) if isinstance(of, JoinedSource) else [(0, of)]

    if isinstance(other, PartSource):
        place = torch.full((len(other.source) + 1,), -1)  # the last entry is for what is not in the source
        place[other.index] = torch.arange(len(other))
        return place[locate(source, other.source)]
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
    files = find_tables(Path(path)) if path and Path(path).is_dir() else []
    if files and not declares_configs(Path(path)):
        return folder_splits(Path(path, config) if Path(path, config).is_dir() else Path(path))
    if files:  # of which a copy may have kept the time of modification, by which `datasets` tells changes
        cache_dir = str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / f'files-{digest_files(map(str, files))}')
    try:
        tables = datasets.load_dataset(path, config or None, cache_dir=cache_dir)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        fault = cache_fault(error)
        if fault:
            raise UsageError(f'--dataset {name}: {fault}') from error
        reason = ' '.join(str(error).split())  # a RuntimeError: the set has a loading script, which is not run any more
        if 'Config name is missing' in reason:
            configs = re.findall(r"'([^']*)'", reason.partition('configs:')[2].partition(']')[0])
            reason = f'it has the configurations {", ".join(configs)}; choose one, as --dataset {name}:{configs[0]}'
        if isinstance(error, ConnectionError):
            reason = f'the hub ({path}) cannot be reached and no copy is cached here'
        if isinstance(error, (ConnectionError, datasets.exceptions.DatasetNotFoundError)):
            flag = '--data-dir' if name in SHORT_NAMES else '--dataset'
            reason += f'; from files: {flag} DIR, with {local_layouts(name)} in DIR'
        raise UsageError(f'--dataset {name}: {reason}') from error
    for table in tables.values() if os.path.isdir(path) else ():
        refuse_deep_classes(name, path, table)
    return {split: partial(tables.__getitem__, split) for split in tables}


def refuse_deep_classes(name: str, folder: str, table: datasets.Dataset) -> None:
    """Refuses a folder's pictures whose classes `datasets` takes from the innermost of several folders."""
    if table.info.builder_name != 'imagefolder' or not isinstance(table.features.get('label'), datasets.ClassLabel):
        return
    paths = pc.struct_field(table.select_columns(['image']).with_format('arrow')[:].column('image'), 'path')
    paths = paths.filter(pc.starts_with(paths, os.path.join(os.path.abspath(folder), '')))  # not those of archives
    if len(pc.unique(pc.replace_substring_regex(paths, r'/[^/]*/[^/]*$', ''))) > 1:
        raise UsageError(f'--dataset {name}: `datasets` takes the innermost folders for the classes there '
                         f'({name_some(table.features["label"].names)}); --data-dir {folder} takes the first below '
                         'the split')


def declares_configs(folder: Path) -> bool:
    """Whether the README of a hub repository's copy says which files belong to which configuration."""
    readme = folder / 'README.md'
    return readme.is_file() and re.search(r'^configs:', readme.read_text(errors='replace'), re.MULTILINE) is not None


def local_layouts(name: str) -> str:
    """The forms in which a folder may hold a data set, for messages."""
    files = known_facts(name).get('files')
    own = f'{files} (torchvision\'s files), ' if files else ''
    return own + '<split>*.parquet, <split>*.arrow or <split>/<class>/<image>'


def folder_splits(
        root: Path,
        name: str = '',
        class_map: str = '',
        flat: bool = False,
        **columns,
) -> dict[str, Callable]:
    """A folder with parquet or arrow files, a data set saved by `datasets`, or image folders `<split>/<class>/`. Beside
    tables pictures are left out, and counted.

    `flat` is as of `image_folder`; `columns` are the arguments of `filelists.read_metadata`, for folders of pictures
    with such a file.
    """
    if not root.is_dir():
        raise UsageError(f'{root}: no such folder')
    if (root / 'dataset_dict.json').is_file():
        try:
            tables = datasets.load_from_disk(str(root))
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UsageError(f'{root}: cannot be read: {" ".join(str(error).split())}') from error
        return {split: partial(tables.__getitem__, split) for split in tables}
    files = find_tables(root)
    if files:
        tell_pictures_beside(root, files)
        return table_splits(files, root)
    described = filelists.read_metadata(root, **columns)
    if described:
        return {split: partial(described.__getitem__, split) for split in described}
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    if not folders:
        raise UsageError(f'{root}: no data set in it; expected {local_layouts(name)}')
    return {
        folder.name: partial(open_folder, folder, class_map, flat or is_unlabeled(folder.name), columns)
        for folder in folders
    }


def tell_pictures_beside(root: Path, tables: Sequence[Path]) -> None:
    """Counts the pictures below a folder whose tables are taken for the data."""
    pictures = list_pictures(str(root.absolute())).pictures
    if pictures:
        names = name_some(table.relative_to(root) for table in tables)
        tell(f'{root}: {len(pictures)} pictures below it are left out, such as {readable(pictures[0])}, as tables lie '
             f'there, which are the data: {names}; move these away to read the pictures')


def open_folder(folder: Path, class_map: str, flat: bool, columns: dict) -> datasets.Dataset:
    """One split: what a `metadata.csv` in the folder says, else a folder for each class."""
    described = filelists.read_metadata(folder, **columns)
    if len(described) > 1:
        raise UsageError(f'{folder}: its metadata has the splits {", ".join(described)}; give that file as --dataset')
    return next(iter(described.values())) if described else image_folder(folder, class_map, flat)


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


def find_splits(
        name: str,
        data_dir: str | None,
        class_map: str = '',
        download: bool = False,
        skip_missing: bool = False,
        flat: bool = False,
        input_key: str | None = None,
        target_key: str | None = None,
) -> dict[str, Callable]:
    """The splits of a data set and what opens them; see `create_source`."""
    prefix, _, rest = name.partition('/')
    prefix, facts, root = prefix.lower(), known_facts(name), Path(data_dir or '.')
    columns = dict(input_key=input_key, target_key=target_key, skip_missing=skip_missing)
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
        return folder_splits(root / config if (root / config).is_dir() else root, name, class_map, flat, **columns)
    if prefix == 'hfds':
        if not rest.partition(':')[0]:
            raise UsageError(f'--dataset {name}: the name of a data set of the hub, or a folder, has to follow hfds/')
        return hub_splits(name, rest, data_dir)
    if prefix in ('hfids', 'tfds', 'wds'):
        raise UsageError(f'--dataset {name}: a stream, whose images have no index to keep margins by; take hfds/')
    if prefix == 'torch':
        if rest.lower() in ('imagenet', 'image_folder', 'folder'):
            return folder_splits(root, class_map=class_map, flat=flat, **columns)
        return torch_splits(rest.lower(), str(root), download)
    if filelists.is_file_table(name):
        return filelists.file_table_splits(Path(name), data_dir and root, **columns)
    if name.lower().endswith('.parquet'):
        files = [Path(file) for file in sorted(glob(name, recursive=True))]
        if not files:
            raise UsageError(f'--dataset {name}: no such file')
        return table_splits(files)
    root = Path(name or data_dir or '')
    if data_dir and not name and not root.is_dir():
        raise UsageError(f'--data-dir {data_dir}: no such folder')
    if not (name or data_dir) or not root.is_dir():
        raise UsageError(
            f'--dataset {name}: neither a known data set nor a folder; known are {", ".join(SHORT_NAMES)}, '
            'hfds/<hub name or folder>, torch/<torchvision\'s name>, the path of a folder, .parquet files, and '
            'tables of file and label (.csv, .tsv, .jsonl)'
        )
    return folder_splits(root, class_map=class_map, flat=flat, **columns)


def refuse_unused_folder(
        name: str,
        data_dir: str | None,
        flag: str = '--dataset',
        dir_flag: str = '--data-dir',
) -> None:
    """Raises UsageError if a folder is given beside a data set that has all its files elsewhere."""
    own = name not in KNOWN and not filelists.is_file_table(name) and (
        name.lower().endswith('.parquet') or os.path.isdir(name))
    if not data_dir or not (own or name == 'digits'):
        return
    if not (os.path.isdir(name) and os.path.isdir(data_dir) and os.path.samefile(name, data_dir)):
        raise UsageError(f'{flag} {name} and {dir_flag} {data_dir}: nothing would be read from the latter; give one of '
                         'the two')


def refuse_unused_map(name: str, data_dir: str | None, class_map: str, split: str | None) -> None:
    """Raises UsageError if a class map is given for a data set without folders of images."""
    if not class_map or any(map(os.path.isabs, (split or '').split('+'))):  # another folder, which may have use for it
        return
    prefix, _, rest = name.lower().partition('/')
    root, files = Path(data_dir or name), known_facts(name).get('files')
    known = name in SHORT_NAMES and name != 'digits' and not name.startswith('webvision') and data_dir
    known = known and not (files and any(root.glob(files)))
    folders = known or (prefix == 'torch' and rest in ('imagenet', 'image_folder', 'folder')) or (
        name not in KNOWN and (not name or root.is_dir()) and not filelists.is_file_table(name))
    if not folders or (root.is_dir() and ((root / 'dataset_dict.json').is_file() or find_tables(root))):
        raise UsageError(f'--class-map {class_map}: numbers folders of images, and {name or data_dir} has none '
                         '(--target-key names the label column of a table)')


def named_folder(name: str, data_dir: str | None, split: str, splits: dict[str, Callable]) -> tuple[str, Path] | None:
    """A split that is given as the path of a folder, below the data set's own or absolute: its name and the folder.

    The name is that of the split which lies there, if one does.
    """
    root = Path(data_dir or name or '.')
    if split in splits or not (root / split).is_dir():
        return None
    same = (other for other in splits if (root / other).is_dir() and (root / other).samefile(root / split))
    plain = Path(os.path.normpath(root / split))  # of FOLDER/../FOLDER the short form, unless a link makes it another
    found = plain if plain.is_dir() and plain.samefile(root / split) else root / split
    return next(same, split), found


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
        flat: bool = False,
        max_pixels: int = MAX_PIXELS,
        train_split: str | None = None,
        unlabeled_dir: str | None = None,
        val_labels: str | None = None,
) -> Source:
    """Opens one split of a data set.

    Args:
        name: One of
            - 'digits' (bundled);
            - 'cifar10', 'cifar100', 'svhn', 'stl10', 'imagenet': from data_dir if given, else from the hub;
            - 'webvision', 'webvision-mini': from data_dir;
            - 'hfds/<hub name or folder>[:config]', 'torch/<one of TORCHVISION>';
            - a folder in one of `folder_splits`'s forms, a .parquet file or a glob of them;
            - a .csv, .tsv or .jsonl file with a row a picture, see `filelists.list_files`;
            - '' for a folder at data_dir.
        data_dir: Root of the files that belong to a name or that a table names; cache of 'hfds/'.
        split: Exact name of a split, several joined by +, or a slice of one such as `train[:50%]` (not of torchvision's
            arrays); None picks the first of VAL_SPLITS that exists. A split called unlabeled has no labels. The path of
            a folder of images, absolute or below the data set's, is one too.
        input_key: Image column; default: image or img, else the only one.
        target_key: Label column; default: the only one that looks like it (CIFAR-100 by its name: fine_label).
        class_map: timm's class map file, for image folders.
        download: Lets torchvision download.
        skip_missing: Leaves out images of WebVision's lists and of tables of files that are not there.
        labeled: Without, labels need not be there.
        flat: Images may lie directly in the split's folder, which then has no labels.
        max_pixels: Larger pictures are refused when they are asked for.
        train_split: The training split, whose sorted names number labels that are words; default: this split.
        unlabeled_dir: Adds a split UNLABELED_DIR, of the pictures below this folder that are in no other split.
        val_labels: Labels of the pictures of this split, a flat folder; see `filelists.ground_truth`.

    Raises:
        UsageError: If the name, the split or a column is unknown, listing what exists, or if the split is empty.
    """
    if not name and not data_dir:
        raise UsageError('no images are given: --data-dir FOLDER for your own (<split>/<class>/<image>), or --dataset '
                         'NAME, such as digits, which is bundled')
    if split == '':
        raise UsageError(f'{name or data_dir}: the name of the split is empty')
    if split and '+' in split and named_folder(name, data_dir, split, {}) is None:
        trained = train_split or split
        if not all(split.split('+')):
            raise UsageError(f'split {split}: a part of it has no name')
        source = JoinedSource([
            create_source(
                name, data_dir, part, input_key, target_key, class_map, download, skip_missing, labeled, flat,
                max_pixels, f'{trained}+{split}' if part == UNLABELED_DIR else trained, unlabeled_dir, val_labels,
            )
            for part in split.split('+')
        ])
        source.max_pixels = max_pixels
        return source
    trained = [part.partition('[')[0] for part in (train_split or '').split('+')]
    if split in trained or (split or '').partition('[')[0] in trained:
        flat = False  # so that the split's positions are those of training, which a class map shifts
    shown = name or data_dir
    target_key = target_key or known_facts(name).get('target_key')
    splits = find_splits(name, data_dir, class_map, download, skip_missing, flat or not labeled, input_key,
                         target_key)
    if unlabeled_dir:
        if filelists.is_file_table(name):
            def known():
                return filelists.list_files(Path(name), data_dir, input_key, target_key, skip_missing).paths
        else:  # below a folder of the training split or one for evaluation
            root, parts = Path(data_dir or name).absolute(), (train_split or 'train').split('+')
            used = {*(part.partition('[')[0] for part in parts), *VAL_SPLITS} - {UNLABELED_DIR}
            used = [root / part for part in used if (root / part).is_dir()]

            def known():
                return (f'{folder}/{path}' for folder in used for path in list_pictures(str(folder)).pictures)
        splits[UNLABELED_DIR] = partial(filelists.open_pictures, Path(unlabeled_dir), known, input_key or 'image')
    there = ', '.join(list(splits)[:20]) + ', ...' * (len(splits) > 20)
    if split is None:
        split = next((s for s in VAL_SPLITS if s in splits), None)
        if split is None:
            asked = ('--val-split, or hold out a part of the training split (train_ssl.py --val-fraction 0.2)'
                     if labeled else '--ood-split (predict.py: --split)')
            raise NoEvaluationSplit(f'{shown}: none of the splits {there} is named as one for evaluation; name it with '
                                    f'{asked}')
    base = split if split in splits else split.partition('[')[0]  # a folder's name may have a bracket
    bracket = split[len(base):]
    for asked, rest in ((split, ''), (base, bracket)):
        folder = named_folder(name, data_dir, asked, splits)
        if folder is not None:
            base, bracket = folder[0], rest
            splits.setdefault(base, partial(image_folder, folder[1], class_map, flat or not labeled))
            break
    if base not in splits:
        hint = '; a folder of images elsewhere is named by its absolute path' if os.sep in split else ''
        if split == 'train' and labeled and not name and holds_classes(Path(data_dir), list(splits)):
            hint = '. If these are classes: --val-fraction 0.2 takes them so, and holds out a fifth to measure on'
        raise UsageError(f'{shown}: no split {split}; it has {there}{hint}')
    if val_labels:
        opened = filelists.ground_truth(Path(val_labels), Path(data_dir or name) / base, input_key, target_key)
    else:
        opened = splits[base]()
    if isinstance(opened, Source):
        if bracket:
            raise UsageError(f'{shown}: no slices such as {split} of torchvision\'s arrays')
        opened.split = split
        return opened
    bits = look_at(HFSource(opened, f'{shown} {base}', input_key, labeled=False))  # its slices are scaled alike
    start = 0
    if bracket:
        try:
            [part] = datasets.ReadInstruction.from_spec('x' + bracket).to_absolute({'x': len(opened)})
            opened, start = opened.select(range(part.from_, part.to)), part.from_
        except (ValueError, AssertionError, IndexError) as error:
            raise UsageError(f'{shown}: {split} is no slice of the {len(opened)} images of {base}') from error
    labeled = labeled and not is_unlabeled(base)
    train = [part.partition('[')[0] for part in (train_split or base).split('+')]

    def training_names():
        """From the whole training split, so that a slice numbers its classes alike."""
        tables = (splits[part]() for part in train if part in splits and not is_unlabeled(part))
        return training_class_names(tables, target_key, f'{shown} {train_split or base}')

    source = HFSource(opened, f'{shown} {split}', input_key, target_key, labeled, training_names)
    source.split, source.start, source.bits, source.max_pixels = base, start, bits, max_pixels
    if source.class_names is None and split == train_split:
        tell_counting_from_one(source.targets, source.name)
    if name == 'svhn':
        source.targets[source.targets == 10] = 0  # as its own files number the digit 0
    return source


def look_at(source: Source) -> int:
    """Looks at pictures of a source: returns the bits of deep greyscale (see `find_bits`), and tells of these, of
    files that hold several pictures, and of transparent ones."""
    bits, note = find_bits(source.data, len(source))
    name = getattr(source, 'name', '')
    tell(note and f'{name or source.where(0)}: {note}')
    likely = source.ending_with(FRAME_ENDINGS)
    looked_at = {*spread_indices(len(source), LOOKED_AT)}
    looked_at |= {int(likely[i]) for i in spread_indices(len(likely), FRAMES_LOOKED_AT)} if len(likely) else set()
    several = count_frames(source.data, sorted(looked_at))
    if several:
        tell(f'{name and f"{name}: "}{len(several)} of {len(looked_at)} files looked at hold several frames or pages, '
             f'such as {source.where(several[0])}; the first of each is taken')
    looked_at = spread_indices(len(source), LOOKED_AT)
    transparent = count_transparent(source.data, looked_at)
    if transparent:
        tell(f'{name and f"{name}: "}{len(transparent)} of {len(looked_at)} pictures looked at have transparent parts, '
             f'such as {source.where(transparent[0])}; there the colour is taken that the file has below (often black)')
    return bits


def plain_folder(folder: str, max_pixels: int = MAX_PIXELS) -> Source:
    """All images below a folder, without labels."""
    source = HFSource(image_folder(Path(folder), flat=True), folder, labeled=False)
    source.bits, source.max_pixels = look_at(source), max_pixels
    return source


def unlabeled_split(args: argparse.Namespace) -> str:
    """The split of the unlabeled images: --unlabeled-split, else the data set's own, else the training split; with
    --unlabeled-dir its pictures too.
    """
    split = args.unlabeled_split or known_facts(args.dataset).get('unlabeled_split', args.train_split)
    return f'{split}+{UNLABELED_DIR}' if args.unlabeled_dir else split


def holds_classes(root: Path, folders: Sequence[str]) -> bool:
    """Whether these folders of a folder, not one of which is named as a split is, may be those of classes."""
    named = any(folder in ('train', 'labeled', 'extra', *VAL_SPLITS) or is_unlabeled(folder) for folder in folders)
    described = find_tables(root) or any(root.glob('metadata.*'))
    return len(folders) > 1 and not named and not described and not {'+', '['} & set(root.name)


def absolute_name(name: str) -> str:
    """A data set's name; that of files or a folder from here with an absolute path."""
    prefix, slash, rest = name.partition('/')
    path, colon, config = rest.partition(':')
    if prefix.lower() == 'hfds' and os.path.isdir(path):
        return prefix + slash + os.path.abspath(path) + colon + config
    is_file = name.lower().endswith('.parquet') or filelists.is_file_table(name)
    return os.path.abspath(name) if name not in KNOWN and (is_file or os.path.isdir(name)) else name


def settle_sources(args: argparse.Namespace) -> None:
    """Settles the flags that name a run's images, so that its args.yaml names the same ones from any working folder.

    Files and folders get absolute paths, and a folder as --dataset becomes the --data-dir that it means. Where a folder
    has a split labeled and no train, labeled and unlabeled are the training and the unlabeled split by default. With
    --val-fraction a folder of class folders will do, which is then its own training split.
    """
    for name_key, dir_key in (('dataset', 'data_dir'), ('extra_val', 'extra_val_dir')):
        name, folder = getattr(args, name_key) or '', getattr(args, dir_key)
        if folder and os.path.isdir(folder):
            setattr(args, dir_key, os.path.abspath(folder))
        if name_key == 'dataset' and folder is None and name not in KNOWN and os.path.isdir(name):
            args.dataset, args.data_dir = '', os.path.abspath(name)
        elif name:
            setattr(args, name_key, absolute_name(name))
    for key in ('class_map', 'unlabeled_dir', 'val_labels'):
        path = getattr(args, key)
        if path and os.path.exists(path):
            setattr(args, key, os.path.abspath(path))
    root = Path(args.dataset or args.data_dir or '')
    if not (args.dataset or args.data_dir) or not root.is_dir():
        return
    splits = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    if args.val_fraction is not None and args.train_split == 'train' and holds_classes(root, splits):
        args.train_split = os.path.join(os.pardir, root.name)
        tell(f'{root}: no folder in it is named as a split, so its {len(splits)} folders are taken for classes: '
             f'{name_some(splits)}', logging.INFO)
        return
    unused = [split for split in splits if split in VAL_SPLITS and split != args.test_split]
    if args.val_fraction is not None and unused and not find_tables(root):
        tell(f'{root}: --val-fraction leaves {" and ".join(unused)} there unused; --test-split {unused[-1]} reports it '
             'at the end', logging.INFO)
    if not any(split == 'labeled' or is_unlabeled(split) for split in splits) or find_tables(root):
        return
    if args.train_split == 'train' and 'train' not in splits and 'labeled' in splits:
        args.train_split = 'labeled'
        tell(f'{root}: no split train; --train-split labeled is taken', logging.INFO)
    unlabeled = next(filter(is_unlabeled, splits), None)
    if args.unlabeled_split is None and unlabeled:
        if args.train_split == 'labeled':
            args.unlabeled_split = unlabeled
            tell(f'{root}: --unlabeled-split {unlabeled} is taken, as it lies beside labeled', logging.INFO)
        else:
            tell(f'{root}: split {unlabeled} is not used; --unlabeled-split {args.train_split}+{unlabeled} takes it')


# The flags by which a program names its images, with their defaults. A run's args.yaml holds them.
SOURCE_FLAGS = dict(
    dataset='',
    data_dir=None,
    train_split='train',
    val_split=None,
    unlabeled_split=None,
    unlabeled_dir=None,
    val_labels=None,
    input_key=None,
    target_key=None,
    class_map='',
    dataset_download=False,
    skip_missing=False,
    skip_bad_images=False,
    max_pixels=MAX_PIXELS,
)


def open_source(args: argparse.Namespace, split: str | None) -> Source:
    """A split of --dataset; `args` has the flags of SOURCE_FLAGS, and may have `val_labels_split`, the split to which
    --val-labels belongs where that is not the one to evaluate.

    Raises:
        UsageError: As `create_source`, if a flag has no use, and if no image of the training split has a label, unless
            a file gives them.
    """
    refuse_unused_folder(args.dataset, args.data_dir)
    refuse_unused_map(args.dataset, args.data_dir, args.class_map, split)
    source = create_source(
        args.dataset,
        args.data_dir,
        split,
        input_key=args.input_key,
        target_key=args.target_key,
        class_map=args.class_map,
        download=args.dataset_download,
        skip_missing=args.skip_missing,
        flat=split is not None and split == args.unlabeled_split,
        max_pixels=args.max_pixels,
        train_split=args.train_split,
        unlabeled_dir=args.unlabeled_dir,
        val_labels=args.val_labels if split == getattr(args, 'val_labels_split', args.val_split) else None,
    )
    for flag, column in (('input', args.input_key), ('target', args.target_key)):
        if column and any(isinstance(part, ArraySource) for part in getattr(source, 'parts', [source])):
            raise UsageError(f'--{flag}-key {column}: the arrays of {args.dataset} have no columns')
    if split == args.train_split and not getattr(args, 'labels_file', None) and (source.targets < 0).all():
        raise UsageError(f'{args.dataset or args.data_dir}: no image of split {split} has a label; give the labeled '
                         'split as --train-split and this one as --unlabeled-split')
    return source


def open_run_source(args: argparse.Namespace, split: str | None, run: Path | str) -> Source:
    """`open_source` where a run's args.yaml names the images: an error says so, as the user gave no flag."""
    try:
        return open_source(args, split)
    except UsageError as error:
        where = Path(run) / 'args.yaml'
        raise type(error)(f'{error} (as {where} has it; --data-dir says where the images are now)') from error
