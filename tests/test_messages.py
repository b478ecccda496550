"""What a user is told: mistakes in one line, and lines at the start of a run and in it."""
import sys

import pytest

import benchmark
import mislabeled
import predict
import report
import train_ssl
import validate

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
    ('validate', [], 'give --checkpoint RUN/best'),
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
