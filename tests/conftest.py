import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest

# Tests never reach for a hub, and tiny models run best on one thread.
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')
# The launchers' `python` is the one that runs the tests, also where its environment is not activated.
os.environ['PATH'] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get('PATH', '')])

ROOT = Path(__file__).resolve().parent.parent

# With the requirements and pytest alone, as on a machine that is lent for its GPU, the other files still run.
ABSENT = [name for name in ('hypothesis', 'sklearn') if importlib.util.find_spec(name) is None]
collect_ignore = [path.name for path in sorted((ROOT / 'tests').glob('test_*.py'))
                  if any(f'\nfrom {name}' in path.read_text() for name in ABSENT)]


def pytest_terminal_summary(terminalreporter):
    if collect_ignore:
        terminalreporter.write_line(f'Left out, as {" and ".join(ABSENT)} (requirements-dev.txt) cannot be imported: '
                                    f'{", ".join(collect_ignore)}')


# A few steps of the real job, on real images: the smallest wide ResNet and the bundled digits.
TINY = (
    '--dataset', 'digits', '--num-labels', '20', '--model', 'wide_resnet10_1', '--bn-momentum', '0.1',
    '-b', '4', '--mu', '2', '--epochs', '2', '--train-steps-per-epoch', '4', '--log-interval', '3',
    '--workers', '0', '--device', 'cpu',
)


# Processes that have imported torch, timm and the programs already: six seconds less for each.
FORKING = multiprocessing.get_context('forkserver')
FORKING.set_forkserver_preload(['train_ssl', 'validate', 'predict', 'mislabeled', 'report'])
PATIENCE = 240  # seconds, for machines that are busy with other things


def _run_as_script(argv: list[str], environment: dict[str, str], cwd: Path, outputs: tuple[Path, Path], before) -> None:
    multiprocessing.set_start_method(None, force=True)  # for the data workers, the platform's own
    os.setpgid(0, 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment, ACCELERATE_USE_CPU='true')
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [str(ROOT / argv[0]), *argv[1:]]
    before()
    runpy.run_path(sys.argv[0], run_name='__main__')


def start_script(
        argv: list[str],
        stdout: list[Path],
        stderr: list[Path] | None = None,
        cwd: Path | None = None,
        before=time.time,
) -> list[multiprocessing.Process]:
    """Starts a script on as many processes as there are files for their outputs, each the leader of a process group.

    More than one find each other over gloo as under a launcher. `before` is called in each first.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(ROOT), prepend=os.pathsep)  # where the preloaded programs are
        multiprocessing.forkserver.ensure_running()
    environment, processes = {}, []
    if len(stdout) > 1:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        environment = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(len(stdout)))
    for rank, outputs in enumerate(zip(stdout, stderr or stdout)):
        own = dict(environment, RANK=str(rank), LOCAL_RANK=str(rank)) if environment else {}
        argument = (argv, {**os.environ, **own}, cwd or Path.cwd(), outputs, before)
        processes.append(FORKING.Process(target=_run_as_script, args=argument))
        processes[-1].start()
    return processes


def end_scripts(processes: list[multiprocessing.Process], timeout: float = PATIENCE) -> list[int]:
    """Exit statuses; minus the signal of a process that one ended."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    return codes


def run_script(*arguments, processes: int = 1, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs a script of the project as a user does, on one process or, over gloo, on several."""
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = ([Path(folder, f'{rank}.{name}') for rank in range(processes)] for name in ('out', 'err'))
        codes = end_scripts(start_script(arguments, out, err, cwd))
        texts = (''.join(path.read_text() for path in paths) for paths in (out, err))
        code = next((code for code in codes if code != 0), 0)
        return subprocess.CompletedProcess(arguments, code, *texts)


@pytest.fixture
def shared_data() -> Path:
    """Real CIFAR-10 and photographs beside the repository; tests that need them skip where they are absent."""
    folder = ROOT.parent / 'shared' / 'data'
    if not folder.is_dir():
        pytest.skip(f'no real images at {folder}')
    return folder


def forget_accelerator() -> None:
    """Lets the next Accelerator of this process have another device and precision than the last."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train_in_process(experiment: str, *arguments, output: Path, without: str | None = None) -> Path:
    """Runs train_ssl.py in this process, TINY unless told otherwise; returns the run folder."""
    import train_ssl

    tiny = list(TINY)
    if without is not None:
        at = tiny.index(without)
        del tiny[at:at + 2]
    forget_accelerator()
    where = ('--output', output, '--experiment', experiment)
    train_ssl.main(train_ssl._parse_args([str(a) for a in (*tiny, *where, *arguments)]))
    return Path(output) / experiment


@pytest.fixture
def train(tmp_path):
    """`train_in_process`, by default into a new folder."""
    return partial(train_in_process, output=tmp_path)
