import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

# Tests never reach for a hub, and tiny models run best on one thread.
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')
# The launchers' `python` is the one that runs the tests, also where its environment is not activated.
os.environ['PATH'] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get('PATH', '')])

ROOT = Path(__file__).resolve().parent.parent

# A few steps of the real job, on real images: the smallest wide ResNet and the bundled digits.
TINY = (
    '--dataset', 'digits', '--num-labels', '20', '--model', 'wide_resnet10_1', '--bn-momentum', '0.1',
    '-b', '4', '--mu', '2', '--epochs', '2', '--train-steps-per-epoch', '4', '--log-interval', '3',
    '--workers', '0', '--device', 'cpu',
)


def run_script(*arguments, processes: int = 1, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs a script of the project as a user does, on one process or, over gloo, on several."""
    command = [sys.executable]
    if processes > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    script, *arguments = map(str, arguments)
    command += [str(ROOT / script), *arguments]
    environment = dict(os.environ, ACCELERATE_USE_CPU='true')
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def shared_data() -> Path:
    """Real CIFAR-10 and photographs beside the repository; tests that need them skip where they are absent."""
    folder = ROOT.parent / 'shared' / 'data'
    if not folder.is_dir():
        pytest.skip(f'no real images at {folder}')
    return folder


def train_in_process(experiment: str, *arguments, output: Path, without: str | None = None) -> Path:
    """Runs train_ssl.py in this process, TINY unless told otherwise; returns the run folder."""
    from accelerate.state import AcceleratorState, GradientState

    import train_ssl

    tiny = list(TINY)
    if without is not None:
        at = tiny.index(without)
        del tiny[at:at + 2]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    where = ('--output', output, '--experiment', experiment)
    train_ssl.main(train_ssl._parse_args([str(a) for a in (*tiny, *where, *arguments)]))
    return Path(output) / experiment


@pytest.fixture
def train(tmp_path):
    """`train_in_process`, by default into a new folder."""
    return partial(train_in_process, output=tmp_path)
