"""Items and batches of a training: images with their views, endless sampling, loaders, batches on the device.

Nothing random here depends on processes, workers or resumes. The order of the data is a function of (seed, pass), and
the augmentation of an item a function of (seed, pass, index): an item draws from generators seeded for itself.
"""
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from labels import Labels
from program import UsageError, name_some
from seeds import item_seed, seeded
from sources import ImageError, Source
from splits import Identity

_logger = logging.getLogger('train')

KEEP_DECODED = 64 * 2 ** 20  # bytes; a worker keeps the decoded images of a set that is smaller
HOLD_DECODED = 2 * 2 ** 30  # bytes; small images of one size are held decoded, once for all workers, up to this
SMALL = 96  # pixels; a larger side pays little for batched views and much for the memory


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
            own label and index, and `skipped` holds the index in the source of the one asked for (else -1).
        least: Pixels that the views need of an image's sides; see `decode_image`.

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
            least: int | None = None,
    ):
        self.source, self.views, self.seed, self.stream = source, views, seed, stream
        self.skip_bad, self.least = skip_bad, least
        self.index = torch.arange(len(source)) if index is None else index
        self.targets = source.targets[self.index] if targets is None else targets
        self.decoded = {}

    def __len__(self) -> int:
        return len(self.index)

    def _image(self, index: int) -> Image.Image:
        if index in self.decoded:
            return self.decoded[index]
        image = self.source.image(index, self.least)
        if 3 * image.width * image.height * len(self) <= KEEP_DECODED:
            self.decoded[index] = image
        return image

    def __getitem__(self, key: int | tuple[int, int]) -> dict | ImageError:
        data_pass, i = key if isinstance(key, tuple) else (0, key)
        skipped = -1
        for _ in range(len(self)):
            try:
                image = self._image(int(self.index[i]))
            except ImageError as error:
                if not self.skip_bad:
                    return ImageError(f'{error} (--skip-bad-images leaves such images out)')
                skipped = int(self.index[i]) if skipped < 0 else skipped
                i = (i + 1) % len(self)
                continue
            with seeded(item_seed(self.seed, self.stream, data_pass, i)):
                views = {name: view(image) for name, view in self.views.items()}
            return dict(views, target=int(self.targets[i]), index=i, skipped=skipped)
        return ImageError(f'none of the {len(self)} images can be decoded')


class BatchDataset(ViewDataset):
    """A set whose images are held decoded; DataLoader takes whole batches of it, by a list of keys.

    Args:
        dataset: The set, with its seed and stream.
        pixels: `[n, ...]` uint8, as `decode_all` returns it.
        shown: `[n]` int64, likewise.
        views: A `views.BatchViews`, or None: the pixels are the view `image` already.
        defer: Leaves the views to whoever has the batch on a GPU: it then holds pixels and numbers, their arguments.
    """

    def __init__(
            self,
            dataset: ViewDataset,
            pixels: torch.Tensor,
            shown: torch.Tensor,
            views: Callable | None = None,
            defer: bool = False,
    ):
        super().__init__(
            dataset.source, dataset.views, dataset.index, dataset.targets, dataset.seed, dataset.stream,
            dataset.skip_bad, dataset.least,
        )
        self.pixels, self.shown, self.batch_views, self.defer = pixels, shown, views, defer

    def __getitems__(self, keys: list[int | tuple[int, int]]) -> dict[str, torch.Tensor]:
        keys = [key if isinstance(key, tuple) else (0, key) for key in keys]
        asked = torch.tensor([i for _, i in keys])
        index = self.shown[asked]
        batch = dict(
            target=self.targets[index],
            index=index,
            skipped=torch.where(index == asked, -1, self.index[asked]),
        )
        pixels = self.pixels[index]
        if self.batch_views is None:
            return dict(batch, image=pixels)
        numbers = torch.tensor([
            self._numbers(data_pass, i) for (data_pass, _), i in zip(keys, index.tolist())
        ])
        if self.defer:
            return dict(batch, pixels=pixels, numbers=numbers)
        return dict(batch, **self.batch_views(pixels, numbers))

    def _numbers(self, data_pass: int, i: int) -> list[float]:
        """An image's random numbers, in [0, 1) as float32 too, which has 24 bits."""
        generator = random.Random(item_seed(self.seed, self.stream, data_pass, i))
        return [generator.getrandbits(24) * 2. ** -24 for _ in range(self.batch_views.num_numbers)]


def decode_all(dataset: ViewDataset, prepare: Callable) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Decodes a whole set, if its images are small, all of one size, and not too many to hold.

    Args:
        dataset: The set; its views are not read.
        prepare: What is done with every image, PIL -> PIL or uint8 tensor, without randomness.

    Returns:
        Pixels `[n, ...]` uint8 and `[n]` int64, the item that is shown in the place of each: itself, or with skip_bad
        the next one that can be decoded. None if the images are not such.

    Raises:
        ImageError: If an image cannot be decoded and bad ones are not skipped, or if none can be.
    """
    pixels, good = None, torch.zeros(len(dataset), dtype=torch.bool)
    for i, at in enumerate(dataset.index.tolist()):
        try:
            image = dataset.source.image(at, dataset.least)
            if max(image.size) > SMALL * min(image.size):  # not to be prepared: scaled up, a strip takes much memory
                return None
            image = np.asarray(prepare(image))
        except ImageError:
            if not dataset.skip_bad:
                raise
            continue
        if pixels is None:
            if max(image.shape) > SMALL or image.size * len(dataset) > HOLD_DECODED:
                return None
            pixels = np.zeros((len(dataset), *image.shape), np.uint8)
        if image.shape != pixels.shape[1:]:
            return None
        pixels[i], good[i] = image, True
    if pixels is None:
        raise ImageError(f'none of the {len(dataset)} images can be decoded')
    places = good.nonzero().squeeze(1)
    # The first good place from i on, beginning again behind the last one.
    shown = places[torch.searchsorted(places, torch.arange(len(dataset))) % len(places)]
    return torch.from_numpy(pixels), shown


def collate(items: list | dict) -> dict | ImageError:
    """Batches items. An error travels as a value: raised in a worker, it would arrive as a wall of traceback."""
    if isinstance(items, dict):  # a BatchDataset's
        return items
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
                    orders[data_pass] = torch.randperm(self.length, generator=generator).numpy()
                batch.append((data_pass, int(orders[data_pass][offset])))
            yield batch
            position += self.batch_size * self.num_processes


def _end_with_parent(worker: int) -> None:
    """Lets a worker outlive signals that a terminal, launcher or scheduler sends to a process and all that belongs to
    it: the parent may have work to finish, and ends its workers itself. If it dies, they notice, and say nothing."""
    def tell(kind, error, trace):
        # The thread that hands tensors over would print a traceback where the parent ended in the middle of it.
        if not issubclass(kind, (ConnectionError, EOFError)):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = tell
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, 'sigwaitinfo'):  # macOS
        return
    # Ignoring SIGTERM would not do: the parent's multiprocessing uses it too, and would wait for ever.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey_parent_only():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    threading.Thread(target=obey_parent_only, daemon=True).start()


def count_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def limit_workers(asked: int | None) -> int:
    """Workers to load with: no more than the processors, and four if no number was asked for. Tells if they are fewer
    than asked for.
    """
    processors = count_processors()
    if asked is None:
        return min(4, processors)
    if asked > processors:
        _logger.info(f'--workers {asked}: {processors} instead, one for each processor that there is')
    return min(asked, processors)


def create_loader(
        dataset: ViewDataset,
        batches: torch.utils.data.Sampler | list,
        workers: int = 0,
        pin_memory: bool | None = None,
        device: torch.device | None = None,
) -> torch.utils.data.DataLoader:
    """DataLoader over lists of keys, with a generator of its own so that making one draws no global random number.

    Memory is pinned where that is asked for, and by default (None) for a GPU: a copy from other memory waits for it.
    """
    if pin_memory is None:
        pin_memory = device is not None and device.type == 'cuda'
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
        worker_init_fn=_end_with_parent,
    )


def evaluation_batches(length: int, batch_size: int, rank: int = 0, num_processes: int = 1) -> list[list[int]]:
    """This process's part of a set, in batches: every index exactly once over all processes, without padding."""
    own = range(rank, length, num_processes)
    return [list(own[i:i + batch_size]) for i in range(0, len(own), batch_size)]


@dataclass
class DataConfig:
    """What evaluation of the run's weights needs to know."""
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float


@dataclass
class Datasets:
    """Sets of a run with their views, and what the bank must know of them."""
    labeled: ViewDataset
    unlabeled: ViewDataset | None
    evaluation: ViewDataset
    extra: ViewDataset | None  # second evaluation set
    labeled_to_unlabeled: torch.Tensor | None
    labels: Labels
    identity: Identity
    test: ViewDataset | None = None  # what --test-split names, evaluated once


def check_classes_left(dataset: ViewDataset, skipped: set[int]) -> None:
    """Raises ImageError if a class of the labeled set has lost all its images; of other sets nothing is asked.

    Args:
        dataset: The set.
        skipped: Indices in its source of images that cannot be decoded.
    """
    if dataset.stream != 'labeled' or not skipped:
        return
    bad = torch.isin(dataset.index, torch.tensor(sorted(skipped)))
    lost = sorted({*dataset.targets.tolist()} - {*dataset.targets[~bad].tolist()})
    if lost:
        names, k = dataset.source.class_names or [], lost[0]
        name = names[k] if k < len(names) else f'{k}'
        rows = dataset.index[dataset.targets == k].tolist()
        raise ImageError(f'--skip-bad-images: class {name} has none left of its {len(rows)} labeled images, as none '
                         f'can be decoded: {name_some(map(dataset.source.where, rows))}. Mend them, or label others')


class Feed:
    """Batches on the device: images as normalised float32, by timm's way of doing that there and not in the workers.

    On a GPU the next batch is copied and prepared on a stream of its own while the network has the current one, as by
    timm's PrefetchLoader, for the memory of one batch more. A copy that has to wait then waits for that stream alone.
    Images that cannot be decoded are told when the turn of their batch comes.
    """

    def __init__(
            self,
            loader,
            data_config: DataConfig,
            device: torch.device,
            channels_last: bool,
            skipped: set[int] | None = None,
    ):
        self.loader, self.device = loader, torch.device(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.mean, self.std = (
            torch.tensor(v, device=device).mul(255).view(-1, 1, 1) for v in (data_config.mean, data_config.std)
        )
        # Indices in the source of images that this process could not decode.
        self.skipped = set() if skipped is None else skipped
        self.stream = torch.cuda.Stream(self.device) if self.device.type == 'cuda' else None

    def __iter__(self) -> Iterator[dict]:
        if self.stream is None:
            for batch in self.loader:
                self._tell_skipped(batch)
                yield self._prepare(batch)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # for mean and std
        for batch, prepared, ready in one_ahead(map(self._prepare_aside, self.loader)):
            self._tell_skipped(batch)
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            for value in prepared.values():
                if isinstance(value, torch.Tensor):
                    value.record_stream(current)  # else the next batches could be written over it while it is read
            yield prepared

    def _tell_skipped(self, batch: dict | ImageError) -> None:
        """Takes note of images that could not be decoded; raises what stands in the place of a batch."""
        if isinstance(batch, ImageError):
            raise batch
        skipped = {i for i in batch['skipped'].tolist() if i >= 0}
        if not self.skipped.issuperset(skipped):
            self.skipped.update(skipped)
            check_classes_left(self.loader.dataset, self.skipped)

    def _prepare_aside(self, batch: dict | ImageError) -> tuple:
        """The batch of the loader, what `_prepare` makes of it, and the event of that being done."""
        if isinstance(batch, ImageError):
            return batch, {}, None
        with torch.cuda.stream(self.stream):
            return batch, self._prepare(batch), self.stream.record_event()

    def _prepare(self, batch: dict[str, torch.Tensor]) -> dict:
        # Known here without a wait for the device.
        repeated = len({*batch['index'].tolist()}) < len(batch['index'])
        numbers = batch.get('numbers')
        batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if k != 'numbers'}
        if numbers is not None:
            batch.update(self.loader.dataset.batch_views(batch.pop('pixels'), numbers))
        for key, value in batch.items():
            if value.dtype == torch.uint8:  # a view; the others are whole numbers of 64 bits
                image = value.to(torch.float32, memory_format=self.memory_format)
                batch[key] = image.sub_(self.mean).div_(self.std)
        return dict(batch, repeated=repeated)


def one_ahead(items: Iterable) -> Iterator:
    """The items as they are, each once the next one is there."""
    held = []
    for item in items:
        yield from held
        held = [item]
    yield from held
