"""Tables of images: parquet and arrow files as complete sets of shards, their image and label columns, their classes.

What a user brings is read right or refused by name: a shard that is missing or double, several configurations in one
folder, two columns of which either could be meant. Class names count, not numbers: shards that number their classes in
different orders are mapped, and labels that are words are numbered by the training split's sorted names.
"""
import errno
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from folders import composed, is_hidden, natural_key, tell
from program import UsageError, name_some

_logger = logging.getLogger(__name__)

# Where evaluation looks when no split is named: the first of these that exists.
VAL_SPLITS = ('validation', 'val', 'valid', 'test')
IMAGE_COLUMNS = ('image', 'img')  # taken where there are others too
LABEL_COLUMNS = ('label', 'labels', 'target', 'targets', 'cls', 'class')
WORDY_LABEL_COLUMNS = ('class_name', 'label_name', 'category', 'predictionstring')  # where none of the above is there
OWN_TABLES = ('predictions.parquet', 'margins.parquet')  # what the programs here write of pictures
NO_VALUE = ('nan', 'none', 'null', 'na', 'n/a', '<na>')  # how programs write that there is nothing
LFS_POINTER = b'version https://git-lfs.github.com/spec/'


def is_unlabeled(split: str) -> bool:
    return split.startswith('unlabel')


# --- Files ------------------------------------------------------------------------------------------------------------

def find_tables(root: Path) -> list[Path]:
    """The parquet, or else the arrow files of a folder: those of the first level of three that has any, sorted.

    Hidden files and folders are no part of the data, nor is `metadata.parquet`, which describes pictures beside it, nor
    are OWN_TABLES.
    """
    levels = [dict(parquet=[], arrow=[]) for _ in range(3)]
    for depth, file in _walk_tables(root, 0):
        if file.name in OWN_TABLES:
            tell(f'{file}: not read, as by its name it is a report and no part of the data', logging.INFO)
        else:
            levels[depth][file.suffix[1:].lower()].append(file)
    orders = [(0, 'parquet'), (1, 'parquet'), (0, 'arrow'), (1, 'arrow'), (2, 'parquet')]
    depth, kind = next(((d, k) for d, k in orders if levels[d][k]), (0, 'parquet'))
    left_out = [f'{file}' for level in levels[depth + 1:] for file in level[kind]]
    if left_out and levels[depth][kind]:
        tell(f'{root}: {len(left_out)} .{kind} files in deeper folders are left out, such as {left_out[0]}; '
             'name their folder as --dataset to read them')
    return sorted(levels[depth][kind])


def _walk_tables(folder: Path, depth: int) -> Iterator[tuple[int, Path]]:
    """Tables below a folder with their depth, from 0 to 2."""
    try:
        with os.scandir(folder) as entries:
            # The last level may hold a million pictures, and tables never stand behind many of these.
            entries = [e for e in islice(entries, 50 if depth == 2 else None) if not is_hidden(e.name)]
        if depth == 2 and any(_is_table(entry) for entry in entries):
            entries = [e for e in os.scandir(folder) if not is_hidden(e.name)]
    except OSError as error:
        raise UsageError(f'{folder}: cannot be read ({error.strerror})') from error
    for entry in entries:
        if _is_table(entry):
            yield depth, Path(entry.path)
        elif depth < 2 and entry.is_dir():
            yield from _walk_tables(Path(entry.path), depth + 1)


def _is_table(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(('.parquet', '.arrow')) and entry.name != 'metadata.parquet' and entry.is_file()


def table_splits(files: Sequence[Path], root: Path | None = None) -> dict[str, Callable]:
    """Parquet or arrow files, below root. A file's split is its name up to the number of the shard, or its last part if
    that is the name of a split (`cifar10-train-00000-of-00001`), or else its folder's name if that is one or its own is
    a number; a sole split with another name is train.

    Opening a split raises UsageError if its shards are not complete or not of one set; without root, files that the
    user named are a choice, and what they lack is only told.
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
        splits.setdefault(last if last in names else split, []).append(file)
    if len(splits) == 1 and not splits.keys() & {*names}:
        splits = {'train': splits.popitem()[1]}
    return {split: partial(_open_split, split, paths, root) for split, paths in splits.items()}


def _open_split(split: str, files: Sequence[Path], root: Path | None) -> datasets.Dataset:
    check_shards(split, files, root)
    table = open_tables([str(file) for file in files])
    if not any(map(holds_images, table.features.values())):
        raise UsageError(f'{files[0]}: none of its columns {", ".join(table.features)} holds images; is it no part of '
                         'the data? Then move it away')
    return table


def check_shards(split: str, files: Sequence[Path], root: Path | None) -> None:
    """Refuses files of a split that are of several configurations, or not all shards of one set; see `table_splits`."""
    where = f'{root or files[0].parent}: split {split}'
    folders = sorted({file.parent for file in files})
    if root is not None and len(folders) > 1:
        named = [str(folder.relative_to(root)) for folder in folders]
        raise UsageError(f'{where} stands in several folders, {name_some(named)}, which look like configurations of '
                         f'one repository: choose one as --dataset hfds/{root}:{named[0]}')
    numbers, plain, totals = Counter(), [], Counter()
    for file in files:
        shard = re.search(r'(?:^|[-_.])(\d+)-of-(\d+)', file.stem)
        if shard:
            numbers[int(shard[1])] += 1
            totals[int(shard[2])] += 1
        else:
            plain.append(file.name)
    if totals and (len(totals) > 1 or plain):
        parts = [f'{count} of a set of {total}' for total, count in sorted(totals.items())] + plain
        raise UsageError(f'{where} has shards of several sets side by side: {", ".join(parts)}; move all but one away, '
                         'or name the files of one as --dataset \'GLOB\'')
    for number, count in numbers.items():
        if count > 1:
            twice = [f.name for f in files if re.search(rf'(?:^|[-_.])0*{number}-of-', f.stem)]
            raise UsageError(f'{where} has shard {number} {count} times: {", ".join(twice)}; move all but one away')
    if totals:
        [total] = totals
        first = int(0 not in numbers and total in numbers)  # some tools count from 1
        missing = [n for n in range(first, total + first) if n not in numbers]
        if missing:
            before, digits, after = re.split(r'(\d+)(?=-of-)', files[0].name, maxsplit=1)
            names = [f'{before}{n:0{len(digits)}d}{after}' for n in missing]
            text = f'{where} has {len(numbers)} of its {total} shards; missing: {name_some(names)}'
            if root is not None:
                raise UsageError(f'{text} (to train on a part, name its files as --dataset \'GLOB\')')
            tell(text)
        return
    counted = sorted(int(m[1]) for m in (re.search(r'(?:^|[-_.])(\d+)$', name.rsplit('.', 1)[0]) for name in plain)
                     if m)
    if len(counted) > 1 and counted[-1] - counted[0] >= len(counted):
        gaps = name_some(str(n) for n in range(counted[0], counted[-1]) if n not in counted)
        tell(f'{where} has files numbered {counted[0]} to {counted[-1]}, without {gaps}')
    elif len(plain) > 1 and len(counted) < len(plain):
        tell(f'{where} is joined from {len(plain)} files: {name_some(plain)}', logging.INFO)


def open_tables(files: Sequence[str]) -> datasets.Dataset:
    """Arrow files as they lie; parquet files through the cache of `datasets`, which holds them as arrow.

    Classes are those of the first file; another file that names the same ones in another order is mapped.

    Raises:
        UsageError: If a file cannot be read, or has other classes than the first one.
    """
    for file in files:
        refuse_pointer(file)
    try:
        if files[0].lower().endswith('.arrow'):
            return join_tables([datasets.Dataset.from_file(file) for file in files], files)
        footers = [pq.read_metadata(file).schema.to_arrow_schema().metadata for file in files]
        if len({_class_names(metadata) for metadata in footers}) > 1:
            return join_tables([_load_parquet([file]) for file in files], files)
        return _load_parquet(files)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        reason = ' '.join(str(error.__cause__ or error).split())
        fault = cache_fault(error)
        if fault or isinstance(error, UsageError):
            raise UsageError(fault or reason) from error
        raise UsageError(f'{files[0]}{" and others" * (len(files) > 1)}: cannot be read: {reason}') from error


def _load_parquet(files: Sequence[str]) -> datasets.Dataset:
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    key = f'files-{digest_files(files)}'
    return datasets.load_dataset('parquet', key, data_files={'train': list(files)}, split='train')


def digest_files(files: Iterable[str]) -> str:
    """Tells one state of some files from another, also where a copy kept the time of modification (`cp -p`).

    Size, time of the last change of any kind, which no program can set, and the last bytes, where parquet has its
    footer.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        about = os.stat(file)
        with open(file, 'rb') as opened:
            opened.seek(max(about.st_size - 4096, 0))
            digest.update(repr((file, about.st_size, about.st_ctime_ns)).encode() + opened.read())
    return digest.hexdigest()


def refuse_pointer(file: str | Path) -> None:
    """Raises UsageError if a file is one of Git LFS, which stands for another that was not downloaded."""
    try:
        with open(file, 'rb') as opened:
            start = opened.read(len(LFS_POINTER))
    except OSError as error:
        raise UsageError(f'{file}: cannot be read ({error.strerror})') from error
    if start == LFS_POINTER:
        raise UsageError(f'{file}: a pointer of Git LFS, without the data (git lfs install, then git lfs pull)')


def cache_fault(error: BaseException) -> str | None:
    """What is wrong with the cache of `datasets`, if an error of the system comes from there."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    if error is None:
        return None
    folder, reason = Path(datasets.config.HF_DATASETS_CACHE), error.strerror
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return None
        except OSError as found:
            reason = found.strerror
    return f'{folder}: the cache cannot be written ({reason}); set HF_HOME to another folder'


def _class_names(metadata: dict[bytes, bytes] | None) -> str:
    """Class names by column in the metadata that `datasets` keeps in a parquet file, as text to compare."""
    about = json.loads((metadata or {}).get(b'huggingface', b'{}'))
    features = about.get('info', {}).get('features') or {}
    return json.dumps({key: value['names'] for key, value in features.items()
                       if isinstance(value, dict) and value.get('_type') == 'ClassLabel'})


def join_tables(parts: list[datasets.Dataset], files: Sequence[str]) -> datasets.Dataset:
    """Tables one after the other; class labels of the later ones are numbered as in the first.

    Raises:
        UsageError: If a table has a class that the first lacks, or the other way round.
    """
    first = parts[0]
    for i, (part, file) in enumerate(zip(parts, files)):
        for key, feature in first.features.items():
            theirs = part.features.get(key)
            if not (isinstance(feature, datasets.ClassLabel) and isinstance(theirs, datasets.ClassLabel)):
                continue
            if theirs.names == feature.names:
                continue
            ours, names = ([*map(composed, each.names)] for each in (feature, theirs))
            odd = sorted({*names} ^ {*ours})
            if odd:
                raise UsageError(f'{file}: other classes in column {key} than in {files[0]}: only one of the two has '
                                 f'{name_some(odd)}')
            tell(f'{file}: its classes in column {key} stand in another order than those of {files[0]}, and '
                 'are mapped by name')
            number = pa.array([ours.index(name) for name in names], pa.int64())
            labels = part.select_columns([key]).with_format('arrow')[:].column(key).combine_chunks()
            part = part.remove_columns(key).add_column(key, number.take(labels), feature=feature)
        parts[i] = part.select_columns(first.column_names)
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else first


# --- Columns ----------------------------------------------------------------------------------------------------------

def holds_images(feature) -> bool:
    if isinstance(feature, dict):
        return {'bytes', 'path'} <= feature.keys()
    return isinstance(feature, datasets.Image) or getattr(feature, 'dtype', '') in ('binary', 'large_binary')


def choose_image_column(features: datasets.Features, name: str, asked: str | None) -> str:
    """The column asked for, else image or img, else the only one that holds images.

    Raises:
        UsageError: If there is none, or several among which to choose.
    """
    columns = ', '.join(features)
    found, given = [key for key, feature in features.items() if holds_images(feature)], asked is not None
    if asked is None:
        asked = next((key for key in IMAGE_COLUMNS if key in found), None)
        if asked is None and len(found) > 1:
            raise UsageError(f'{name}: the columns {", ".join(found)} hold images; choose one (--input-key)')
        asked = asked or next(iter(found), None)
    if asked not in features:
        raise UsageError(f'{name}: no image column {asked or ""}; it has {columns} (--input-key)')
    if asked not in found:
        raise UsageError(f'{name}: column {asked} holds no images; it has {columns} (--input-key)')
    if not given and len(found) > 1:
        others = ', '.join(key for key in found if key != asked)
        tell(f'{name}: images are column {asked}, and not {others} (--input-key)', logging.INFO)
    return asked


def find_label_columns(features: dict, image_column: str) -> list[str]:
    """Columns that may hold the labels: by their name, or as they are class labels to `datasets`."""
    found = [
        key for key, feature in features.items() if key != image_column and (
            isinstance(feature, datasets.ClassLabel) or key.lower() in LABEL_COLUMNS
            or key.lower().endswith(('_label', '_labels'))
        )
    ]
    return found or [key for key in features if key != image_column and key.lower() in WORDY_LABEL_COLUMNS]


def choose_label_column(features: dict, name: str, asked: str | None, image_column: str) -> str:
    """The column asked for, else the only one that looks like labels.

    Raises:
        UsageError: If there is none, or several among which to choose.
    """
    columns = ', '.join(features)
    found = find_label_columns(features, image_column)
    if asked is None and len(found) > 1:
        raise UsageError(f'{name}: {" and ".join(found)} may each be the label column; choose one (--target-key)')
    if asked is None and not found:
        raise UsageError(f'{name}: no label column; it has {columns} (--target-key)')
    if asked is None and found[0].lower() not in LABEL_COLUMNS:
        tell(f'{name}: labels are column {found[0]} (--target-key)', logging.INFO)
    asked = asked or found[0]
    if asked not in features:
        raise UsageError(f'{name}: no label column {asked}; it has {columns} (--target-key)')
    return asked


def clean_words(
        count: Mapping[str, int],
        where: str,
        column: str,
        place: Callable[[str], str],
) -> dict[str, str | None] | None:
    """What each of the words of a label column is called as a class, if all are whole numbers; None if not all are.

    pandas writes whole numbers as 3.0 where a cell is empty; among whole numbers -1 and NaN are no label, here None.

    Args:
        count: How often each word is there.
        where: The file or table, for messages.
        column: Likewise.
        place: Tells where a word stands.

    Raises:
        UsageError: If a number is below -1.
    """
    number = {word: re.fullmatch(r'(-?\d+)(\.0*)?', word) for word in count}
    if not all(match or word.lower() in NO_VALUE for word, match in number.items()) or not any(number.values()):
        return None
    number = {word: match and match[1] for word, match in number.items()}
    below = next((word for word in count if (number[word] or '').startswith('-') and number[word] != '-1'), None)
    if below is not None:
        raise UsageError(f'{place(below)}: the label is {below}; expected 0 or more, or -1 for no label')
    none = [word for word in count if number[word] in (None, '-1')]
    if none:
        tell(f'{where}: {sum(count[word] for word in none)} rows whose {column} is {name_some(none)} have no label')
    written = next((word for word in count if '.' in word), None)
    if written:
        tell(f'{where}: labels such as {written} are taken as whole numbers', logging.INFO)
    return {word: None if word in none else number[word] for word in count}


def tell_odd_words(count: Mapping[str, int], where: str, column: str) -> None:
    """Warns of words that count as classes beside others and may be meant otherwise."""
    odd = [word for word in count if word.lower() in NO_VALUE]
    odd += [word for word in count if re.fullmatch(r'-1(\.0*)?', word)]
    if odd:
        tell(f'{where}: column {column} holds {name_some(odd)} among other words, {sum(count[w] for w in odd)} times; '
             'that counts as a class (an empty cell is no label)')
    broken = next((word for word in count if re.fullmatch(r'-?\d*\.\d+', word) and not re.fullmatch(
        r'-?\d+\.0*', word)), None)
    if broken:
        tell(f'{where}: column {column} holds numbers with fractions, such as {broken}; each counts as a class')


def _read_words(
        column: pa.ChunkedArray,
        key: str,
        name: str,
        training_names: Callable[[], list[str] | None] | None,
) -> tuple[torch.Tensor, list[str] | None]:
    """`read_targets` of a column of words."""
    words = pc.utf8_normalize(pc.utf8_trim_whitespace(column), 'NFC')
    if key.lower() == 'predictionstring':  # Kaggle's ground truth has a box behind each wnid
        words = pc.replace_substring_regex(words, r'(?s)\s.*', '')
    words = pc.if_else(pc.equal(words, ''), None, words)
    count = {word: number for word, number in (
        cell.values() for cell in pc.value_counts(words).to_pylist()) if word is not None}
    known = (training_names() if training_names else None) or []
    own = {*known}  # as the training split has them
    cleaned = clean_words(count, name, key, lambda word: name) if count.keys() - own else {}
    if cleaned is None:
        tell_odd_words(count, name, key)
    called = {word: word if word in own else (cleaned or {}).get(word, word) for word in count}
    names = [*known, *sorted({*called.values()} - own - {None}, key=natural_key)]
    number = {name: i for i, name in enumerate(names)}
    place = pc.fill_null(pc.index_in(words, pa.array(count, words.type), skip_nulls=True), -1).to_numpy()
    numbers = np.array([*(number.get(called[word], -1) for word in count), -1], np.int64)  # the last is for no word
    return torch.from_numpy(numbers[place]), names or None


def read_targets(
        table: datasets.Dataset,
        key: str,
        name: str,
        training_names: Callable[[], list[str] | None] | None = None,
) -> tuple[torch.Tensor, list[str] | None]:
    """Labels of a table, `[N]` int64 (-1: none), and their class names, if it has any.

    Words are numbered by the training split's names; those that it lacks come behind them, so that the names differ
    from the training split's wherever a label does.

    Args:
        table: The table.
        key: Label column: class labels, whole numbers, words or truth values; null and '' are no label, nor is what
            `clean_words` takes for none.
        name: For messages.
        training_names: Returns the class names of the training split; default: the words of this table, sorted.

    Raises:
        UsageError: If the column holds anything else.
    """
    feature = table.features[key]
    column = table.select_columns([key]).with_format('arrow')[:].column(key)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        raise UsageError(f'{name}: column {key} holds lists of labels; images of several classes (multi-label) cannot '
                         'be trained here, so choose a column of one label an image (--target-key)')
    if pa.types.is_string_view(kind):  # for which Arrow lacks what is done to words here
        column = column.cast(pa.large_string())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return _read_words(column, key, name, training_names)
    if pa.types.is_null(kind):
        return torch.full((len(table),), -1), None
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    target = column.to_numpy()
    if np.issubdtype(target.dtype, np.floating):  # whole numbers with nulls arrive as floats
        target = np.where(np.isnan(target), -1, target.astype(np.float64))
    finite = np.issubdtype(target.dtype, np.number) and (np.abs(target) < 2. ** 63).all()
    if not finite or (target != target.astype(np.int64)).any():
        kind = getattr(feature, 'dtype', type(feature).__name__)
        raise UsageError(f'{name}: labels in column {key} must be whole numbers or words, not {kind}')
    target = target.astype(np.int64)
    names = [*map(composed, feature.names)] if isinstance(feature, datasets.ClassLabel) else None
    if len(target) and (target.min() < -1 or (names and target.max() >= len(names))):
        odd = int(target.min() if target.min() < -1 else target.max())
        within = f'0 to {len(names) - 1}' if names else '0 or more'
        raise UsageError(f'{name}: a label in column {key} is {odd}; expected {within}, or -1 for no label')
    return torch.from_numpy(target), names


def training_class_names(tables: Iterable, target_key: str | None, name: str) -> list[str] | None:
    """Class names of the joined tables of a training split, by which words are numbered in all splits."""
    names, words = None, set()
    for table in tables:
        if not isinstance(table, datasets.Dataset):
            names = names or table.class_names
            continue
        key = target_key or next(iter(find_label_columns(table.features, '')), None)
        if key in table.column_names:
            found = read_targets(table, key, name)[1]
            if isinstance(table.features[key], datasets.ClassLabel):
                names = names or found
            words |= set(found or ())
    return names or sorted(words, key=natural_key) or None


def tell_counting_from_one(targets: torch.Tensor, name: str) -> None:
    """Says of labels without names that are 1 to K, and not 0 to K-1, that they make K+1 classes."""
    found = targets[targets >= 0].unique()
    if len(found) and found.tolist() == list(range(1, len(found) + 1)):
        tell(f'{name}: class 0 has no image; do the labels count from 1? As they stand there are {len(found) + 1} '
             f'classes, 0 to {len(found)}, of which one is never right')
