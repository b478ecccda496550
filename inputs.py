"""Pictures as people have them, without classes: files, folders of any depth, and lists of files."""
import os
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import torch

from filelists import choose_file_column, file_names, find_files, read_rows
from folders import list_pictures, tell
from pictures import MAX_PIXELS
from program import UsageError, readable
from sources import KNOWN, HFSource, Source, create_source, look_at
from tables import find_tables, open_tables

LISTS = ('.txt', '.csv', '.tsv', '.jsonl')


class PlainFolder(Source):
    """Image files without labels.

    Args:
        paths: Of the files. A file that is not there is told when it is asked for, as a broken one is.
        names: What they are called in tables; default: the paths.
        columns: Whether they are of a list that has columns.
    """

    def __init__(self, paths: Sequence[str], names: Sequence[str] | None = None, columns: bool = False):
        self.paths, self.names, self.class_names = paths, paths if names is None else names, None
        self.columns = columns
        self.targets = torch.full((len(paths),), -1)

    def data(self, index: int) -> str:
        return self.paths[index]

    def where(self, index: int) -> str:
        return readable(self.paths[index])

    def ending_with(self, endings: Sequence[str]) -> Sequence[int]:
        return [i for i, path in enumerate(self.paths) if path.lower().endswith(tuple(endings))]


def read_list(file: Path, root: Path | None = None, column: str | None = None) -> PlainFolder:
    """The pictures that a list names, in its order: .txt, a path a line; .csv, .tsv or .jsonl, a row a picture.

    Args:
        file: The list, in UTF-8.
        root: What its paths are relative to; default: the list's folder.
        column: Of the paths; default: as `filelists.choose_file_column` finds it.

    Raises:
        UsageError: If it cannot be read, has no such column, or none of its files exists.
    """
    root = file.parent if root is None else root
    if file.suffix.lower() == '.txt':
        try:
            names = [line for line in file.read_text(encoding='utf-8-sig').split('\n') if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f'{file}: cannot be read: {getattr(error, "strerror", None) or error}') from error
    else:
        rows = read_rows(file)
        at = rows.columns.index(choose_file_column(rows.columns, file, column))
        names = file_names(rows, at, file)
    paths, missing = find_files(names, f'{root}', file)
    if paths and len(missing) == len(paths):
        raise UsageError(f'{file}: none of its {len(paths)} files exists, such as {paths[0]}; paths are taken as '
                         f'relative to {root} (--data-dir names another folder)')
    return PlainFolder(paths, names, file.suffix.lower() != '.txt')


def limited(source: Source, max_pixels: int) -> Source:
    """The source with its limit of pixels, and the depth of its greyscale pictures found."""
    source.bits, source.max_pixels = look_at(source) if len(source) else 8, max_pixels
    return source


def open_pictures(
        name: str,
        data_dir: str | None = None,
        split: str | None = None,
        input_key: str | None = None,
        download: bool = False,
        max_pixels: int = MAX_PIXELS,
) -> Source:
    """An image set without need of labels.

    Args:
        name: A folder or .parquet files, of which all is taken unless a split is named; a list (see `read_list`); a
            picture; or as for `create_source`.
        data_dir: What the paths of a list are relative to; else as for `create_source`.
        split: As for `create_source`.
        input_key: Column of the pictures, or in a list of their paths.
        download: As for `create_source`.
        max_pixels: Likewise.

    Raises:
        UsageError: If there is no such thing, or it cannot be read.
    """
    path = Path(name)
    if split is None and name and name not in KNOWN:
        if path.is_dir() and not find_tables(path):
            listing = list_pictures(str(path.absolute()))
            tell(f'{path}: {listing.tell()}' if listing.tell() else '')
            if not listing.pictures and not any(path.glob('*.json')):  # JSON: of a data set that `datasets` saved
                raise UsageError(f'{path}: no picture in it{listing.tell() and f" ({listing.tell()})"}')
            if listing.pictures:
                return limited(PlainFolder([os.path.join(name, found) for found in listing.pictures]), max_pixels)
        elif name.lower().endswith('.parquet') and glob(name, recursive=True):
            tables = open_tables(sorted(glob(name, recursive=True)))
            return limited(HFSource(tables, name, input_key, labeled=False), max_pixels)
        elif path.is_file():
            if path.suffix.lower() not in LISTS:
                return limited(PlainFolder([name]), max_pixels)
            return limited(read_list(path, Path(data_dir) if data_dir else None, input_key), max_pixels)
    return create_source(name, data_dir, split, input_key, download=download, labeled=False, max_pixels=max_pixels)
