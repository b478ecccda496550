"""Where a run's weights come from, what of them is frozen, and when a run ends for want of progress."""
import csv
import json
import logging
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import TINY, run_script
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import backbone
import checkpoint
import report
import train_ssl
from program import UsageError

MODEL = 'wide_resnet10_1'


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory) -> Path:
    """Weights of seven classes with statistics of their own: as others save them, and as a folder."""
    folder = tmp_path_factory.mktemp('pretrained')
    torch.manual_seed(1)
    model = timm.create_model(MODEL, num_classes=7).train()
    model(torch.rand(16, 3, 8, 8))
    state = model.state_dict()
    torch.save(dict(epoch=3, state_dict={f'module.{name}': value for name, value in state.items()}), folder / 'w.pth')
    save_file(state, folder / 'w.safetensors')
    config = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation='bicubic', input_size=(3, 8, 8))
    save_for_hf(model, folder / 'best', safe_serialization=True, data_config=config)
    return folder


def build(*flags, num_classes=10):
    args = train_ssl._parse_args(['--model', MODEL, *map(str, flags)])
    return backbone.build_model(args, num_classes), args


def weights(folder: Path, which: str = 'last') -> dict[str, torch.Tensor]:
    return load_file(folder / which / 'model.safetensors')


def summary(folder: Path) -> list[dict[str, str]]:
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


# --- Pretrained weights -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors', 'best'])
def test_weights_of_a_path_are_taken_with_a_new_head_and_without_moving_random_numbers(name, pretrained):
    torch.manual_seed(5)
    model, _ = build('--pretrained-path', pretrained / name)
    after = torch.rand(1)
    torch.manual_seed(5)
    plain, _ = build()
    assert torch.equal(after, torch.rand(1))
    expected = load_file(pretrained / 'w.safetensors')
    for key, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key] if key.startswith('fc.') else expected[key]), key


def test_a_checkpoint_folder_brings_its_normalisation_and_another_number_of_channels_is_adapted(pretrained):
    model, args = build('--pretrained-path', pretrained / 'best', '--dataset', 'digits')
    config = train_ssl.resolve_data(args, model)
    assert (config.mean, config.std, config.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 'bicubic')
    grey, _ = build('--pretrained-path', pretrained / 'best', '--in-chans', 1)
    expected = load_file(pretrained / 'w.safetensors')['conv1.weight'].sum(1, keepdim=True)
    assert torch.equal(grey.conv1.weight, expected)


def test_pretrained_weights_that_lack_a_part_are_told_and_those_of_another_model_refused(pretrained, tmp_path, caplog):
    state = load_file(pretrained / 'w.safetensors')
    save_file({k: v for k, v in state.items() if not k.startswith('layer3')}, tmp_path / 'part.safetensors')
    with caplog.at_level(logging.INFO):
        build('--pretrained-path', tmp_path / 'part.safetensors')
    body = [n for n, _ in timm.create_model(MODEL).named_parameters() if not n.startswith('fc.')]
    lost = [n for n in body if n.startswith('layer3')]
    assert f'{len(lost)} of {len(body)} tensors of {MODEL} are not in it, such as {lost[0]}' in caplog.text
    assert f'{len(body) - len(lost)} tensors are in it; the head of 10 outputs is new' in caplog.text
    assert not [record for record in caplog.records if record.name.startswith('timm') and record.levelname == 'INFO']
    save_file({f'encoder.{k}': v for k, v in state.items()}, tmp_path / 'other.safetensors')
    with pytest.raises(UsageError, match=f'{len(body)} of {len(body)} tensors of .* is it of another model'):
        build('--pretrained-path', tmp_path / 'other.safetensors')
    with pytest.raises(UsageError, match='size mismatch') as raised:
        build('--pretrained-path', pretrained / 'w.pth', '--model', 'wide_resnet16_2')
    assert '\n' not in str(raised.value)


def test_the_head_starts_with_the_scale_that_is_asked_for_and_nothing_else_changes(pretrained):
    models = []
    for scale in (None, 0.5, 0):
        torch.manual_seed(5)
        flags = () if scale is None else ('--head-init-scale', scale)
        models.append(build('--pretrained-path', pretrained / 'w.pth', *flags)[0].state_dict())
    for name, value in models[0].items():
        factors = (0.5, 0) if name.startswith('fc.') else (1, 1)
        assert all(torch.equal(value * factor, model[name]) for factor, model in zip(factors, models[1:])), name
    assert models[0]['fc.weight'].any()


class Trap:
    def __reduce__(self):
        return Path.touch, (Path('sprung'),)


def test_what_holds_no_weights_is_refused_in_one_line_and_nothing_in_it_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict=Trap()), 'trap.pth')
    torch.save(dict(epoch=3), 'empty.pth')
    Path('broken.safetensors').write_bytes(b'nothing')
    Path('run/best').mkdir(parents=True)
    for path, told in (('trap.pth', 'read from it safely'), ('empty.pth', 'no weights in it'),
                       ('broken.safetensors', 'read from it safely'), ('absent', 'no such file'),
                       ('run', 'give run/best'), ('run/best', 'no model.safetensors')):
        for flag in ('--pretrained-path', '--initial-checkpoint'):
            with pytest.raises(UsageError, match=f'{flag} {path}: .*{told}') as raised:
                build(flag, path)
            assert '\n' not in str(raised.value)
    Path('checkpoint-4.safetensors').touch()
    for flag in ('--pretrained-path', '--initial-checkpoint'):
        with pytest.raises(UsageError, match=f'{flag} checkpoint-4.safetensors: .* a state to resume from'):
            build(flag, 'checkpoint-4.safetensors')
    assert not Path('sprung').exists()


@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors', 'best'])
def test_an_initial_checkpoint_is_taken_head_and_all(name, pretrained):
    model, saved = build('--initial-checkpoint', pretrained / name, num_classes=7)[0], weights(pretrained, 'best')
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_an_initial_checkpoint_of_another_head_or_model_is_told_as_such(pretrained, tmp_path):
    flags = ('--initial-checkpoint', pretrained / 'best')
    with pytest.raises(UsageError, match=r'best: fc.weight is \[7, \d+\] in it, and \[8, \d+\] in wide_resnet10_1 with '
                                         'the 8 outputs of this run; --pretrained-path takes all but the head'):
        build(*flags, num_classes=8)
    with pytest.raises(UsageError, match=r'best: \d+ of \d+ tensors of resnet18 are not in it.* of another model\?'):
        build(*flags, '--model', 'resnet18', num_classes=7)
    save_file({**weights(pretrained, 'best'), 'more': torch.zeros(1)}, tmp_path / 'more.safetensors')
    with pytest.raises(UsageError, match='1 of .* tensors in it are none of wide_resnet10_1, such as more:'):
        build('--initial-checkpoint', tmp_path / 'more.safetensors', num_classes=7)


# --- Freezing ---------------------------------------------------------------------------------------------------------

def of_stages(name: str, number: int) -> bool:
    return name.startswith(('conv1.', 'layer1.', 'layer2.')[:number])


@pytest.mark.parametrize('what, flags', [
    ('backbone', ('--calibratemix', '--calmix-warmup-epochs', '1')),
    ('2', ('--no-model-ema', '--weight-decay', '0.1')),
    ('2', ('--amp', '--clip-grad', '1', '--opt', 'adamw', '--weight-decay', '0')),
])
def test_what_is_frozen_stays_bit_equal_with_its_statistics_and_the_rest_moves(what, flags, train, pretrained):
    folder = train('run', '--pretrained-path', pretrained / 'w.pth', '--freeze', what, *flags)
    before, after = load_file(pretrained / 'w.safetensors'), weights(folder)
    assert after.keys() == before.keys()
    for name, value in after.items():
        if name.startswith('fc.'):
            continue
        frozen = what == 'backbone' or of_stages(name, 2)
        assert torch.equal(value, before[name]) == frozen, name
    state = checkpoint.read_checkpoint(checkpoint.list_checkpoints(folder)[0])
    trained = sum(not (what == 'backbone' or of_stages(n, 2)) or n.startswith('fc.')
                  for n, _ in timm.create_model(MODEL).named_parameters())
    assert sum(len(group['params']) for group in state['optimizer']['param_groups']) == trained or '0' in flags
    assert len(state['optimizer']['state']) == trained  # no momentum of what has no gradient
    assert yaml.safe_load((folder / 'args.yaml').read_text())['freeze'] == (what if what == 'backbone' else 2)
    model = timm.create_model(f'local-dir:{folder / "last"}', pretrained=True)
    assert torch.equal(model.state_dict()['conv1.weight'], before['conv1.weight'])
    checkpoint.list_checkpoints(folder)[0].unlink()
    train('run', '--pretrained-path', pretrained / 'w.pth', '--freeze', what, *flags, '--resume', 'auto')
    assert all(torch.equal(value, after[name]) for name, value in weights(folder).items())


def test_on_two_processes_frozen_parts_stay_and_both_end_together_when_out_of_patience(pretrained, tmp_path):
    flags = ('--pretrained-path', pretrained / 'w.pth', '--freeze', 2, '--epochs', 6, '--train-steps-per-epoch', 1,
             '--patience', 1, '--dist-timeout', 60, '--output', tmp_path, '--experiment', 'run')
    result = run_script('train_ssl.py', *TINY, *flags, processes=2)
    assert result.returncode == 0 and 'on each of 2 processes' in result.stderr, result.stderr
    before, after = load_file(pretrained / 'w.safetensors'), weights(tmp_path / 'run')
    for name, value in after.items():
        if not name.startswith('fc.'):
            assert torch.equal(value, before[name]) == of_stages(name, 2), name
    values = [float(row['eval_top1']) for row in summary(tmp_path / 'run')]
    assert all(value > max(values[:i]) for i, value in enumerate(values[:-1]) if i)
    assert len(values) == 6 or values[-1] <= max(values[:-1])


@pytest.mark.parametrize('name, stages', [('resnet18', 5), ('test_vit', None), ('test_efficientnet', None)])
def test_the_stages_are_the_models_own_and_all_norms_among_them_stay_in_evaluation_mode(name, stages):
    model = timm.create_model(name, num_classes=3)
    with pytest.raises(UsageError, match=r'expected 1 to (\d+)') as raised:
        backbone.freeze(model, 99)
    last = int(str(raised.value).split()[-1])
    assert stages in (None, last)
    frozen = backbone.freeze(model, last)
    wrapped = backbone.FeaturesAndLogits(model, frozen).train()
    still = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert 'fc.weight' not in still and 'head.weight' not in still and 'classifier.weight' not in still and still
    norm = 'none'
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            assert module.training == (f'{path}.weight' not in still), path
            norm = path
        elif not path.startswith(f'{norm}.'):  # timm's norms have their activation inside
            assert module.training, path
    assert wrapped.training and model.training


@pytest.mark.parametrize('flags, message', [
    (('--freeze',), '--freeze: the frozen part would keep random weights'),
    (('--freeze', '0', '--pretrained'), 'expected a number of stages from 1 on'),
    (('--head-init-scale', '0', '--initial-checkpoint', 'b'), 'is no new one'),
    (('--patience', '0'), '--patience 0: expected 1 or more'),
    (('--pretrained-path', 'a', '--initial-checkpoint', 'b'), 'the second would overwrite the first'),
])
def test_what_cannot_be_is_refused_by_the_command_line(capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        train_ssl._parse_args(list(flags))
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_resume_with_another_part_frozen_is_refused(train, pretrained):
    flags = ('--pretrained-path', pretrained / 'w.pth', '--epochs', 1)
    train('run', *flags, '--freeze', 1)
    with pytest.raises(UsageError, match='--freeze 1 -> 2'):
        train('run', *flags, '--freeze', 2, '--resume', 'auto')


# --- Patience ---------------------------------------------------------------------------------------------------------

STILL = ('--model', 'test_vit', '--img-size', '32', '--lr', '0', '--epochs', '6', '--train-steps-per-epoch', '1',
         '--val-split', 'test[:60]')


def test_a_run_that_ends_by_patience_reports_its_test_split_too(train):
    folder = train('run', *STILL[:-2], '--patience', 2, '--val-fraction', 0.2, '--test-split', 'test[:40]')
    metrics = json.loads((folder / 'last/metrics.json').read_text())
    assert metrics['out_of_patience'] and metrics['epoch'] == 2
    assert metrics['test']['count'] == 40 and metrics['test']['source'] == 'test[:40]'
    assert 'test' not in json.loads((folder / 'best/metrics.json').read_text())


def test_a_run_ends_after_so_many_evaluations_without_progress_and_is_then_finished(train, tmp_path, caplog):
    with caplog.at_level(logging.INFO, 'train'):
        folder = train('run', *STILL, '--patience', 2, '--checkpoint-hist', 9)
    assert [row['epoch'] for row in summary(folder)] == ['0', '1', '2']  # the first is the best, of equal ones
    assert 'Ending after epoch 2: 2 evaluations in a row were not better than top1' in caplog.text
    metrics = json.loads((folder / 'last/metrics.json').read_text())
    assert metrics['out_of_patience'] is True and metrics['epoch'] == 2
    assert 'out_of_patience' not in json.loads((folder / 'best/metrics.json').read_text())
    assert report.read_run(folder)['metrics']['num_updates'] == 3

    before = (folder / 'summary.csv').read_bytes()
    train('run', *STILL, '--patience', 2, '--resume', 'auto')
    assert (folder / 'summary.csv').read_bytes() == before and f'{folder} is finished' in caplog.text
    with pytest.raises(UsageError, match='of its --patience 2; raise --epochs or --patience'):
        train('other', *STILL, '--patience', 2, '--resume', folder / 'checkpoint-3.safetensors')
    (folder / 'checkpoint-3.safetensors').unlink()  # as killed before its last epoch: it counts on from there
    train('run', *STILL, '--patience', 2, '--resume', 'auto')
    assert (folder / 'summary.csv').read_bytes() == before
    train('run', *STILL, '--patience', 4, '--resume', 'auto')
    assert [row['epoch'] for row in summary(folder)] == ['0', '1', '2', '3', '4']


def test_a_run_with_progress_or_before_calibratemix_starts_is_not_ended(train):
    flags = ('--calibratemix', '--calmix-warmup-epochs', '3', '--patience', 1)
    assert len(summary(train('waits', *STILL, *flags))) == 4
    folder = train('falls', '--patience', 1, '--eval-metric', 'nll', '--epochs', 8, '--train-steps-per-epoch', 1)
    values = [float(row['eval_nll']) for row in summary(folder)]
    first = next((i for i in range(1, len(values)) if values[i] >= min(values[:i])), None)
    assert len(values) == (8 if first is None else first + 1) > 2
