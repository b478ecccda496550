"""The launchers: their commands, and what they do with runs that are finished, broken, failing or stopped.

Where the training itself does not matter, a stand-in for `python` takes its place.
"""
import importlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT

import train_ssl
from calibratemix import PRESETS

NO_GRIDS = ('_common', 'slurm', 'multinode', 'slurm_multinode')
GRIDS = sorted(path.stem for path in (ROOT / 'launch').glob('*.sh') if path.stem not in NO_GRIDS)
ALGORITHMS = ('fixmatch', 'flexmatch', 'softmatch')
# Writes a line to $LOG and what launchers look at in a run folder. Fails, takes long, or waits for others if so told.
STAND_IN = '''#!/bin/bash
while [ $# -gt 0 ]; do
    case $1 in *.py) script=$(basename "$1") ;; --output) output=$2 ;; --experiment) name=$2 ;; esac
    shift
done
echo "$script $name" >> "$LOG"
if [ "$script" = train_ssl.py ]; then
    trap 'echo "stopped $name" >> "$LOG"; leave=1' TERM
    if [ -n "${SLOW:-}" ]; then
        for _ in $(seq 300); do
            if [ -n "${leave:-}" ]; then
                case "$name" in *-seed1) for _ in $(seq 20); do sleep 0.1; done ;; esac
                exit 75
            fi
            sleep 0.1
        done
    fi
    case "$name" in ${HELD:-none}) TOGETHER=$UNTIL ;; esac
    for _ in $(seq 100); do
        if [ -n "${leave:-}" ]; then exit 75; fi
        [ "$(grep -c train_ssl "$LOG")" -lt "${TOGETHER:-1}" ] || break
        sleep 0.1
    done
    [ "$(grep -c train_ssl "$LOG")" -ge "${TOGETHER:-1}" ] || exit 1
    case "$name" in $FAILING) exit 1 ;; esac
    mkdir -p "$output/$name/last"
    touch "$output/$name/last/metrics.json"
fi
'''


def launch(name: str, *arguments: str, launcher: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Runs a launcher; environment variables of its own are only those given."""
    command = ['bash', launcher or str(ROOT / 'launch' / f'{name}.sh'), *arguments]
    return subprocess.run(command, env=clean_environment(environment), capture_output=True, text=True, timeout=300)


def clean_environment(extra: dict[str, str]) -> dict[str, str]:
    own = ('SCALE', 'DATA_DIR', 'OUTPUT', 'SEEDS', 'DRY_RUN', 'NUM_PROCESSES', 'ACCELERATE_ARGS', 'JOBS', 'KEEP_GOING',
           'ONLY', 'COUNT', 'OOD_DATASETS', 'OOD_DATA_DIR')
    return {**{key: value for key, value in os.environ.items() if key not in own}, **extra}


def commands(name: str, *arguments: str, **environment: str) -> list[list[str]]:
    """What a launcher would run, word by word."""
    result = launch(name, *arguments, DRY_RUN='1', **environment)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def trainings(name: str, *arguments: str, **environment: str) -> list:
    """The parsed arguments of a launcher's runs."""
    found = []
    for command in commands(name, *arguments, **environment):
        script = next(i for i, word in enumerate(command) if word.endswith('.py'))
        if command[script].endswith('train_ssl.py'):
            found.append(train_ssl._parse_args(command[script + 1:]))
    return found


@pytest.fixture
def stand_in(tmp_path):
    """Launches with the stand-in for python; returns the result and the lines of its log."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'python').write_text(STAND_IN)
    (tmp_path / 'bin' / 'python').chmod(0o755)
    log = tmp_path / 'log'
    base = dict(PATH=f'{tmp_path / "bin"}:{os.environ["PATH"]}', LOG=str(log), FAILING='none', SCALE='smoke',
                OUTPUT=str(tmp_path / 'an output'))

    def run(name, *arguments, **environment):
        log.write_text('')
        result = launch(name, *arguments, **{**base, **environment})
        return result, log.read_text().splitlines()

    run.environment, run.log = base, log
    return run


# --- Commands ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('scale', ['paper', 'cpu', 'smoke'])
@pytest.mark.parametrize('name', GRIDS)
def test_every_command_is_one_that_its_script_accepts(name, scale):
    experiments = []
    for command in commands(name, SCALE=scale, SEEDS='0'):
        assert command[0] == 'python'
        script = Path(command[1])
        assert script.parent == ROOT
        args = importlib.import_module(script.stem)._parse_args(command[2:])
        if script.name == 'train_ssl.py':
            experiments.append(args.experiment)
            assert args.resume == 'auto'
            if scale == 'smoke' and name != 'quickstart':
                assert args.dataset == 'digits' and args.epochs * args.train_steps_per_epoch <= 10
    assert len(set(experiments)) == len(experiments) == int(launch(name, SCALE=scale, SEEDS='0', COUNT='1').stdout)


# Network, weight decay and labels of the paper, typed in once more.
PAPER = {
    'table1_cifar10': ('cifar10', 'wide_resnet28_2', 5e-4, (40, 250, 4000)),
    'table1_cifar100': ('cifar100', 'wide_resnet28_8', 1e-3, (400, 2500, 10000)),
    'table1_svhn': ('svhn', 'wide_resnet28_2', 5e-4, (40, 250, 1000)),
    'table1_stl10': ('stl10', 'wide_resnet37_2', 5e-4, (40, 250, 1000)),
    'table2_imagenet': ('imagenet', 'resnet50', 3e-4, (None,)),
    'table2_webvision': ('webvision', 'resnet50', 3e-4, (None,)),
}


def assert_the_recipe(args, dataset: str, model: str, weight_decay: float) -> None:
    assert (args.dataset, args.model, args.weight_decay) == (dataset, model, weight_decay)
    assert args.epochs * args.train_steps_per_epoch == 2 ** 20
    assert (args.mu, args.lr, args.momentum, args.sched, args.opt) == (7, 0.03, 0.9, 'cosine-7-16', 'sgd')
    assert (args.model_ema_decay, args.model_ema_warmup, args.bn_momentum, args.threshold) == (0.999, False, None, 0.95)
    assert args.img_size == (224 if model == 'resnet50' else None)  # else the data set's own
    if args.calmix_warmup_epochs is None:  # then the preset's, in proportion to 2^20 updates
        assert PRESETS[args.calmix_preset]['warmup_steps'] == 102_400


@pytest.mark.parametrize('name', PAPER)
def test_tables_1_and_2_have_the_paper_s_settings(name):
    dataset, model, weight_decay, labels = PAPER[name]
    runs = trainings(name)
    for args in runs:
        assert_the_recipe(args, dataset, model, weight_decay)
        assert args.batch_size == 64 and args.label_fraction == (0.1 if name.startswith('table2') else None)
    cells = [(args.algorithm, args.calibratemix, args.num_labels, args.seed) for args in runs]
    assert len(cells) == len(set(cells))
    assert set(cells) == set(itertools.product(ALGORITHMS, (False, True), labels, (0, 1, 2)))


def test_table_3_has_every_baseline_with_every_base_method():
    cells = []
    for args in trainings('table3_baselines'):
        assert_the_recipe(args, 'cifar10', 'wide_resnet28_2', 5e-4)
        cells.append((args.algorithm, args.calibratemix, args.calmix_preset, args.calmix_pairing, args.label_smoothing,
                      args.seed))
    variants = ((False, 'paper', None, 0.), (True, 'paper', 'random', 0.), (False, 'paper', None, 0.1),
                (True, 'paper', None, 0.), (True, 'ours', None, 0.))
    assert sorted(map(str, cells)) == sorted(
        str((algorithm, *variant, seed)) for algorithm in ALGORITHMS for variant in variants for seed in (0, 1, 2))


@pytest.mark.parametrize('name, setting, key, values', [
    ('ablation_warmup', ('cifar100', 'wide_resnet28_8', 1e-3, 2500), 'calmix_warmup_epochs', (0, 50, 100, 200)),
    ('ablation_similarity_k', ('stl10', 'wide_resnet37_2', 5e-4, 250), 'calmix_topk',
     (0, 0.025, 0.05, 0.075, 0.1, 0.15)),
    ('ablation_batch_size', ('cifar10', 'wide_resnet28_2', 5e-4, 250), 'batch_size calmix_split',
     tuple(itertools.product((16, 32, 64, 128, 256), ('batch', 'bank')))),
    ('ablation_distance', ('cifar10', 'wide_resnet28_2', 5e-4, 250), 'calmix_similarity calmix_space',
     tuple(itertools.product(('cosine', 'euclidean', 'dot'), ('feature', 'pixel')))),
    ('mislabeled', ('cifar10', 'wide_resnet28_2', 5e-4, 4000), 'label_noise aum_threshold_samples',
     tuple(itertools.product((0.2, 0.4), (1, 2)))),
])
def test_ablations_vary_what_they_say_and_nothing_else(name, setting, key, values):
    cells, others = [], set()
    for args in trainings(name):
        *recipe, labels = setting
        assert_the_recipe(args, *recipe)
        assert args.num_labels == labels and args.calibratemix and args.algorithm == 'fixmatch'
        varied = tuple(getattr(args, part) for part in key.split())
        cells.append((varied if len(varied) > 1 else varied[0], args.seed))
        others.add(str({k: v for k, v in vars(args).items() if k not in (*key.split(), 'seed', 'experiment')}))
    assert sorted(cells) == sorted(itertools.product(values, (0, 1, 2))) and len(others) == 1


def test_options_are_compared_on_training_images_that_no_run_trains_on():
    runs, cells = trainings('ablation_options', SEEDS='0'), set()
    for args in runs:
        assert_the_recipe(args, 'cifar10', 'wide_resnet28_2', 5e-4)
        assert (args.train_split, args.val_split, args.unlabeled_split) == ('train[:90%]', 'train[90%:]', None)
        assert args.num_labels == 250 and args.algorithm == 'fixmatch' and args.calmix_preset == 'paper'
        cells.add((args.calibratemix, *(getattr(args, f'calmix_{name}') for name in PRESETS['paper']
                                        if name != 'warmup_steps')))
    assert len(cells) == len(runs)  # no option twice
    own = {name: value for name, value in PRESETS['ours'].items() if PRESETS['paper'][name] != value}
    assert any(all(getattr(args, f'calmix_{name}') == value for name, value in own.items()) for args in runs)


def test_strengths_are_compared_with_two_presets_on_training_images_that_no_run_trains_on():
    runs, cells, others = trainings('ablation_strength'), [], set()
    for args in runs:
        assert_the_recipe(args, 'cifar10', 'wide_resnet28_2', 5e-4)
        assert (args.train_split, args.val_split, args.num_labels) == ('train[:90%]', 'train[90%:]', 250)
        cells.append((args.calibratemix, args.calmix_preset, args.calmix_weight, args.seed))
        others.add(str({k: v for k, v in vars(args).items()
                        if k not in ('calibratemix', 'calmix_preset', 'calmix_weight', 'seed', 'experiment')}))
    mixing = itertools.product((True,), ('paper', 'ours'), (0.1, 0.25, 0.5, 1.0, 2.0))
    expected = itertools.product([(False, 'paper', None), *mixing], (0, 1, 2))
    assert sorted(map(str, cells)) == sorted(str((*variant, seed)) for variant, seed in expected) and len(others) == 1


def test_a_warmup_keeps_its_share_of_any_number_of_epochs():
    for arguments, epochs in (((), 10), (('--epochs', '64'), 64), (('--epochs=12',), 12)):
        found = [args.calmix_warmup_epochs for args in trainings('ablation_warmup', *arguments, SCALE='cpu', SEEDS='0')]
        assert found == pytest.approx([share / 1024 * epochs for share in (0, 50, 100, 200)], rel=1e-4)


def test_the_cpu_scale_is_one_recipe_for_all_rows():
    """All but the data set and what a table varies."""
    seen = set()
    for name in GRIDS:
        if name == 'quickstart':
            continue
        args = trainings(name, SCALE='cpu', SEEDS='0')[0]
        seen.add((args.model, args.img_size, args.bn_momentum, args.model_ema_warmup, args.mu, args.epochs,
                  args.train_steps_per_epoch, args.stat_momentum, args.weight_decay, args.device))
    assert len(seen) == 1
    assert {args.num_labels for args in trainings('table1_cifar100', SCALE='cpu')} == {1000}


def test_flags_of_the_user_win_and_folders_may_have_spaces(tmp_path):
    runs = trainings('table1_cifar10', '--lr', '0.01', '--model', 'resnet18', DATA_DIR='a data set',
                     OUTPUT=str(tmp_path / 'an output'), SEEDS='4')
    assert {(args.lr, args.model, args.data_dir, args.output, args.seed) for args in runs} == {
        (0.01, 'resnet18', 'a data set', str(tmp_path / 'an output'), 4)}


def test_several_processes_share_the_batch():
    for command in commands('table2_imagenet', NUM_PROCESSES='4', SEEDS='0')[:-1]:
        assert command[:5] == ['accelerate', 'launch', '--multi_gpu', '--num_processes', '4']
        assert train_ssl._parse_args(command[6:]).batch_size == 16
    options = '--tpu --main_process_port 1'
    command = commands('table3_baselines', '-b', '10', NUM_PROCESSES='4', ACCELERATE_ARGS=options)[0]
    assert command[:7] == 'accelerate launch --tpu --main_process_port 1 --num_processes 4'.split()
    assert train_ssl._parse_args(command[8:]).batch_size == 10  # the user's, a process


@pytest.mark.parametrize('environment, arguments, told', [
    (dict(SCALE='big'), (), 'SCALE=big: expected paper, cpu or smoke'),
    (dict(SCALE='own'), (), 'SCALE=own: expected paper, cpu or smoke'),
    (dict(NUM_PROCESSES='two'), (), 'NUM_PROCESSES=two: expected 1 or more'),
    (dict(JOBS='0'), (), 'JOBS=0: expected 1 or more'),
    (dict(NUM_PROCESSES='3', DRY_RUN='1'), (), 'NUM_PROCESSES=3 does not divide -b 64'),
    ({}, ('--output', 'x'), '--output: every run has its own; set OUTPUT instead'),
    (dict(NUM_PROCESSES='3', COUNT='1'), (), 'NUM_PROCESSES=3 does not divide -b 64'),
    (dict(COUNT='1'), ('--seed', '5'), '--seed 5: the grid has its own seeds; set SEEDS="5" instead'),
    (dict(DRY_RUN='1'), ('--seed', '5'), '--seed 5: the grid has its own seeds; set SEEDS="5" instead'),
    (dict(ONLY='55', DRY_RUN='1'), (), 'ONLY=55: expected report, or 1 to 54'),
])
def test_a_mistake_is_told_in_one_line(environment, arguments, told):
    result = launch('table1_cifar10', *arguments, **environment)
    assert result.returncode == 2 and result.stderr == f'table1_cifar10.sh: error: {told}\n'


# --- Runs -------------------------------------------------------------------------------------------------------------

def test_a_broken_run_goes_on_and_the_launcher_ends_with_its_table(tmp_path, train, monkeypatch):
    """From another folder, through a path with a space: a run broken off in its second epoch, then the report alone."""
    (tmp_path / 'a repository').symlink_to(ROOT)
    launcher = str(tmp_path / 'a repository' / 'launch' / 'ablation_warmup.sh')
    environment = dict(SCALE='smoke', SEEDS='0', OUTPUT=str(tmp_path / 'an output'))
    args = trainings('ablation_warmup', **environment)[3]

    def save_and_break(*rest):
        save_checkpoint(*rest)
        raise KeyboardInterrupt

    save_checkpoint = train_ssl.save_checkpoint
    monkeypatch.setattr(train_ssl, 'save_checkpoint', save_and_break)
    monkeypatch.setattr(train_ssl, '_parse_args', lambda argv: args)
    with pytest.raises(KeyboardInterrupt):
        train(args.experiment)

    result = launch('', launcher=launcher, ONLY='4', **environment)
    assert result.returncode == 0 and result.stdout == '', result.stderr
    assert re.search(r'Resuming from .*checkpoint-4\.safetensors at update 4', result.stderr)
    result = launch('', launcher=launcher, ONLY='report', **environment)
    assert result.returncode == 0, result.stderr
    caption = 'digits, 20 labels: one run each, so there is no standard deviation'
    assert result.stdout.startswith(f'{caption}\n\n| algorithm ')
    assert result.stderr.count('left out') == 3 and 'warmup100-seed0: no run' in result.stderr
    assert (tmp_path / 'an output' / 'table.tex').is_file() and (tmp_path / 'an output' / 'curves.png').is_file()


def test_finished_runs_are_skipped_and_others_are_not(stand_in, tmp_path):
    _, first = stand_in('ablation_distance', SEEDS='0')
    names = [f'{space}-{similarity}-seed0' for space in ('feature', 'pixel')
             for similarity in ('cosine', 'euclidean', 'dot')]
    assert first == [*(f'train_ssl.py {name}' for name in names), 'report.py ']
    shutil.rmtree(tmp_path / 'an output' / 'pixel-dot-seed0' / 'last')  # as if it were broken
    result, second = stand_in('ablation_distance', SEEDS='0')
    assert second == ['train_ssl.py pixel-dot-seed0', 'report.py '] and result.stderr.count('is finished') == 5
    result, third = stand_in('ablation_distance', '--lr', '0.1', SEEDS='0')
    assert result.returncode == 2 and third == [] and 'was made with other flags' in result.stderr


def test_a_finished_run_is_one_wherever_its_data_lie_and_however_its_machine_is_used(stand_in, tmp_path):
    given = ('--workers', '4', '--device=cpu', '--lr', '0.1', '-j2', '--no-pin-mem')
    stand_in('ablation_distance', *given, SEEDS='0', SCALE='paper', DATA_DIR='a data set')
    keys = list((tmp_path / 'an output').glob('*/finished'))
    assert len(keys) == 6 and all("--data-dir a\\ data\\ set " in key.read_text() for key in keys)
    result, log = stand_in('ablation_distance', '--lr', '0.1', '--log-interval', '7', SEEDS='0', SCALE='paper')
    assert result.returncode == 0 and log == ['report.py '], result.stderr
    result, _ = stand_in('ablation_distance', '--lr', '0.2', SEEDS='0', SCALE='paper', DATA_DIR='a data set')
    assert result.returncode == 2 and 'was made with other flags' in result.stderr


def test_a_failed_run_stops_the_launcher_unless_told_to_keep_going(stand_in):
    result, log = stand_in('table3_baselines', SEEDS='0', FAILING='fixmatch-random-mixup-*')
    assert result.returncode == 1 and len(log) == 2
    assert 'error: fixmatch-random-mixup-seed0 failed with status 1' in result.stderr
    result, log = stand_in('table3_baselines', SEEDS='0', FAILING='fixmatch-random-mixup-*', KEEP_GOING='1')
    assert len(log) == 15 and log[-1] == 'report.py '  # fourteen runs, the first being finished, and the table
    assert result.returncode == 1 and result.stderr.endswith('error: failed: fixmatch-random-mixup-seed0\n')


@pytest.mark.parametrize('jobs', [1, 2])
def test_a_signal_stops_all_runs_once_and_nothing_else_is_started(stand_in, jobs):
    """A second signal would end a run without its checkpoint; the second run takes longer to stop than the first."""
    environment = clean_environment({**stand_in.environment, 'SLOW': '1', 'JOBS': str(jobs)})
    command = ['bash', str(ROOT / 'launch' / 'ood.sh')]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    started = time.monotonic()
    while not stand_in.log.exists() or len(stand_in.log.read_text().splitlines()) < jobs:
        assert time.monotonic() - started < 60
        time.sleep(0.05)
    time.sleep(0.2)  # until it is in the handler's reach
    process.send_signal(signal.SIGUSR1)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75 and 'stopped; the same command goes on' in told
    names = [f'fixmatch-seed{seed}' for seed in range(jobs)]
    assert sorted(stand_in.log.read_text().splitlines()) == sorted(
        [f'train_ssl.py {name}' for name in names] + [f'stopped {name}' for name in names])


def test_jobs_run_at_the_same_time(stand_in):
    """The first does not end before the second has begun."""
    result, log = stand_in('ablation_distance', SEEDS='0', JOBS='2', TOGETHER='2')
    assert result.returncode == 0 and len(log) == 7 and log[-1] == 'report.py '
    assert len(list(Path(stand_in.environment['OUTPUT']).glob('*/train.log'))) == 6


def test_a_run_that_ends_makes_room_and_is_told_with_its_own_seconds_while_an_older_one_goes_on(stand_in):
    """The first of six takes as long as there are others to begin."""
    result, log = stand_in('ablation_distance', SEEDS='0', JOBS='2', HELD='feature-cosine-*', UNTIL='6')
    assert result.returncode == 0 and len(log) == 7, result.stderr
    took = re.findall(r'(\S+) took (\d+) s', result.stderr)
    assert took[-1][0] != took[0][0] and [name for name, _ in took].index('feature-cosine-seed0') >= 4
    assert all(int(seconds) <= 2 for name, seconds in took if name != 'feature-cosine-seed0'), took


def test_a_younger_run_that_fails_is_noticed_at_once_and_stops_the_older_one(stand_in):
    result, log = stand_in('ablation_distance', SEEDS='0', JOBS='2', HELD='feature-cosine-*', UNTIL='99',
                           FAILING='feature-euclidean-*')
    assert result.returncode == 1 and 'error: feature-euclidean-seed0 failed with status 1' in result.stderr
    assert log == ['train_ssl.py feature-cosine-seed0', 'train_ssl.py feature-euclidean-seed0',
                   'stopped feature-cosine-seed0'] and 'took' not in result.stderr


def test_a_signal_between_the_start_of_a_run_and_its_entry_in_the_list_stops_it_too(stand_in, tmp_path):
    launcher = tmp_path / 'interrupted.sh'
    launcher.write_text(f'. {shlex.quote(str(ROOT / "launch" / "_common.sh"))}\n'
                        'dataset cifar10\n'
                        'set -T\n'
                        "trap 'case $BASH_COMMAND in pids+=*) sleep 1; kill -USR1 $$ ;; esac' DEBUG\n"
                        'run first\n')
    result = launch('', launcher=str(launcher), **{**stand_in.environment, 'SLOW': '1'})
    assert result.returncode == 75, result.stderr
    assert stand_in.log.read_text().splitlines() == ['train_ssl.py first', 'stopped first']


def test_slurm_gets_a_task_for_every_run_and_queues_a_stopped_one_again(stand_in, tmp_path):
    """With stand-ins for sbatch, which runs the job at once, and scontrol."""
    for name, body in {
        'sbatch': 'for word; do\n'
                  '    shift\n'
                  '    if [ "$word" = --array ]; then array=$1; fi\n'
                  '    case $word in --dependency) echo "sbatch $1" >> "$LOG" ;; *.sh) break ;; esac\n'
                  'done\n'
                  'if [ -z "${array:-}" ]; then bash "$word" "$@" >&2; exit; fi\n'
                  'echo "sbatch $array" >> "$LOG"\n'
                  'for i in $(seq "${array#*-}"); do SLURM_ARRAY_TASK_ID=$i bash "$word" "$@" >&2; done\n'
                  'echo "7;cluster"\n',
        'scontrol': 'echo "scontrol $*" >> "$LOG"\n',
    }.items():
        (tmp_path / 'bin' / name).write_text('#!/bin/bash\n' + body)
        (tmp_path / 'bin' / name).chmod(0o755)
    result, log = stand_in('slurm', str(ROOT / 'launch' / 'ablation_warmup.sh'), '--lr', '0.1', SEEDS='0')
    names = [f'train_ssl.py warmup{warmup}-seed0' for warmup in (0, 50, 100, 200)]
    assert result.returncode == 0, result.stderr
    assert log == ['sbatch 1-4', *names, 'sbatch afterany:7', 'report.py ']
    dry, = [line for line in launch('slurm', str(ROOT / 'launch' / 'ood.sh'), DRY_RUN='1', SBATCH_ARGS='--gres gpu:1'
                                    ).stdout.splitlines() if '--array' in line]
    assert {'1-18', 'B:USR1@300', '--requeue', 'gpu:1'} <= set(shlex.split(dry))

    environment = clean_environment({**stand_in.environment, 'SLOW': '1', 'OUTPUT': str(tmp_path / 'other'),
                                     'SLURM_ARRAY_JOB_ID': '7', 'SLURM_ARRAY_TASK_ID': '2', 'SLURM_JOB_ID': '9'})
    stand_in.log.write_text('')
    process = subprocess.Popen(['bash', str(ROOT / 'launch' / 'slurm.sh'), '--task', str(ROOT / 'launch' / 'ood.sh')],
                               env=environment, stderr=subprocess.DEVNULL)
    while not stand_in.log.read_text():
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 75
    assert stand_in.log.read_text().splitlines() == ['train_ssl.py fixmatch-seed1', 'stopped fixmatch-seed1',
                                                     'scontrol requeue 7_2']


@pytest.mark.parametrize('name, arguments, told', [
    ('slurm_multinode', ('--experiment', 'mine'), 'not within a SLURM job: submit it with sbatch'),
    ('slurm', (str(ROOT / 'launch' / 'ood.sh'),), 'no sbatch here'),
    ('multinode', ('--experiment', 'mine'), 'set NNODES: the number of hosts'),
])
def test_a_script_for_several_machines_says_in_one_line_what_it_lacks(name, arguments, told):
    if shutil.which('sbatch') or 'SLURM_JOB_ID' in os.environ:
        pytest.skip('SLURM is here')
    result = launch(name, *arguments)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f'{name}.sh: error: {told}')


def test_a_table_behind_failed_runs_is_made_of_the_others_and_names_those_that_are_missing(tmp_path, train):
    environment = dict(SCALE='smoke', SEEDS='0', OUTPUT=str(tmp_path))
    train('warmup50-seed0')
    result = launch('ablation_warmup', ONLY='report', **environment)
    assert result.returncode == 0, result.stderr
    table = (tmp_path / 'table.md').read_text()
    assert 'Left out, 3 of 4 runs: warmup0-seed0, warmup100-seed0, warmup200-seed0' in table and table in result.stdout


# --- The scripts themselves -------------------------------------------------------------------------------------------

def test_launchers_are_valid_and_need_no_bash_newer_than_3_2():
    newer = (r'(declare|local) -[An]|mapfile|readarray|\$\{\w+(,,?|\^\^?)\}|wait -n|&>>|\|&|\$\{\w+@\w\}|\[-1\]')
    for path in sorted((ROOT / 'launch').glob('*.sh')):
        subprocess.run(['bash', '-n', str(path)], check=True)
        assert not re.search(newer, path.read_text()), path
        assert all(len(line) <= 120 for line in path.read_text().splitlines()), path


def test_shellcheck_finds_nothing():
    if shutil.which('shellcheck') is None:
        pytest.skip('shellcheck is not installed')
    files = map(str, sorted((ROOT / 'launch').glob('*.sh')))
    result = subprocess.run(['shellcheck', *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_launcher_says_what_it_reproduces():
    for name in GRIDS:
        lines = (ROOT / 'launch' / f'{name}.sh').read_text().splitlines()
        head = ' '.join(itertools.takewhile(lambda line: line.startswith('#'), lines))
        for said in ('Time: ', *(() if name == 'quickstart' else ('Settings: ', 'Measured by us: ', 'The paper\'s '))):
            assert said in head, name
