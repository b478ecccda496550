"""Pictures as people have them, without classes: files, folders of any depth, and lists of files."""
import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import torch
from PIL import Image
from timm.utils.misc import natural_key

from program import UsageError
from sources import KNOWN, HFSource, Source, create_source, open_tables

_logger = logging.getLogger(__name__)

LISTS = ('.txt', '.csv', '.tsv', '.jsonl')
FILE_COLUMNS = ('file_name', 'filename', 'path', 'image')
# Pillow opens these, but they are no pictures, or need programs of others.
NO_PICTURES = {'.bufr', '.eps', '.fits', '.fit', '.grib', '.h5', '.hdf', '.mpeg', '.mpg', '.ps', '.emf', '.wmf'}


class PlainFolder(Source):
    """Image files without labels.

    Args:
        paths: Of the files. A file that is not there is told when it is asked for, as a broken one is.
        names: What they are called in tables; default: the paths.
    """

    def __init__(self, paths: Sequence[str], names: Sequence[str] | None = None):
        self.paths, self.names, self.class_names = paths, paths if names is None else names, None
        self.targets = torch.full((len(paths),), -1)

    def data(self, index: int) -> str:
        return self.paths[index]

    def where(self, index: int) -> str:
        return self.paths[index]


def picture_suffixes() -> set[str]:
    """Endings of the files that Pillow can open as pictures, in lower case with the dot."""
    return {end for end, form in Image.registered_extensions().items() if form in Image.OPEN} - NO_PICTURES


def list_pictures(folder: Path) -> list[str]:
    """All pictures below a folder, in natural order of their paths; hidden files and folders are left out.

    Files that are no pictures are counted and told.

    Raises:
        UsageError: If a folder cannot be read.
    """
    def stop(error: OSError):
        raise UsageError(f'{error.filename}: cannot be read: {error.strerror}') from error

    known, found, others = picture_suffixes(), [], Counter()
    seen = set()  # a link to a folder above would be followed for ever
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=stop):
        here = os.stat(parent)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in files:
            end = os.path.splitext(name)[1].lower()
            if name.startswith('.'):
                continue
            if end in known:
                found.append(os.path.join(parent, name))
            else:
                others[end or 'without ending'] += 1
    if others:
        kinds = ', '.join(f'{number} {end}' for end, number in others.most_common(5))
        _logger.warning(f'{folder}: {sum(others.values())} files are no pictures that can be opened ({kinds}): left '
                        'out')
    return sorted(found, key=natural_key)


def read_list(file: Path, root: Path | None = None, column: str | None = None) -> PlainFolder:
    """The pictures that a list names, in its order: .txt, a path a line; .csv, .tsv or .jsonl, a row a picture.

    Args:
        file: The list, in UTF-8.
        root: What its paths are relative to; default: the list's folder.
        column: Of the paths; default: the first of FILE_COLUMNS that there is.

    Raises:
        UsageError: If it cannot be read, has no such column, or none of its files exists.
    """
    root = file.parent if root is None else root
    try:
        with open(file, encoding='utf-8-sig', newline='' if file.suffix.lower() in ('.csv', '.tsv') else None) as lines:
            if file.suffix.lower() == '.txt':
                names = [line.rstrip('\n') for line in lines if line.strip()]
            else:
                names = _read_column(file, lines, column)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f'{file}: cannot be read: {getattr(error, "strerror", None) or error}') from error
    paths = [os.path.join(root, name) for name in names]
    if paths and not any(map(os.path.isfile, paths)):
        raise UsageError(f'{file}: none of its {len(paths)} files exists, such as {paths[0]}; paths are taken as '
                         f'relative to {root} (--data-dir names another folder)')
    return PlainFolder(paths, names)


def _read_column(file: Path, lines, column: str | None) -> list[str]:
    if file.suffix.lower() == '.jsonl':
        try:
            rows = [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise UsageError(f'{file}: expected a JSON object a line: {error}') from error
        if not all(isinstance(row, dict) for row in rows):
            raise UsageError(f'{file}: expected a JSON object a line')
        columns = list(rows[0]) if rows else FILE_COLUMNS
    else:
        reader = csv.DictReader(lines, delimiter='\t' if file.suffix.lower() == '.tsv' else ',', strict=True)
        rows, columns = list(reader), reader.fieldnames or []
    column = column or next((name for name in FILE_COLUMNS if name in columns), None)
    if column not in columns:
        raise UsageError(f'{file}: no column {column or " or ".join(FILE_COLUMNS)} of file names; it has '
                         f'{", ".join(columns) or "none"} (--input-key)')
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(column), str) or not row[column]:
            raise UsageError(f'{file}: row {number} has no file name in column {column}')
    return [row[column] for row in rows]


def open_pictures(
        name: str,
        data_dir: str | None = None,
        split: str | None = None,
        input_key: str | None = None,
        download: bool = False,
) -> Source:
    """An image set without need of labels.

    Args:
        name: A folder or .parquet files, of which all is taken unless a split is named; a list (see `read_list`); a
            picture; or as for `create_source`.
        data_dir: What the paths of a list are relative to; else as for `create_source`.
        split: As for `create_source`.
        input_key: Column of the pictures, or in a list of their paths.
        download: As for `create_source`.

    Raises:
        UsageError: If there is no such thing, or it cannot be read.
    """
    path = Path(name)
    if split is None and name and name not in KNOWN:
        if path.is_dir():
            found = list_pictures(path)
            if found:
                return PlainFolder(found)
        elif name.endswith('.parquet') and glob(name, recursive=True):
            return HFSource(open_tables(sorted(glob(name, recursive=True))), name, input_key, labeled=False)
        elif path.is_file():
            is_list = path.suffix.lower() in LISTS
            return read_list(path, Path(data_dir) if data_dir else None, input_key) if is_list else PlainFolder([name])
    return create_source(name, data_dir, split, input_key, download=download, labeled=False)
