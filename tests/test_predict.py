"""The prediction program: what it reads, decides, writes and refuses."""
import csv
import io
import json
import logging
import os
import re
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import run_script
from images import noise
from PIL import Image
from timm.models import save_for_hf

import predict
import validate
import wide_resnet  # noqa: F401  registers wide_resnet10_1 with timm
from backbone import load_model
from data import DataConfig
from decisions import class_scores, set_sizes
from inputs import open_pictures
from program import RunError, UsageError
from sources import ArraySource

ODD = ['ants, red', 'a "quoted"\nname', '猫']  # class names that a table may break on


def save_model(folder: Path, names) -> Path:
    """A tiny network that is not trained, but has opinions, in a folder of timm's."""
    torch.manual_seed(0)
    model = timm.create_model('wide_resnet10_1', num_classes=len(names or 'abc')).eval()
    images = torch.from_numpy(np.concatenate([noise(30, 16) // k for k in (1, 2, 3)])).permute(0, 3, 1, 2) / 63.75 - 2
    with torch.no_grad():
        model.get_classifier().weight.mul_(2 / model(images).std(0).mean())
        model.get_classifier().bias.sub_(model(images).mean(0))
    config = dict(label_names=names) if names else {}
    save_for_hf(model, folder, safe_serialization=True, model_config=config, data_config=dict(
        input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation='bilinear', crop_pct=1.,
    ))
    return folder


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp('model') / 'odd', ODD)


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    """12 pictures in folders of several depths, and one that is broken."""
    root = tmp_path_factory.mktemp('pictures') / 'photos'
    for i, pixels in enumerate(noise(12, 24)):
        path = root / ('a/deep' if i % 2 else 'b') / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels // (1 + i % 3)).save(path)
    (root / 'b' / 'broken.png').write_bytes((root / 'b' / '0.png').read_bytes()[:200])
    return root


@pytest.fixture
def run(tmp_path):
    """Runs predict.py in this process; returns the rows of its CSV, or None with --results-file."""
    def call(*arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        common = ('--device', 'cpu', '-j', '0', '--results-dir', tmp_path / 'results')
        predict.main(predict._parse_args([str(a) for a in (*arguments, *common)]))
        path = tmp_path / 'results' / 'predictions.csv'
        if path.is_file():
            with open(path, newline='', encoding='utf-8') as file:
                return list(csv.DictReader(file))
        return None
    return call


def with_calibration(folder: Path, to: Path, **calibration) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / 'config.json').read_text())
    content = dict(dict(temperature=2., split='val', images=100), **calibration)
    (to / 'config.json').write_text(json.dumps(dict(config, calibration=content)))
    return to


# --- Right values -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def validated(model, tmp_path_factory):
    """A model that validate.py calibrated, its data set and what validate.py said of the evaluated split."""
    root = tmp_path_factory.mktemp('validated')
    asked = predict._parse_args(['x', '--checkpoint', str(model)])
    network, _, view = load_model(asked, model, {})
    for split, number in (('val', 24), ('train', 90)):
        for name in 'abc':
            (root / 'data' / split / name).mkdir(parents=True)
        for i, pixels in enumerate(noise(number, 20, seed=number)):
            image = Image.fromarray(pixels // (1 + i % 3))
            with torch.no_grad():  # labels that the network is right about more often than not
                k = int(network.eval()(view(image)[None] / 63.75 - 2).argmax())
            image.save(root / 'data' / split / 'abc'[(k + (i % 4 == 0)) % 3] / f'{i}.png')
    folder = Path(shutil.copytree(model, root / 'model'))
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(dict(config, label_names=['a', 'b', 'c'])))  # those of the folders
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    args = ['--checkpoint', folder, '--dataset', root / 'data', '--split', 'val', '--calibration-split', 'train',
            '--save-temperature', '--save-logits', '--target-accuracy', '0.8', '0.85', '0.99',
            '--coverage', '0.6', '0.9', '--device', 'cpu', '-j', '0', '-b', '7', '--bootstrap', '20',
            '--results-dir', root / 'results']
    validate.main(validate._parse_args([str(a) for a in args]))
    return folder, root / 'data', pq.read_table(root / 'results' / 'predictions.parquet')


def test_rows_are_the_predictions_of_validate_and_what_it_stored_decides(validated, run):
    folder, data, table = validated
    saved = json.loads((folder / 'config.json').read_text())['calibration']
    assert saved['images'] == 90 and saved['split'] == 'train' and saved['input_size'] == [3, 16, 16]
    rows = run(data / 'val', '--checkpoint', folder, '--target-accuracy', '0.8', '--coverage', '0.6', '--set-score',
               'aps', '--topk', '3', '--include-index')
    logits = torch.tensor(table['logits'].to_pylist())
    probs = (logits / saved['temperature']).softmax(1)
    raw = table['confidence'].to_pylist()
    order, scores = class_scores(probs, 'aps')
    sizes = set_sizes(scores, saved['sets']['aps']['0.6']['quantile']).tolist()
    threshold = saved['thresholds']['0.8']['threshold']
    assert len(rows) == len(table) == 24
    for i, row in enumerate(rows):
        k = table['predicted'][i].as_py()
        assert int(row['index']) == k and row['label'] == 'abc'[k]
        assert float(row['raw_confidence']) == pytest.approx(raw[i], abs=1e-6)
        assert float(row['confidence']) == pytest.approx(float(probs[i].max()), abs=1e-6)
        assert row['decision'] == ('accepted' if float(probs[i].max()) >= threshold else 'unsure')
        assert json.loads(row['prediction_set']) == ['abc'[c] for c in order[i, :sizes[i]].tolist()]
        assert int(row['set_size']) == sizes[i]
        first, second, _ = logits[i].sort(descending=True).values
        assert float(row['margin']) == pytest.approx(float(first - second), rel=1e-4, abs=1e-5)
        assert float(row['energy']) == pytest.approx(float(logits[i].logsumexp(0)), rel=1e-4, abs=1e-5)
        assert json.loads(row['topk_index']) == order[i].tolist()
        assert json.loads(row['topk_prob']) == pytest.approx(probs[i].sort(descending=True).values.tolist(), abs=1e-6)
    assert {row['decision'] for row in rows} == {'accepted', 'unsure'}


def test_an_accuracy_that_was_not_reached_or_not_stored_is_refused_and_a_higher_one_stands_in(validated, run, caplog):
    folder, data, _ = validated
    with pytest.raises(UsageError, match='the 90 images of train are too few, or too few .* to promise 0.99'):
        run(data / 'val', '--checkpoint', folder, '--target-accuracy', '0.9')
    with pytest.raises(UsageError, match='keeps 0.8, 0.85, 0.99; validate.py --target-accuracy 0.995'):
        run(data / 'val', '--checkpoint', folder, '--target-accuracy', '0.995')
    with pytest.raises(UsageError, match='keeps 0.6, 0.9; validate.py --coverage 0.95'):
        run(data / 'val', '--checkpoint', folder, '--coverage', '0.95')
    caplog.set_level('INFO')
    run(data / 'val', '--checkpoint', folder, '--target-accuracy', '0.75', '--coverage', '0.7')
    assert 'that of 0.8 is taken' in caplog.text and 'that of 0.9 is taken' in caplog.text


def test_two_processes_write_the_table_of_one_with_a_broken_and_a_repeated_picture(model, photos, run, tmp_path):
    given = (photos, photos / 'b' / '2.png', '--checkpoint', model, '-b', '3', '--coverage', '0.9', '--topk', '2',
             '--min-confidence', '0.6', '--results-format', 'csv', 'parquet')
    rows = run(*given)
    one = {name: (tmp_path / 'results' / f'predictions.{name}').read_bytes() for name in ('csv', 'parquet')}
    done = run_script('predict.py', *given, '--device', 'cpu', '-j', '1', '--results-dir', tmp_path / 'two',
                      processes=2)
    assert done.returncode == 0, done.stderr
    assert '2 process(es)' in done.stderr and done.stdout.count('14 pictures: ') == 1
    # A picture's numbers may differ in the last digit, as some processors round a batch of another size differently.
    two = {name: (tmp_path / 'two' / f'predictions.{name}').read_bytes() for name in one}
    pattern = re.compile(r'-?\d+\.\d+(?:e-?\d+)?')
    texts = [str(pq.read_table(io.BytesIO(table['parquet'])).to_pylist()) + table['csv'].decode()
             for table in (one, two)]
    assert pattern.sub('', texts[0]) == pattern.sub('', texts[1])
    numbers = [list(map(float, pattern.findall(text))) for text in texts]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-6) and len(numbers[0]) > 14 * 2 * 4
    expected = [*(photos / 'a' / 'deep' / f'{i}.png' for i in range(1, 12, 2)),
                *(photos / 'b' / f'{i}.png' for i in range(0, 12, 2)), photos / 'b' / 'broken.png',
                photos / 'b' / '2.png']
    assert [row['filename'] for row in rows] == list(map(str, expected))
    broken, twice = rows[12], rows[13]
    assert broken['error'] and not any(v for k, v in broken.items() if k not in ('filename', 'error'))
    assert twice == next(row for row in rows if row['filename'].endswith('2.png'))
    assert 'broken.png cannot be opened' in done.stderr and not list((tmp_path / 'two').glob('*.part'))


def test_ten_thousand_pictures_keep_their_order(run, monkeypatch):
    n = 10_000
    pixels = np.zeros((n, 1, 1, 3), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(n) % 251, np.arange(n) // 251

    class Fake(torch.nn.Module):
        num_classes, pretrained_cfg = 2, dict(label_names=['even', 'odd'])

        def forward(self, x):
            number = (255 * x[:, 0, 0, 0]).round() + 251 * (255 * x[:, 1, 0, 0]).round()
            return torch.stack([1 - number % 2, number / n + number % 2], 1)

    def view(image):
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)

    config = DataConfig((3, 1, 1), (0.,) * 3, (1.,) * 3, 'bilinear', 1.)
    monkeypatch.setattr(predict, 'load_model', lambda *_: (Fake(), config, view))
    monkeypatch.setattr(predict, 'open_all', lambda _: ArraySource(pixels, np.zeros(n), None, 'numbers'))
    rows = run('made-up', '--model', 'fake', '--pretrained', '--no-console-results', '-b', '64')
    assert len(rows) == n
    logits = np.stack([1 - np.arange(n) % 2, np.arange(n) / n + np.arange(n) % 2], 1)
    margin = np.abs(logits[:, 0] - logits[:, 1])
    assert np.allclose([float(row['margin']) for row in rows], margin, atol=1e-5)
    assert [row['label'] for row in rows] == [('even', 'odd')[k] for k in logits.argmax(1)]


# --- Decisions --------------------------------------------------------------------------------------------------------

def test_without_a_calibration_the_confidences_are_believed_and_this_is_said(model, photos, run, caplog):
    rows = run(photos / 'b', '--checkpoint', model, '--target-accuracy', '0.9', '--coverage', '0.9')
    assert 'taken from the confidences themselves; no labels were at hand' in caplog.text
    assert 'if confidences mean what they say' in caplog.text
    good = [row for row in rows if not row['error']]
    confidence = sorted((float(row['confidence']) for row in good), reverse=True)
    means = np.cumsum(confidence) / np.arange(1, len(confidence) + 1)
    kept = int((means >= 0.9).nonzero()[0][-1]) + 1 if (means >= 0.9).any() else 0
    assert sum(row['decision'] == 'accepted' for row in good) == kept
    assert all(row['confidence'] == row['raw_confidence'] for row in good)


def test_the_temperature_changes_confidences_and_not_predictions_and_is_told(model, photos, run, tmp_path, caplog):
    plain = run(photos / 'b', '--checkpoint', model)
    assert 'after temperature' not in caplog.text
    with caplog.at_level(logging.INFO):
        rows = run(photos / 'b', '--checkpoint', with_calibration(model, tmp_path / 'scaled'))
    assert 'after temperature 2.000, which was fitted with labels on 100 images of val' in caplog.text
    assert [row['label'] for row in rows] == [row['label'] for row in plain]
    assert [row['raw_confidence'] for row in rows] == [row['confidence'] for row in plain]
    assert all(float(row['confidence']) < float(row['raw_confidence']) for row in rows if not row['error'])
    assert 'decision' not in rows[0]


@pytest.mark.parametrize('damage', [
    dict(thresholds={'0.9': {'threshold': 0.5}}), dict(thresholds={'high': None}), dict(thresholds=3),
    dict(temperature=0),
])
def test_a_damaged_calibration_is_told_in_one_line(damage, model, photos, run, tmp_path):
    folder = with_calibration(model, tmp_path / 'damaged', **damage)
    with pytest.raises(UsageError, match='calibration is damaged'):
        run(photos, '--checkpoint', folder, '--target-accuracy', '0.9')


def test_another_image_size_than_the_temperatures_is_told(model, photos, run, tmp_path, caplog):
    folder = with_calibration(model, tmp_path / 'sized', input_size=[3, 32, 32])
    run(photos / 'b', '--checkpoint', folder)
    assert 'The temperature was found on images of [3, 32, 32], not [3, 16, 16]' in caplog.text
    run(photos / 'b', '--checkpoint', with_calibration(model, tmp_path / 'odd', input_size=3))
    assert 'The temperature was found on images of 3, not [3, 16, 16]' in caplog.text


# --- Names ------------------------------------------------------------------------------------------------------------

def test_odd_class_names_survive_every_format(model, photos, run, tmp_path):
    rows = run(photos / 'a', '--checkpoint', model, '--topk', '3', '--results-separate-col', '--results-format', 'csv',
               'json', 'json-record', 'parquet', '--filename-col', 'file')
    results = tmp_path / 'results'
    by_name = json.loads((results / 'predictions.json').read_text())
    records = [json.loads(line) for line in (results / 'predictions.jsonl').read_text().splitlines()]
    parquet = pq.read_table(results / 'predictions.parquet').to_pylist()
    assert len(rows) == 6
    for row, record, cells in zip(rows, records, parquet):
        assert {row[f'label_{i}'] for i in range(3)} == set(ODD)
        for other in (record, cells, by_name[row['file']] | dict(file=row['file'])):
            assert other.keys() == row.keys()
            for key, text in row.items():
                if isinstance(other[key], float):
                    assert float(text) == pytest.approx(other[key], abs=1e-6)
                else:
                    assert (other[key] or '') == text


@pytest.mark.parametrize('separate', [[], ['--results-separate-col']])
def test_columns_have_their_types_whatever_the_user_calls_them(separate, model, photos, run, tmp_path):
    names = ('--include-index', '--index-col', 'class_2', '--output-col', 'p_1', '--label-col', 'prob_7',
             '--filename-col', 'topk_index')
    rows = run(photos, '--checkpoint', model, '--topk', '2', *names, *separate, '--results-format', 'csv', 'parquet')
    table = pq.read_table(tmp_path / 'results' / 'predictions.parquet')
    assert table.column_names == list(rows[0]) and len(table) == len(rows) == 13
    kinds = {field.name: field.type for field in table.schema}
    for name, kind in dict(topk_index='string', class_2='int64', prob_7='string', p_1='float').items():
        assert kinds[name] == kind
    for name, kind in dict(class_2='int64', prob_7='string', prob='float').items():
        further = [kinds[f'{name}_{i}'] for i in (0, 1)] if separate else [kinds[f'topk_{name}'].value_type]
        assert set(map(str, further)) == {kind}


def test_weights_without_names_give_numbers_and_say_so_but_a_run_knows_them(photos, run, tmp_path, caplog):
    plain = save_model(tmp_path / 'run' / 'best', None)
    rows = run(photos / 'a', '--checkpoint', plain)
    assert {row['label'] for row in rows} <= {'0', '1', '2'} and 'classes are given by number' in caplog.text
    (tmp_path / 'run' / 'args.yaml').write_text('model: wide_resnet10_1\n')
    (tmp_path / 'run' / 'labels.json').write_text(json.dumps(dict(class_names=ODD)))
    named = run(photos / 'a', '--checkpoint', plain)
    assert [row['label'] for row in named] == [ODD[int(row['label'])] for row in rows]
    numbers = run(photos / 'a', '--checkpoint', plain, '--label-type', 'none', '--exclude-output')
    assert [row['index'] for row in numbers] == [row['label'] for row in rows]
    assert set(numbers[0]) == {'filename', 'index', 'error'}


def test_a_model_of_timms_has_the_names_of_imagenet():
    found = predict.choose_names(timm.create_model('test_vit', num_classes=1000), None, {}, 'description')
    assert found[1] == 'goldfish, Carassius auratus'
    assert predict.choose_names(timm.create_model('test_vit'), None, {}, 'name')[1] == 'n01443537'


def test_file_names_that_are_no_text_and_hidden_files_do_not_stop_it(model, photos, run, tmp_path, caplog):
    folder = tmp_path / 'in'
    folder.mkdir()
    for name in (b'caf\xe9.png', '猫, "x".png'.encode(), b'.hidden.png', b'UPPER.PNG'):
        shutil.copy(photos / 'a' / 'deep' / '1.png', os.path.join(os.fsencode(folder), name))
    (folder / 'notes.txt').write_text('no picture')
    (folder / 'again').symlink_to(folder)  # which has no end
    rows = run(folder, '--checkpoint', model, '--results-format', 'csv', 'parquet')
    assert sorted(Path(row['filename']).name for row in rows) == ['UPPER.PNG', 'caf\\xe9.png', '猫, "x".png']
    assert '1 no pictures (.txt)' in caplog.text


# --- Pictures in, files out -------------------------------------------------------------------------------------------

def test_lists_name_the_same_pictures_as_they_stand(model, photos, run, tmp_path):
    names = ['b/2.png', 'a/deep/1.png', 'b/2.png', 'b/missing.png']
    (photos / 'list.txt').write_text('\n'.join(names) + '\n\n')
    (tmp_path / 'list.csv').write_text('\ufeffid,file_name\n' + ''.join(f'{i},{n}\n' for i, n in enumerate(names)))
    (tmp_path / 'list.tsv').write_text('photo\tnumber\n' + ''.join(f'{n}\t1\n' for n in names))
    (tmp_path / 'list.jsonl').write_text(''.join(json.dumps({'image': n}) + '\n' for n in names))
    try:
        expected = run(photos / 'list.txt', '--checkpoint', model)
    finally:
        (photos / 'list.txt').unlink()
    assert [row['filename'] for row in expected] == names
    assert expected[0] == expected[2] and expected[3]['error'] == 'No such file or directory'
    for name, more in (('csv', ()), ('tsv', ('--input-key', 'photo')), ('jsonl', ())):
        assert run(tmp_path / f'list.{name}', '--data-dir', photos, '--checkpoint', model, *more) == expected
    with pytest.raises(UsageError, match='no column of files in its first line; it has photo, number'):
        run(tmp_path / 'list.tsv', '--data-dir', photos, '--checkpoint', model)
    with pytest.raises(UsageError, match='none of its 4 files exists.*--data-dir'):
        run(tmp_path / 'list.csv', '--checkpoint', model)


def test_an_empty_list_is_an_empty_table_and_an_empty_folder_a_mistake(model, run, tmp_path):
    (tmp_path / 'none.txt').write_text('')
    (tmp_path / 'none').mkdir()
    assert run(tmp_path / 'none.txt', '--checkpoint', model, '--results-format', 'csv', 'parquet') == []
    text = (tmp_path / 'results' / 'predictions.csv').read_text()
    assert text == 'filename,label,confidence,raw_confidence,margin,energy,error\n'
    assert pq.read_table(tmp_path / 'results' / 'predictions.parquet').schema.field('margin').type == 'float'
    with pytest.raises(UsageError, match='none'):
        run(tmp_path / 'none', '--checkpoint', model)


def test_only_broken_pictures_leave_a_table_and_a_failure(model, photos, run, tmp_path):
    with pytest.raises(RunError, match='none of 1 pictures can be opened'):
        run(photos / 'b' / 'broken.png', '--checkpoint', model)
    assert 'broken.png' in (tmp_path / 'results' / 'predictions.csv').read_text()


def test_results_go_into_folders_that_are_not_there_yet(model, photos, run, tmp_path):
    run(photos / 'a', '--checkpoint', model, '--results-file', 'sub/x.csv', '--results-format', 'csv', 'parquet',
        '--contact-sheet', tmp_path / 'new' / 'sheet.png')
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*.*')}
    assert found == {'results/sub/x.csv', 'results/sub/x.parquet', 'new/sheet.png'}


def test_a_folder_in_the_place_of_a_result_is_told_before_the_predictions(model, photos, run, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, 'predict', None)
    (tmp_path / 'results' / 'x.csv').mkdir(parents=True)
    for flag, path in (('--results-file', 'x'), ('--contact-sheet', tmp_path)):
        with pytest.raises(UsageError, match=f'{flag} .*: is a folder; give the name of a file'):
            run(photos, '--checkpoint', model, flag, path)


def test_standard_output_holds_the_table_alone(model, photos, run, capfd):
    run(photos / 'b', '--checkpoint', model, '--results-file', '-')
    out, _ = capfd.readouterr()
    rows = list(csv.DictReader(io.StringIO(out, newline='')))
    assert len(rows) == 7 and rows[0]['filename'].endswith('0.png')


def test_a_picture_given_twice_is_refused_where_the_format_would_lose_it(model, photos, run):
    twice = (photos / 'b' / '2.png', photos / 'b' / '2.png', '--checkpoint', model)
    assert len(run(*twice)) == 2
    with pytest.raises(UsageError, match='given 2 times; json-record and csv keep both'):
        run(*twice, '--results-format', 'json')


@pytest.mark.parametrize('copy', [False, True])
def test_pictures_are_sorted_into_folders_and_none_is_lost(copy, model, photos, run, tmp_path):
    shutil.copytree(photos / 'b', tmp_path / 'other')  # the same names again
    out = tmp_path / 'sorted'
    rows = run(photos / 'b', tmp_path / 'other', photos / 'b' / '2.png', '--checkpoint', model, '--min-confidence',
               '0.7', '--split-folders', out, *(['--copy'] if copy else []))
    good = [row for row in rows[:-1] if not row['error']]
    folders = dict(zip(ODD, predict.folder_names(ODD)))
    where = Counter('unsure' if row['decision'] == 'unsure' else folders[row['label']] for row in good)
    found = [path for path in out.glob('*/*')]
    assert Counter(path.parent.name for path in found) == where and len(where) > 1
    assert all(path.is_symlink() != copy and path.is_file() for path in found)
    assert Counter(path.read_bytes() for path in found) == Counter(Path(r['filename']).read_bytes() for r in good)
    assert not list(tmp_path.glob('.sorted*'))
    with pytest.raises(UsageError, match='has something in it'):
        run(photos / 'b', '--checkpoint', model, '--split-folders', out)


def test_rows_of_a_table_are_copied_and_not_linked(model, photos, run, tmp_path, monkeypatch):
    cells = [{'bytes': (photos / 'b' / f'{i}.png').read_bytes(), 'path': None} for i in (0, 2)]
    table = datasets.Dataset.from_dict({'image': cells}).cast_column('image', datasets.Image())
    table.to_parquet(tmp_path / 'p.parquet')
    given = (tmp_path / 'p.parquet', '--checkpoint', model, '--split-folders', tmp_path / 'sorted')
    with monkeypatch.context() as patch, pytest.raises(UsageError, match='is no file to link to: add --copy'):
        patch.setattr(predict, 'predict', None)  # before anything is predicted
        run(*given)
    assert not (tmp_path / 'sorted').exists()
    assert not list(tmp_path.glob('.sorted*'))
    rows = run(*given, '--copy')
    assert rows[1]['filename'] == f'row 1 of {tmp_path / "p.parquet"}'
    assert {path.name for path in (tmp_path / 'sorted').glob('*/*')} == {'0.png', '1.png'}


def test_a_link_to_an_empty_folder_is_where_the_pictures_go(model, photos, run, tmp_path):
    (tmp_path / 'real').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'real')
    rows = run(photos / 'b', '--checkpoint', model, '--split-folders', tmp_path / 'link')
    assert (tmp_path / 'link').is_symlink()
    assert len(list((tmp_path / 'real').glob('*/*'))) == sum(not row['error'] for row in rows)


def test_json_by_file_name_loses_no_row_of_several_sources(model, photos, run, tmp_path):
    cells = [{'bytes': (photos / 'b' / '0.png').read_bytes(), 'path': None}]
    table = datasets.Dataset.from_dict({'image': cells}).cast_column('image', datasets.Image())
    table.to_parquet(tmp_path / 'p.parquet')
    given = (tmp_path / 'p.parquet', photos / 'b', '--results-format', 'json', '--checkpoint', model)
    with pytest.raises(UsageError, match=r'row 0 of .*p.parquet is given 2 times; json-record and csv keep both'):
        run(tmp_path / 'p.parquet', *given)
    with pytest.raises(UsageError, match=r'0.png is given 2 times'):
        run(*given, photos / 'b' / '0.png')


def test_a_file_system_without_links_is_told_before_the_predictions(model, photos, run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(1, 'Operation not permitted')

    monkeypatch.setattr(Path, 'symlink_to', refuse)
    monkeypatch.setattr(predict, 'predict', None)
    with pytest.raises(UsageError, match='links cannot be made there .*add --copy'):
        run(photos, '--checkpoint', model, '--split-folders', tmp_path / 'sorted')


def test_folders_of_classes_are_different_and_safe_whatever_their_names():
    names = ['a/b', 'a\\b', 'A_B', '..', '', 'unsure', 'x' * 300, 'line\nbreak', '猫', 'plain', ' .hidden']
    folders = predict.folder_names(names)
    assert len({folder.casefold() for folder in folders} | {'unsure'}) == len(names) + 1
    assert all(folder and '/' not in folder and folder not in ('.', '..') for folder in folders)
    assert not any(folder.startswith('.') or len(os.fsencode(folder)) > 255 for folder in folders)
    assert folders[8:10] == ['猫', 'plain']


def test_the_contact_sheet_shows_both_ends_of_each_class(model, photos, run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(predict, 'contact_sheet', lambda parts, path: (drawn.append(parts), Path(path).touch()))
    rows = run(photos, '--checkpoint', model, '--contact-sheet', tmp_path / 'sheet.png', '--min-confidence', '0.7')
    [parts] = drawn
    by_class = {}
    for row in rows:
        if not row['error']:
            by_class.setdefault(row['label'], []).append(float(row['confidence']))
    assert sum(len(cells) for _, cells in parts) == 12
    files = {}
    for row in rows:
        files.setdefault(row['label'], set()).add(Path(row['filename']).name)
    for label, confidence in by_class.items():
        title = f'{" ".join(label.split())}: the '
        cells = [cell for heading, cells in parts for cell in cells if heading.startswith(title)]
        assert {cell.label for cell in cells} <= files[label]
        shown = [float(cell.note.split()[0]) for cell in cells]
        most = -(-len(confidence) // 2)
        ranked = sorted(confidence, reverse=True)
        assert shown == pytest.approx(ranked[:most] + ranked[most:][::-1], abs=6e-4)
    assert all(cell.note.endswith('unsure') == (float(cell.note.split()[0]) < 0.7) for _, c in parts for cell in c)
    monkeypatch.undo()
    run(photos, '--checkpoint', model, '--contact-sheet', tmp_path / 'sheet.png', '--device', 'cpu')
    assert Image.open(tmp_path / 'sheet.png').size[0] == 1620


# --- Mistakes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arguments, told', [
    (['x'], 'give --checkpoint RUN/best'),
    (['x', '--model', 'resnet18'], 'its weights are random'),
    (['--checkpoint', 'c'], 'give pictures'),
    (['x', '--checkpoint', 'c', '--dataset', 'digits'], 'give one of them'),
    (['x', '--checkpoint', 'c', '--min-confidence', '1.5'], 'between 0 and 1'),
    (['x', '--checkpoint', 'c', '--target-accuracy', '95'], 'between 0 and 1'),
    (['x', '--checkpoint', 'c', '--target-accuracy', '0.9', '--min-confidence', '0.5'], 'not allowed with'),
    (['x', '--checkpoint', 'c', '--copy'], 'goes with --split-folders'),
    (['x', '--checkpoint', 'c', '--results-file', '-', '--results-format', 'parquet'], 'standard output takes'),
    (['x', '--checkpoint', 'c', '--results-format', 'json', 'json-split'], 'the same file'),
    (['x', '--checkpoint', 'c', '--topk', '0'], 'expected 1 or more'),
])
def test_arguments_that_make_no_sense_end_with_status_2(arguments, told, capsys):
    with pytest.raises(SystemExit) as ended:
        predict._parse_args(arguments)
    assert ended.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize('arguments, told', [
    (['nowhere'], 'nowhere: no such file or folder'),
    (['--data-dir', 'nowhere'], '--data-dir nowhere: no such folder'),
    (['PHOTOS', '--data-dir', 'nowhere'], '--data-dir nowhere: the paths of a list are relative to it, and no list'),
    (['PHOTOS', '--label-col', 'margin'], 'the same name, margin: change'),
    (['PHOTOS', '--label-col', 'prob', '--topk', '2'], 'the same name, topk_prob: change'),
    (['PHOTOS', '--filename-col', 'topk_label', '--topk', '2'], 'the same name, topk_label: change'),
    (['PHOTOS', '--include-index', '--index-col', 'label_1', '--topk', '2', '--results-separate-col'],
     'the same name, label_1: change'),
    (['PHOTOS', '--results-dir', '/dev/null/x'], 'cannot be made'),
    (['PHOTOS', '--results-file', '/dev/null/x'], '--results-file /dev/null: cannot be made'),
    (['--dataset', 'digits', '--split', 'none'], 'no split none'),
    (['PHOTOS', '--input-key', 'crop'], '--input-key crop: .*photos has no columns'),
    (['--data-dir', 'PHOTOS', '--input-key', 'crop'], '--input-key crop: .*photos has no columns'),
    (['PHOTOS/a/deep/1.png', '--input-key', 'crop'], '--input-key crop: .*1.png has no columns'),
])
def test_mistakes_are_told_in_one_line(arguments, told, model, photos, run, monkeypatch):
    monkeypatch.setattr(predict, 'predict', None)  # they are told before
    arguments = [a.replace('PHOTOS', str(photos)) for a in arguments]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UsageError, match=told) as error:
        args = predict._parse_args([*arguments, '--checkpoint', str(model), '--device', 'cpu', '-j', '0'])
        predict.main(args)
    assert '\n' not in str(error.value)


def test_a_split_of_any_data_set_is_taken(model, run):
    rows = run('--dataset', 'digits', '--split', 'test[:5]', '--checkpoint', model)
    assert len(rows) == 5


@pytest.mark.parametrize('flag', [[], ['--data-dir'], ['--dataset']])
def test_the_column_asked_for_is_taken_however_the_table_is_named(tmp_path, flag):
    cells = {key: [encoded(noise(2, 8, seed=seed)[i]) for i in range(2)] for seed, key in enumerate(('image', 'crop'))}
    pq.write_table(pa.table(cells), tmp_path / 'test.parquet')
    args = predict._parse_args([*flag, str(tmp_path), '--input-key', 'crop', '--checkpoint', 'c'])
    assert [*predict.open_all(args).data_of(range(2))] == cells['crop']


def encoded(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'PNG')
    return buffer.getvalue()


def test_a_list_with_an_empty_cell_names_the_row(tmp_path):
    (tmp_path / 'x.csv').write_text('path,label\na.png,1\n,2\n')
    with pytest.raises(UsageError, match='line 3: no file in column path'):
        open_pictures(str(tmp_path / 'x.csv'))


@pytest.mark.parametrize('form', ['txt', 'csv'])
def test_a_list_finds_its_pictures_as_training_does(tmp_path, form):
    names = ['a/é.png', 'a/0.jpg', 'a/1.png', 'a/2.png']
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new('RGB', (4, 4)).save(tmp_path / name)
    given = [unicodedata.normalize('NFD', names[0]), 'a/0', 'a\\1.png', './a/2.png', 'a/gone.png']
    (tmp_path / f'x.{form}').write_text('\n'.join(['path'] * (form == 'csv') + given))
    source = open_pictures(str(tmp_path / f'x.{form}'))
    assert source.names == given
    assert source.paths == [str(tmp_path / name) for name in [*names, 'a/gone.png']]
    assert source.image(1).size == (4, 4)


def test_a_folder_without_a_picture_says_so_and_names_what_a_phone_writes(tmp_path):
    with pytest.raises(UsageError, match=f'^{tmp_path}: no picture in it$'):
        open_pictures(str(tmp_path))
    (tmp_path / 'IMG_1.HEIC').write_bytes(b'x')
    with pytest.raises(UsageError, match=r'no picture in it .*\(.heic; Pillow cannot read HEIC: convert it to JPEG\)'):
        open_pictures(str(tmp_path))
