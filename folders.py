"""Image files in folders and in lists of files: which of them count, what classes they have, and a kept index of them.

Nothing is left out silently: hidden and system files, files that are no pictures, links to what is there already and
classes without a picture are each told in a line.
"""
import functools
import json
import logging
import os
import pickle
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv
from timm.data.readers.class_map import load_class_map

from pictures import picture_extensions
from program import UsageError, name_some, readable
from seeds import item_seed

_logger = logging.getLogger(__name__)

INDEX_FROM = 50_000  # image files from which on their listing is kept on disk

# What operating systems, archives, network storage and editors leave among a user's files; see `is_hidden`.
SYSTEM_NAMES = frozenset((
    '@eadir', '@recycle', '@tmp', '#recycle', '#snapshot', '$recycle.bin', '__macosx', '__pycache__', 'desktop.ini',
    'ehthumbs.db', 'icon\r', 'lost+found', 'system volume information', 'thumbs.db',
))


# --- Names ------------------------------------------------------------------------------------------------------------

def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden (.ipynb_checkpoints, ._x.jpg) or the system's own (@eaDir)."""
    return name.startswith('.') or name.lower() in SYSTEM_NAMES


def natural_key(text: str) -> str:
    """Sorts a2 before a10, upper and lower case alike, as timm's function of this name.

    That one fails on names such as ². And a million of its lists keep the garbage collector busy, unlike strings: here
    a number is a sign below all letters, its number of digits, and these; what ties is told apart by the name itself.
    """
    return f'{_NUMBER.sub(_number_key, text.lower())}\0{text}'


_NUMBER = re.compile(r'\d+')


def _number_key(match: re.Match) -> str:
    digits = match[0]
    if digits[0] == '0' or not digits.isascii():
        digits = str(int(digits))
    return f'\1{len(digits):03}{digits}'


def natural_paths(paths: Iterable[str]) -> list[str]:
    """Paths sorted by `natural_key`, which for the folders in them is found once."""
    folder_keys = {}

    def key(path: str) -> str:
        folder, slash, name = path.rpartition(os.sep)
        if folder not in folder_keys:
            folder_keys[folder] = _NUMBER.sub(_number_key, folder.lower()) + slash
        return f'{folder_keys[folder]}{_NUMBER.sub(_number_key, name.lower())}\0{path}'

    return sorted(paths, key=key)


def composed(text: str) -> str:
    """Text in one form of Unicode (NFC): a name that was written on a Mac may have each accent as a sign of its own."""
    return text if text.isascii() else unicodedata.normalize('NFC', text)


# Arrow's strings are UTF-8, and a file's name may be any bytes. A name that is not UTF-8 is kept as a file: URI, which
# no path of a listing begins with, as these are absolute.

def to_stored(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        return f'file://{quote_from_bytes(os.fsencode(path))}'
    return path


def from_stored(path: str) -> str:
    return os.fsdecode(unquote_to_bytes(path[len('file://'):])) if path.startswith('file://') else path


# --- The listing ------------------------------------------------------------------------------------------------------

@dataclass
class Listing:
    """What lies below a folder.

    Attributes:
        pictures: Their paths, relative to the folder, in natural order.
        classes: Folders directly in it, also empty ones, in natural order.
        folders: All folders that were looked into, absolute.
        left_out: Names by reason.
    """
    pictures: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def tell(self) -> str:
        """What is left out, in a line; empty if nothing is."""
        parts = []
        for reason, names in self.left_out.items():
            if reason == 'no pictures':
                names = [_ending(os.path.basename(name)) or 'without an ending' for name in names]
            kinds = list(dict(Counter(os.path.basename(name) for name in sorted(names)).most_common()))
            hint = '; Pillow cannot read HEIC: convert it to JPEG' if {'.heic', '.heif'} & {*kinds} else ''
            parts.append(f'{len(names)} {reason} ({name_some(kinds)}{hint})')
        return f'left out: {"; ".join(parts)}' if parts else ''


def list_pictures(folder: str) -> Listing:
    """All pictures below a folder, each of them once.

    Links are followed, but a folder is looked into once: not again through a link to it or to one of its parents. A
    link to a picture counts unless the picture is there already. What is no link comes first, then links by depth and
    name.

    Raises:
        UsageError: If a folder cannot be read.
    """
    found, extensions, links, linked = Listing(folders=[folder]), picture_extensions(), [''], []
    real = os.path.realpath(folder)
    # The folder's parents count as seen: through a link to one of them, another split's pictures would come in.
    seen = {_identity(parent) for parent in (Path(real), *Path(real).parents)}

    def leave_out(reason: str, at: str) -> None:
        found.left_out.setdefault(reason, []).append(at)

    def look_into(start: str) -> None:
        waiting = [start]
        while waiting:
            at = waiting.pop()
            path = os.path.join(folder, at) if at else folder
            try:
                identity = _identity(path)
                with os.scandir(path) as scan:
                    entries = list(scan)
            except OSError as error:
                raise UsageError(f'{readable(path)}: cannot be read: {error.strerror}') from error
            if at:
                if identity in seen:
                    leave_out('links to what is listed already', at)
                    continue
                seen.add(identity)
                found.folders.append(path)
                if os.sep not in at:
                    found.classes.append(at)
            for entry in entries:
                name = entry.name
                below = f'{at}{os.sep}{name}' if at else name
                if is_hidden(name):
                    leave_out('hidden or of the system', below)
                elif entry.is_file(follow_symlinks=False) and _ending(name) in extensions:  # most of a million
                    found.pictures.append(below)
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(below)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    leave_out('links to nothing', below)
                elif entry.is_dir():
                    links.append(below)
                elif _ending(name) not in extensions or not entry.is_file():
                    leave_out('no pictures', below)
                else:
                    linked.append(below)

    while links:
        now, links[:] = sorted(links, key=natural_key), []
        for at in sorted(now, key=lambda at: at.count(os.sep)):  # what may be a class first
            look_into(at)
    if linked:
        there = {_identity(os.path.join(folder, at)) for at in found.pictures}
        for at in sorted(linked, key=natural_key):
            identity = _identity(os.path.join(folder, at))
            if identity in there:
                leave_out('links to what is listed already', at)
            else:
                there.add(identity)
                found.pictures.append(at)
    found.pictures, found.classes = natural_paths(found.pictures), sorted(found.classes, key=natural_key)
    return found


def _identity(path: str | Path) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_dev, state.st_ino


def begins_with_pictures(folder: str | Path) -> bool:
    """Whether there are pictures directly in a folder; looks no further than the first one."""
    with os.scandir(folder) as scan:
        return any(_ending(entry.name) in picture_extensions() and not is_hidden(entry.name) for entry in scan)


def _ending(name: str) -> str:
    """Of a file that is not hidden."""
    dot = name.rfind('.')
    return name[dot:].lower() if dot > 0 else ''


# --- Image folders ----------------------------------------------------------------------------------------------------

def image_folder(folder: Path, class_map: str = '', flat: bool = False) -> datasets.Dataset:
    """Pictures in one folder per class, which may lie in further folders there; classes in timm's natural order.

    Args:
        folder: One split.
        class_map: timm's class map file.
        flat: Pictures may lie directly in the folder: all are then without a label. Those of folders that the class map
            does not name have none either, and are not left out.

    Raises:
        UsageError: If there is no picture, or one outside of the class folders, or the class map does not fit.
    """
    folder = str(folder.absolute())  # as the listing may be read again from elsewhere

    def listing() -> tuple:
        found, notes = list_pictures(folder), []
        left_out = found.tell()
        if not found.pictures:
            raise UsageError(f'{readable(folder)}: no picture in it{left_out and f" ({left_out})"}')
        if left_out:
            notes.append(f'{readable(folder)}: {left_out}')
        paths, label, names = found.pictures, [-1] * len(found.pictures), None
        direct = next((path for path in paths if os.sep not in path), None)
        if direct is not None and not flat:
            raise UsageError(f'{readable(folder)}: images lie directly in it, such as {readable(direct)}; expected one '
                             'folder per class (a folder of unlabeled images: --unlabeled-split)')
        if direct is None:
            number, names, told = number_classes(found, folder, class_map, flat)
            label = [number.get(path.partition(os.sep)[0], -1) for path in paths]
            if not flat:
                paths = [path for path, at in zip(paths, label) if at >= 0]
                label = [at for at in label if at >= 0]
                notes += told
        # timm finds a class map in the folder too.
        maps = [class_map if os.path.exists(class_map) else os.path.join(folder, class_map)] if class_map else []
        base = os.path.join(folder, '')
        paths = [base + path for path in paths]
        return _path_array(paths), pa.array(label), names, [*found.folders, *maps], '\n'.join(notes)

    return file_index(('folder 3', folder, class_map, flat, sorted(picture_extensions())), listing)


def number_classes(
        found: Listing,
        folder: str,
        class_map: str,
        flat: bool,
) -> tuple[dict[str, int], list[str] | None, list[str]]:
    """Numbers of the class folders, class names by number (None if a map leaves numbers without one), what to tell."""
    filled, notes = Counter(path.partition(os.sep)[0] for path in found.pictures), []
    number = {name: i for i, name in enumerate(found.classes)}
    if class_map:
        there = {composed(name): name for name in found.classes}
        number = {there.get(composed(name), name): i for name, i in read_class_map(class_map, folder).items()}
        known = [name for name in found.classes if name in number]
        if not known and not flat:
            raise UsageError(f'--class-map {class_map}: none of its names ({name_some(number)}) is a class folder in '
                             f'{readable(folder)} ({name_some(found.classes)}); in a .txt file each line is a '
                             'name alone')
        dropped = [name for name in found.classes if name not in number]
        if dropped:
            notes.append(f'{readable(folder)}: --class-map {class_map} leaves out {len(dropped)} of '
                         f'{len(found.classes)} class folders, with {sum(filled[name] for name in dropped)} pictures: '
                         f'{name_some(dropped)}')
        if not any(filled[name] for name in known) and not flat:
            raise UsageError(f'{readable(folder)}: no picture in the class folders of --class-map {class_map}')
    names = [[] for _ in range(max(number.values()) + 1)]
    for name, i in number.items():
        names[i].append(composed(readable(name)))
    gaps = [str(i) for i, name in enumerate(names) if not name]
    empty = [name for name in number if not filled[name]]
    if empty:
        notes.append(f'{readable(folder)}: no picture in {len(empty)} of {len(number)} classes, which keep their '
                     f'numbers: {name_some(empty)}')
    if gaps:
        notes.append(f'--class-map {class_map}: no class has the number {name_some(gaps)} (an empty line, or a name '
                     'that is there twice?); classes are known by number alone')
        return number, None, notes
    names = [', '.join(name) for name in names]  # a map may join classes
    if len(set(names)) < len(names):
        raise UsageError(f'{readable(folder)}: two class folders look alike: {name_some(names)}')
    return number, names, notes


def read_class_map(class_map: str, folder: str) -> dict[str, int]:
    """timm's class map: .txt with a name a line, or .pkl with a dict from name to number.

    Raises:
        UsageError: If it cannot be found or read, or has another form.
    """
    try:
        number = load_class_map(class_map, folder)
    except (AssertionError, OSError, ValueError, EOFError, LookupError, AttributeError, pickle.PickleError) as error:
        raise UsageError(f'--class-map {class_map}: no class map: {" ".join(str(error).split())}; expected .txt with a '
                         'class name a line, or .pkl with a dict from name to number') from error
    number = {name.lstrip('\ufeff') if isinstance(name, str) else name: i for name, i in number.items()}
    number.pop('', None)  # an empty line
    if not number or not all(
            isinstance(name, str) and isinstance(i, Integral) and not isinstance(i, bool) and i >= 0
            for name, i in number.items()
    ):
        raise UsageError(f'--class-map {class_map}: expected class names, and whole numbers from 0 on for them')
    return {name: int(i) for name, i in number.items()}


# --- WebVision --------------------------------------------------------------------------------------------------------

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
            pa.array([os.fsencode(parent + name) for name in os.listdir(base / parent)], pa.binary())
            for parent in parents if (base / parent).is_dir()
        ]
        exists = pc.is_in(rows.field('path').cast(pa.binary()), pa.chunked_array(present, pa.binary()))
        missing, note = pc.sum(pc.invert(exists)).as_py() or 0, ''
        if missing:
            note = f'{base}: {missing} of {len(rows)} images are missing'
            if not skip_missing:
                first = ', '.join(rows.field('path').filter(pc.invert(exists))[:5].to_pylist())
                raise UsageError(f'{note}, such as {first} (--skip-missing leaves them out)')
            rows = rows.filter(exists)
        synsets = root / 'info' / 'synsets.txt'
        lines = synsets.read_text(errors='replace').strip().splitlines() if synsets.is_file() else []
        if not all(line.strip() for line in lines):
            raise UsageError(f'{synsets}: a line in it is blank, and its lines are numbered as the classes are')
        names = [line.split()[0] for line in lines]
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


# --- Kept index -------------------------------------------------------------------------------------------------------

def _path_array(paths: Sequence[str]) -> pa.Array:
    try:
        return pa.array(paths, pa.string())
    except UnicodeEncodeError:
        return pa.array(map(to_stored, paths), pa.string())


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
            was made from, and lines to tell (or '').
    """
    file = Path(datasets.config.HF_DATASETS_CACHE) / 'calibratemix' / f'{item_seed(*key):016x}.arrow'
    if file.is_file():
        with pa.memory_map(str(file)) as kept:
            about = json.loads(pa.ipc.open_stream(kept).schema.metadata[b'calibratemix'])
        if about['times'] == _times(about['times']):
            tell(about['note'])
            return datasets.Dataset.from_file(str(file))
    started = time.time_ns()
    path, label, names, looked_at, note = listing()
    tell(note)
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


@functools.cache
def tell(note: str, level: int = logging.WARNING) -> None:
    """Logs the lines of a note, once, and on the first of several processes."""
    if os.environ.get('RANK', '0') == '0':
        for line in note.splitlines():
            _logger.log(level, line)


def _times(paths: Iterable[str]) -> dict[str, int]:
    return {path: os.stat(path).st_mtime_ns if os.path.exists(path) else 0 for path in paths}
