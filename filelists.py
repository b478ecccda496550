"""Lists of picture files: tables of file and label (CSV, TSV, JSON lines), names of labeled files, ground truth of a
flat folder, and pictures below a folder.

A row is told by its line, and none is dropped in silence: missing files, double rows and files with two labels are
refused or counted.
"""
import csv
import json
import logging
import os
import re
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from folders import composed, list_pictures, tell, to_stored
from program import UsageError, name_some
from tables import NO_VALUE, VAL_SPLITS, clean_words, find_label_columns, refuse_pointer

FORMS = ('.csv', '.tsv', '.jsonl')
# Columns of file names; of the first group that has any, one is taken.
FILE_COLUMNS = (
    ('file_name', 'filename', 'path', 'image'),
    ('file', 'file_path', 'filepath', 'image_path', 'img_path', 'img'),
    ('image_id', 'imageid', 'id'),
)
PICTURES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.bmp', '.dib', '.tif', '.tiff', '.gif', '.ppm', '.pgm',
            '.pbm', '.pnm', '.jp2', '.avif')
SPLIT_NAMES = frozenset(('train', 'training', 'test', 'testing', 'dev', 'unlabeled', 'extra', *VAL_SPLITS))


class Rows(NamedTuple):
    """Cells of a file as text (None: empty; a list stays one), a list a column, and the line each row begins at."""
    columns: list[str]
    cells: list[list]
    lines: Sequence[int]


class Listed(NamedTuple):
    """Pictures that a file names."""
    splits: dict[str, datasets.Dataset]  # by name, each with the file's own columns; that of files holds images
    paths: list[str]  # absolute
    labels: list[str]  # columns that may each be that of the labels

    def files(self) -> frozenset[str]:
        return frozenset(self.paths)


def is_file_table(name: str | Path) -> bool:
    return str(name).lower().endswith(FORMS)


# --- Tables of file and label -----------------------------------------------------------------------------------------

def file_table_splits(
        file: Path,
        base: Path | None = None,
        input_key: str | None = None,
        target_key: str | None = None,
        skip_missing: bool = False,
) -> dict[str, Callable]:
    """The splits of a CSV, TSV or JSON lines file with a row a picture; see `list_files`."""
    listed = list_files(file, base, input_key, target_key, skip_missing)
    return {split: partial(listed.splits.__getitem__, split) for split in listed.splits}


def list_files(
        file: Path,
        base: Path | None = None,
        input_key: str | None = None,
        target_key: str | None = None,
        skip_missing: bool = False,
) -> Listed:
    """The pictures that a file names, a row a picture, as tables of their paths and the file's other columns.

    Args:
        file: .csv, .tsv or .jsonl with a header or keys, or a .parquet of file names.
        base: Folder that the paths are relative to; default: the file's own.
        input_key: Column of file names; default: see FILE_COLUMNS.
        target_key: Column of labels; default: the only one that looks like it. Words or numbers, each a class of that
            name; an empty cell is no label.
        skip_missing: Leaves rows out whose file is missing, and counts them.

    The split is in the column split, if there is one, else the first folder of each path, if all of these are names of
    splits, else train.

    Raises:
        UsageError: With the line, if a row has no file or one that is missing, or a file has two labels or splits.
    """
    file = Path(file).absolute()
    if not file.is_file():
        raise UsageError(f'{file}: no such file')
    about = file.stat()
    return _list_files(file, (about.st_size, about.st_ctime_ns), Path(base or file.parent).absolute(), input_key,
                       target_key, skip_missing)


@lru_cache(maxsize=4)
def _list_files(
        file: Path,
        state: tuple,  # of the file, so that a changed one is read again
        base: Path,
        input_key: str | None,
        target_key: str | None,
        skip_missing: bool,
) -> Listed:
    rows = read_rows(file)
    at = rows.columns.index(choose_file_column(rows.columns, file, input_key))
    found = [target_key] if target_key in rows.columns else find_label_columns(
        dict.fromkeys(rows.columns), rows.columns[at])
    label_at = rows.columns.index(found[0]) if len(found) == 1 else None
    if label_at is not None:
        _clean_labels(rows, label_at, file)
    paths, missing = find_files(file_names(rows, at, file), f'{base}', file)
    if missing:
        note = (f'{file}: {len(missing)} of {len(paths)} files are missing, such as line {rows.lines[missing[0]]}: '
                f'{rows.cells[at][missing[0]]} (paths are relative to {base}; --data-dir names another folder)')
        if not skip_missing or len(missing) == len(paths):
            raise UsageError(note if len(missing) == len(paths) else f'{note}; --skip-missing leaves them out')
        tell(note)
    splits = _find_split_names(rows, at, file)
    for column in range(len(rows.columns)):
        if column != at:
            _flatten(rows, column, file)
    keep = _one_row_a_file(rows, paths, splits, label_at, set(missing), file)
    by_split = {}
    for i in keep:
        by_split.setdefault(splits[i], []).append(i)
    tables = {
        split: _image_table(rows.columns, [[cells[i] for i in chosen] if k != at else [] for k, cells in
                                           enumerate(rows.cells)], at, [paths[i] for i in chosen])
        for split, chosen in sorted(by_split.items())
    }
    told = []
    for split, chosen in sorted(by_split.items()):
        empty = sum(label_at is not None and not rows.cells[label_at][i] for i in chosen)
        told.append(f'{split} of {len(chosen)} pictures' + (f', {empty} of them without a label' if empty else ''))
    label = 'no known label column' if label_at is None else f'labels in {rows.columns[label_at]}'
    tell(f'{file}: files in column {rows.columns[at]}, {label}; {"; ".join(told)}', logging.INFO)
    return Listed(tables, paths, found)


def file_names(rows: Rows, at: int, file: Path) -> list[str]:
    """The column of files; raises UsageError with the line of a cell that names none."""
    for cell, line in zip(rows.cells[at], rows.lines):
        if not cell:
            raise UsageError(f'{file}, line {line}: no file in column {rows.columns[at]}')
        if not isinstance(cell, str) or '\n' in cell or '\r' in cell or '\0' in cell:
            raise UsageError(f'{file}, line {line}: column {rows.columns[at]} has no name of a file: '
                             f'{_shorten(cell)}')
    return rows.cells[at]


def _shorten(cell: str | list) -> str:
    text = repr(cell)
    return text if len(text) <= 60 else f'{text[:60]}...'


def _flatten(rows: Rows, at: int, file: Path) -> None:
    """Lists in a column become text, as such of boxes beside the labels; raises UsageError for what is no text."""
    cells = rows.cells[at]
    if any(isinstance(cell, list) for cell in cells):
        cells[:] = [json.dumps(cell) if isinstance(cell, list) else cell for cell in cells]
    try:
        pa.array(cells, pa.string())
    except UnicodeEncodeError:
        broken = next(i for i, cell in enumerate(cells) if cell and cell != cell.encode(errors='replace').decode())
        raise UsageError(f'{file}, line {rows.lines[broken]}: half a character in column {rows.columns[at]}: '
                         f'{_shorten(cells[broken])}') from None


def _absolute(base: str, name: str) -> str:
    path = name if name.startswith('/') else f'{base}/{name}'
    return os.path.normpath(path) if '/.' in path or '//' in path else path  # a tenth of the time for most


def _image_table(columns: list[str], cells: list[list], at: int, paths: list[str]) -> datasets.Dataset:
    """A table with the file's columns as text, of which that of the files holds images; cells are lists by column."""
    stored = pa.array(map(to_stored, paths), pa.string())
    image = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), stored], ['bytes', 'path'])
    arrays = {
        key: image if i == at else pa.array(cells[i], pa.string()) for i, key in enumerate(columns)
    }
    kinds = {key: datasets.Image() if i == at else datasets.Value('string') for i, key in enumerate(columns)}
    return datasets.Dataset(pa.table(arrays).cast(datasets.Features(kinds).arrow_schema))


def choose_file_column(columns: Sequence[str], file: Path, asked: str | None) -> str:
    there = ', '.join(columns)
    if asked is not None:
        if asked not in columns:
            raise UsageError(f'{file}: no column {asked}; it has {there} (--input-key)')
        return asked
    for group in FILE_COLUMNS:
        found = [column for column in columns if column.lower() in group]
        if len(found) > 1:
            raise UsageError(f'{file}: {" and ".join(found)} may each be the column of files; choose one (--input-key)')
        if found:
            return found[0]
    raise UsageError(f'{file}: no column of files in its first line; it has {there} (expected '
                     f'{", ".join(FILE_COLUMNS[0])}, or --input-key)')


def read_rows(file: Path) -> Rows:
    """A CSV, TSV, JSON lines or parquet file as text.

    Raises:
        UsageError: With the line, if the file cannot be read or a row does not fit the header.
    """
    refuse_pointer(file)
    try:
        if file.suffix.lower() == '.parquet':
            table = pq.read_table(file)
            cells = [[*map(_as_text, column.to_pylist())] for column in table.columns]
            return Rows(table.column_names, cells, range(1, len(table) + 1))
        with open(file, newline='', encoding='utf-8-sig') as opened:
            rows = _read_json_lines(opened, file) if file.suffix.lower() == '.jsonl' else _read_csv(opened, file)
    except UnicodeDecodeError as error:
        raise UsageError(f'{file}: not in UTF-8 (byte {error.start}); save it in that encoding') from error
    except (OSError, csv.Error, pa.ArrowException) as error:
        raise UsageError(f'{file}: cannot be read: {" ".join(str(error).split())}') from error
    if not rows.lines:
        raise UsageError(f'{file}: no rows in it')
    # A row a line, as in most files of a million rows, needs no look at each; but the last row may end lines below.
    one_each = rows.lines[-1] == len(rows.lines) + 1 and file.suffix.lower() in ('.csv', '.tsv')
    start = len(rows.lines) - 1 if one_each else 0
    long = [line for *cells, line in zip(*(cells[start:] for cells in rows.cells), rows.lines[start:])
            if any(isinstance(cell, str) and ('\n' in cell or '\r' in cell) for cell in cells)]
    if long:
        tell(f'{file}: {len(long)} of {len(rows.lines)} rows have a cell of several lines, such as line {long[0]}; if '
             'none should, a quotation mark is missing there')
    twice = [column for column, count in Counter(rows.columns).items() if count > 1]
    if twice == ['']:
        without = [str(number) for number, column in enumerate(rows.columns, 1) if not column]
        raise UsageError(f'{file}: columns {" and ".join(without)} have no name; are there too many commas?')
    if twice:
        raise UsageError(f'{file}: two columns are called {next(filter(None, twice))}')
    return rows


def _read_csv(opened, file: Path) -> Rows:
    header = opened.readline()
    opened.seek(0)
    delimiter = '\t' if file.suffix.lower() == '.tsv' else ','
    if delimiter not in header:
        other = next((mark for mark in ';\t,' if mark in header), delimiter)
        if other != delimiter:
            tell(f'{file}: columns are taken as separated by {other!r}, as its first line is')
            delimiter = other
    reader = csv.reader(opened, delimiter=delimiter, strict=True, skipinitialspace=True)
    columns, cells, lines, line, block = None, [], array('q'), 1, []

    def take() -> None:
        """Puts rows into their columns; in a million rows the same word is kept once."""
        for column, new, same in zip(cells, zip(*block), words):
            new = [cell.strip() or None for cell in new]
            column += map(same.setdefault, new, new) if 2 * len({*new}) < len(new) else new
        block.clear()

    try:
        for row in reader:
            if row and columns is None:
                columns = [column.strip() for column in row]
                cells, words = [[] for _ in columns], [{} for _ in columns]
            elif row:
                if len(row) != len(columns):
                    raise UsageError(f'{file}, line {line}: {len(row)} cells, and the first line has {len(columns)} (a '
                                     'comma in a name needs quotes around it)')
                block.append(row)
                lines.append(line)
                if len(block) == 1000:
                    take()
            line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f'{file}, line {line}: {error} (a quotation mark opens a cell there that ends nowhere, or not '
                         'at its end)') from error
    if block:
        take()
    return Rows(columns or [], cells, lines)


def _read_json_lines(opened, file: Path) -> Rows:
    columns, parsed, lines = {}, [], []
    for number, line in enumerate(opened, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f'{file}, line {number}: no JSON ({error})') from error
        if not isinstance(row, dict):
            raise UsageError(f'{file}, line {number}: expected an object such as {{"file_name": ..., "label": ...}}')
        columns.update(dict.fromkeys(row))
        parsed.append(row)
        lines.append(number)
    return Rows(list(columns), [[_as_text(row.get(key)) for row in parsed] for key in columns], lines)


def _as_text(cell) -> str | list | None:
    if isinstance(cell, list):
        return cell
    if isinstance(cell, dict):
        return json.dumps(cell)
    if isinstance(cell, float) and cell != cell:  # NaN
        return None
    return None if cell is None else str(cell).strip() or None


def _clean_labels(rows: Rows, at: int, file: Path) -> None:
    """Labels as names of classes, as far as `clean_words` does it; of words `tables.read_targets` tells the odd ones.
    Kaggle's ground truth has a box behind each wnid; a list is no label.
    """
    column, cells = rows.columns[at], rows.cells[at]
    for i, line in enumerate(rows.lines):
        if isinstance(cells[i], list):
            raise UsageError(f'{file}, line {line}: a list of labels; images of several classes (multi-label) cannot '
                             'be trained here, so choose a column of one label an image (--target-key)')
        if cells[i] and ('\n' in cells[i] or '\r' in cells[i]):
            raise UsageError(f'{file}, line {line}: a label of several lines, {_shorten(cells[i])}; is a quotation '
                             'mark missing?')
        if column.lower() == 'predictionstring' and cells[i]:
            cells[i] = cells[i].split()[0]
    count = Counter(cells)
    count.pop(None, None)
    number = clean_words(count, f'{file}', column, lambda word: f'{file}, line {rows.lines[cells.index(word)]}')
    if number is not None and any(number[word] != word for word in count):
        cells[:] = [cell and number[cell] for cell in cells]


def find_files(given: Sequence[str], base: str, file: Path) -> tuple[list[str], list[int]]:
    """Absolute paths of named files as they are on disk, and the positions of those that are not.

    A path that is not there is tried with slashes for backslashes; with its accents in the other form of Unicode, as a
    Mac writes them; and then, if it has no ending that pictures have, as a name without its ending.

    Args:
        given: Names in the file.
        base: What they are relative to.
        file: The list, for messages.

    Raises:
        UsageError: If a name without its ending may be several files.
    """
    folders, stems, missing = {}, {}, []
    paths, slashes, forms, endings = [_absolute(base, name) for name in given], 0, 0, 0

    def names(folder):
        if folder not in folders:
            try:
                folders[folder] = {entry.name for entry in os.scandir(folder)
                                   if (os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file())}
            except (OSError, ValueError):  # ValueError: of a name that no file can have
                folders[folder] = set()
        return folders[folder]

    for i, path in enumerate(paths):
        folder, _, name = path.rpartition('/')
        folder = folder or '/'
        if name in (folders.get(folder) or names(folder)):
            continue
        if '\\' in path:
            folder, name = os.path.split(os.path.normpath(path.replace('\\', '/')))
            if name in names(folder):
                paths[i], slashes = os.path.join(folder, name), slashes + 1
                continue
        if not given[i].isascii():
            other = (os.path.split(_absolute(base, unicodedata.normalize(form, given[i]))) for form in ('NFC', 'NFD'))
            found = next((split for split in other if split[1] in names(split[0])), None)
            if found:
                paths[i], forms = os.path.join(*found), forms + 1
                continue
        if os.path.splitext(name)[1].lower() not in PICTURES:
            if folder not in stems:
                stems[folder] = {}
                for there in sorted(names(folder)):
                    if there.lower().endswith(PICTURES):
                        stems[folder].setdefault(os.path.splitext(there)[0], []).append(there)
            found = stems[folder].get(name, [])
            if len(found) > 1:
                raise UsageError(f'{file}: {name} may be each of {name_some(found)} in {folder}; write the ending too')
            if found:
                paths[i], endings = os.path.join(folder, found[0]), endings + 1
                continue
        missing.append(i)
    for count, what in ((slashes, 'have backslashes, which are taken as slashes'),
                        (forms, 'have accents in another form of Unicode than the files, and are found all the same'),
                        (endings, 'have no ending and are found by the rest of the name')):
        if count:
            tell(f'{file}: {count} of {len(paths)} file names {what}', logging.INFO)
    return paths, missing


def _find_split_names(rows: Rows, at: int, file: Path) -> list[str]:
    column = next((i for i, key in enumerate(rows.columns) if key.lower() == 'split'), None)
    if column is not None:
        odd = next((i for i, cell in enumerate(rows.cells[column]) if isinstance(cell, list)), None)
        if odd is not None:
            raise UsageError(f'{file}, line {rows.lines[odd]}: column {rows.columns[column]} has no name of a split: '
                             f'{_shorten(rows.cells[column][odd])}')
        words = sorted({cell for cell in rows.cells[column] if cell and cell.lower() in NO_VALUE})
        names = [None if cell in words else cell for cell in rows.cells[column]]
        if None in names:
            tell(f'{file}: {names.count(None)} rows with an empty split{f" (or {name_some(words)})" if words else ""} '
                 'count as train')
        return [name or 'train' for name in names]
    for key, cells in zip(rows.columns, rows.cells):
        words = {cell.lower() for cell in cells[:1000] if isinstance(cell, str)}
        if len(words) > 1 and words <= SPLIT_NAMES:
            tell(f'{file}: column {key} looks like splits ({", ".join(sorted(words))}) and is not read as such; call '
                 'it split')
    known = {'train', 'unlabeled', 'extra', *VAL_SPLITS}
    firsts = []
    for cell in rows.cells[at]:
        first = cell.replace('\\', '/').lstrip('./').partition('/')[0]
        if first not in known:
            return ['train'] * len(rows.lines)
        firsts.append(sys.intern(first))
    names = set(firsts)
    if names != {'train'}:
        tell(f'{file}: no column split; the first folder of each path counts as its split '
             f'({", ".join(sorted(names))})', logging.INFO)
    return firsts


def _one_row_a_file(
        rows: Rows,
        paths: list[str],
        splits: list[str],
        label_at: int | None,
        leave_out: set[int],
        file: Path,
) -> list[int]:
    """Positions of the rows to keep: the first of each file; refuses rows of one file that contradict each other."""
    first, again = {}, []
    for i, path in enumerate(paths):
        if i in leave_out:
            continue
        if path not in first:
            first[path] = i
            continue
        j = first[path]
        where = f'{file}, lines {rows.lines[j]} and {rows.lines[i]}: {os.path.basename(path)}'
        if label_at is not None and rows.cells[label_at][i] != rows.cells[label_at][j]:
            one, other = (rows.cells[label_at][k] or '(no label)' for k in (j, i))
            raise UsageError(f'{where} has two labels, {one} and {other}')
        if splits[i] != splits[j]:
            raise UsageError(f'{where} is in two splits, {splits[j]} and {splits[i]}')
        again.append(i)
    if again:
        told = [f'{rows.lines[i]} (as {rows.lines[first[paths[i]]]})' for i in again]
        tell(f'{file}: {len(again)} rows repeat another one and count once: lines {name_some(told)}')
    return list(first.values())


def refuse_several(listed: Listed, file: Path) -> None:
    if len(listed.labels) > 1:
        raise UsageError(f'{file}: {" and ".join(listed.labels)} may each be the label column; choose one '
                         '(--target-key)')


# --- Pictures below a folder ------------------------------------------------------------------------------------------

def pictures_below(folder: Path) -> list[str]:
    """Absolute paths of all pictures below a folder; what is left out is told."""
    base = str(folder.absolute())
    listing = list_pictures(base)
    if listing.tell():
        tell(f'{folder}: {listing.tell()}')
    return [os.path.join(base, path) for path in listing.pictures]


def real_paths(paths: Iterable[str]) -> Iterator[str]:
    """Absolute paths without a link in them; those of folders are found once."""
    folders = {}
    for path in paths:
        folder, _, name = path.rpartition('/')
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        path = os.path.join(folders[folder], name)
        yield os.path.realpath(path) if os.path.islink(path) else path


def open_pictures(folder: Path, known: Callable[[], Iterable[str]], column: str = 'image') -> datasets.Dataset:
    """All pictures below a folder, without labels, but those in a split already, whose paths `known` returns."""
    if not folder.is_dir():
        raise UsageError(f'--unlabeled-dir {folder}: no such folder')
    found, there = pictures_below(folder), {*real_paths(known())}
    paths = [path for path, real in zip(found, real_paths(found)) if real not in there]
    if len(paths) < len(found):
        tell(f'--unlabeled-dir {folder}: {len(found) - len(paths)} of its {len(found)} pictures are in a split of '
             '--dataset already and left out here', logging.INFO)
    if not paths:
        raise UsageError(f'--unlabeled-dir {folder}: no picture in it that is not in a split of --dataset already')
    return _image_table([column], [[]], 0, paths)


def read_metadata(
        folder: Path,
        input_key: str | None = None,
        target_key: str | None = None,
        skip_missing: bool = False,
) -> dict[str, datasets.Dataset]:
    """The splits that `metadata.csv`, `.jsonl` or `.parquet` beside pictures describes, as `datasets` has it.

    Empty if there is none, or none with labels: then folders are the classes.
    """
    files = [folder / f'metadata{form}' for form in (*FORMS, '.parquet')]
    files = [file for file in files if file.is_file()]
    if not files:
        return {}
    if len(files) > 1:
        raise UsageError(f'{folder}: {" and ".join(file.name for file in files)} side by side; move all but one away')
    listed = list_files(files[0], None, input_key, target_key, skip_missing)
    refuse_several(listed, files[0])
    if not listed.labels:
        tell(f'{files[0]}: not read, as no column of labels is known in it (--target-key)')
        return {}
    known = listed.files()
    unnamed = [path for path in pictures_below(folder) if path not in known]
    if unnamed:
        tell(f'{files[0]}: {len(unnamed)} pictures beside it have no row and are left out, such as '
             f'{unnamed[0]}')
    return listed.splits


# --- Ground truth of a flat folder ------------------------------------------------------------------------------------

def ground_truth(
        file: Path,
        folder: Path,
        input_key: str | None = None,
        target_key: str | None = None,
) -> datasets.Dataset:
    """The pictures of a flat folder with the labels that a file gives them, as words.

    Args:
        file: A table of file and label, such as Kaggle's LOC_val_solution.csv; or a text file whose line n belongs to
            the picture whose name ends with the number n: wnids, or the numbers of ILSVRC's devkit, whose meta.mat or
            map_clsloc.txt then lies beside the file or in its folder data.
        folder: The pictures.
        input_key, target_key: Columns of the table, or what they are called here.

    Raises:
        UsageError: If the file does not fit the pictures.
    """
    if not folder.is_dir():
        raise UsageError(f'--val-labels {file}: gives labels to the pictures of a flat folder, and {folder} is none')
    if is_file_table(file):
        listed = list_files(file, folder, input_key, target_key)
        refuse_several(listed, file)
        if not listed.labels:
            raise UsageError(f'--val-labels {file}: no column of labels is known in it (--target-key)')
        if len(listed.splits) > 1:
            raise UsageError(f'--val-labels {file}: has the splits {", ".join(listed.splits)}; give it as --dataset')
        [table] = listed.splits.values()
        known = listed.files()
        unnamed = [path for path in pictures_below(folder) if path not in known]
        if unnamed:
            raise UsageError(f'--val-labels {file}: {len(unnamed)} pictures of {folder} have no row, such as '
                             f'{unnamed[0]}')
        return table
    lines = read_lines(file, '--val-labels')
    paths = pictures_below(folder)
    numbers = [re.search(r'(\d+)$', os.path.splitext(path)[0]) for path in paths]
    numbers = [int(number[1]) for number in numbers if number]
    if len(set(numbers)) < len(paths) or sorted(numbers) != list(range(1, len(lines) + 1)):
        raise UsageError(f'--val-labels {file}: {len(lines)} lines do not fit the {len(paths)} pictures of {folder}, '
                         'whose names must end with the number of their line, 1 and on (or give a table with the '
                         'columns file_name and label)')
    if all(line.isdecimal() for line in lines):
        lines = _name_synsets(lines, file)
    columns = [input_key or 'image', target_key or 'label']
    return _image_table(columns, [[], [lines[n - 1] for n in numbers]], 0, paths)


def _name_synsets(numbers: list[str], file: Path) -> list[str]:
    """Wnids of ILSVRC's own numbers, whose order is not the alphabetic one of the folders."""
    beside = [folder / name for folder in (file.parent, file.parent / 'data', file.parent.parent / 'data')
              for name in ('map_clsloc.txt', 'meta.mat', 'meta_clsloc.mat')]
    meta = next((path for path in beside if path.is_file()), None)
    if meta is None:
        raise UsageError(f'--val-labels {file}: numbers of ILSVRC\'s own order, which is not that of the folders: put '
                         'the devkit\'s meta.mat or map_clsloc.txt (lines of wnid and number) beside it')
    if meta.suffix == '.txt':
        found = (re.match(r'(n\d{8})\s+(\d+)\b|(\d+)\s+(n\d{8})\b', line) for line in read_lines(meta, ''))
        wnids = {match[2] or match[3]: match[1] or match[4] for match in found if match}
    else:
        try:
            from scipy import io
        except ImportError as error:
            raise UsageError(f'--val-labels {file}: reading {meta.name} needs scipy (pip install scipy)') from error
        try:
            synsets = io.loadmat(meta, squeeze_me=True)['synsets']
            wnids = {str(int(row['ILSVRC2012_ID'])): str(row['WNID']) for row in synsets if row['num_children'] == 0}
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UsageError(f'--val-labels {file}: {meta} is no meta.mat of the devkit '
                             f'({" ".join(str(error).split())})') from error
    unknown = sorted(set(numbers) - wnids.keys())
    if unknown:
        raise UsageError(f'--val-labels {file}: {meta} has no class number {name_some(unknown)}')
    tell(f'{file}: numbers of classes are wnids by {meta}', logging.INFO)
    return [wnids[number] for number in numbers]


# --- Names of labeled files -------------------------------------------------------------------------------------------

def read_lines(file: Path, flag: str) -> list[str]:
    """Lines of a text file that are not empty."""
    refuse_pointer(file)
    try:
        lines = Path(file).read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'{flag} {file}: cannot be read: {error}'.strip()) from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UsageError(f'{flag} {file}: nothing in it'.strip())
    return lines


def is_name_list(file: str | Path) -> bool:
    """Whether a labels file lists names of files, rather than being a run's labels.json."""
    try:
        with open(file, 'rb') as opened:
            return is_file_table(file) or not opened.read(200).lstrip(b'\xef\xbb\xbf \t\r\n').startswith((b'{', b'['))
    except OSError:
        return False


def read_names(file: Path, input_key: str | None = None) -> list[str]:
    """Names of files: a line each of a text file, or a column of a table."""
    first = read_lines(file, '--labels-file')[0]
    if not is_file_table(file) or first.lower().endswith(PICTURES):  # a list may be called .csv without a header
        return read_lines(file, '--labels-file')
    rows = read_rows(file)
    at = rows.columns.index(choose_file_column(rows.columns, file, input_key))
    others = find_label_columns(dict.fromkeys(rows.columns), rows.columns[at])
    if others:
        tell(f'--labels-file {file}: names alone are read from it, and labels are the training split\'s; '
             f'{" and ".join(others)} is not read')
    return [cell for cell in rows.cells[at] if isinstance(cell, str)]


def match_names(names: Sequence[str], paths: Sequence[str], what: str) -> list[int]:
    """Positions of the named files among the paths, ascending, each once.

    Files are matched by their base name. Where several share it, the folders in the name decide. A folder that others
    of the files lie in is never looked past, but one that is none of theirs is, which is told. The copies on the hub
    have ImageNet's wnid once more at the end of the name, which is looked past.

    Raises:
        UsageError: If none is found, or a name may be several of the files.
    """
    def base_name(path):
        return composed(re.sub(r'(?<=\d)_n\d{8}(?=\.\w+$)', '', path.rpartition('/')[2]))

    def parent(path):
        folder = path.rpartition('/')[0].rpartition('/')[2]
        return '' if folder in ('.', '..') else composed(folder)

    by_name, folders = {}, [*map(parent, paths)]
    for i, path in enumerate(paths):
        by_name.setdefault(base_name(path), []).append(i)
    found, missing, elsewhere, known = Counter(), [], [], {*folders}
    for name in names:
        name = name.replace('\\', '/')
        places, folder = by_name.get(base_name(name), []), parent(name)
        if folder and folder in known:
            places = [i for i in places if folders[i] in ('', folder)]
        if len(places) > 1:
            ends = composed('/' + name.lstrip('/'))
            places = [i for i in places if composed(paths[i]).endswith(ends)] or places
        if len(places) > 1:
            raise UsageError(f'{what}: {name} may be {len(places)} files, such as {paths[places[0]]} and '
                             f'{paths[places[1]]}; write it with its folders')
        if places:
            found[places[0]] += 1
            if folder and folders[places[0]] not in ('', folder):
                elsewhere.append(f'{name} for {paths[places[0]]}')
        else:
            missing.append(name)
    if not found:
        raise UsageError(f'{what}: none of its {len(names)} names is that of a file of the training split, such as '
                         f'{os.path.basename(paths[0])}; it begins with {names[0]}')
    told = [f'{len(found)} labeled images']
    if missing:
        told.append(f'{len(missing)} of {len(names)} names are not in the training split, such as {missing[0]}')
    again = sum(found.values()) - len(found)
    if again:
        told.append(f'{again} names stand there again and count once')
    if elsewhere:
        told.append(f'{len(elsewhere)} names have another folder than their file, such as {elsewhere[0]}')
    tell(f'{what}: {"; ".join(told)}', logging.WARNING if len(told) > 1 else logging.INFO)
    return sorted(found)
