"""What a long run meets: signals, kills, full and read-only disks, dead workers, lost processes, several launchers.

Real processes throughout. They are forked from one that has imported the script already, each then runs it as `python
train_ssl.py` does: an import of torch and timm for each would take longer than all of these runs together.
"""
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from test_train import CALMIX, assert_same_run, summary

import train_ssl

# Long enough to be hit in the middle: 60 updates, CalibrateMix from the 30th on.
RUN = (*TINY, *CALMIX, '--train-steps-per-epoch', '30')
FORKING = multiprocessing.get_context('forkserver')
FORKING.set_forkserver_preload(['train_ssl'])


def _run_as_script(argv: list[str], environment: dict[str, str], log: Path) -> None:
    multiprocessing.set_start_method(None, force=True)  # for the data workers, the platform's own
    os.setpgid(0, 0)
    os.environ.update(environment, ACCELERATE_USE_CPU='true')
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [str(ROOT / 'train_ssl.py'), *argv]
    runpy.run_path(sys.argv[0], run_name='__main__')


class Job:
    """A run on one or, without any launcher, several processes, each the leader of a process group."""

    def __init__(self, output: Path, experiment: str, *flags, processes: int = 1):
        argv = [str(flag) for flag in (*RUN, *flags, '--output', output, '--experiment', experiment)]
        self.folder = output / experiment
        self.logs = [output / f'{experiment}.{rank}.log' for rank in range(processes)]
        environment = {}
        if processes > 1:
            with socket.socket() as free:
                free.bind(('127.0.0.1', 0))
                port = free.getsockname()[1]
            environment = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(processes))
        self.processes = []
        for rank, log in enumerate(self.logs):
            log.unlink(missing_ok=True)
            own = dict(environment, RANK=str(rank), LOCAL_RANK=str(rank)) if processes > 1 else {}
            self.processes.append(FORKING.Process(target=_run_as_script, args=(argv, own, log)))
            self.processes[-1].start()

    def log(self, rank: int = 0) -> str:
        return self.logs[rank].read_text() if self.logs[rank].exists() else ''

    def wait_for(self, text: str) -> None:
        """Until the first process logged the text."""
        wait_until(lambda: text in self.log(), lambda: f'{text!r} not in\n{self.log()}')

    def join(self, timeout: float = 60) -> list[int]:
        """Exit statuses; minus the signal of a process that one ended."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
        return codes


def wait_until(condition, message, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, message()
        time.sleep(0.01)


@pytest.fixture(scope='module', autouse=True)
def importable():
    before = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    yield
    if before is None:
        del os.environ['PYTHONPATH']
    else:
        os.environ['PYTHONPATH'] = before


@pytest.fixture(scope='module')
def straight(tmp_path_factory) -> dict[int, Path]:
    """The run that nothing happens to, on one process and on two."""
    output = tmp_path_factory.mktemp('straight')
    jobs = [Job(output, f'on{processes}', processes=processes) for processes in (1, 2)]
    for job in jobs:
        assert set(job.join()) == {0}, job.log()
    assert 'on 2 process(es)' in jobs[1].log()
    return {1: jobs[0].folder, 2: jobs[1].folder}


def newest(folder: Path) -> int:
    return int(train_ssl.list_checkpoints(folder)[0].stem.split('-')[1])


# --- Signals ----------------------------------------------------------------------------------------------------------

def test_each_signal_stops_a_run_after_its_update_with_status_75_and_the_resumed_run_ends_bit_identical(
        straight, tmp_path):
    """SIGINT and SIGTERM go to the data workers too, as they do at a terminal and under a scheduler."""
    stopped = []
    for number, at in ((signal.SIGINT, 6), (signal.SIGTERM, 27), (signal.SIGUSR1, 42)):
        job = Job(tmp_path, 'run', '--resume', 'auto', '--workers', 2)
        job.wait_for(f'update {at}/60')
        pid = job.processes[0].pid
        os.kill(pid, number) if number == signal.SIGUSR1 else os.killpg(pid, number)
        assert job.join() == [75], job.log()
        lines = job.log().strip().splitlines()
        assert lines[-1] == f'train_ssl.py: stopped by {number.name}; --resume auto goes on from there'
        assert lines[-2].endswith(f'Stopping at update {newest(job.folder)}')
        assert 'Traceback' not in job.log() and 'worker' not in job.log()
        stopped.append(newest(job.folder))
    assert 6 <= stopped[0] < 27 <= stopped[1] < 42 <= stopped[2] < 60
    job = Job(tmp_path, 'run', '--resume', 'auto')
    assert job.join() == [0], job.log()
    assert_same_run(straight[1], job.folder)


def test_a_signal_during_an_evaluation_stops_there_and_the_resumed_run_evaluates(train, monkeypatch):
    straight = train('straight', *CALMIX)
    asked = train_ssl.StopRequest.ask

    def ask(self):
        asked(self)
        if sys._getframe(1).f_code.co_name == 'validate':
            train_ssl.caught.append(signal.SIGTERM)

    monkeypatch.setattr(train_ssl, 'caught', [])
    monkeypatch.setattr(train_ssl.StopRequest, 'ask', ask)
    with pytest.raises(train_ssl.Stopped, match='stopped by SIGTERM'):
        train('run', *CALMIX)
    monkeypatch.undo()
    folder = straight.parent / 'run'
    assert newest(folder) == 4 and not (folder / 'summary.csv').exists()
    train('run', *CALMIX, '--resume', 'auto')
    assert [row['num_updates'] for row in summary(folder)] == ['4', '8']
    assert_same_run(straight, folder)


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_update(straight, tmp_path):
    job = Job(tmp_path, 'run', processes=2)
    job.wait_for('update 6/60')
    os.kill(job.processes[1].pid, signal.SIGTERM)
    assert job.join() == [75, 75], job.log(0) + job.log(1)
    assert 6 <= newest(job.folder) < 60 and 'Traceback' not in job.log(0) + job.log(1)
    assert job.log().endswith('train_ssl.py: stopped by SIGTERM; --resume auto goes on from there\n')
    job = Job(tmp_path, 'run', '--resume', 'auto', processes=2)
    assert job.join() == [0, 0], job.log()
    assert_same_run(straight[2], job.folder)


def test_a_launcher_that_is_asked_to_stop_lets_its_processes_save(straight, tmp_path):
    """torch's, which `accelerate launch` runs too: it passes the signal on, and kills them 30 seconds later."""
    launch = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2')
    flags = (*RUN, '--workers', '1', '--output', str(tmp_path), '--experiment', 'run')
    with open(tmp_path / 'log', 'w+') as log:
        environment = dict(os.environ, ACCELERATE_USE_CPU='true')
        process = subprocess.Popen((*launch, ROOT / 'train_ssl.py', *flags), stderr=log, env=environment)
        wait_until(lambda: 'update 6/60' in (tmp_path / 'log').read_text(), (tmp_path / 'log').read_text)
        process.terminate()
        assert process.wait(25) != 0
    text = (tmp_path / 'log').read_text()
    assert text.count('train_ssl.py: stopped by SIGTERM') == 1 and 'SIGKILL' not in text
    assert 6 <= newest(tmp_path / 'run') < 60
    job = Job(tmp_path, 'run', '--resume', 'auto', processes=2)
    assert job.join() == [0, 0], job.log()
    assert_same_run(straight[2], job.folder)


def test_a_second_signal_ends_even_a_process_that_hangs_in_a_collective(tmp_path):
    job = Job(tmp_path, 'run', processes=2)
    job.wait_for('update 6/60')
    os.kill(job.processes[1].pid, signal.SIGSTOP)
    os.kill(job.processes[0].pid, signal.SIGTERM)
    os.kill(job.processes[0].pid, signal.SIGTERM)  # the same once more within a second
    job.processes[0].join(1.5)
    assert job.processes[0].is_alive()
    os.kill(job.processes[0].pid, signal.SIGTERM)
    job.processes[0].join(5)
    assert job.processes[0].exitcode == 128 + signal.SIGTERM
    os.kill(job.processes[1].pid, signal.SIGKILL)
    job.join()
