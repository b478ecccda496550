"""What pictures are, by content: digests of the undecoded images, and where the same ones stand in another set."""
import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from program import UsageError
from sources import Source

_logger = logging.getLogger('train')

MOST_DIGESTS = 10_000  # labeled images whose content is kept; of more labels, as many that are spread over them
SAMPLE = 256  # unlabeled images whose content is kept
SEARCH_MOST = 200_000  # images that a moved picture is looked for among
COMPARED_MOST = 50_000  # images of a set that are compared with another set's; of more, as many that are spread over it
COMPARED_BYTES = 2 ** 28  # that are read of each of the two
COMPARED_FILES = 5000  # of each of the two that are opened where a number is to be told and nothing is refused


def spread(number: int, most: int) -> torch.Tensor:
    """All of 0 to number - 1, or `most` that are spread evenly over them; `[n]` int64."""
    return torch.arange(number) if number <= most else torch.arange(most) * number // most


def digest_pictures(source: Source, index: torch.Tensor) -> torch.Tensor:
    """Digests of undecoded images `[n]` int64; see `digest_data`."""
    return digest_data(source.data_of(index.tolist()))


def digest_data(content: Iterable[bytes | str | np.ndarray]) -> torch.Tensor:
    """Digests `[n]` int64 of bytes, of what a file holds, or of an array; 0 where none can be read."""
    digests = []
    for data in content:
        if isinstance(data, np.ndarray):
            data = np.ascontiguousarray(data).data
        elif not isinstance(data, bytes):
            try:
                data = Path(data).read_bytes()
            except OSError:  # reading the image for training tells of it, or steps over it
                data = b''
        digest = hashlib.blake2b(data, digest_size=8).digest() if len(data) else bytes(8)
        digests.append(int.from_bytes(digest, 'little', signed=True))
    return torch.tensor(digests, dtype=torch.int64)


def to_text(digests: torch.Tensor) -> list[str]:
    return [f'{digest % 2 ** 64:016x}' for digest in digests.tolist()]


def from_text(digests: list[str]) -> torch.Tensor:
    """Inverse of `to_text`; raises ValueError or TypeError if it is none of its lists."""
    values = [int.from_bytes(int(digest, 16).to_bytes(8, 'little'), 'little', signed=True) for digest in digests]
    return torch.tensor(values, dtype=torch.int64)


class Contents:
    """Images of a set, to be compared with those of others; nothing is read of them before that, or twice.

    Args:
        source: The set.
        index: Positions in it, `[n]` int64; default: all.

    Attributes:
        whole: All positions, `[n]` int64.
        index: Those that are compared, `[m]` int64.
    """

    def __init__(self, source: Source, index: torch.Tensor | None = None):
        index = torch.arange(len(source)) if index is None else index
        self.source, self.whole, self.index = source, index, index[spread(len(index), COMPARED_MOST)]
        self.known = {}

    def read(self, what: Callable, rows: np.ndarray) -> np.ndarray:
        """What a function of source and positions `[r]` says of rows of `index`, `[r]` int64."""
        values, done = self.known.setdefault(what, np.zeros((2, len(self.index)), np.int64))
        new = rows[done[rows] == 0]
        if len(new):
            values[new], done[new] = what(self.source, self.index[torch.from_numpy(new)]), 1
        return values[rows]


def _sizes(source: Source, index: torch.Tensor) -> np.ndarray:
    return source.sizes(index.numpy())


def _tails(source: Source, index: torch.Tensor) -> np.ndarray:
    return source.tails(index.numpy())


def shared_pictures(
        one: Contents,
        other: Contents,
        most_files: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Images of one set that are in another too, by content.

    Read whole are only images that agree in size and in some bytes with one of the other set, and of these no more than
    COMPARED_BYTES in either.

    Args:
        one, other: The sets.
        most_files: Of more files of sizes that both sets have, those of some sizes are compared.

    Returns:
        Positions in both, `[n]` int64 each, where an image that is several times in the second set is found at one
        place there; and 'at least ' if not all could be compared, else ''.
    """
    least = any(len(contents.index) < len(contents.whole) for contents in (one, other))
    rows = [np.arange(len(contents.index)) for contents in (one, other)]
    for what in (_sizes, _tails, digest_pictures):
        files = max((len(row) for row, contents in zip(rows, (one, other)) if contents.source.in_files()), default=0)
        if what is _tails and most_files is not None and files > most_files:
            sizes = [contents.read(_sizes, row) for row, contents in zip(rows, (one, other))]
            known = np.unique(sizes[0])
            known = known[spread(len(known), max(len(known) * most_files // files, 1)).numpy()]
            rows, least = [row[np.isin(size, known)] for row, size in zip(rows, sizes)], True
        if what is digest_pictures:
            for side, contents in enumerate((one, other)):
                size = int(contents.read(_sizes, rows[side]).sum())
                fit = len(rows[side]) * COMPARED_BYTES // max(size, 1)
                least = least or fit < len(rows[side])
                rows[side] = rows[side][spread(len(rows[side]), max(fit, 1)).numpy()]
        found = [contents.read(what, rows[side]) for side, contents in enumerate((one, other))]
        both = [np.isin(found[0], found[1]), np.isin(found[1], found[0])]
        if what is not _tails:  # a size or digest of 0 is that of an image that cannot be read
            both = [kept & (value != 0) for kept, value in zip(both, found)]
        rows = [row[kept] for row, kept in zip(rows, both)]
    digests = [contents.read(digest_pictures, rows[side]) for side, contents in enumerate((one, other))]
    place = {digest: row for digest, row in zip(digests[1].tolist()[::-1], rows[1].tolist()[::-1])}
    second = torch.tensor([place[digest] for digest in digests[0].tolist()], dtype=torch.int64)
    return one.index[torch.from_numpy(rows[0])], other.index[second], 'at least ' * least


def place_pictures(
        what: str,
        source: Source,
        index: torch.Tensor,
        rows: torch.Tensor,
        digests: torch.Tensor,
        kind: str = 'labeled',
) -> torch.Tensor:
    """Where pictures stand that a file lists by position and content.

    Args:
        what: The file, for messages.
        source: The set that they are looked for in.
        index: Their positions when the file was written, `[L]` int64.
        rows: Rows of index whose digests are known, `[d]` int64.
        digests: `[d]` int64.
        kind: Of pictures, for messages.

    Returns:
        Positions `[L]` int64: the same ones, or where the set is in another order now, the new ones.

    Raises:
        UsageError: If a picture is not in the set any more; names the first that differs.
    """
    inside = index[rows] < len(source)
    here = torch.zeros_like(digests)
    here[inside] = digest_pictures(source, index[rows][inside])
    differs = here != digests
    if not differs.any() and int(index.max()) < len(source):
        return index
    row = int(rows[differs][0]) if differs.any() else int(index.argmax())
    position = int(index[row])
    now = source.where(position) if position < len(source) else f'this set ends at {len(source)}'
    told = f'{what}: the data has changed since: picture {position} ({now}) is another one'
    if len(rows) < len(index) or len(source) > SEARCH_MOST:
        raise UsageError(f'{told}; give the data in the order that it had')
    places = defaultdict(list)
    for place, digest in enumerate(digest_pictures(source, torch.arange(len(source))).tolist()):
        places[digest].append(place)
    found = [places[digest].pop(0) if places[digest] and digest else -1 for digest in digests.tolist()]
    missing = found.count(-1)
    if missing:
        raise UsageError(f'{told}, and {missing} of the {len(index)} {kind} pictures are nowhere in it; give the data '
                         f'as it was{", or draw labels anew" * (kind == "labeled")}')
    _logger.warning(f'{told}; all {len(index)} {kind} pictures were found elsewhere by content'
                    f'{", and their labels follow them" * (kind == "labeled")}')
    return torch.tensor(found)
