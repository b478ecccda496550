"""What a user is told: mistakes in one line, and lines at the start of a run and in it."""
import argparse
import fcntl
import math
import os
import re
import struct
import sys
import termios
import time

import pytest
import torch
from huggingface_hub import constants
from PIL import Image

import backbone
import benchmark
import mislabeled
import predict
import program
import report
import train_ssl
import validate
from checkpoint import holds_results
from labels import select_labeled
from program import RunError, UsageError, bfloat16_units, takes_bar
from sources import ImageError
from splits import open_sources

PARSERS = dict(
    train_ssl=train_ssl._parse_args,
    validate=validate._parse_args,
    predict=predict._parse_args,
    mislabeled=mislabeled._parse_args,
    report=report._parse_args,
    benchmark=lambda argv: benchmark.create_parser().parse_args(argv),
)


@pytest.mark.parametrize('program, arguments, told', [
    ('train_ssl', ['--num-lables', '40'], '--num-lables: there is no such flag; did you mean --num-labels?'),
    ('train_ssl', ['--epochs=2', '--modle=resnet18'], '--modle: there is no such flag; did you mean --model'),
    ('train_ssl', ['--epochs', 'two'], "argument --epochs: invalid int value: 'two'"),
    ('train_ssl', ['--epochs', '0'], '--epochs 0: expected 1 or more'),
    ('validate', ['--chekpoint', 'best'], '--chekpoint: there is no such flag; did you mean --checkpoint'),
    ('train_ssl', ['photos'], 'no flag takes photos; pictures are given as --data-dir FOLDER'),
    ('validate', [], 'give --checkpoint RUN/best'),
    ('validate', ['run/last'], 'no flag takes run/last; weights are given as --checkpoint RUN/last'),
    ('predict', ['x', '--coverag', '0.9'], '--coverag: there is no such flag; did you mean --coverage?'),
    ('mislabeled', ['run', '--result-dir', 'x'], '--result-dir: there is no such flag; did you mean --results-dir?'),
    ('report', ['run', '--ouput', 'x'], '--ouput: there is no such flag; did you mean --output?'),
    ('report', ['run'], 'the following arguments are required: --output'),
    ('benchmark', ['--quik'], '--quik: there is no such flag; did you mean --quick?'),
    ('benchmark', ['--zzzzzz'], '--zzzzzz: there is no such flag; --help lists them'),
])
def test_a_mistake_in_the_arguments_is_one_line_that_says_what_was_meant(
        monkeypatch, capsys, program, arguments, told,
):
    monkeypatch.setattr(sys, 'argv', [f'{program}.py'])
    with pytest.raises(SystemExit) as exit:
        PARSERS[program](arguments)
    line = capsys.readouterr().err
    assert exit.value.code == 2
    assert line.startswith(f'{program}.py: error: {told}')
    assert line.count('\n') == 1 and line.endswith('\n')


def test_a_mistake_is_told_by_one_process_of_a_machine(monkeypatch, capsys):
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(SystemExit) as exit:
        train_ssl._parse_args(['--epochs', '0'])
    assert exit.value.code == 2 and not capsys.readouterr().err


def test_an_unknown_entry_of_a_config_file_names_what_is_spelt_alike(tmp_path, capsys):
    path = tmp_path / 'args.yaml'
    path.write_text('num_lables: 40\n')
    with pytest.raises(SystemExit):
        train_ssl._parse_args(['--config', str(path)])
    assert 'unknown num_lables; did you mean num_labels?' in capsys.readouterr().err


def test_a_run_without_images_is_told_what_to_give():
    with pytest.raises(UsageError, match='no images are given: --data-dir FOLDER .* or --dataset NAME'):
        open_sources(train_ssl._parse_args([]))


def test_a_draw_that_a_class_is_too_small_for_names_it_and_the_share_that_fits_unequal_classes():
    targets, names = torch.tensor([0] * 30 + [1] * 10), ['ants', 'bees']
    with pytest.raises(UsageError) as error:
        select_labeled(targets, None, 2, 0, labels_per_class=15, class_names=names)
    assert str(error.value) == ('--labels-per-class 15: asks for 15 images of class bees, which has 10. The classes '
                                'are unequal: --label-fraction 0.75 would take this share of each')
    drawn = select_labeled(targets, None, 2, 0, label_fraction=0.75, class_names=names)
    assert targets[drawn].bincount().tolist() == [23, 8]
    with pytest.raises(UsageError, match='class ants, which has 10$'):  # of equal classes none has more to give
        select_labeled(targets[20:], 22, 2, 0, class_names=names)


def test_a_run_that_ended_before_it_saved_anything_does_not_block_its_name(train, monkeypatch, caplog):
    def fail(*_):
        raise RunError('the disk is full')

    with monkeypatch.context() as patched:
        patched.setattr(train_ssl, 'train_and_evaluate', fail)
        with pytest.raises(RunError):
            train('run', '--epochs', 1)
    with caplog.at_level('INFO', 'train'):
        folder = train('run', '--epochs', 1, '--seed', 7)
    assert caplog.text.count('ended before it saved anything: starting anew there') == 1
    assert 'seed: 7' in (folder / 'args.yaml').read_text() and (folder / 'summary.csv').exists()
    with pytest.raises(UsageError, match='holds a run already'):
        train('run', '--epochs', 1)


@pytest.mark.parametrize('name', ['checkpoint-4.safetensors', 'abandoned-4.safetensors', 'summary.csv', 'best', 'last'])
def test_what_a_run_saved_is_kept_whatever_of_it_is_left(tmp_path, name):
    for early in ('args.yaml', 'labels.json', '.lock', 'checkpoint-1.safetensors.part'):
        (tmp_path / early).touch()
    assert not holds_results(tmp_path)
    (tmp_path / name).touch()
    assert holds_results(tmp_path)


MEANS = dict(loss=2.5, loss_labeled=1., loss_unlabeled=0.75, loss_mixup=0.75, mask_rate=0.5, pseudo_label_accuracy=0.25)


def test_lines_and_bar_tell_the_parts_of_the_loss_that_a_run_has_and_right_pseudo_labels_only_where_known():
    def words(algorithm, calibratemix, **other):
        args = argparse.Namespace(algorithm=algorithm, calibratemix=calibratemix)
        return train_ssl.progress_words(MEANS | other, args, 3)

    told = 'loss 2.500 (labeled 1.000 unlabeled 0.750 mixup 0.750)  mask 0.500'
    assert words('fixmatch', True) == f'{told}  pseudo-labels right 0.250'
    assert words('fixmatch', True, pseudo_label_accuracy=math.nan) == told
    assert words('vat', False, pseudo_label_accuracy=math.nan) == told.replace(' mixup 0.750', '')
    assert words('supervised', False, pseudo_label_accuracy=math.nan) == 'loss 2.500'


@pytest.mark.parametrize('columns, rows, bar', [(0, 24, False), (80, 0, False), (80, 24, True)])
def test_a_terminal_that_has_no_width_or_height_gets_lines(columns, rows, bar):
    other, terminal = os.openpty()
    with os.fdopen(terminal, 'w') as stream:
        fcntl.ioctl(stream, termios.TIOCSWINSZ, struct.pack('HHHH', rows, columns, 0, 0))
        assert stream.isatty() and takes_bar(stream) == bar
    os.close(other)
    assert not takes_bar(stream)


def test_a_run_tells_once_when_mixing_starts_and_never_nan(train, monkeypatch, caplog):
    shown = []
    monkeypatch.setattr(train_ssl, 'takes_bar', lambda stream: True)
    monkeypatch.setattr(train_ssl.tqdm, 'set_postfix_str', lambda bar, text, refresh: shown.append(text))
    with caplog.at_level('INFO', 'train'):
        train('bar', '--calibratemix', '--calmix-warmup-epochs', 1, '--algorithm', 'fixmatch')
        monkeypatch.undo()
        train('lines', '--algorithm', 'supervised')
    started = [line for line in caplog.messages if 'starts mixing' in line]
    assert started == ['CalibrateMix starts mixing in epoch 1, with update 5: the loss has one more part from here on, '
                       'and is higher by it']
    mixup = [float(re.search(r'mixup ([.0-9]+)', text)[1]) for text in shown]
    assert len(shown) == 4 and mixup[0] == 0 and mixup[-1] > 0
    assert all('pseudo-labels right' in text for text in shown)
    assert 'nan' not in ''.join(shown) + caplog.text
    assert any('update 8/8  loss' in line and 'right' not in line for line in caplog.messages)


@pytest.mark.parametrize('offline, told', [(True, 'HF_HUB_OFFLINE is set'), (False, 'refused')])
def test_pretrained_weights_that_cannot_be_fetched_are_told_at_once(monkeypatch, tmp_path, offline, told):
    # Nothing listens at the discard port of this machine.
    for name, value in (('HF_HUB_OFFLINE', offline), ('ENDPOINT', 'http://127.0.0.1:9'), ('HF_HUB_CACHE', tmp_path)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                        'http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}')
    started = time.monotonic()
    with pytest.raises(UsageError) as error:
        backbone.build_model(train_ssl._parse_args(['--model', 'resnet18', '--pretrained']), 10)
    message = str(error.value)
    assert message.startswith(f'--pretrained: the pretrained weights of resnet18 are not in the cache of this machine '
                              f'({tmp_path}), and http://127.0.0.1:9 cannot be reached')
    assert told in message and '\n' not in message and '--pretrained-path' in message
    with pytest.raises(UsageError, match='^--pretrained: the pretrained weights of resnet18 are not in the cache'):
        args = validate._parse_args(['--model', 'resnet18', '--pretrained', '--dataset', 'digits'])
        backbone.load_model(args, None, {})
    assert time.monotonic() - started < 20


def test_the_start_of_a_run_tells_sets_splits_batch_and_who_labels(train, monkeypatch, caplog):
    monkeypatch.setattr(train_ssl, 'tell_bfloat16', lambda *_: 'which flags are faster')
    with caplog.at_level('INFO', 'train'):
        train('run', '--epochs', 1, '--grad-accum-steps', 2, '--train-steps-per-epoch', 1, '--val-fraction', 0.2,
              '--test-split', 'test')
    lines = caplog.messages
    number, unlabeled, held_out, tested = map(int, re.search(
        r'(\d+) labeled images of train, (\d+) unlabeled of train, (\d+) for evaluation of .+, (\d+) of test at the '
        'end',
        caplog.text,
    ).groups())
    assert number == 20 and unlabeled + held_out == 1297 and tested == 500
    assert 'an update takes 8 labeled and 16 unlabeled images: 4 and 8 from each of 2 batches on one process, device ' \
           'cpu' in lines
    assert 'Pseudo-labels are those of the student, the network that is trained, not the average that is evaluated' in \
           lines
    assert lines.count('which flags are faster') == 1


def test_the_batch_is_told_of_all_processes():
    args = train_ssl._parse_args(['-b', '4', '--algorithm', 'supervised'])
    assert train_ssl.tell_batch(args, 3, 'cuda') == ('an update takes 12 labeled images: 4 on each of 3 processes, '
                                                     'device cuda, with TF32 and cudnn.benchmark')


def test_units_for_bfloat16_are_found_where_the_system_or_torch_names_them(tmp_path, monkeypatch):
    for flags, units in (('sse2 avx512_bf16 amx_bf16', 'avx512_bf16, amx_bf16'), ('sse2 avx512f amx_tile', ''),
                         ('asimd bf16', None)):
        (tmp_path / 'cpuinfo').write_text(f'processor : 0\nflags : fpu {flags}\n')
        assert bfloat16_units(str(tmp_path / 'cpuinfo')) == units
    told = dict(sse2=True, avx512_bf16=True, amx_bf16=False, cpu_name='any')
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: told, raising=False)
    assert bfloat16_units(str(tmp_path / 'nowhere')) == 'avx512_bf16'
    monkeypatch.delattr(torch.cpu, 'get_capabilities')
    assert bfloat16_units(str(tmp_path / 'nowhere')) is None


@pytest.mark.parametrize('flags, told', [
    ([], '--amp --channels-last, --weak-forward no-grad'),
    (['--weak-forward', 'no-grad'], '--amp --channels-last'),
    (['--algorithm', 'supervised'], '--amp --channels-last'),
    (['--algorithm', 'mixmatch'], '--amp --channels-last'),
    (['--freeze', '--pretrained'], '--amp --channels-last'),
    (['--freeze', '2', '--pretrained'], '--amp --channels-last, --weak-forward no-grad'),
    (['--amp'], ''),
])
def test_flags_for_bfloat16_units_are_told_to_runs_that_lack_them_and_can_have_them(flags, told, monkeypatch):
    def line(units):
        monkeypatch.setattr(program, 'bfloat16_units', lambda: units)
        return program.tell_bfloat16(args.amp, train_ssl.saves_backward(args))

    args = train_ssl._parse_args(flags)
    found = re.findall('--amp --channels-last|--weak-forward no-grad', line('amx_bf16'))
    assert ', '.join(found) == told and '\n' not in line('amx_bf16')
    train_ssl._parse_args([*flags, *' '.join(found).split()])  # they can be added as they stand there
    assert bool(line('')) == args.amp and not line(None)


def test_pictures_to_predict_are_limited_as_those_of_a_run_are(tmp_path):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        Image.new('RGB', (20, 10)).save(tmp_path / name / 'x.png')
    (tmp_path / 'list.txt').write_text('a/x.png\n')
    given = [
        [str(tmp_path / 'a'), str(tmp_path / 'b')], [str(tmp_path / 'a' / 'x.png')], [str(tmp_path / 'list.txt')],
        ['--data-dir', str(tmp_path / 'a')],
    ]
    for pictures in given:
        for limit, fits in ((199, False), (200, True)):
            source = predict.open_all(predict._parse_args([*pictures, '--checkpoint', 'x', '--max-pixels', str(limit)]))
            if fits:
                assert source.image(0).size == (20, 10)
            else:
                with pytest.raises(ImageError, match='20 x 10 pixels are more than 199'):
                    source.image(0)
