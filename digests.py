"""What pictures are, by content: digests of the undecoded images, and where the same ones stand in another set."""
import hashlib
import logging
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from program import UsageError
from sources import Source

_logger = logging.getLogger('train')

MOST_DIGESTS = 10_000  # labeled images whose content is kept; of more labels, as many that are spread over them
SAMPLE = 256  # unlabeled images whose content is kept
SEARCH_MOST = 200_000  # images that a picture is looked for among
SEARCH_BYTES = 2 ** 29  # that are read for it


def spread(number: int, most: int) -> torch.Tensor:
    """All of 0 to number - 1, or `most` that are spread evenly over them; `[n]` int64."""
    return torch.arange(number) if number <= most else torch.arange(most) * number // most


def digest_pictures(source: Source, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Digests of undecoded images: of a file's or cell's bytes, or of an array's.

    Args:
        source: The images.
        index: `[n]` int64.

    Returns:
        Digests `[n]` int64, 0 for an image that cannot be read, and bytes of each `[n]` int64.
    """
    digests, sizes = [], []
    for data in source.data_of(index.tolist()):
        if isinstance(data, np.ndarray):
            data = np.ascontiguousarray(data).data
        elif not isinstance(data, bytes):
            try:
                data = Path(data).read_bytes()
            except OSError:  # reading the image for training tells of it, or steps over it
                data = b''
        size = memoryview(data).nbytes
        digest = hashlib.blake2b(data, digest_size=8).digest() if size else bytes(8)
        digests.append(int.from_bytes(digest, 'little', signed=True))
        sizes.append(size)
    return torch.tensor(digests, dtype=torch.int64), torch.tensor(sizes, dtype=torch.int64)


def to_text(digests: torch.Tensor) -> list[str]:
    return [f'{digest % 2 ** 64:016x}' for digest in digests.tolist()]


def from_text(digests: list[str]) -> torch.Tensor:
    """Inverse of `to_text`; raises ValueError or TypeError if it is none of its lists."""
    values = [int.from_bytes(int(digest, 16).to_bytes(8, 'little'), 'little', signed=True) for digest in digests]
    return torch.tensor(values, dtype=torch.int64)


def shared_pictures(source: Source, digests: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor | None:
    """Images of a source that are among known ones, by content.

    Only those are read that are as long as one of the known ones.

    Args:
        source: The images to look through.
        digests: Of the known images, `[d]` int64.
        sizes: Their bytes, `[d]` int64.

    Returns:
        Indices `[n]` int64, or None where too much would have to be read.
    """
    if len(source) > SEARCH_MOST:
        return None
    here = torch.from_numpy(source.sizes())
    candidates = torch.isin(here, sizes) | (here < 0)
    if int(here[candidates].clamp(min=0).sum()) > SEARCH_BYTES:
        return None
    index = candidates.nonzero().squeeze(1)
    found = digest_pictures(source, index)[0]
    return index[torch.isin(found, digests) & (found != 0)]


def place_pictures(
        what: str,
        source: Source,
        index: torch.Tensor,
        rows: torch.Tensor,
        digests: torch.Tensor,
) -> torch.Tensor:
    """Where pictures stand that a file lists by position and content.

    Args:
        what: The file, for messages.
        source: The set that they are looked for in.
        index: Their positions when the file was written, `[L]` int64.
        rows: Rows of index whose digests are known, `[d]` int64.
        digests: `[d]` int64.

    Returns:
        Positions `[L]` int64: the same ones, or where the set is in another order now, the new ones.

    Raises:
        UsageError: If a picture is not in the set any more; names the first that differs.
    """
    inside = index[rows] < len(source)
    here = torch.zeros_like(digests)
    here[inside] = digest_pictures(source, index[rows][inside])[0]
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
    for place, digest in enumerate(digest_pictures(source, torch.arange(len(source)))[0].tolist()):
        places[digest].append(place)
    found = [places[digest].pop(0) if places[digest] and digest else -1 for digest in digests.tolist()]
    missing = found.count(-1)
    if missing:
        raise UsageError(f'{told}, and {missing} of the {len(index)} labeled pictures are nowhere in it; give the data '
                         'as it was, or draw labels anew')
    _logger.warning(f'{told}; all {len(index)} labeled pictures were found elsewhere by content, and their labels '
                    'follow them')
    return torch.tensor(found)
