"""Data for semi-supervised training: sources, labeled draws, views, endless sampling.

An image set is a `Source`: a folder, a data set of the `datasets` library, or arrays. All of them decode through
`decode_image`, so that the same file gives the same picture wherever it lies.

Nothing random here depends on processes, workers or resumes. The order of the data is a function of (seed, pass), and
the augmentation of an item a function of (seed, pass, index): an item draws from generators seeded for itself.
"""
import hashlib
import io
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision import datasets as tv_datasets
from torchvision import transforms

BUNDLED = Path(__file__).resolve().parent / 'digits'
CIFAR10_STATS = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
CIFAR100_STATS = dict(mean=(0.5071, 0.4866, 0.4409), std=(0.2673, 0.2564, 0.2762))

# What a data set's name implies. hflip is 0 where a mirrored image shows another class or none.
KNOWN = {
    'digits': dict(img_size=8, mean=(0.3053,) * 3, std=(0.3758,) * 3, hflip=0.),
    'torch/cifar10': dict(img_size=32, **CIFAR10_STATS),
    'torch/cifar100': dict(img_size=32, **CIFAR100_STATS),
}
# Where evaluation looks when no split is named: the first of these that exists.
VAL_SPLITS = ('validation', 'val', 'test')


class UsageError(ValueError):
    """A user's mistake, told in one line: what, where, and what to do."""


class RunError(RuntimeError):
    """A fault while running, told in one line."""


class ImageError(RunError):
    """An image that cannot be decoded; names the file or row."""


def decode_image(data: bytes | str | Path | np.ndarray) -> Image.Image:
    """Encoded bytes, a path or a uint8 `[H, W, 3]` array to an upright 8-bit RGB picture.

    Honours the EXIF orientation, scales 16-bit greyscale down (PIL would clip it to white), resolves palettes and CMYK,
    and drops an alpha channel.

    Raises:
        OSError, ValueError or another error of PIL if the data is no complete image.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data).convert('RGB')
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I'):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        elif image.mode == 'F':
            raise ValueError('floating-point pixels have no known range; store the image with 8 or 16 bits')
        if image.mode in ('P', 'PA', 'LA'):
            image = image.convert('RGBA')
        return image.convert('RGB')


class Source:
    """An image set; subclasses set `targets` and `class_names` and define two methods.

    `targets` is `[N]` int64 (-1: no label), `class_names` a list or None. `data(index)` returns the undecoded image, as
    `decode_image` takes it, and `where(index)` the file or row behind an index, for messages.
    """
    targets: torch.Tensor
    class_names: list[str] | None

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        """RGB picture of an index.

        Raises:
            ImageError: If it cannot be decoded.
        """
        try:
            return decode_image(self.data(index))
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise ImageError(f'image {index} ({self.where(index)}) cannot be decoded: {error}') from error


class FolderSource(Source):
    """Images in one folder per class; classes in timm's natural order."""

    def __init__(self, root: Path, class_map: str = ''):
        try:
            reader = ReaderImageFolder(str(root), class_map=class_map)
        except RuntimeError as error:
            raise UsageError(f'{root}: {error}') from error
        if '' in reader.class_to_idx:
            raise UsageError(f'{root}: images lie directly in it; expected one folder per class')
        self.paths = [path for path, _ in reader.samples]
        self.targets = torch.tensor([target for _, target in reader.samples])
        self.class_names = sorted(reader.class_to_idx, key=reader.class_to_idx.get)

    def data(self, index: int) -> str:
        return self.paths[index]

    def where(self, index: int) -> str:
        return self.paths[index]


class HFSource(Source):
    """A map-style data set of the `datasets` library: memory-mapped arrow, images left encoded until asked for."""

    def __init__(self, dataset: datasets.Dataset, name: str, input_key: str | None, target_key: str | None):
        columns = ', '.join(dataset.column_names)
        image_columns = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        input_key = input_key or next(iter(image_columns), None)
        if input_key not in dataset.column_names:
            raise UsageError(f'{name}: no image column {input_key or ""}; it has {columns} (--input-key)')
        if not isinstance(dataset.features[input_key], datasets.Image):
            raise UsageError(f'{name}: column {input_key} holds no images; it has {columns} (--input-key)')
        target_key = target_key or ('label' if 'label' in dataset.column_names else 'fine_label')
        if target_key not in dataset.column_names:
            raise UsageError(f'{name}: no label column {target_key}; it has {columns} (--target-key)')
        feature = dataset.features[target_key]
        target = dataset.select_columns([target_key]).with_format('arrow')[:].column(target_key).to_numpy()
        if np.issubdtype(target.dtype, np.floating):  # whole numbers with nulls arrive as floats
            target = np.nan_to_num(target, nan=-1)
        if not np.issubdtype(target.dtype, np.number) or (target != target.astype(np.int64)).any():
            raise UsageError(f'{name}: labels in column {target_key} must be whole numbers, not {feature.dtype}')
        self.targets = torch.from_numpy(target.astype(np.int64))
        self.class_names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        self.name, self.input_key = name, input_key
        self.dataset = dataset.select_columns([input_key]).cast_column(input_key, datasets.Image(decode=False))

    def data(self, index: int) -> bytes | str:
        row = self.dataset[index][self.input_key]
        return row['path'] if row['bytes'] is None else row['bytes']

    def where(self, index: int) -> str:
        return f'row {index} of {self.name}'


class ArraySource(Source):
    """Images in memory, uint8 `[N, H, W, 3]`."""

    def __init__(self, images: np.ndarray, targets: Sequence[int], class_names: list[str] | None, name: str):
        self.images, self.class_names, self.name = images, class_names, name
        self.targets = torch.as_tensor(targets, dtype=torch.int64)

    def data(self, index: int) -> np.ndarray:
        return self.images[index]

    def where(self, index: int) -> str:
        return f'row {index} of {self.name}'


def list_splits(name: str, data_dir: str | None) -> list[str]:
    """Splits of a data set, as far as its files or its hub tell."""
    if name == 'digits' or name in ('torch/cifar10', 'torch/cifar100'):
        return ['train', 'test']
    if name.startswith('hfds/'):
        path, _, config = name[len('hfds/'):].partition(':')
        with _hub_errors(name):
            return datasets.get_dataset_split_names(path, config or None)
    root = Path(name or data_dir)
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith('.'))


@contextmanager
def _hub_errors(name: str):
    try:
        yield
    except ConnectionError as error:
        raise UsageError(
            f'--dataset {name}: its hub cannot be reached and no copy is cached here. Put the files in a folder, as '
            'parquet (--dataset hfds/FOLDER) or as images with one folder per class (--dataset FOLDER)'
        ) from error
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UsageError(f'--dataset {name}: {str(error).splitlines()[0]}') from error
    except ValueError as error:  # unknown split or configuration; the library's message lists those there are
        raise UsageError(f'--dataset {name}: {str(error).splitlines()[0]}') from error


def create_source(
        name: str,
        data_dir: str | None,
        split: str | None,
        input_key: str | None = None,
        target_key: str | None = None,
        class_map: str = '',
        download: bool = False,
) -> Source:
    """Opens one split of a data set.

    Args:
        name: 'digits' (bundled), 'hfds/<hub name or folder>[:config]', 'torch/cifar10', 'torch/cifar100', the path of
            an image folder, or '' for an image folder at data_dir.
        data_dir: Root of an image folder or of torchvision's files; cache of 'hfds/'.
        split: Exact name of a split ('hfds/' takes slices such as `train[:50%]`); None picks the first of VAL_SPLITS
            that exists.
        input_key: Image column of 'hfds/'; default: the first image column.
        target_key: Label column of 'hfds/'; default: label, else fine_label.
        class_map: timm's class map file, for image folders.
        download: Lets torchvision download.

    Raises:
        UsageError: If the name, the split or a column is unknown, listing what exists.
    """
    root = name or data_dir
    if not root or not (name in KNOWN or name.startswith('hfds/') or Path(root).is_dir()):
        shown = f'--dataset {name}' if name else f'--data-dir {data_dir or ""}'
        raise UsageError(
            f'{shown}: neither a known data set nor an existing folder; '
            f'known are {", ".join(KNOWN)}, hfds/<hub name or folder>, or the path of an image folder'
        )
    splits = list_splits(name, data_dir)
    if split is None:
        split = next((s for s in VAL_SPLITS if s in splits), None)
        if split is None:
            raise UsageError(f'{root}: none of the splits {", ".join(splits)} is named as one for '
                             'evaluation; name it with --val-split')
    if split.partition('[')[0] not in splits or ('[' in split and not name.startswith('hfds/') and name != 'digits'):
        raise UsageError(f'{root}: no split {split}; it has {", ".join(splits) or "none"}')

    if name == 'digits':
        files = {s: str(BUNDLED / f'{s}.parquet') for s in splits}
        return HFSource(datasets.load_dataset('parquet', data_files=files, split=split), f'digits {split}', None, None)
    if name.startswith('hfds/'):
        path, _, config = name[len('hfds/'):].partition(':')
        with _hub_errors(name):
            dataset = datasets.load_dataset(path, config or None, split=split, cache_dir=data_dir)
        return HFSource(dataset, f'{path} {split}', input_key, target_key)
    if name.startswith('torch/'):
        cls = tv_datasets.CIFAR10 if name == 'torch/cifar10' else tv_datasets.CIFAR100
        try:
            dataset = cls(data_dir or '.', train=split == 'train', download=download)
        except RuntimeError as error:
            raise UsageError(f'{name}: {error} (--data-dir, --dataset-download)') from error
        return ArraySource(dataset.data, dataset.targets, dataset.classes, f'{name} {split}')
    return FolderSource(Path(root) / split, class_map)


def select_labeled(targets: torch.Tensor, num_labels: int, num_classes: int, seed: int) -> torch.Tensor:
    """Draws the labeled images, balanced over the classes.

    A generator of its own makes the draw depend on the targets and the seed alone. Where num_labels is no multiple of
    the number of classes, a random choice of classes gets one more than the others.

    Args:
        targets: `[N]` int64; -1 is never drawn.
        num_labels: In total.
        num_classes: K.
        seed: Of the draw.

    Returns:
        `[num_labels]` int64 indices, ascending.

    Raises:
        UsageError: If num_labels is below num_classes or a class has too few images.
    """
    if num_labels < num_classes:
        raise UsageError(f'--num-labels {num_labels}: at least one for each of the {num_classes} classes is needed')
    generator = np.random.default_rng(seed)
    wanted = np.full(num_classes, num_labels // num_classes)
    wanted[generator.permutation(num_classes)[:num_labels % num_classes]] += 1
    drawn = []
    for label, number in enumerate(wanted):
        members = (targets == label).nonzero().squeeze(1).numpy()
        if len(members) < number:
            raise UsageError(
                f'--num-labels {num_labels}: asks for {number} images of class {label}, which has {len(members)}'
            )
        drawn.append(generator.choice(members, number, replace=False))
    return torch.from_numpy(np.sort(np.concatenate(drawn)))


def write_labels(path: Path, index: torch.Tensor, target: torch.Tensor, **about) -> None:
    """Writes the labeled draw as JSON: index and target lists, and what they belong to."""
    content = dict(about, num_labels=len(index), index=index.tolist(), target=target.tolist())
    path.write_text(json.dumps(content, indent=1) + '\n')


def read_labels(path: str | Path, targets: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads a labels file back: indices `[L]` int64 and their labels `[L]` int64.

    Raises:
        UsageError: If the file is missing or broken, or does not fit the data set.
    """
    try:
        content = json.loads(Path(path).read_text())
        index, target = (torch.tensor(content[key], dtype=torch.int64) for key in ('index', 'target'))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f'{type(error).__name__} {error}'
        raise UsageError(f'--labels-file {path}: {reason}; expected index and target lists') from error
    if index.ndim != 1 or index.shape != target.shape or not len(index):
        raise UsageError(f'--labels-file {path}: index and target must be lists of one length, and not empty')
    if len(index.unique()) != len(index):
        raise UsageError(f'--labels-file {path}: an index stands there twice')
    if index.min() < 0 or index.max() >= len(targets):
        raise UsageError(f'--labels-file {path}: an index is outside of the {len(targets)} images of this split')
    if target.min() < 0 or target.max() >= num_classes:
        raise UsageError(f'--labels-file {path}: a label is outside of the {num_classes} classes')
    return index, target


def item_seed(*parts: int | str) -> int:
    """63-bit seed from any parts, the same on every machine and in every process (unlike hash())."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


@contextmanager
def seeded(seed: int):
    """Runs a block on Python's global generator, seeded, and puts its state back. The views draw from no other."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


class ViewDataset(torch.utils.data.Dataset):
    """One or more views of the images of a source, each item with its label and index.

    A key `(pass, i)` gives the views drawn for that pass over the data; a plain `i` is for views without randomness.

    Args:
        source: The images.
        views: Transform of each view by name, PIL -> uint8 tensor.
        index: `[n]` int64, which images of the source belong; item i shows image index[i]. Default: all.
        targets: `[n]` int64 to override the source's labels.
        seed: With the stream's name, governs the views.
        stream: Sets of one run that must not share random numbers have different names.
        skip_bad: An image that cannot be decoded is stepped over: the item is then the next good one, with that one's
            own label and index, and `skipped` holds the index in the source of the bad one (else -1).

    Items are dicts: each view `[C, H, W]`, target, index (position i in this set) and skipped.
    """

    def __init__(
            self,
            source: Source,
            views: dict[str, Callable],
            index: torch.Tensor | None = None,
            targets: torch.Tensor | None = None,
            seed: int = 0,
            stream: str = '',
            skip_bad: bool = False,
    ):
        self.source, self.views, self.seed, self.stream, self.skip_bad = source, views, seed, stream, skip_bad
        self.index = torch.arange(len(source)) if index is None else index
        self.targets = source.targets[self.index] if targets is None else targets

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, int]) -> dict | ImageError:
        data_pass, i = key if isinstance(key, tuple) else (0, key)
        skipped = -1
        for _ in range(len(self)):
            try:
                image = self.source.image(int(self.index[i]))
            except ImageError as error:
                if not self.skip_bad:
                    return error
                skipped, i = int(self.index[i]), (i + 1) % len(self)
                continue
            with seeded(item_seed(self.seed, self.stream, data_pass, i)):
                views = {name: view(image) for name, view in self.views.items()}
            return dict(views, target=int(self.targets[i]), index=i, skipped=skipped)
        return ImageError(f'none of the {len(self)} images can be decoded')


def collate(items: list) -> dict | ImageError:
    """Batches items. An error travels as a value: raised in a worker, it would arrive as a wall of traceback."""
    for item in items:
        if isinstance(item, ImageError):
            return item
    return torch.utils.data.default_collate(items)


class EndlessBatches(torch.utils.data.Sampler):
    """Batches of `(pass, index)` keys without end; every pass over the data holds each index once, in a new order.

    The passes form one stream, cut into joined batches of `batch_size * num_processes`, of which each process takes its
    own part; a batch may reach into the next pass. Nothing is ever skipped or padded, and the position is just the
    number of batches drawn, which makes a resume exact.

    Args:
        length: Size of the set.
        batch_size: Per process.
        rank: This process.
        num_processes: Processes in all.
        seed: With the stream's name, governs the order.
        stream: Name of the set.
        start: Batches drawn so far.

    Raises:
        UsageError: If the set is empty.
    """

    def __init__(
            self,
            length: int,
            batch_size: int,
            rank: int = 0,
            num_processes: int = 1,
            seed: int = 0,
            stream: str = '',
            start: int = 0,
    ):
        if length < 1:
            raise UsageError(f'the {stream or "training"} set is empty')
        self.length, self.batch_size, self.rank, self.num_processes = length, batch_size, rank, num_processes
        self.seed, self.stream, self.start = seed, stream, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders = {}
        position = (self.start * self.num_processes + self.rank) * self.batch_size
        while True:
            batch = []
            for p in range(position, position + self.batch_size):
                data_pass, offset = divmod(p, self.length)
                if data_pass not in orders:
                    generator = torch.Generator().manual_seed(item_seed(self.seed, self.stream, data_pass))
                    orders = {k: v for k, v in orders.items() if k == data_pass - 1}
                    orders[data_pass] = torch.randperm(self.length, generator=generator).tolist()
                batch.append((data_pass, orders[data_pass][offset]))
            yield batch
            position += self.batch_size * self.num_processes


def create_loader(
        dataset: ViewDataset,
        batches: torch.utils.data.Sampler | list,
        workers: int = 0,
        pin_memory: bool = False,
) -> torch.utils.data.DataLoader:
    """DataLoader over lists of keys, with a generator of its own so that making one draws no global random number."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
    )


def evaluation_batches(length: int, batch_size: int, rank: int = 0, num_processes: int = 1) -> list[list[int]]:
    """This process's part of a set, in batches: every index exactly once over all processes, without padding."""
    own = range(rank, length, num_processes)
    return [list(own[i:i + batch_size]) for i in range(0, len(own), batch_size)]


class FlipCrop:
    """Random crop of a square out of an image with a reflected border, and a random mirror image of it.

    torchvision's RandomCrop pads by reflection too, at ten times the cost for a 32-pixel image.

    Args:
        size: Side of the crop in pixels; the image has at least this height and width.
        border: Width of the reflected border in pixels, below the image's size.
        hflip: Probability of mirroring.
    """

    def __init__(self, size: int, border: int, hflip: float):
        self.size, self.border, self.hflip = size, border, hflip

    def __call__(self, image: Image.Image) -> Image.Image:
        pixels = np.asarray(image)
        rows, columns = (self._reflected(length) for length in pixels.shape[:2])
        if random.random() < self.hflip:
            columns = columns[::-1]
        return Image.fromarray(pixels[rows[:, None], columns])

    def _reflected(self, length: int) -> np.ndarray:
        """Indices of a random window into `length` pixels, mirrored where it leaves them."""
        start = random.randint(-self.border, length + self.border - self.size)
        window = np.abs(np.arange(start, start + self.size))
        return np.where(window < length, window, 2 * (length - 1) - window)


# RandAugment's operations as FixMatch uses them (arXiv 2001.07685, appendix), in timm's names.
STRONG_OPS = (
    'AutoContrast', 'Brightness', 'Color', 'Contrast', 'Equalize', 'PosterizeOriginal', 'Rotate', 'Sharpness',
    'ShearX', 'ShearY', 'SolarizeIncreasing', 'TranslateXRel', 'TranslateYRel',
)


class StrongAugment:
    """RandAugment with uniform magnitudes, then Cutout.

    The operations are timm's. FixMatch's list has the identity as a 14th, which here is each operation's chance of 1/14
    to do nothing.

    Args:
        num_ops: Operations an image, drawn with replacement.
        cutout: Largest side of the blanked square, as a share of the image's; the side is drawn uniformly from zero on,
            and the square may reach over the edge.
        fill: Colour of what is blanked or moved in, 8 bits per channel.
    """

    def __init__(self, num_ops: int, cutout: float, fill: tuple[int, int, int]):
        hparams = dict(
            img_mean=fill,
            translate_pct=0.3,
            interpolation=Image.Resampling.BILINEAR,
            magnitude_std=float('inf'),  # timm then draws the magnitude uniformly from 0 to 10, the most
        )
        self.ops = [AugmentOp(name, prob=13 / 14, magnitude=10, hparams=hparams) for name in STRONG_OPS]
        self.num_ops, self.cutout, self.fill = num_ops, cutout, fill

    def __call__(self, image: Image.Image) -> Image.Image:
        for op in random.choices(self.ops, k=self.num_ops):
            image = op(image)
        width, height = image.size
        side = random.uniform(0, self.cutout) * width
        x, y = random.uniform(0, width) - side / 2, random.uniform(0, height) - side / 2
        box = [round(v) for v in (max(x, 0), max(y, 0), min(x + side, width), min(y + side, height))]
        if box[0] < box[2] and box[1] < box[3]:
            image.paste(self.fill, box)
        return image


def build_views(
        img_size: int,
        mean: Sequence[float],
        in_chans: int = 3,
        interpolation: str = 'bilinear',
        crop_pct: float = 1.0,
        hflip: float = 0.5,
        crop_ratio: float = 0.875,
        num_ops: int = 3,
        cutout: float = 0.5,
) -> dict[str, Callable]:
    """Transforms of METHOD section 5, PIL RGB -> uint8 `[C, S, S]`, by name: weak, strong and eval.

    weak: shorter side to img_size, flip, and a random crop out of a reflected border of `(1 - crop_ratio) * img_size`.
    strong: the weak one, then RandAugment with uniform magnitudes, then Cutout. eval: timm's.

    Args:
        img_size: S, pixels.
        mean: Per channel, of pixels in [0, 1]: the colour of what is blanked.
        in_chans: 3, or 1 for greyscale.
        interpolation: timm's name, for resizing.
        crop_pct: Share of the evaluation image that its centre crop keeps.
        hflip: Probability of a mirrored training image.
        crop_ratio: See above; 1 crops nothing.
        num_ops: Operations a strong view.
        cutout: Largest side of the blanked square, as a share of img_size; 0 for none.

    Raises:
        UsageError: If in_chans is neither 1 nor 3.
    """
    if in_chans not in (1, 3):
        raise UsageError(f'--in-chans {in_chans}: expected 1 or 3')
    to_tensor = [*([transforms.Grayscale()] if in_chans == 1 else []), transforms.PILToTensor()]
    geometry = [
        transforms.Resize(img_size, interpolation=transforms.InterpolationMode(interpolation)),
        FlipCrop(img_size, int(img_size * (1 - crop_ratio)), hflip),
    ]
    fill = tuple(round(255 * m) for m in (mean if len(mean) == 3 else (mean[0],) * 3))
    # timm's own transform ends in its own PILToTensor, after which there is nothing left to convert.
    *evaluate, _ = create_transform(
        img_size, interpolation=interpolation, crop_pct=crop_pct, normalize=False,
    ).transforms
    return dict(
        weak=transforms.Compose([*geometry, *to_tensor]),
        strong=transforms.Compose([*geometry, StrongAugment(num_ops, cutout, fill), *to_tensor]),
        eval=transforms.Compose([*evaluate, *to_tensor]),
    )
