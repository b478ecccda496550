"""What every program here shares: errors in one line, exit status, signals, Accelerate, writing a file whole."""
import argparse
import copy
import ctypes
import difflib
import importlib.util
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from safetensors import SafetensorError
from timm import utils

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 75  # exit status, EX_TEMPFAIL of sysexits.h: not done, go on later


# --- Errors -----------------------------------------------------------------------------------------------------------

class UsageError(ValueError):
    """A user's mistake, told in one line: what, where, and what to do."""


class RunError(RuntimeError):
    """A fault while running, told in one line."""


class Stopped(Exception):
    """A signal asked this run to stop; `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(f'stopped by {signal.Signals(number).name}')
        self.signal = number
        self.signal = number


def explain(error: Exception, resume: str = '') -> RunError | None:
    """What an error of a library or the system says about the run, in one line; None if it is no known fault.

    Args:
        error: The error.
        resume: What the line ends with: how nothing that was saved is lost.
    """
    text = ' '.join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(f'the device is out of memory; a smaller --batch-size or --amp needs less, and in training '
                        f'--grad-accum-steps and --grad-checkpointing ({text})')
    if isinstance(error, MemoryError):
        return RunError(f'out of memory, in this process or in a data worker; fewer --workers need less{resume}')
    distributed = isinstance(error, torch.distributed.DistError) or re.search('gloo|nccl', text, re.IGNORECASE)
    # A worker that dies while it hands a batch over leaves a broken connection.
    if text.startswith('DataLoader worker') or (isinstance(error, (ConnectionError, EOFError)) and not distributed):
        return RunError(f'a data worker died: {text.rstrip(".")}. If the system was out of memory, fewer --workers '
                        f'need less{resume}')
    if isinstance(error, OSError) and error.errno is not None:
        return RunError(f'{error.filename or "the system"}: {error.strerror}{resume}')
    if distributed and re.search('connect|timed? ?out|broken pipe|reset by peer|remote process', text, re.IGNORECASE):
        reason = re.sub(r'^\[[^]]*\] ', '', text)
        return RunError(f'another process ended, as it will say itself, or does not answer ({reason}){resume}')
    return None


def show(text: str) -> None:
    """Prints a text; nothing, from where on nobody reads it, as behind `| head`: files may still have to be written."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        with open(os.devnull, 'w') as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def exit_with(error: UsageError | RunError | Stopped) -> None:
    """Tells the error in one line and ends the process: status 2 for a usage error, 1 for a fault, 75 when stopped."""
    code = 2 if isinstance(error, UsageError) else 1
    line = f'error: {error}'
    if isinstance(error, Stopped):
        code, line = STOPPED, f'{error}; --resume auto goes on from there'
        for number in STOP_SIGNALS:  # nothing is left to interrupt, and the status shall be this one
            signal.signal(number, signal.SIG_IGN)
    # A usage error is the same on all processes of a machine, and the first tells it; a fault may be one process's own.
    if code == 1 or os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'{Path(sys.argv[0]).name}: {line}', file=sys.stderr, flush=True)
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        os._exit(code)  # others may wait in a collective, on which an orderly exit would hang or abort
    sys.exit(code)


def run_program(program: Callable[[], Any], resume: str = '') -> Any:
    """Returns what the program does; an error of it is told in one line and ends the process (see `exit_with`).

    Only a fault that `explain` does not know shows its traceback.
    """
    try:
        try:
            return program()
        except BaseException:
            # For a data worker that died, torch's handler raises wherever the main thread happens to be: no longer, or
            # the worker's end could break off the telling of what was raised because of it.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise
    except (UsageError, RunError, Stopped) as error:
        exit_with(error)
    except Exception as error:
        fault = explain(error, resume)
        if fault is None:
            traceback.print_exc()
            fault = RunError('the traceback above is no known fault; please report it')
        exit_with(fault)


# --- Words of messages ------------------------------------------------------------------------------------------------

def readable(path: str) -> str:
    """A file's name in one line of text, whatever its bytes are: what cannot be shown is escaped."""
    text = os.fsencode(path).decode('utf-8', 'backslashreplace')
    return text if text.isprintable() else ''.join(
        c if c.isprintable() else c.encode('unicode_escape').decode() for c in text
    )


def quoted(name) -> str:
    """A name in one line of text; in quotation marks if blanks at its ends would go unseen."""
    text = readable(str(name))
    return text if text == text.strip() else f'"{text}"'


def name_some(names: Iterable, most: int = 5) -> str:
    """Names for a message, the first few of them: 'a, b, c and 4 more'."""
    names = [quoted(name) for name in names]
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def takes_bar(stream: TextIO) -> bool:
    """Whether a progress bar can be drawn there: on a terminal of a known width and height. Others get lines."""
    try:
        return stream.isatty() and all(os.get_terminal_size(stream.fileno()))
    except (OSError, ValueError):  # no file, or a closed one
        return False


# --- Arguments --------------------------------------------------------------------------------------------------------

class ArgumentParser(argparse.ArgumentParser):
    """argparse's, without abbreviations: an error is one line, and of several processes of a machine one tells it."""

    def __init__(self, *args, stray: str = '', **kwargs):
        """`stray` says how what stands there without a flag is given."""
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.stray = stray

    def error(self, message: str) -> None:
        head, found, rest = message.partition('unrecognized arguments:')
        if found and not head:
            message = f'no flag takes{rest}{self.stray}'
        own = os.environ.get('LOCAL_RANK', '0') == '0'
        self.exit(2, f'{self.prog}: error: {" ".join(message.split())}\n' if own else None)

    def at_least(self, args: argparse.Namespace, **least: int) -> None:
        """Exits at the first of these arguments that is given and smaller than allowed."""
        for name, value in least.items():
            if getattr(args, name) is not None and not getattr(args, name) >= value:  # NaN fails it too
                self.error(f'--{name.replace("_", "-")} {getattr(args, name)}: expected {value} or more')

    def shares(self, args: argparse.Namespace, *names: str, below: bool = False) -> None:
        """Exits at the first of these arguments with a number outside of [0, 1], or where 1 is too much of [0, 1)."""
        for name, value in _numbers(args, names):
            if not 0 <= value <= 1 or (below and value == 1):
                self.error(f'--{name.replace("_", "-")} {value}: expected a number in [0, 1{")" if below else "]"}')

    def above_zero(self, args: argparse.Namespace, *names: str) -> None:
        """Exits at the first of these arguments with a number that is not above 0."""
        for name, value in _numbers(args, names):
            if not value > 0:
                self.error(f'--{name.replace("_", "-")} {value}: expected a number above 0')

    def check_flags(self, argv: Sequence[str]) -> None:
        """Exits at the first flag that is none, naming the one that is spelt most alike."""
        flags = self._option_string_actions
        for argument in argv:
            flag = argument.partition('=')[0]
            if argument == '--':
                return
            if flag.startswith('--') and ' ' not in argument and flag not in flags:
                self.error(f'{flag}: there is no such flag{did_you_mean(flag, flags)}; --help lists them')

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        self.check_flags(sys.argv[1:] if args is None else args)
        return super().parse_args(args, namespace)

    def parse_intermixed_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        self.check_flags(sys.argv[1:] if args is None else args)
        return super().parse_intermixed_args(args, namespace)


class ParseKwargs(utils.ParseKwargs):
    """timm's, which takes K=V for an argument of a function; anything else is told."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if value and '=' not in value:
                parser.error(f'{option_string} {value}: expected K=V')
        super().__call__(parser, namespace, values, option_string)


def _numbers(args: argparse.Namespace, names: Iterable[str]) -> list[tuple[str, float]]:
    """The numbers that are given for these arguments, one or several for each, by name."""
    given = [(name, getattr(args, name)) for name in names if getattr(args, name) is not None]
    return [(name, number) for name, value in given for number in (value if isinstance(value, list) else [value])]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question that names what is spelt most alike; empty if nothing is."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f'; did you mean {close[0]}?' if close else ''


def parse_with_config(
        parser: argparse.ArgumentParser,
        argv: Sequence[str] | None = None,
        fit: Callable[[dict, Iterable[str]], dict] = lambda entries, given: entries,
) -> argparse.Namespace:
    """Command line over the YAML file that its --config names over defaults.

    The file's entries become arguments in front of the command line's, so that argparse checks them alike. Before,
    `fit` may leave entries out that do not fit to the arguments that the command line gives, by their names.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument('-c', '--config', default=None)
    path = config.parse_known_args(argv)[0].config
    if path is None:
        return parser.parse_args(argv)
    try:
        entries = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f'--config {path}: {" ".join(str(error).split())}')
    if not isinstance(entries, dict):
        parser.error(f'--config {path}: expected a mapping of argument names to values')
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(str(key) for key in entries if key not in actions)
    if unknown:
        parser.error(f'--config {path}: unknown {", ".join(unknown)}{did_you_mean(unknown[0], actions)}')
    # Of arguments that exclude each other, the command line's puts the file's out.
    given = copy.deepcopy(parser)
    for action in given._actions:
        action.default = argparse.SUPPRESS
    given = vars(given.parse_args(argv)).keys()
    for group in parser._mutually_exclusive_groups:
        names = {action.dest for action in group._group_actions}
        if names & given:
            entries = {key: value for key, value in entries.items() if key not in names}
    front = []
    for key, value in fit(entries, given).items():
        action = actions[key]
        if value is None or value in ([], {}) or key == 'config':
            continue
        if action.nargs == 0:
            if not isinstance(value, bool):
                parser.error(f'--config {path}: {key} must be true or false, not {value!r}')
            front += action.option_strings[0 if value else 1:][:1]  # a plain flag has no second, negative form
        elif isinstance(value, dict):
            front += [action.option_strings[-1], *(f'{k}={v!r}' for k, v in value.items())]
        elif isinstance(value, list):
            front += [action.option_strings[-1], *map(str, value)]
        else:
            front.append(f'{action.option_strings[-1]}={value}')
    return parser.parse_args(front + argv)


# --- Signals ----------------------------------------------------------------------------------------------------------

caught = []  # the first of STOP_SIGNALS that came; a list of the module, as handlers are the whole process's


def catch_signals() -> None:
    """Notes a signal of STOP_SIGNALS in `caught`; a second one ends the process, with status 128 + its number.

    A thread reads them, since a handler in Python waits for the main thread, which may hang in a collective or in a
    file system. Within a second they count as one: a launcher and a terminal or scheduler may both pass on the same.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)

    def listen():
        first = math.inf
        while True:
            number = os.read(reader, 1)[0]
            if number not in STOP_SIGNALS:  # torch handles SIGCHLD, to see its data workers end
                continue
            if not caught:
                first = time.monotonic()
                caught.append(number)
            elif time.monotonic() > first + 1:
                os._exit(128 + number)

    threading.Thread(target=listen, daemon=True).start()


class StopRequest:
    """Whether to stop after the update at hand: `ask` before it, `check` after it.

    A single process just looks. Several have to stop after the same update, whichever of them the signal reached. Their
    answer is a maximum over a group of gloo's, in main memory, that travels while the update is computed: the device is
    never waited for, as it would be for a flag in one of the step's own collectives, and stopping takes an update more
    at the most. A process that died is also noticed here at once, where NCCL would wait for its timeout.
    """

    def __init__(self, accelerator: Accelerator, timeout: float):
        self.group = None
        if accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend='gloo', timeout=timedelta(seconds=timeout))

    def ask(self) -> None:
        if self.group is not None:
            self.flag = torch.tensor([caught[0] if caught else 0])
            self.answer = torch.distributed.all_reduce(
                self.flag, torch.distributed.ReduceOp.MAX, self.group, async_op=True,
            )

    def check(self) -> None:
        """Raises Stopped, on all processes alike, if one of them was asked to stop."""
        if self.group is not None:
            self.answer.wait()
            number = int(self.flag)
        else:
            number = caught[0] if caught else 0
        if number:
            raise Stopped(number)


# --- Set-up and files -------------------------------------------------------------------------------------------------

def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for the next use, as each step on a CPU frees what the following one asks for.

    Given back to the system, it costs a page fault for every 4 KiB of it in the next step. Variables of the environment
    that say what is to be kept win, and other C libraries go their own ways.
    """
    if not sys.platform.startswith('linux') or any(name.startswith('MALLOC_') for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: bytes that may lie free at the end of the heap
        mallopt(-3, 2 ** 30)  # M_MMAP_THRESHOLD: bytes of a piece that gets pages of its own, and gives them back


def setup_accelerator(
        device: str | None = None,
        amp: bool = False,
        amp_dtype: str = 'bfloat16',
        dist_timeout: float = 1800.,
        sync_bn: bool = False,
        trackers: Sequence[str] = (),
        project_dir: str | None = None,
) -> Accelerator:
    """Accelerate for this process, with what the flags of these names ask for.

    Raises:
        UsageError: If the device, the precision, a tracker or Accelerate's own configuration cannot be had here.
    """
    # The argument's new name is not yet one that Accelerate passes on.
    warnings.filterwarnings('ignore', message='`broadcast_buffers` is deprecated', category=FutureWarning)
    missing = [name for name in trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'--log-{missing[0]}: needs the package {missing[0]} (pip install {missing[0]})')
    launched = int(os.environ.get('WORLD_SIZE', '1'))
    # Of several processes Accelerate makes a group on CPUs only where it is told to; each would else be alone.
    cpu = device == 'cpu' or (device is None and launched > 1 and not torch.accelerator.is_available())
    accelerator = Accelerator(
        mixed_precision={'bfloat16': 'bf16', 'float16': 'fp16'}[amp_dtype] if amp else 'no',
        log_with=list(trackers) or None,
        project_dir=project_dir,
        cpu=cpu,
        # The script divides the loss itself; the plugin keeps ACCELERATE_GRADIENT_ACCUMULATION_STEPS from doing so too.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Two forward passes precede a backward pass. Broadcasting buffers in the second would overwrite what the
        # first one's graph needs; share_batch_norm does it after the update.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=dist_timeout)),
        ],
    )
    found = accelerator.device.type
    if accelerator.num_processes < launched:
        raise UsageError(f'{launched} processes were launched, and each believes that it is alone, as Accelerate makes '
                         f'no group of them on the device {found}: add --device cpu, or launch one process')
    if device and found != device:
        raise UsageError(f'--device {device}: not available here; Accelerate found {found}')
    if found == 'cpu':
        keep_freed_memory()
    elif found == 'cuda':  # as in timm's train.py
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if sync_bn and found != 'cuda':
        raise UsageError(f'--sync-bn: needs GPUs, and the device is {found}')
    if amp and not accelerator.native_amp:
        raise UsageError(f'--amp-dtype {amp_dtype}: not available on the device {found}; bfloat16 may be')
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise UsageError(f'Accelerate is configured for {accelerator.distributed_type.value}, which this script does '
                         'not support: launch it with --multi_gpu, or change the configuration (accelerate config)')
    return accelerator


@contextmanager
def once_a_machine(accelerator: Accelerator):
    """Runs a block on the main process first, then on the first process of every other machine, then on the rest.

    What it downloads or puts into a cache is written once on a disk that machines share, and once a machine where they
    share none. However long that takes, the others wait: --dist-timeout is for processes that do not answer, and one
    that died is noticed at once as ever.
    """
    if accelerator.num_processes == 1:
        yield
        return
    group = torch.distributed.new_group(backend='gloo', timeout=timedelta(days=30))
    own_turn = 0 if accelerator.is_main_process else 1 if accelerator.is_local_main_process else 2
    for turn in range(3):
        if turn == own_turn:
            yield
        torch.distributed.barrier(group)
    torch.distributed.destroy_process_group(group)


def bfloat16_units(file: str = '/proc/cpuinfo') -> str | None:
    """The instructions for bfloat16 of an x86 processor, by Linux's names: empty if it has none, None if that is not
    known.
    """
    try:
        words = set(Path(file).read_text().split())
    except OSError:  # another system, of which newer versions of torch tell
        words = {name for name, there in getattr(torch.cpu, 'get_capabilities', dict)().items() if there}
    if 'sse2' not in words:
        return None
    return ', '.join(name for name in ('avx512_bf16', 'amx_bf16') if name in words)


def tell_bfloat16(amp: bool, no_grad: bool) -> str:
    """A line on what makes training faster on a processor with units for bfloat16, or slower on one without, or none.

    The times are those of results/bfloat16.csv and, without units, of ONEDNN_MAX_CPU_ISA=AVX512_CORE.

    Args:
        amp: The run has --amp.
        no_grad: It can have --weak-forward no-grad, and has not.
    """
    units = bfloat16_units()
    if amp and units == '':
        return 'This processor has no units for bfloat16: --amp made steps 1.4 times as long on one without'
    if amp or not units:
        return ''
    further = '; with --weak-forward no-grad too 4.8, 2.3 and 1.4 times (other batch-norm statistics, see --help)'
    return (f'This processor has units for bfloat16 ({units}): --amp --channels-last made a step of wide_resnet28_2 '
            f'3.5 times as fast, of resnet18 1.6 times, but of vit_tiny_patch16_224 0.9 times{further * no_grad}')


def replace_file(path: Path, write) -> None:
    """Writes a file whole or not at all: under another name, synced, renamed."""
    part = path.with_name(path.name + '.part')
    try:
        write(part)
        with open(part, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise RunError(f'{path} cannot be written: {reason}; what was saved before is intact') from error
    finally:
        with suppress(OSError):  # a disk that went read-only refuses this too, and the first error is the one to tell
            part.unlink(missing_ok=True)


def replace_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a folder of files as a whole: beside the old one, synced, and then put in its place.

    A process that is killed between the two renames leaves the old folder as `<name>.old`; see `mend_folder`.

    Args:
        path: The folder.
        write: Fills an empty folder, whose path it gets.

    Raises:
        RunError: If it cannot be written; the old folder is then as it was.
    """
    part, old = path.with_name(path.name + '.part'), path.with_name(path.name + '.old')
    try:
        mend_folder(path)
        part.mkdir()
        write(part)
        for file in (*part.iterdir(), part):
            _sync(file)
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)  # if it stays, the next writing removes it
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # as in replace_file
            mend_folder(path)
        reason = getattr(error, 'strerror', None) or error
        raise RunError(f'{path} cannot be written: {reason}; what was saved before is intact') from error


def mend_folder(path: Path) -> None:
    """Puts the old folder back if `replace_folder` was killed between its renames, and removes what it left over."""
    part, old = path.with_name(path.name + '.part'), path.with_name(path.name + '.old')
    if old.exists() and not path.exists():
        os.replace(old, path)
    for rest in (part, old):
        if rest.exists():
            shutil.rmtree(rest)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
