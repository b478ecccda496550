"""What a long run meets: signals, kills, full and read-only disks, dead workers, lost processes, several launchers.

Real processes throughout. They are forked from one that has imported the script already, each then runs it as `python
train_ssl.py` does: an import of torch and timm for each would take longer than all of these runs together.
"""
import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from conftest import FORKING, PATIENCE, ROOT, TINY, end_scripts, forget_accelerator, start_script
from test_train import CALMIX, assert_same_run, summary

import checkpoint
import program
import train_ssl
from calibratemix import CalibrateMix
from program import RunError, UsageError

# Long enough to be hit in the middle: 60 updates, CalibrateMix from the 30th on.
RUN = (*TINY, *CALMIX, '--train-steps-per-epoch', '30')


class Job:
    """A run on one or, without any launcher, several processes, each the leader of a process group.

    `before` is called in each first; `terminal` is where a single process's output goes instead of a file.
    """

    def __init__(
            self,
            output: Path,
            experiment: str,
            *flags,
            processes: int = 1,
            before=time.time,
            terminal: str | None = None,
    ):
        argv = ['train_ssl.py', *map(str, (*RUN, *flags, '--output', output, '--experiment', experiment))]
        self.folder = output / experiment
        number = len(list(output.glob('*.log')))
        self.logs = [output / f'{number + rank}.log' for rank in range(processes)]
        for log in self.logs:
            log.touch()
        self.processes = start_script(argv, [Path(terminal)] if terminal else self.logs, before=before)

    def log(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()

    def wait_for(self, text: str) -> None:
        """Until the first process logged the text."""
        wait_until(lambda: text in self.log(), lambda: f'{text!r} not in\n{self.log()}')

    def join(self, timeout: float = PATIENCE) -> list[int]:
        return end_scripts(self.processes, timeout)


def wait_until(condition, message, timeout: float = PATIENCE) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, message()
        time.sleep(0.01)


@pytest.fixture(scope='module')
def straight(tmp_path_factory) -> dict[int, Path]:
    """The run that nothing happens to, on one process and on two."""
    output = tmp_path_factory.mktemp('straight')
    jobs = [Job(output, f'on{processes}', processes=processes) for processes in (1, 2)]
    for job in jobs:
        assert set(job.join()) == {0}, job.log()
    assert 'on each of 2 processes' in jobs[1].log()
    return {1: jobs[0].folder, 2: jobs[1].folder}


def newest(folder: Path) -> int:
    return int(checkpoint.list_checkpoints(folder)[0].stem.split('-')[1])


# --- Signals ----------------------------------------------------------------------------------------------------------

def test_each_signal_stops_a_run_after_its_update_with_status_75_and_the_resumed_run_ends_bit_identical(
        straight, tmp_path):
    """SIGINT and SIGTERM go to the data workers too, as they do at a terminal and under a scheduler."""
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        job = Job(tmp_path, 'run', '--resume', 'auto', '--workers', 2)
        job.wait_for('  loss ')  # the first line of progress
        pid = job.processes[0].pid
        os.kill(pid, number) if number == signal.SIGUSR1 else os.killpg(pid, number)
        assert job.join() == [75], job.log()
        lines = job.log().strip().splitlines()
        assert lines[-1] == f'train_ssl.py: stopped by {number.name}; --resume auto goes on from there'
        assert lines[-2].endswith(f'Stopping at update {newest(job.folder)}')
        assert 'Traceback' not in job.log() and 'worker' not in job.log()
        stopped.append(newest(job.folder))
    assert 3 <= stopped[0] < stopped[1] < stopped[2] < 60
    job = Job(tmp_path, 'run', '--resume', 'auto')
    assert job.join() == [0], job.log()
    assert_same_run(straight[1], job.folder)


def test_a_signal_during_an_evaluation_stops_there_and_the_resumed_run_evaluates(train, monkeypatch):
    straight = train('straight', *CALMIX)
    asked = program.StopRequest.ask

    def ask(self):
        asked(self)
        if sys._getframe(1).f_code.co_name == 'validate':
            program.caught.append(signal.SIGTERM)

    monkeypatch.setattr(program, 'caught', [])
    monkeypatch.setattr(program.StopRequest, 'ask', ask)
    with pytest.raises(program.Stopped, match='stopped by SIGTERM'):
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


class Launch:
    """A run under torch's launcher, which is also that of `accelerate launch`."""

    def __init__(self, output: Path, *flags):
        launch = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2')
        flags = (*RUN, *map(str, flags), '--output', str(output), '--experiment', 'run')
        environment = dict(os.environ, ACCELERATE_USE_CPU='true')
        self.file = output / 'launch.log'
        with open(self.file, 'w') as log:
            self.process = subprocess.Popen(
                (*launch, ROOT / 'train_ssl.py', *flags), stdout=log, stderr=log, env=environment,
            )
        wait_until(lambda: 'update 6/60' in self.log(), self.log)

    def log(self) -> str:
        return self.file.read_text()


def test_a_launcher_that_is_asked_to_stop_lets_its_processes_save(straight, tmp_path):
    """It passes the signal on to their process groups, data workers included, and kills them 30 seconds later."""
    launch = Launch(tmp_path, '--workers', 1)
    launch.process.terminate()
    assert launch.process.wait(60) != 0
    assert launch.log().count('train_ssl.py: stopped by SIGTERM') == 1 and 'SIGKILL' not in launch.log()
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
    job.processes[0].join(60)
    assert job.processes[0].exitcode == 128 + signal.SIGTERM
    os.kill(job.processes[1].pid, signal.SIGKILL)
    job.join()


# --- The run folder ---------------------------------------------------------------------------------------------------

def test_a_second_run_into_a_folder_in_use_is_refused_by_all_its_processes_and_the_first_goes_on(straight, tmp_path):
    first = Job(tmp_path, 'run')
    first.wait_for('update 3/60')
    os.kill(first.processes[0].pid, signal.SIGSTOP)  # so that it is not done before the other has started
    second = Job(tmp_path, 'run', '--resume', 'auto', processes=2)
    assert second.join() == [2, 2], second.log()
    os.kill(first.processes[0].pid, signal.SIGCONT)
    told = second.log(0) + second.log(1)
    assert told.count('error: ') == 1 and 'Traceback' not in told
    assert f'is in use by process {first.processes[0].pid} on {socket.gethostname()}: wait' in told
    assert first.join() == [0], first.log()
    assert_same_run(straight[1], first.folder)


def test_a_folder_that_cannot_be_written_is_a_usage_error(train, tmp_path):
    with pytest.raises(UsageError, match='--output .*run cannot be written: No such file'):
        train('run', output=Path('/proc'))
    (tmp_path / 'file').touch()
    with pytest.raises(UsageError, match='--output .*file/run cannot be written: Not a directory'):
        train('run', output=tmp_path / 'file')


@pytest.mark.parametrize('at', ['checkpoint', 'labels.json', 'summary.csv', 'last.part', 'best.part'])
def test_a_disk_that_turns_read_only_stops_a_run_in_one_line(train, monkeypatch, tmp_path, at):
    """Renaming fails first in the tests; on such a disk removing fails as well, even of a file that is not there."""
    replace = os.replace

    def refuse(path, *more, **options):
        if more and at not in str(path):
            return replace(path, *more)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, 'replace', refuse)
    monkeypatch.setattr(Path, 'unlink', refuse)
    with pytest.raises(RunError, match='run.* cannot be written: Read-only file system') as caught:
        train('run')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('steps', range(6))
def test_a_kill_while_last_is_written_leaves_weights_and_metrics_of_one_epoch(tmp_path, monkeypatch, steps):
    """Killed before each step: a file, its metrics, two renames, removing the old one, none."""
    folder, left = tmp_path / 'last', [math.inf]

    class Killed(BaseException):
        pass

    def killable(step):
        def take(*given, **named):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return step(*given, **named)
        return take

    def write(epoch):
        def fill(part):
            killable(Path.write_text)(part / 'model.safetensors', epoch)
            killable(Path.write_text)(part / 'metrics.json', epoch)
        program.replace_folder(folder, fill)

    def found():
        assert sorted(path.name for path in folder.iterdir()) == ['metrics.json', 'model.safetensors']
        return ''.join(sorted({path.read_text() for path in folder.iterdir()}))

    write('0')
    monkeypatch.setattr(os, 'replace', killable(os.replace))
    monkeypatch.setattr(shutil, 'rmtree', killable(shutil.rmtree))
    left[0] = steps
    if steps < 5:
        with pytest.raises(Killed):
            write('1')
    else:
        write('1')
    left[0] = math.inf
    assert not folder.exists() or found() in ('0', '1')
    program.mend_folder(folder)
    assert found() == ('1' if steps >= 4 else '0') and [path.name for path in tmp_path.iterdir()] == ['last']
    write('2')
    assert found() == '2' and [path.name for path in tmp_path.iterdir()] == ['last']


@pytest.mark.skipif(not hasattr(resource, 'prlimit'), reason='needs the limits of Linux')
def test_a_run_that_met_a_full_disk_while_saving_resumes_bit_identical_when_there_is_space(straight, tmp_path):
    job = Job(tmp_path, 'run', '--recovery-interval', 1)
    job.wait_for('update 6/60')
    resource.prlimit(job.processes[0].pid, resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes, of any file
    assert job.join() == [1] and 'Traceback' not in job.log()
    assert re.search(r'cannot be written: .*File too large.*; what was saved before is intact\n$', job.log())
    assert not list(tmp_path.rglob('*part*')) and 3 <= newest(job.folder) < 60
    job = Job(tmp_path, 'run', '--resume', 'auto')
    assert job.join() == [0], job.log()
    assert_same_run(straight[1], job.folder)


# --- Kills ------------------------------------------------------------------------------------------------------------

def kill_and_resume(output: Path, kills: int, seed: int, *flags, updates: int = 60) -> tuple[list[int], int, Path]:
    """A run that saves every update, killed so many times at random moments, each time resumed, and then finished.

    Returns:
        The update of each resume, how many kills hit the writing of a file, and the run folder.
    """
    chance, resumed, while_writing = random.Random(seed), [0], 0
    folder = output / 'run'
    for _ in range(kills):
        job = Job(output, 'run', *flags, '--recovery-interval', 1, '--workers', 2, '--resume', 'auto')
        at = resumed[-1] + chance.randint(1, updates // (kills + 3))
        while not checkpoint.list_checkpoints(folder) or newest(folder) < at:
            assert job.processes[0].is_alive(), job.log()
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        # Half of them in the middle of a write; the others hit whatever is going on.
        writing = chance.random() < 0.5
        while writing and job.processes[0].is_alive() and not list(folder.rglob('*part*')):
            pass
        job.processes[0].kill()
        assert job.join() == [-signal.SIGKILL], job.log()
        while_writing += bool(list(folder.rglob('*part*')))
        resumed.append(newest(folder))
    job = Job(output, 'run', *flags, '--resume', 'auto')
    assert job.join() == [0], job.log()
    return resumed[1:], while_writing, folder


def test_a_run_killed_at_random_moments_also_while_it_writes_ends_bit_identical(straight, tmp_path):
    resumed, while_writing, folder = kill_and_resume(tmp_path, kills=4, seed=0)
    assert resumed == sorted(set(resumed)) and resumed[-1] < 60 and while_writing > 0
    assert_same_run(straight[1], folder)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='finds the workers in /proc')
def test_a_data_worker_that_is_killed_ends_the_run_with_one_line_and_status_1(tmp_path):
    job = Job(tmp_path, 'run', '--workers', 2)
    job.wait_for('update 6/60')
    os.kill(children(job.processes[0].pid)[-1], signal.SIGKILL)
    assert job.join() == [1], job.log()
    last = job.log().strip().splitlines()[-1]
    assert last.startswith('train_ssl.py: error: a data worker died: ')
    assert 'fewer --workers' in last and '--resume auto' in last and 'Traceback' not in job.log()


def _fail_just_before_a_data_worker_dies(log: Path) -> None:
    log.touch()
    os.dup2(os.open(log, os.O_WRONLY), 2)
    loader = iter(torch.utils.data.DataLoader(range(100), num_workers=1, multiprocessing_context='fork'))
    next(loader)
    explain = program.explain

    def explain_slowly(error, resume):
        loader._workers[0].kill()
        time.sleep(1)  # unless torch's handler breaks it off
        return explain(error, resume)

    def fail():
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    program.explain = explain_slowly
    program.run_program(fail)


def test_a_data_worker_that_ends_while_a_fault_is_told_does_not_break_that_off(tmp_path):
    """One that dies while it hands a batch over is noticed by the broken connection first and by its end afterwards."""
    process = FORKING.Process(target=_fail_just_before_a_data_worker_dies, args=(tmp_path / 'log',))
    process.start()
    process.join(PATIENCE)
    told = (tmp_path / 'log').read_text().splitlines()
    assert process.exitcode == 1 and len(told) == 1, told
    assert 'error: a data worker died: [Errno ' in told[0] and 'Connection reset by peer' in told[0]


def exhaust_memory():
    from data import BatchDataset

    def fail(self, keys):
        raise MemoryError
    BatchDataset.__getitems__ = fail


def test_memory_that_runs_out_in_a_data_worker_is_told_in_one_line(tmp_path):
    job = Job(tmp_path, 'run', '--workers', 1, before=exhaust_memory)
    assert job.join() == [1] and 'Traceback' not in job.log()
    assert 'train_ssl.py: error: out of memory, in this process or in a data worker' in job.log()


@pytest.mark.parametrize('number, said', [
    (signal.SIGKILL, 'another process ended'),
    (signal.SIGSTOP, 'does not answer (Timed out'),
])
def test_one_of_two_processes_that_dies_or_hangs_ends_the_other_in_time_with_one_line(tmp_path, number, said):
    job = Job(tmp_path, 'run', '--dist-timeout', 4, processes=2)
    job.wait_for('update 6/60')
    os.kill(job.processes[1].pid, number)
    job.processes[0].join(60)
    assert job.processes[0].exitcode == 1, job.log()
    if number == signal.SIGSTOP:
        job.processes[1].kill()
    assert job.join()[1] == -signal.SIGKILL
    last = job.log().strip().splitlines()[-1]
    assert last.startswith('train_ssl.py: error: ') and said in last and '--resume auto' in last
    assert 'Traceback' not in job.log()


def test_a_launcher_ends_the_run_in_time_when_one_of_its_processes_is_killed(tmp_path):
    launch = Launch(tmp_path)
    victims = children(launch.process.pid)
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    assert launch.process.wait(60) == 1
    wait_until(lambda: not any(Path(f'/proc/{pid}').exists() for pid in victims), launch.log)
    assert 'train_ssl.py: error: another process ended' in launch.log() and 'exitcode  : -9 ' in launch.log()


def test_an_unknown_error_keeps_its_traceback():
    assert program.explain(RuntimeError('mat1 and mat2 shapes cannot be multiplied')) is None
    assert program.explain(KeyError('gloom')) is None


# --- Batches ----------------------------------------------------------------------------------------------------------

def test_a_global_batch_is_shared_out_over_processes_and_accumulated_steps(train):
    args = train_ssl._parse_args(['--global-batch-size', '24', '--grad-accum-steps', '2'])
    train_ssl.share_batch(args, 3)
    assert args.batch_size == 4
    with pytest.raises(UsageError, match='--global-batch-size 24: not divisible by 5 process.* x --grad-accum-steps 2'):
        train_ssl.share_batch(args, 5)
    with pytest.raises(SystemExit):
        train_ssl._parse_args(['--global-batch-size', '64', '-b', '64'])
    plain = train('plain', '-b', 8)
    shared = train('shared', '--global-batch-size', 8, without='-b')
    assert_same_run(plain, shared)
    assert_same_run(plain, train('replayed', '--config', shared / 'args.yaml', without='-b'))


def test_a_resume_on_fewer_processes_says_what_becomes_of_the_joined_batch(straight, train, tmp_path, caplog):
    """Two processes with a batch of 4 each, resumed on one from update 30."""
    draws = {}
    flags = (*CALMIX, '--train-steps-per-epoch', 30, '--resume', 'auto')
    for name, batch in (('kept', ('--global-batch-size', 8)), ('halved', ('-b', 4))):
        shutil.copytree(straight[2], tmp_path / name)
        (tmp_path / name / 'checkpoint-60.safetensors').unlink()
        with caplog.at_level(logging.WARNING):
            train(name, *flags, *batch, without='-b')
        draws[name] = checkpoint.read_checkpoint(checkpoint.list_checkpoints(tmp_path / name)[0])['num_draws']
    told = [line for line in caplog.messages if line.startswith('Resuming on')]
    assert told[0].startswith('Resuming on 1 instead of 2 process(es): the joined batch stays 8 labeled images')
    assert told[1].startswith('Resuming on 1 instead of 2 process(es): the joined batch changes from 8 to 4 labeled')
    assert draws == {'kept': 60, 'halved': 30 * 2 + 30}  # the data goes on where it was


def record_masks():
    mix, loss, masks = CalibrateMix.mix, CalibrateMix.loss, []

    def recording_mix(self, *args):
        mixed = mix(self, *args)
        masks[:] = [mask.int().tolist() for mask in (*args[-1], mixed.easy)]
        return mixed

    def recording_loss(self, logits, mixed):
        print('mixed', json.dumps([*masks, mixed.weight.tolist()]), flush=True)
        return loss(self, logits, mixed)

    CalibrateMix.mix, CalibrateMix.loss = recording_mix, recording_loss


def test_the_joined_split_on_two_processes_is_that_of_one_on_the_joined_batch(tmp_path):
    """Frozen weights and no batch-norm, so that margins do not depend on the batch that an image is in."""
    flags = ('--calmix-split', 'joined', '--model', 'test_vit', '--img-size', 32, '--lr', 0,
             '--train-steps-per-epoch', 6)
    jobs = [Job(tmp_path, f'on{n}', *flags, '-b', 8 // n, processes=n, before=record_masks) for n in (1, 2)]
    masks = []
    for job in jobs:
        assert set(job.join()) == {0}, job.log()
        of_rank = [[json.loads(line[6:]) for line in job.log(rank).splitlines() if line.startswith('mixed')]
                   for rank in range(len(job.logs))]
        masks.append([[sum(part, []) for part in zip(*step)] for step in zip(*of_rank)])
    assert len(masks[0]) == len(masks[1]) == 6
    uneven = 0
    for one, two in zip(*masks):
        assert one[:3] == two[:3] and sum(one[0]) == 4 and sum(one[1]) == 8
        assert sum(two[3]) / 2 == pytest.approx(sum(one[3])) == pytest.approx(2)
        uneven += sum(two[0][:4]) != 2
    assert uneven  # by its own median, each process would have two


def test_the_joined_split_of_one_process_is_the_split_of_its_batch(train):
    assert_same_run(train('batch', *CALMIX), train('joined', *CALMIX, '--calmix-split', 'joined'))


# --- Progress and compilation -----------------------------------------------------------------------------------------

def test_a_terminal_shows_a_bar_that_log_lines_do_not_tear_and_a_file_gets_plain_lines(straight, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 120, 0, 0))  # rows, columns
    job = Job(tmp_path, 'run', terminal=os.ttyname(theirs))
    shown = b''
    os.set_blocking(ours, False)
    while job.processes[0].is_alive():
        try:
            shown += os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.01)
    assert job.join() == [0], shown
    with contextlib.suppress(BlockingIOError):  # what came between the last read and the process's end
        shown += os.read(ours, 65536)
    shown = shown.decode()
    lines = re.split(r'[\r\n]+', shown)
    assert '100%|' in shown and '60/60' in shown and 'loss ' in shown
    whole = re.compile(r'epoch \d evaluation of 500 images of [^:]+: .*, confidence [\d.]+ %( \(best top1 so far\))?')
    assert len([line for line in lines if whole.fullmatch(line)]) == 2
    assert 'update 3/60' not in shown
    plain = (straight[1].parent / '0.log').read_text()
    assert '%|' not in plain and '\r' not in plain and 'update 3/60' in plain
    assert_same_run(straight[1], job.folder)


def test_a_compiled_network_is_compiled_whole_for_two_shapes_and_then_never_again(train, monkeypatch):
    """Neither the end of CalibrateMix's warmup nor an evaluation of the very network compiles it once more."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    graphs, one_update = [], train_ssl.train_one_update

    def counting(*args):
        updated = one_update(*args)
        graphs.append(counters['stats']['unique_graphs'])
        return updated

    monkeypatch.setattr(train_ssl, 'train_one_update', counting)
    train('run', *CALMIX, '--torchcompile', 'aot_eager', '--epochs', 3, '--amp', '--channels-last', '--no-model-ema',
          '-vb', 7)
    assert graphs == [1] * 4 + [2] * 8  # labeled, weak and strong images; after warmup the mixed ones too
    assert not counters['graph_break']
    forget_accelerator()  # in other tests of this process bfloat16 is not asked for


# --- Several machines -------------------------------------------------------------------------------------------------

def test_two_machines_on_loopback_end_bit_identical_to_one_with_two_processes(straight, tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    hosts = []
    for rank in range(2):
        environment = dict(
            os.environ, NNODES='2', NODE_RANK=str(rank), NPROC='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
            ACCELERATE_USE_CPU='true', PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]),
        )
        with open(tmp_path / f'{rank}.log', 'w') as log:
            hosts.append(subprocess.Popen(
                ('bash', ROOT / 'launch/multinode.sh', *RUN, '--output', tmp_path, '--experiment', 'run'),
                env=environment, stdout=log, stderr=log,
            ))
    logs = [(tmp_path / f'{rank}.log').read_text for rank in range(2)]
    try:
        assert [host.wait(PATIENCE) for host in hosts] == [0, 0], logs[0]() + logs[1]()
    finally:
        for host in hosts:
            host.terminate()  # which ends its processes too
    assert 'on each of 2 processes' in logs[0]() and '--result' in logs[0]() and '--result' not in logs[1]()
    assert_same_run(straight[2], tmp_path / 'run')


PRETENDED = {
    # Two tasks on each of two machines, and the highest of their exit statuses.
    'srun': """
        while [ "$1" != bash ]; do shift; done
        for i in 0 1 2 3; do SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "$@" & pids="$pids $!"; done
        for pid in $pids; do wait "$pid"; s=$?; [ $s -gt "${most:-0}" ] && most=$s; done; exit "${most:-0}"
    """,
    'python': 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $(basename "$1") ${*:2}" >> "$SEEN"; exit "$STATUS"',
    'scontrol': 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "scontrol $*" >> "$SEEN"; fi',
}


@pytest.mark.parametrize('status', [0, 1, 75])
def test_the_slurm_script_starts_every_task_with_its_rank_and_requeues_a_stopped_run_only(tmp_path, status):
    """SLURM itself is pretended: srun starts the tasks that it would."""
    for name, text in PRETENDED.items():
        (tmp_path / name).write_text(f'#!/usr/bin/env bash\n{text}\n')
        (tmp_path / name).chmod(0o755)
    environment = dict(
        os.environ, PATH=os.pathsep.join([str(tmp_path), os.environ['PATH']]), SEEN=str(tmp_path / 'seen'),
        STATUS=str(status), SLURM_NTASKS='4', SLURM_JOB_ID='42', SLURM_JOB_NODELIST='node[7-8]',
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    script = shutil.copy(ROOT / 'launch/slurm_multinode.sh', tmp_path / 'slurm_script')  # as SLURM does
    flags = ('--data-dir', 'a folder', '--experiment', 'mine')
    result = subprocess.run(('bash', script, *flags), env=environment, capture_output=True, text=True)
    *tasks, last = sorted((tmp_path / 'seen').read_text().splitlines() + ([] if status == 75 else ['z']))
    same = '4 node7 train_ssl.py --data-dir a folder --experiment mine --resume auto'
    assert tasks == [f'{i} {i % 2} {same}' for i in range(4)], result.stderr
    assert last == ('scontrol requeue 42' if status == 75 else 'z')
    assert result.returncode == status
