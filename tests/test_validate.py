"""The validation program: what it reads, measures, fits, writes and refuses."""
import csv
import json
import runpy
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT, run_script
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import transforms

import data
import metrics
import scaling
import sources
import validate
from data import ViewDataset
from labels import write_labels
from program import RunError, UsageError
from seeds import item_seed
from sources import create_source

PICTURES = ('reliability_diagram', 'confidence_histogram', 'risk_coverage_diagram', 'class_diagram',
            'confusion_diagram')


# --- Runs to evaluate -------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def run_folder(tmp_path_factory) -> Path:
    """A short run on digits."""
    output = tmp_path_factory.mktemp('validate')
    done = run_script(
        'train_ssl.py', '--dataset', 'digits', '--num-labels', '20', '--model', 'wide_resnet10_1', '--calibratemix',
        '-b', '8', '--mu', '2', '--epochs', '2', '--train-steps-per-epoch', '20', '--bn-momentum', '0.1',
        '--model-ema-warmup', '-j', '0', '--device', 'cpu', '--output', output, '--experiment', 'run',
    )
    assert done.returncode == 0, done.stderr
    return output / 'run'


@pytest.fixture(scope='session')
def sharp_folder(run_folder) -> Path:
    """The run with its logits times 4: the same predictions, claimed with four times the certainty."""
    folder = run_folder.parent / 'sharp'
    shutil.copytree(run_folder, folder)
    path = folder / 'best' / 'model.safetensors'
    weights = load_file(path)
    save_file({key: 4 * value if key.startswith('fc.') else value for key, value in weights.items()}, path)
    return folder


@pytest.fixture
def run_copy(run_folder, tmp_path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / 'copy'))


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Runs validate.py in this process, without pictures; returns its results folder."""
    for name in PICTURES:
        monkeypatch.setattr(validate, name, lambda *args, **kwargs: None)

    def run(*arguments) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        common = ('--device', 'cpu', '-j', '0', '--bootstrap', '20', '--results-dir', tmp_path / 'results')
        validate.main(validate._parse_args([str(a) for a in (*common, *arguments)]))
        return tmp_path / 'results'

    return run


def report(folder: Path) -> dict:
    return json.loads((folder / 'metrics.json').read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def logits_of(folder: Path, source, index=None) -> torch.Tensor:
    """Straight from timm: one image after the other."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**config)
    with torch.no_grad():
        return torch.cat([model(transform(source.image(i))[None]) for i in (index or range(len(source)))])


@pytest.fixture(scope='session')
def photographs(tmp_path_factory) -> Path:
    """Thirteen pictures of other sizes than the model's, in no class folders."""
    folder = tmp_path_factory.mktemp('photographs')
    generator = np.random.default_rng(0)
    for i in range(13):
        pixels = generator.integers(0, 256, (10 + i, 30 - i, 3), dtype=np.uint8)
        (folder / f'part{i % 2}').mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f'part{i % 2}' / f'{i}.png')
    return folder


@pytest.fixture(scope='session')
def comparison(run_folder, sharp_folder, photographs) -> tuple[Path, str]:
    """Two checkpoints compared as a user does, on two processes: the results folder and what was printed."""
    folder = run_folder.parent / 'results'
    arguments = report_arguments(run_folder, sharp_folder, photographs)
    done = run_script('validate.py', *arguments, '-b', '64', '--results-dir', folder, processes=2)
    assert done.returncode == 0, done.stderr
    assert '2 process(es)' in done.stderr
    return folder, done.stdout


def report_arguments(run_folder: Path, sharp_folder: Path, photographs: Path) -> tuple:
    return (
        '--checkpoint', run_folder / 'best', sharp_folder / 'best', '--calibration-split', 'train[:649]',
        '--ood-dataset', photographs, '--save-logits', '-j', '0', '--bootstrap', '50', '--calibration', 'pseudo',
        '--unlabeled-split', 'train[:90]',
    )


# --- The report -------------------------------------------------------------------------------------------------------

def test_a_run_needs_no_flag_repeated_and_its_own_figures_come_out(run_folder, comparison):
    ours, theirs = report(comparison[0] / 'run'), report(run_folder / 'best')
    assert (ours['dataset'], ours['split'], ours['count']) == ('digits', 'test', 500)
    for key in ('error', 'top5', 'ece', 'ece_10', 'mce', 'confidence'):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-4), key
    assert ours['bins']['count'] == theirs['bins']['count']
    assert ours['nll'] == pytest.approx(theirs['nll'], abs=1e-6)


def test_predictions_are_those_of_the_model_in_the_order_of_the_images(run_folder, comparison):
    table = pq.read_table(comparison[0] / 'run' / 'predictions.parquet')
    assert table.column_names == ['index', 'target', 'predicted', 'confidence', 'logits']
    source = create_source('digits', None, 'test')
    assert table['index'].to_pylist() == list(range(500))
    assert table['target'].to_pylist() == source.targets.tolist()
    logits = torch.tensor(table['logits'].to_pylist())
    assert torch.allclose(logits[:40], logits_of(run_folder / 'best', source, range(40)), atol=1e-5)
    assert table['predicted'].to_pylist() == logits.argmax(1).tolist()
    assert torch.allclose(torch.tensor(table['confidence'].to_pylist()), logits.softmax(1).amax(1), atol=1e-6)
    found = report(comparison[0] / 'run')
    expected = metrics.calibration_report(logits, source.targets, bootstrap=50, seed=0)
    assert {key: found[key] for key in expected} == pytest.approx(dict(expected))


def test_two_processes_give_the_same_digits_as_one(run_folder, sharp_folder, photographs, comparison, evaluate):
    folder = evaluate(*report_arguments(run_folder, sharp_folder, photographs))
    for name in ('comparison.csv', 'ood.csv', 'run/metrics.json', 'sharp/metrics.json', 'run/predictions.parquet',
                 'run/classes.csv', 'run/confusion.csv'):
        assert (comparison[0] / name).read_bytes() == (folder / name).read_bytes(), name


def test_no_batch_is_smaller_than_the_others(run_folder):
    # Some kernels give other last digits for other batch sizes, and a process's last batch may have any size.
    class Recorder(torch.nn.Module):
        num_classes, sizes = 2, []

        def forward(self, x):
            self.sizes.append(len(x))
            return x.flatten(1)[:, :2]

    _, config, view = validate.load_model(validate._parse_args(['--checkpoint', 'x']), run_folder / 'best', {})
    source = create_source('digits', None, 'test[:10]')
    dataset = ViewDataset(source, {'image': view, 'digest': validate.picture_digest})
    model, args = Recorder(), Namespace(batch_size=4, workers=0, pin_mem=False, channels_last=False, amp=False)
    outputs = validate.collect(model, dataset, config, Accelerator(cpu=True), args)
    assert model.sizes == [4, 4, 4]
    assert outputs.index.tolist() == list(range(10)) and torch.equal(outputs.target, source.targets)
    assert len(outputs.digest.unique()) == 10


def test_every_picture_is_written(comparison):
    shared = {'comparison.png', 'comparison_temperature.png', 'comparison_vector.png', 'comparison_pseudo.png',
              'risk_coverage.png'}
    own = {'reliability.png', 'reliability_pseudo.png', 'reliability_temperature.png', 'reliability_vector.png',
           'confidence.png', 'risk_coverage.png', 'classes.png', 'confusion.png'}
    for folder, names in ((comparison[0], shared), (comparison[0] / 'run', own), (comparison[0] / 'sharp', own)):
        assert {path.name for path in folder.glob('*.png')} == names
        for name in names:
            with Image.open(folder / name) as picture:
                picture.load()
                assert min(picture.size) > 400


def test_what_an_earlier_report_left_in_the_folder_is_told_and_not_removed(run_folder, sharp_folder, photographs,
                                                                          evaluate, tmp_path, caplog):
    best, few = run_folder / 'best', ('--split', 'test[:30]')
    first = ('--checkpoint', best, sharp_folder / 'best', '--ood-dataset', photographs, *few)
    evaluate(*first)
    for name in ('comparison.png', 'run/reliability_vector.png', 'notes.png'):
        (tmp_path / 'results' / name).touch()
    told = 'holds what this report has not written and an earlier one may have: '
    assert told not in caplog.text
    evaluate(*first)
    assert f'{told}run/reliability_vector.png\n' in caplog.text
    caplog.clear()
    folder = evaluate('--checkpoint', best, *few)
    assert f'{told}comparison.png, ood.csv, run, sharp\n' in caplog.text
    assert (folder / 'ood.csv').stat().st_size and (folder / 'sharp' / 'metrics.json').exists()
    caplog.clear()
    evaluate(*first)
    assert f'{told}classes.csv, confusion.csv, metrics.json, predictions.parquet, run/reliability' in caplog.text


def test_a_report_leaves_nothing_over_of_its_own(comparison):
    scalings = ('none', 'pseudo', 'temperature', 'vector')
    results = [Namespace(name=name, scaled=scalings) for name in ('run', 'sharp')]
    assert validate.left_over(comparison[0], results, True) == []
    assert {path.name for path in (comparison[0] / 'run').iterdir()} == set(validate.result_files(scalings))


def test_the_table_and_its_file_have_a_row_for_each_checkpoint_and_scaling(comparison):
    folder, printed = comparison
    found = rows(folder / 'comparison.csv')
    assert [(row['run'], row['scaling']) for row in found] == [
        (run, scaling) for run in ('run', 'sharp') for scaling in ('none', 'pseudo', 'temperature', 'vector')
    ]
    for row in found:
        assert float(row['ece_low']) <= float(row['ece']) <= float(row['ece_high'])
        own = [line for line in printed.splitlines() if line.split()[:2] == [row['run'], row['scaling']]]
        line, further, selective = own
        keys = ('coverage_at_95', 'coverage_at_99', 'accuracy_at_80', 'accuracy_at_90', 'aurc')
        assert selective.split()[2:] == [f'{float(row[key]):.2f}' for key in keys]
        keys = ('balanced_accuracy', 'macro_f1', 'ece_equal_mass', 'ece_balanced', 'ece_classwise', 'ece_smooth')
        assert further.split()[2:] == [f'{float(row[key]):.2f}' for key in keys]
        assert f'{float(row["ece"]):.2f} [{float(row["ece_low"]):.2f}, {float(row["ece_high"]):.2f}]' in line
        assert f'{float(row["nll"]):.4f}' in line


def test_temperature_scaling_takes_back_a_factor_of_the_logits(comparison):
    folder, printed = comparison
    plain, _, scaled, _, sharp, _, sharp_scaled, _ = rows(folder / 'comparison.csv')
    assert float(sharp_scaled['temperature']) == pytest.approx(4 * float(scaled['temperature']), rel=1e-5)
    assert abs(float(sharp['ece']) - float(plain['ece'])) > 2
    for key in ('ece', 'nll', 'brier', 'error'):
        assert float(sharp_scaled[key]) == pytest.approx(float(scaled[key]), abs=1e-3)
    left = printed[printed.index('ECE of sharp minus ECE of run, in percentage points, with its 95 %'):].splitlines()
    scaled_line, = [line for line in left if 'after temperature scaling: ' in line]
    assert left[1].startswith('  unscaled: ') and '0.00 [' in scaled_line
    assert '; the gap is 0 % of the unscaled one' in scaled_line


@pytest.mark.parametrize('scaled, told', [
    ((2., 4.), '+2.00; the gap is 50 % of the unscaled one'),
    ((2., 0.), '-2.00; the gap is 50 % of the unscaled one, and now first has the larger ECE'),
    ((2., 8.), '+6.00; the gap is 150 % of the unscaled one'),
])
def test_what_scaling_leaves_of_a_gap_is_told_in_words(scaled, told):
    results = [validate.Result(
        name, None, None, None, None, None, None, {}, scaled=dict(none=None, temperature=None),
        reports=dict(none=dict(ece=raw), temperature=dict(ece=after)),
    ) for name, raw, after in zip(('first', 'other'), (3., 7.), scaled)]
    assert validate.what_is_left(results, Namespace(bootstrap=0, seed=0)) == [
        'ECE of other minus ECE of first, in percentage points:',
        '  unscaled: +4.00',
        f'  after temperature scaling: {told}',
    ]
    results[1].reports['none']['ece'] = 3.1  # a share of next to nothing says nothing
    assert '%' not in validate.what_is_left(results, Namespace(bootstrap=0, seed=0))[2]


def test_pictures_name_their_runs_and_scalings(run_folder, sharp_folder, evaluate, monkeypatch):
    drawn = []
    for name in PICTURES:
        monkeypatch.setattr(validate, name, lambda *args, name=name: drawn.append((name, args)))
    evaluate('--checkpoint', run_folder / 'best', sharp_folder / 'best', '--split', 'test[:100]',
             '--calibration-split', 'train[:10%]')
    headings = [args[2] for name, args in drawn if name == 'reliability_diagram']
    scalings = ['after temperature scaling', 'after vector scaling']
    own = [[name, *(f'{name}, {scaling}' for scaling in scalings)] for name in ('run', 'sharp')]
    assert headings == [*own[0], *own[1], '', *scalings]
    assert [args[-1] for name, args in drawn if name in ('confidence_histogram', 'class_diagram')] == [
        'run', 'run', 'sharp', 'sharp']
    *_, panels = [args[0] for name, args in drawn if name == 'reliability_diagram']
    assert [panel.title for panel in panels] == ['run', 'sharp'] and panels[0].note.startswith('95 %: ')
    assert [name for name, *_ in drawn[-1][1][0]] == ['run', 'sharp']


def test_labeled_images_of_the_runs_are_left_out_of_the_fit(run_folder, comparison):
    labeled = json.loads((run_folder / 'labels.json').read_text())['index']
    within = sum(i < 649 for i in labeled)
    assert 0 < within < 20
    assert report(comparison[0] / 'run')['calibration_images'] == 649 - within


def test_pseudo_calibration_equals_a_plain_loop_and_never_sees_labeled_or_evaluated_images(run_folder, comparison):
    source, folder = create_source('digits', None, 'train[:90]'), run_folder / 'best'
    labeled = set(json.loads((run_folder / 'labels.json').read_text())['index'])
    test = create_source('digits', None, 'test')
    seen = {image.tobytes() for image in (*map(test.image, range(500)), *map(source.image, labeled & set(range(90))))}
    index = [i for i in range(90) if source.image(i).tobytes() not in seen]
    assert labeled & set(range(90)) and len(index) < 90
    alone = logits_of(folder, source, index).argmax(1)
    partner = scaling.draw_partners(len(index), item_seed(0, 'pseudo-calibration'))
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    logits = []
    for i, j in enumerate(partner.tolist()):
        mixture = 0.65 * transform(source.image(index[i])) + 0.35 * transform(source.image(index[j]))
        with torch.no_grad():
            logits.append(model(mixture[None]))
    temperature, at_bound = scaling.fit_temperature(torch.cat(logits), alone)
    found = report(comparison[0] / 'run')['scaled']['pseudo']
    assert not at_bound and found['images'] == len(index)
    assert found['temperature'] == pytest.approx(temperature, rel=1e-4)


def test_a_temperature_without_labels_that_makes_a_model_surer_is_told(caplog):
    logits = torch.tensor([[1., 0.]] * 9 + [[0., 1.]])
    for factor, told in ((1., True), (4., False)):
        some = validate.Outputs(torch.arange(10), torch.zeros(10).long(), torch.arange(10), factor * logits)
        result = validate.Result('run', None, None, some, None, None, some, {})
        caplog.clear()
        validate.scale(result, Namespace())
        assert result.parameters['pseudo']['temperature'] == pytest.approx(factor / np.log(9), rel=1e-3)
        assert ('0.46, which makes it surer than it was' in caplog.text) == told


def test_classes_and_their_confusions_are_counted_by_name(comparison):
    table = pq.read_table(comparison[0] / 'run' / 'predictions.parquet')
    pairs = list(zip(table['target'].to_pylist(), table['predicted'].to_pylist()))
    matrix = rows(comparison[0] / 'run' / 'confusion.csv')
    for k, (row, by_class) in enumerate(zip(matrix, rows(comparison[0] / 'run' / 'classes.csv'), strict=True)):
        assert row['true'] == by_class['name'] == str(k)
        assert [int(row[str(j)]) for j in range(10)] == [pairs.count((k, j)) for j in range(10)]
        assert int(by_class['images']) == sum(t == k for t, _ in pairs)
        assert float(by_class['recall']) == pytest.approx(100 * pairs.count((k, k)) / int(by_class['images']))
        if int(by_class['predicted']):
            claimed = [c for c, p in zip(table['confidence'].to_pylist(), table['predicted'].to_pylist()) if p == k]
            assert float(by_class['confidence']) == pytest.approx(100 * np.mean(claimed), abs=1e-4)
        else:
            assert by_class['precision'] == by_class['confidence'] == by_class['ece'] == ''


def test_any_class_name_survives_its_csv_and_its_picture(tmp_path, caplog):
    names = ['a, "b"', 'line\nbreak', '$x$ and $y$', 'unseen']
    outputs = validate.Outputs(*(torch.zeros(4, dtype=torch.int64),) * 3, logits=torch.eye(4))
    outputs.target = torch.tensor([0, 1, 2, 0])
    validate.write_classes(tmp_path, validate.Result('run', None, None, outputs, None, None, None, {}), names)
    assert [row['name'] for row in rows(tmp_path / 'classes.csv')] == names
    assert [row['true'] for row in rows(tmp_path / 'confusion.csv')] == names
    assert list(rows(tmp_path / 'confusion.csv')[0])[1:] == names
    assert (tmp_path / 'confusion.png').stat().st_size > 1000
    assert rows(tmp_path / 'classes.csv')[3]['recall'] == '' and '1 of 4 classes have no image' in caplog.text


def test_a_temperature_without_labels_is_saved_and_warns_of_networks_trained_with_mixing(run_copy, evaluate, caplog):
    flags = ('--checkpoint', run_copy / 'best', '--unlabeled-split', 'train[:60]')
    folder = evaluate(*flags, '--calibration', 'pseudo', '--save-temperature')
    assert 'trained with --calibratemix' in caplog.text
    saved = scaling.read_temperature(run_copy / 'best')
    assert saved['temperature'] == report(folder)['scaled']['pseudo']['temperature']
    assert (saved['split'], saved['fitted'], saved['images']) == (
        'train[:60]', 'without labels', report(folder)['scaled']['pseudo']['images'],
    )
    shown = evaluate('--checkpoint', run_copy / 'best')
    assert report(shown)['scaled']['saved']['temperature'] == saved['temperature']


@pytest.mark.parametrize('run, flags', [
    (dict(calibratemix=True, algorithm='fixmatch'), ['--calibratemix']),
    (dict(calibratemix=False, algorithm='remixmatch'), ['--algorithm remixmatch']),
    (dict(mixup=0.2, cutmix=1.0, cutmix_minmax=None, mixup_prob=1.0), ['--mixup', '--cutmix']),  # timm's train.py
    (dict(mixup=0.0, cutmix=0.0, cutmix_minmax=[0.2, 0.8], mixup_prob=1.0), ['--cutmix-minmax']),
    (dict(mixup=0.0, cutmix=0.0, cutmix_minmax=None, mixup_prob=1.0), []),
    (dict(calibratemix=False, algorithm='fixmatch'), []),
    ({}, []),
])
def test_the_warning_of_mixing_names_the_arguments_and_says_nothing_of_other_runs(caplog, run, flags):
    validate.tell_mixing('a run', run)
    assert len(caplog.messages) == bool(flags)
    assert not flags or f'a run: it was trained with {", ".join(flags)}. ' in caplog.text


def test_out_of_distribution_rows_are_those_of_the_logits(run_folder, photographs, comparison):
    from sklearn.metrics import roc_auc_score

    inside = torch.tensor(pq.read_table(comparison[0] / 'run' / 'predictions.parquet')['logits'].to_pylist())
    outside = logits_of(run_folder / 'best', sources.plain_folder(str(photographs)))
    found = {row['score']: row for row in rows(comparison[0] / 'ood.csv') if row['run'] == 'run'}
    label = np.r_[np.ones(500), np.zeros(13)]
    both = torch.cat([inside, outside]).double()
    top = both.topk(2).values
    for name, score in (
            ('msp', both.softmax(1).amax(1)), ('energy', both.logsumexp(1)), ('margin', top[:, 0] - top[:, 1]),
    ):
        assert found[name]['count'] == '13'
        assert float(found[name]['auroc']) == pytest.approx(100 * roc_auc_score(label, score), abs=1e-3)


# --- Fits -------------------------------------------------------------------------------------------------------------

def test_evaluated_images_are_never_fitted_on(run_folder, evaluate):
    best = run_folder / 'best'
    with pytest.raises(UsageError, match=r'none of 500 images is left .*500 are evaluated'):
        evaluate('--checkpoint', best, '--calibration-split', 'test')
    found = report(evaluate('--checkpoint', best, '--split', 'test[50%:]', '--calibration-split', 'test[:60%]'))
    assert (found['count'], found['calibration_images']) == (250, 250)


def test_fitting_on_labeled_images_warns_that_the_run_was_trained_on_them(run_folder, evaluate, tmp_path, caplog):
    caplog.set_level('INFO')
    found = report(evaluate('--checkpoint', run_folder / 'best', '--calibration-from-labeled'))
    assert found['calibration_images'] == 20
    assert '20 of 20 calibration images are labeled images of its training' in caplog.text
    assert '20 of 20 calibration images are used: 0 are evaluated\n' in caplog.text
    source = create_source('digits', None, 'train')
    trained = json.loads((run_folder / 'labels.json').read_text())['index']
    index = [i for i in range(200) if i not in trained] + trained[-2:]
    held_out = tmp_path / 'held_out.json'
    held_out.write_text(json.dumps(dict(index=index, target=source.targets[index].tolist())))
    caplog.clear()
    found = report(evaluate('--checkpoint', run_folder / 'best', '--calibration-from-labeled', held_out))
    assert found['calibration_images'] == len(index)
    assert f'2 of {len(index)} calibration images are labeled images' in caplog.text
    logits = logits_of(run_folder / 'best', source, index)
    expected, _ = scaling.fit_temperature(logits, source.targets[index])
    assert found['scaled']['temperature']['temperature'] == pytest.approx(expected, rel=1e-4)


def test_a_saved_temperature_is_shown_later_and_timm_still_loads_the_folder(run_copy, evaluate, caplog):
    best, source = run_copy / 'best', create_source('digits', None, 'test')
    before = logits_of(best, source, range(5))
    fitted = report(evaluate('--checkpoint', best, '--calibration-split', 'train[:40%]', '--save-temperature'))
    temperature = json.loads((best / 'config.json').read_text())['calibration']['temperature']
    assert temperature == fitted['scaled']['temperature']['temperature']
    assert torch.equal(logits_of(best, source, range(5)), before)
    later = report(evaluate('--checkpoint', best))
    assert later['scaled']['saved']['ece'] == fitted['scaled']['temperature']['ece']
    assert 'was found on images of' not in caplog.text
    evaluate('--checkpoint', best, '--split', 'test[:20]', '--img-size', '16')
    assert 'config.json: its temperature was found on images of [3, 8, 8], not [3, 16, 16]' in caplog.text
    # The split it was fitted on is no place to show it.
    assert report(evaluate('--checkpoint', best, '--split', 'train[:10%]'))['scaled'] == {}
    assert 'fitted on train[:40%]' in caplog.text


@pytest.mark.parametrize('content', [{}, {'temperature': -1, 'split': 'train'}, {'temperature': 'warm', 'split': 't'}])
def test_a_damaged_saved_temperature_is_refused(content, run_copy, evaluate):
    config = json.loads((run_copy / 'best' / 'config.json').read_text())
    (run_copy / 'best' / 'config.json').write_text(json.dumps(dict(config, calibration=content)))
    with pytest.raises(UsageError, match='calibration must hold a temperature above 0'):
        evaluate('--checkpoint', run_copy / 'best', '--split', 'test[:20]')


def test_a_temperature_at_its_bound_is_marked_and_not_saved(run_copy, evaluate, tmp_path, capsys, caplog):
    source = create_source('digits', None, 'train')
    logits = logits_of(run_copy / 'best', source, range(100))
    easy = [i for i in range(100) if logits[i].argmax() == source.targets[i]]
    file = tmp_path / 'easy.json'
    file.write_text(json.dumps(dict(index=easy, target=source.targets[easy].tolist())))
    with pytest.raises(RunError, match='no temperature is stored in .*copy/best, where it is at its bound$'):
        evaluate('--checkpoint', run_copy / 'best', '--calibration-from-labeled', file, '--save-temperature')
    assert 'calibration' not in json.loads((run_copy / 'best' / 'config.json').read_text())
    assert '0.010*' in capsys.readouterr().out
    assert f'{len(easy)} of {len(easy)} right' in caplog.text


# --- What is evaluated ------------------------------------------------------------------------------------------------

def test_another_data_set_leaves_the_splits_of_the_run_behind(run_folder):
    args = validate._parse_args(['--checkpoint', 'x', '--dataset', 'other'])
    run = dict(yaml.safe_load((run_folder / 'args.yaml').read_text()), val_split='mine', input_key='picture')
    data = validate.choose_data(args, run)
    assert (data.dataset, data.val_split, data.input_key, data.own) == ('other', None, None, False)
    args = validate._parse_args(['--checkpoint', 'x', '--data-dir', 'moved', '--split', 'new'])
    data = validate.choose_data(args, run)
    assert (data.dataset, data.data_dir, data.val_split, data.input_key) == ('digits', 'moved', 'new', 'picture')
    assert data.own


def test_checkpoints_have_short_and_different_names(tmp_path):
    for run in ('a', 'b', 'c/a'):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / 'args.yaml').touch()
    paths = [tmp_path / name for name in ('a/best', 'b/best', 'a/last', 'c/a/best', 'plain')]
    assert validate.name_checkpoints(paths[:2]) == ['a', 'b']
    assert validate.name_checkpoints([paths[0], paths[2]]) == ['a-best', 'a-last']
    assert validate.name_checkpoints([paths[0], paths[3]]) == ['a-best-1', 'a-best-2']
    assert validate.name_checkpoints([paths[0], paths[4]]) == ['a', 'plain']


def save_timm_run(folder: Path, network, **arguments) -> Path:
    """What timm's own training script leaves: a pickled checkpoint with its arguments, and args.yaml beside it."""
    folder.mkdir()
    weights = network.state_dict()
    averaged = {key: 1.1 * value if value.is_floating_point() else value for key, value in weights.items()}
    torch.save(dict(epoch=1, arch='x', state_dict=weights, state_dict_ema=averaged, args=Namespace(lr=1.)),
               folder / 'model_best.pth.tar')
    (folder / 'args.yaml').write_text(yaml.safe_dump(arguments))
    return folder / 'model_best.pth.tar'


@pytest.mark.parametrize('name', ['resnet18', 'vit_tiny_patch16_224'])
def test_a_checkpoint_of_timms_own_training_is_evaluated_as_timm_would(name, evaluate, tmp_path):
    torch.manual_seed(0)
    size = 32 if name == 'resnet18' else 48
    model = timm.create_model(name, num_classes=10, **({} if name == 'resnet18' else {'img_size': size})).eval()
    path = save_timm_run(tmp_path / 'timm', model, model=name, dataset='digits', data_dir=None, val_split='test[:30]',
                         num_classes=10, img_size=size, crop_pct=0.8, mean=None, std=[0.4, 0.5, 0.6], class_map='',
                         interpolation='bilinear', model_kwargs={})
    folder = evaluate('--checkpoint', path, '--save-logits', '--crop-mode', 'squash')
    logits = torch.tensor(pq.read_table(folder / 'predictions.parquet')['logits'].to_pylist())
    transform = timm.data.create_transform(
        size, interpolation='bilinear', crop_pct=0.8, crop_mode='squash', mean=model.pretrained_cfg['mean'],
        std=(0.4, 0.5, 0.6),
    )
    source = create_source('digits', None, 'test[:30]')
    with torch.no_grad():
        expected = torch.cat([model(transform(source.image(i))[None]) for i in range(30)])
    assert torch.allclose(logits, expected, atol=1e-4)
    averaged = evaluate('--checkpoint', path, '--save-logits', '--crop-mode', 'squash', '--use-ema')
    logits = torch.tensor(pq.read_table(averaged / 'predictions.parquet')['logits'].to_pylist())
    assert not torch.allclose(logits, expected, atol=1e-3)


def test_the_crop_mode_of_the_config_is_obeyed(run_copy):
    config = json.loads((run_copy / 'best' / 'config.json').read_text())
    config['pretrained_cfg']['crop_mode'] = 'squash'
    (run_copy / 'best' / 'config.json').write_text(json.dumps(config))
    args = validate._parse_args(['--checkpoint', 'x'])
    _, data_config, view = validate.load_model(args, run_copy / 'best', {})
    wide = Image.fromarray((np.arange(8 * 32) % 256).astype(np.uint8).reshape(8, 32)).convert('RGB')
    squashed = wide.resize((8, 8), Image.Resampling.BICUBIC)
    assert data_config.interpolation == 'bicubic'
    assert (view(wide).int() - transforms.functional.pil_to_tensor(squashed).int()).abs().max() <= 1


def test_greyscale_models_see_greyscale(evaluate, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('wide_resnet10_1', num_classes=10, in_chans=1).eval()
    torch.save(model.state_dict(), tmp_path / 'grey.pth')
    folder = evaluate('--checkpoint', tmp_path / 'grey.pth', '--model', 'wide_resnet10_1', '--num-classes', '10',
                      '--in-chans', '1', '--img-size', '8', '--mean', '0.5', '--std', '0.25', '--dataset', 'digits',
                      '--split', 'test[:10]', '--crop-pct', '1', '--save-logits')
    logits = torch.tensor(pq.read_table(folder / 'predictions.parquet')['logits'].to_pylist())
    source = create_source('digits', None, 'test[:10]')
    grey = torch.stack([transforms.functional.to_tensor(source.image(i).convert('L')) for i in range(10)])
    with torch.no_grad():
        assert torch.allclose(logits, model((grey - 0.5) / 0.25), atol=1e-4)


@pytest.fixture
def broken_folder(tmp_path) -> Path:
    """Twelve images of two classes, the fourth cut in half."""
    generator = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / 'images' / 'val' / f'class{i // 6}' / f'{i:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        if i == 3:
            path.write_bytes(path.read_bytes()[:200])
    return tmp_path / 'images'


def test_a_broken_image_stops_the_evaluation_or_is_left_out_and_counted(broken_folder, evaluate, tmp_path, caplog):
    torch.manual_seed(0)
    torch.save(timm.create_model('wide_resnet10_1', num_classes=2).state_dict(), tmp_path / 'two.pth')
    arguments = ('--checkpoint', tmp_path / 'two.pth', '--model', 'wide_resnet10_1', '--num-classes', '2',
                 '--dataset', broken_folder, '-b', '4')
    with pytest.raises(RunError, match='03.png'):
        evaluate(*arguments)
    folder = evaluate(*arguments, '--skip-bad-images')
    table = pq.read_table(folder / 'predictions.parquet')
    assert table['index'].to_pylist() == [0, 1, 2, *range(4, 12)]
    assert table['target'].to_pylist() == [0] * 5 + [1] * 6
    assert '1 of 12 images cannot be decoded' in caplog.text


def test_logits_that_are_not_finite_name_the_image(run_folder, evaluate):
    with pytest.raises(RunError, match=r'not finite .*row 0 of digits'):
        evaluate('--checkpoint', run_folder / 'best', '--split', 'test[:5]', '--std', '1e-45')


def test_real_photographs_and_tables_are_out_of_distribution_sets(shared_data, run_folder, evaluate):
    sets = (shared_data / 'ants_bees', shared_data / 'imagenet_samples')
    folder = evaluate('--checkpoint', run_folder / 'best', '--split', 'test[:50]', '--ood-dataset', *sets)
    counts = {row['ood_dataset']: int(row['count']) for row in rows(folder / 'ood.csv')}
    assert counts == {str(sets[0]): 180, str(sets[1]): 195}


def test_a_parquet_file_without_labels_is_an_out_of_distribution_set(photographs, run_folder, evaluate, tmp_path):
    import datasets

    images = [str(path) for path in sorted(photographs.glob('*/*'))]
    table = datasets.Dataset.from_dict({'image': images}).cast_column('image', datasets.Image())
    table.to_parquet(tmp_path / 'things.parquet')
    folder = evaluate('--checkpoint', run_folder / 'best', '--split', 'test[:50]', '--ood-dataset',
                      tmp_path / 'things.parquet', photographs)
    table, plain = rows(folder / 'ood.csv')[:3], rows(folder / 'ood.csv')[3:]
    assert [row['auroc'] for row in table] == [row['auroc'] for row in plain]
    assert {row['count'] for row in table} == {'13'}


# --- Mistakes and faults ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arguments, told', [
    ([], 'give --checkpoint'),
    (['--model', 'resnet18'], 'its weights are random'),
    (['--checkpoint', 'x', '--batch-size', '0'], 'expected 1 or more'),
    (['--checkpoint', 'x', '--crop-pct', '1.5'], 'above 0 and up to 1'),
    (['--checkpoint', 'x', '--std', '0'], '--std 0.0: expected a number above 0'),
    (['--checkpoint', 'x', '--model-kwargs', 'foo'], '--model-kwargs foo: expected K=V'),
    (['--checkpoint', 'x', '--calibration-split', 'a', '--calibration-from-labeled'], 'give one of them'),
    (['--checkpoint', 'x', '--save-temperature'], 'nothing is fitted'),
    (['--checkpoint', 'x', '--unlabeled-split', 'a'], 'only --calibration pseudo'),
    (['--checkpoint', 'x.pth', '--save-temperature', '--calibration-split', 'a'], 'config.json'),
    (['--checkpoint', 'x', '--checkpoin', 'y'], '--checkpoin: there is no such flag; did you mean --checkpoint?'),
])
def test_arguments_that_make_no_sense_end_with_status_2(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        validate._parse_args(arguments)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize('arguments, told', [
    (['--checkpoint', 'RUN/nowhere'], 'no such file'),
    (['--checkpoint', 'RUN'], r'give .*run/best or .*run/last'),
    (['--checkpoint', 'RUN/best/model.safetensors'], 'give its folder'),
    (['--checkpoint', 'RUN/checkpoint-40.safetensors'], 'a state to resume from'),
    (['--checkpoint', 'RUN/summary.csv'], 'summary.csv: '),
    (['--checkpoint', 'RUN/best', '--split', 'dev'], 'no split dev; it has test, train'),
    (['--checkpoint', 'RUN/best', '--dataset', 'nonsense'], 'neither a known data set nor'),
    (['--checkpoint', 'RUN/best', '--num-classes', '7'], 'has 10'),
    (['--checkpoint', 'RUN/best', '--mean', '0.1', '0.2'], 'mean must have one value or 3'),
    (['--checkpoint', 'RUN/best', '--calibration-split', 'dev'], 'no split dev'),
    (['--checkpoint', 'RUN/best', '--calibration', 'pseudo', '--unlabeled-split', 'dev'], 'no split dev'),
    (['--checkpoint', 'RUN/best', '--calibration', 'pseudo', '--unlabeled-split', 'test[:9]'], '0 of 9 unlabeled'),
    (['--checkpoint', 'RUN/best', '--ood-dataset', 'nonsense'], 'neither a known data set nor'),
    (['--checkpoint', 'RUN/best', '--calibration-from-labeled', 'RUN/nowhere'], 'nowhere'),
    (['--checkpoint', 'RUN/best', 'EMPTY'], 'no config.json'),
    (['--model', 'resnet_of_mine', '--pretrained', '--dataset', 'digits'], 'Unknown model'),
])
def test_mistakes_are_told_in_one_line(arguments, told, run_folder, evaluate, tmp_path):
    (tmp_path / 'empty').mkdir()
    arguments = [a.replace('RUN', str(run_folder)).replace('EMPTY', str(tmp_path / 'empty')) for a in arguments]
    with pytest.raises(UsageError, match=told) as raised:
        evaluate(*arguments)
    assert '\n' not in str(raised.value)


def test_pseudo_calibration_of_a_run_that_had_all_labels_is_refused_before_anything_is_evaluated(
        run_copy, evaluate, monkeypatch,
):
    train = create_source('digits', None, 'train')
    write_labels(run_copy / 'labels.json', torch.arange(len(train)), train.targets)
    monkeypatch.setattr(validate, 'collect', lambda *args: pytest.fail('images were evaluated'))
    with pytest.raises(UsageError, match=f'all {len(train)} images of train were labeled in training; leave it out'):
        evaluate('--checkpoint', run_copy / 'best', '--calibration', 'pseudo')


def test_where_no_split_is_one_for_evaluation_what_the_run_held_out_is_evaluated(tmp_path, monkeypatch):
    for name in 'ab':
        (tmp_path / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'train' / name / '0.png')
    run = Namespace(**dict(sources.SOURCE_FLAGS, data_dir=str(tmp_path), val_fraction=None))
    with pytest.raises(UsageError, match=r'splits train is named .* \(train_ssl.py --val-fraction 0.2\)'):
        validate.open_split(run, None, [None], None)
    run.val_fraction = 0.5
    monkeypatch.setattr(validate, 'open_held_out', lambda *args: 'what was held out')
    for folder in (None, tmp_path):
        run.val_split = None
        assert validate.open_split(run, None, [None], folder) == 'what was held out'
    assert run.val_split == 'held-out'


def test_other_classes_than_the_models_are_refused(run_folder, broken_folder, evaluate):
    with pytest.raises(UsageError, match='images are of classes that the model does not have'):
        evaluate('--checkpoint', run_folder / 'best', '--dataset', broken_folder)


def test_a_calibration_set_of_one_class_is_refused(run_copy, evaluate, tmp_path):
    targets = create_source('digits', None, 'train').targets
    for name, rows in dict(one=(targets == 0).nonzero()[:30, 0], nine=(targets < 9).nonzero()[:, 0]).items():
        write_labels(tmp_path / f'{name}.json', rows, targets[rows])
    arguments = ('--checkpoint', run_copy / 'best', '--save-temperature', '--calibration-from-labeled')
    with pytest.raises(UsageError, match='all 30 images to fit on are of one class; a slice of image folders takes'):
        evaluate(*arguments, tmp_path / 'one.json')
    assert 'calibration' not in json.loads((run_copy / 'best' / 'config.json').read_text())
    evaluate(*arguments, tmp_path / 'nine.json')
    assert json.loads((run_copy / 'best' / 'config.json').read_text())['calibration']['temperature'] > 0


def test_of_several_checkpoints_those_within_bounds_are_stored_before_the_other_is_told(run_copy, run_folder, evaluate,
                                                                                       tmp_path, monkeypatch):
    other = Path(shutil.copytree(run_folder, tmp_path / 'other'))
    fits = iter([(1.5, True), (1.25, False)])
    monkeypatch.setattr(validate, 'fit_temperature', lambda logits, target: next(fits))
    with pytest.raises(RunError, match='is stored in .*copy/last, where it is at its bound; the other'):
        evaluate('--checkpoint', run_copy / 'last', other / 'last', '--calibration-split', 'train',
                 '--save-temperature')
    assert 'calibration' not in json.loads((run_copy / 'last' / 'config.json').read_text())
    assert json.loads((other / 'last' / 'config.json').read_text())['calibration']['temperature'] == 1.25


def test_a_reader_that_leaves_early_costs_no_file(run_folder, tmp_path):
    arguments = ('--checkpoint', run_folder / 'last', '--device', 'cpu', '-j', '0', '--bootstrap', '0', '--results-dir',
                 tmp_path / 'r')
    command = ' '.join(shlex.quote(str(part)) for part in (sys.executable, ROOT / 'validate.py', *arguments))
    done = subprocess.run(['bash', '-c', f'{command} | true; exit ${{PIPESTATUS[0]}}'], capture_output=True, text=True)
    assert done.returncode == 0 and 'rror' not in done.stderr, done.stderr
    assert (tmp_path / 'r' / 'metrics.json').is_file() and (tmp_path / 'r' / 'reliability.png').is_file()


def test_a_calibration_split_of_other_classes_is_refused(run_folder, tmp_path, evaluate):
    for grey, (split, names) in enumerate([('test', '0123456789'), ('cal', '123456789x'), ('fit', '0123456789')]):
        for name in names:
            (tmp_path / 'set' / split / name).mkdir(parents=True)
            Image.new('RGB', (8, 8), (grey, ord(name), 0)).save(tmp_path / 'set' / split / name / '0.png')
    flags = ('--checkpoint', run_folder / 'best', '--dataset', tmp_path / 'set', '--split', 'test')
    with pytest.raises(UsageError, match='split cal: 1 of 10 images are of classes that the model does not have: x'):
        evaluate(*flags, '--calibration-split', 'cal')
    evaluate(*flags, '--calibration-split', 'fit')


def test_a_temperature_is_stored_in_checkpoint_folders_only(capsys):
    for given in ([], ['--checkpoint', 'weights.pth']):
        with pytest.raises(SystemExit) as stopped:
            validate._parse_args(['--model', 'resnet18', '--pretrained', '--dataset', 'digits', '--calibration-split',
                                  'train', '--save-temperature', *given])
        assert stopped.value.code == 2
        assert '--save-temperature: only checkpoint folders' in capsys.readouterr().err


def test_checkpoints_of_different_data_are_compared_only_on_the_same_images(run_folder, run_copy, evaluate):
    run = yaml.safe_load((run_copy / 'args.yaml').read_text())
    (run_copy / 'args.yaml').write_text(yaml.safe_dump(dict(run, val_split='train')))
    both = ('--checkpoint', run_folder / 'best', run_copy / 'best')
    with pytest.raises(UsageError, match='run has --split None and copy train'):
        evaluate(*both)
    folder = evaluate(*both, '--split', 'test[:30]')
    assert report(folder / 'run')['count'] == report(folder / 'copy')['count'] == 30


def test_a_user_sees_one_line_and_a_status_and_no_traceback(run_folder, tmp_path, monkeypatch, capsys):
    arguments = ['validate.py', '--checkpoint', run_folder / 'best', '--device', 'cpu', '-j', '0', '--results-dir',
                 tmp_path]
    done = run_script(*arguments, '--split', 'test[:5]', '--std', '1e-45')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('validate.py: error: logits are not finite')
    assert 'Traceback' not in done.stderr

    monkeypatch.setattr('sys.argv', [*map(str, arguments), '--split', 'dev'])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / 'validate.py'), run_name='__main__')
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith('validate.py: error: digits: no split dev')


def test_a_data_worker_that_dies_is_told_in_one_line_without_the_advice_for_training(run_folder, tmp_path, monkeypatch,
                                                                                    capsys):
    def die(self):
        raise RuntimeError('DataLoader worker (pid(s) 7) exited unexpectedly')
    monkeypatch.setattr(data.Feed, '__iter__', die)
    arguments = ['validate.py', '--checkpoint', run_folder / 'best', '--device', 'cpu', '-j', '0', '--results-dir',
                 tmp_path]
    monkeypatch.setattr('sys.argv', [*map(str, arguments), '--split', 'test[:5]'])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / 'validate.py'), run_name='__main__')
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        'validate.py: error: a data worker died: DataLoader worker (pid(s) 7) exited unexpectedly. If the system was '
        'out of memory, fewer --workers need less')


def test_a_results_folder_that_cannot_be_made_is_told_before_the_evaluation(run_folder, evaluate, tmp_path,
                                                                            monkeypatch):
    monkeypatch.setattr(validate, 'collect', lambda *args: pytest.fail('evaluated'))
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results' / 'run-best').touch()
    with pytest.raises(UsageError, match='run-best: cannot be made: File exists'):
        evaluate('--checkpoint', run_folder / 'best', run_folder / 'last')
    with pytest.raises(UsageError, match='cannot be made'):
        evaluate('--checkpoint', run_folder / 'best', '--results-dir', run_folder / 'args.yaml' / 'results')
