"""margins.parquet, flipped labels, threshold samples, and the program that finds wrong labels by them."""
import csv
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import ROOT, train_in_process
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from test_train import assert_same_run, rewind, run_on, weights

import backbone
import labels
import methods
import mislabeled
import sources
import train_ssl
from labels import flip_labels
from program import UsageError

NOISY = ('--algorithm', 'supervised', '--num-labels', 300, '-b', 32, '--epochs', 1, '--train-steps-per-epoch', 200,
         '--label-noise', 0.2, '--save-margins')
SMALL = ('--num-labels', 40, '--label-noise', 0.2, '--save-margins')


@pytest.fixture(scope='module')
def noisy(tmp_path_factory) -> list[Path]:
    """Two runs on 300 digits of which 60 have a wrong label, with disjoint threshold samples."""
    output = tmp_path_factory.mktemp('noisy')
    return [train_in_process(f'part{n}', *NOISY, '--aum-threshold-samples', n, output=output) for n in (1, 2)]


def read(folder: Path, which: str = 'labeled') -> dict[str, np.ndarray]:
    """Columns of one set in a run's margins.parquet."""
    table = pq.read_table(folder / 'margins.parquet')
    rows = np.array(table['set'].to_pylist()) == which
    return {name: np.array(table[name].to_pylist(), dtype=object)[rows] for name in table.column_names}


def find(results: Path, *arguments) -> list[dict[str, str]]:
    """Runs mislabeled.py, with a small contact sheet unless told otherwise; returns the rows of mislabeled.csv."""
    arguments = (*arguments, '--results-dir', results)
    mislabeled.main(mislabeled._parse_args(['--num-images', '1', *map(str, arguments)]))
    with open(results / 'mislabeled.csv', newline='') as file:
        return list(csv.DictReader(file))


# --- What is found ----------------------------------------------------------------------------------------------------

def test_flipped_labels_are_found_and_all_figures_equal_an_independent_recomputation(noisy, tmp_path, capsys):
    rows = find(tmp_path, *noisy)
    told = capsys.readouterr().out
    labels = json.loads((noisy[0] / 'labels.json').read_text())
    flipped = {i: t != o for i, t, o in zip(labels['index'], labels['target'], labels['original'])}
    assert len(rows) == len(flipped) == 300 and sum(flipped.values()) == labels['num_flipped'] == 60
    assert all(int(row['flipped']) == flipped[int(row['index'])] for row in rows)

    aum, excess = {}, {}
    for columns in map(read, noisy):
        own, extra = columns['threshold_sample'] == False, columns['threshold_sample'] == True  # noqa: E712
        threshold = np.percentile(columns['margin'][extra].astype(float), 99)
        assert extra.sum() == 300 // 11 and f'{threshold:.2f}' in told
        for i, margin in zip(columns['index'][own], columns['margin'][own]):
            aum.setdefault(i, []).append(margin)
            excess.setdefault(i, []).append(margin - threshold)
    assert sorted({len(values) for values in aum.values()}) == [1, 2]  # some were a threshold sample, none was twice
    aum = {i: float(np.mean(values)) for i, values in aum.items()}
    flagged = {i for i, values in excess.items() if np.mean(values) < 0}
    assert [float(row['aum']) for row in rows] == sorted(float(f'{value:.6g}') for value in aum.values())
    assert {int(row['index']) for row in rows if row['flagged'] == '1'} == flagged
    assert [int(row['rank']) for row in rows] == list(range(1, 301))

    truth, score = [flipped[i] for i in aum], [-value for value in aum.values()]
    auroc, precision = roc_auc_score(truth, score), average_precision_score(truth, score)
    hits = sum(flipped[i] for i in flagged)
    first = sum(row['flipped'] == '1' for row in rows[:60])
    assert auroc > 0.95 and first > 48 and hits > 48 and hits / len(flagged) > 0.8  # by chance: 0.5, 12, and a fifth
    lines = [line.split() for line in told.splitlines()]
    assert ['AUROC', f'{100 * auroc:.2f}', '%,', 'average', 'precision', f'{100 * precision:.2f}', '%'] in lines
    assert ['the', 'first', 'by', 'rank', '60', *[f'{100 * first / 60:.2f}'] * 2] in lines
    figures = [f'{100 * hits / len(flagged):.2f}', f'{100 * hits / 60:.2f}']
    assert ['below', 'the', 'threshold', f'{len(flagged)}', *figures] in lines


def test_one_run_does_not_judge_its_own_threshold_samples(noisy, tmp_path, capsys):
    rows = find(tmp_path, noisy[0])
    columns = read(noisy[0])
    extra = {i for i, mine in zip(columns['index'], columns['threshold_sample']) if mine}
    unjudged = [row for row in rows if row['flagged'] == '']
    assert {int(row['index']) for row in unjudged} == extra and rows[-len(extra):] == unjudged
    assert all(row['rank'] == row['aum'] == '' for row in unjudged)
    assert '27 have no AUM' in capsys.readouterr().out
    assert find(tmp_path / 'less', noisy[0], '--threshold-percentile', 0)[0]['flagged'] == '1'  # still some below
    few = sum(row['flagged'] == '1' for row in find(tmp_path / 'less', noisy[0], '--threshold-percentile', 50))
    assert 0 < few < sum(row['flagged'] == '1' for row in rows)


def made_up(folder: Path, aum: list, extra: list, flipped: list | None = None, index: list | None = None) -> Path:
    """A run folder that holds a margins.parquet alone, of images all labeled 0."""
    folder.mkdir()
    number = len(aum)
    index = list(range(number)) if index is None else index
    columns = dict(
        set=['labeled'] * number, index=index, label=[0] * number, margin=aum, visits=[1] * number,
        easy=[True] * number, threshold_sample=extra, flipped=flipped or [None] * number,
        true_label=[None if f is None else int(f) for f in flipped or [None] * number],
    )
    pq.write_table(pa.table(columns).replace_schema_metadata(dict(dataset='toy', split='train')),
                   folder / 'margins.parquet')
    return folder


def test_the_threshold_rule_on_numbers_worked_out_by_hand(tmp_path):
    """Percentile 75 of -4, -2, 0 is -1, of -3, -3, -1 it is -2; image 7 is judged by both, image 9 was never seen."""
    a = [True] * 3 + [False] * 7
    b = [False] * 3 + [True] * 3 + [False] * 4
    first = made_up(tmp_path / 'a', [-4., -2, 0, -1.5, -0.5, 3, -2.5, -1.5, 1, None], a, [True] * 4 + [False] * 6)
    second = made_up(tmp_path / 'b', [-5., -1, 2, -3, -3, -1, -1.5, -1.75, 2, None], b, [True] * 4 + [False] * 6)
    runs = [mislabeled.read_margins(folder) for folder in (first, second)]
    ranking = mislabeled.rank_labels(runs, 75)
    assert ranking.thresholds == [np.percentile([-4, -2, 0], 75), np.percentile([-3, -3, -1], 75)] == [-1, -2]
    aum = [-5, -1, 2, -1.5, -0.5, 3, -2, -1.625, 1.5]
    order = [0, 6, 7, 3, 1, 4, 8, 2, 5]
    assert ranking.index.tolist() == [*order, 9]
    assert ranking.aum[:9].tolist() == [aum[i] for i in order] and np.isnan(ranking.aum[9])
    assert ranking.judged.tolist() == [True] * 9 + [False]
    # 0 by b alone, 3 by a alone; 6: -1.5 and 0.5 from the thresholds, on average below; 7: -0.5 and 0.25, below.
    assert set(ranking.index[ranking.flagged].tolist()) == {0, 3, 6, 7}
    figures = mislabeled.find_figures(ranking)
    assert figures['precision'] == 2 / 4 and figures['recall'] == 2 / 4 and figures['precision_at_flipped'] == 2 / 4


@pytest.mark.parametrize('aum, extra, doubts', [
    ([2., 3, 4, -3], -2., []),
    ([2., 3, 4, 1], 3.5, ['it flags 75 %']),
    ([-1., -2, 1, -3], -4., ['for 25 % of the images only']),
    ([-1., -2, -1, -3], 0., ['it flags 100 %', 'for 0 % of the images only']),
])
def test_a_threshold_that_cannot_be_trusted_is_told(tmp_path, aum, extra, doubts):
    run = made_up(tmp_path / 'run', [*aum, extra], [False] * 4 + [True])
    told = mislabeled.tell(mislabeled.rank_labels([mislabeled.read_margins(run)]), 1, 'toy', 99)
    lines = [line for line in told.splitlines() if line.startswith('Do not trust the threshold: ')]
    assert len(lines) == len(doubts) and all(doubt in line for doubt, line in zip(doubts, lines))


def test_the_table_names_classes_and_files(train, tmp_path):
    folder = tmp_path / 'images'
    for split in ('train', 'test'):
        for name in ('ant', 'bee'):
            (folder / split / name).mkdir(parents=True)
            for i in range(4):
                image = Image.effect_noise((8, 8), 60 + i)
                image.save(folder / split / name / f'{name}{i}.png')
    run = train('run', '--dataset', folder, '--img-size', 8, '--num-labels', 4, '--label-noise', 0.5, '--save-margins')
    rows = find(tmp_path / 'out', run)
    assert len(rows) == 4
    for row in rows:
        path = Path(row['file'])
        assert path.is_file() and str(path) == row['image'] and path.parent.name == row['true_class']
        assert (row['class'] != row['true_class']) == (row['flipped'] == '1')
    assert {row['flipped'] for row in rows} == {'0', '1'}


def test_without_threshold_samples_or_known_flips_there_is_the_ranking_alone(train, tmp_path, capsys):
    rows = find(tmp_path / 'out', train('run', '--save-margins'))
    assert [row['flagged'] + row['flipped'] + row['true_label'] for row in rows] == [''] * 20
    assert capsys.readouterr().out.splitlines()[0] == '20 labels of digits train; margins of 1 run'


# --- margins.parquet --------------------------------------------------------------------------------------------------

def record_steps(monkeypatch, name: str, images: int) -> list[tuple]:
    """Keeps of each step the batches and the logits of its first forward pass."""
    steps, outputs = [], []
    forward, step = backbone.FeaturesAndLogits.forward, getattr(train_ssl, name)

    def recorded_forward(self, x):
        result = forward(self, x)
        outputs.append(result[1].detach().clone())
        return result

    def recorded_step(model, *arguments):
        outputs.clear()
        result = step(model, *arguments)
        steps.append((*arguments[:images], outputs[0]))
        return result

    monkeypatch.setattr(backbone.FeaturesAndLogits, 'forward', recorded_forward)
    monkeypatch.setattr(train_ssl, name, recorded_step)
    return steps


def loop_margin(logits: list[float], label: int) -> float:
    return logits[label] - max(z for k, z in enumerate(logits) if k != label)


@pytest.mark.parametrize('flags', [
    ('--algorithm', 'supervised'),
    ('--algorithm', 'supervised', '--aum-threshold-samples', 2),
    ('--algorithm', 'fixmatch', '--exclude-labeled'),
    ('--algorithm', 'fixmatch', '--exclude-labeled', '--aum-threshold-samples', 1),
    ('--algorithm', 'flexmatch', '--calibratemix', '--calmix-warmup-epochs', 1, '--aum-threshold-samples', 1),
    ('--algorithm', 'marginmatch', '--calibratemix', '--calmix-warmup-epochs', 1),
])
def test_the_file_holds_the_margins_of_the_logits_in_training_at_the_right_images(train, monkeypatch, flags):
    """A threshold sample's margin is that of the extra class, and the extra class is a rival of every other."""
    supervised = 'supervised' in flags
    steps = record_steps(monkeypatch, *(('supervised_step', 1) if supervised else ('semi_supervised_step', 2)))
    folder = train('run', *SMALL, *flags)
    columns, source = read(folder), sources.create_source('digits', None, 'train')
    assert [source.targets[i].item() for i in columns['index']] == columns['true_label'].tolist()
    assert ((columns['label'] != columns['true_label']) == columns['flipped']).all() and columns['flipped'].sum() == 8
    assert columns['threshold_sample'].sum() == (40 // 11 if '--aum-threshold-samples' in flags else 0)
    seen = {}
    width = 10 + ('--aum-threshold-samples' in flags)  # marginmatch's virtual class is its own affair
    for labeled, *_, logits in steps:
        for row, i, target in zip(logits[:, :width].tolist(), labeled['index'].tolist(), labeled['target'].tolist()):
            assert target == (10 if columns['threshold_sample'][i] else columns['label'][i])
            seen.setdefault(i, []).append(loop_margin(row, target))
    assert columns['visits'].tolist() == [len(seen.get(i, [])) for i in range(40)]
    for i, margin in enumerate(columns['margin']):
        assert margin == (pytest.approx(np.mean(seen[i]), abs=1e-4) if i in seen else None)
    check_halves(columns)
    if supervised:
        assert not len(read(folder, 'unlabeled')['index'])
        return

    columns = read(folder, 'unlabeled')
    assert len(columns['index']) == len(source) - 40 * ('--exclude-labeled' in flags)
    tables, last = {}, {}
    for labeled, unlabeled, logits in steps:
        weak = logits[len(labeled['index']):][:len(unlabeled['index'])]
        for row, j, target in zip(weak[:, :width].tolist(), unlabeled['index'].tolist(), unlabeled['target'].tolist()):
            assert source.targets[columns['index'][j]] == target  # the true one, flipped or not
            t, old = tables.get(j, (0, [0.] * width))
            rate = 0.997 / (1 + t)
            tables[j] = t + 1, [v + (loop_margin(row, k) - v) * rate for k, v in enumerate(old)]
            last[j] = int(np.argmax(row[:10]))
    assert columns['label'].tolist() == [last.get(j, -1) for j in range(len(columns['index']))] and len(last) > 60
    for j, margin in enumerate(columns['margin']):
        assert margin == (pytest.approx(tables[j][1][last[j]], abs=1e-4) if j in last else None)
    check_halves(columns)


def check_halves(columns: dict[str, np.ndarray]) -> None:
    """Seen images are easy or hard by rank, in halves that differ by at most one; the others are neither."""
    seen = columns['visits'] > 0
    easy = columns['easy'] == True  # noqa: E712
    assert all(value is None for value in columns['easy'][~seen])
    assert easy.sum() == seen.sum() // 2 > 0
    assert columns['margin'][easy].min() >= columns['margin'][seen & ~easy].max()


def test_keeping_margins_changes_nothing_else_and_says_what_they_belong_to(train):
    plain, kept = train('plain', '--seed', 3), train('kept', '--seed', 3, '--label-seed', 3, '--save-margins')
    assert all(torch.equal(weights(kept)[key], tensor) for key, tensor in weights(plain).items())
    assert not (plain / 'margins.parquet').exists()
    about = pq.read_schema(kept / 'margins.parquet').metadata
    assert {key.decode(): value.decode() for key, value in about.items()} == dict(
        dataset='digits', split='train', unlabeled_split='train', label_noise='0.0', label_seed='3', seed='3',
        num_updates='8', class_names=json.dumps([str(digit) for digit in range(10)]),
    )


@pytest.mark.parametrize('flags', [
    ('--algorithm', 'supervised', '--aum-threshold-samples', 1),
    ('--algorithm', 'fixmatch'),
    ('--calibratemix', '--calmix-warmup-epochs', 1, '--calmix-bank-dtype', 'float16', '--aum-threshold-samples', 2),
])
def test_a_killed_and_resumed_run_writes_the_same_margins(train, tmp_path, flags):
    flags = (*SMALL, *flags, '--recovery-interval', 1, '--checkpoint-hist', 99)
    straight = train('straight', *flags)
    resumed = rewind(straight, tmp_path / 'resumed', 3)
    (resumed / 'margins.parquet').unlink()
    train('resumed', *flags, '--resume', 'auto')
    assert_same_run(straight, resumed)
    assert (straight / 'margins.parquet').read_bytes() == (resumed / 'margins.parquet').read_bytes()


def test_two_processes_keep_the_margins_of_one(train, tmp_path):
    """A network without batch-norm: an image's logits then do not depend on the batch it is in."""
    flags = ('--model', 'test_vit', '--img-size', 32, '--algorithm', 'supervised', '--num-labels', 40, '--save-margins',
             '--aum-threshold-samples', 1)
    one, two = (read(run_on(n, train, tmp_path, f'on{n}', *flags, '-b', 8 // n)) for n in (1, 2))
    for name in ('index', 'label', 'visits', 'threshold_sample'):
        assert (one[name] == two[name]).all(), name
    assert one['visits'].sum() == 64
    seen = one['visits'] > 0
    assert np.allclose(one['margin'][seen].astype(float), two['margin'][seen].astype(float), atol=1e-4)


# --- Flipped labels ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('share, number, flipped', [
    (0.2, 300, 60), (0.5, 5, 3), (0.0, 10, 0), (0.04, 10, 0), (0.99, 50, 50),
])
def test_the_exact_share_of_labels_is_flipped_and_none_keeps_its_class(share, number, flipped):
    target = torch.randint(7, (number,), generator=torch.Generator().manual_seed(number))
    before = target.clone()
    found = flip_labels(target, share, 7, seed=1)
    assert (found != target).sum() == flipped and 0 <= found.min() and found.max() < 7
    assert torch.equal(found, flip_labels(target, share, 7, seed=1)) and torch.equal(target, before)
    assert not flipped or not torch.equal(found, flip_labels(target, share, 7, seed=2))


def test_flips_go_to_all_other_classes_alike_and_hit_all_images_alike():
    target = torch.arange(30_000) % 3
    found = flip_labels(target, 0.5, 3, seed=0)
    for old in range(3):
        counts = torch.bincount(found[target == old], minlength=3)
        assert counts[old] + counts.sum() - counts[old] == 10_000
        assert all(abs(count - 2_500) < 250 for new, count in enumerate(counts.tolist()) if new != old)  # 5 deviations
    assert abs((found != target)[:15_000].sum() - 7_500) < 310


def test_flipped_labels_are_replayed_by_a_labels_file_and_a_resume_refuses_others(train, tmp_path):
    first = train('first', *SMALL, '--label-seed', 4)
    plain = train('plain', '--num-labels', 40, '--label-seed', 4)
    labels, clean = (json.loads((folder / 'labels.json').read_text()) for folder in (first, plain))
    assert labels['index'] == clean['index'] and labels['original'] == clean['target'] and 'original' not in clean
    assert sum(a != b for a, b in zip(labels['target'], labels['original'])) == labels['num_flipped'] == 8

    file = ('--num-labels', 40, '--labels-file', first / 'labels.json', '--label-seed', 4)
    again = train('again', *file, '--save-margins')
    assert_same_run(first, again)
    assert (first / 'margins.parquet').read_bytes() == (again / 'margins.parquet').read_bytes()
    rewind(first, tmp_path / 'resumed', 4)
    assert_same_run(first, train('resumed', *file, '--save-margins', '--resume', 'auto'))
    with pytest.raises(UsageError, match='other labeled images or labels'):
        train('first', *SMALL, '--label-seed', 4, '--label-noise', 0.1, '--resume', 'auto')
    with pytest.raises(UsageError, match='holds no margins'):
        train('plain', '--num-labels', 40, '--label-seed', 4, '--save-margins', '--resume', 'auto')


# --- Threshold samples ------------------------------------------------------------------------------------------------

def test_the_two_draws_of_threshold_samples_are_disjoint_seeded_and_one_in_k_plus_1():
    for number, classes in ((300, 10), (12, 10), (3, 2), (1000, 3)):
        first, second = (labels.draw_threshold_samples(number, classes, 0, which) for which in (1, 2))
        assert len(first) == len(second) == number // (classes + 1)
        rows = torch.cat([first, second])
        assert len(rows.unique()) == len(rows) and 0 <= rows.min() and rows.max() < number
        assert torch.equal(first, labels.draw_threshold_samples(number, classes, 0, 1))
    assert not torch.equal(first, labels.draw_threshold_samples(number, classes, 1, 1))
    with pytest.raises(UsageError, match='needs 11 labeled images or more, not 10'):
        labels.draw_threshold_samples(10, 10, 0, 1)


@pytest.mark.parametrize('name', [name for name in methods.ALGORITHMS if name != 'marginmatch'])
def test_every_method_trains_threshold_samples_but_saves_and_measures_the_real_classes(train, name):
    penalty = () if name in ('mixmatch', 'remixmatch') else ('--logit-margin-penalty', 0.1)  # refused with these
    folder = train('run', '--algorithm', name, '--save-margins', '--aum-threshold-samples', 1, '--threshold', 0.2,
                   '--freematch-fairness', 1, *penalty)
    model = timm.create_model(f'local-dir:{folder / "last"}', pretrained=True).eval()
    source = sources.create_source('digits', None, 'test')
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.no_grad():
        logits = model(torch.stack([transform(source.image(i)) for i in range(len(source))]))
    metrics = json.loads((folder / 'last/metrics.json').read_text())
    assert logits.shape == (500, 10)
    assert F.cross_entropy(logits, source.targets).item() == pytest.approx(metrics['nll'], abs=1e-5)
    labels = json.loads((folder / 'labels.json').read_text())
    assert labels['target'] == [sources.create_source('digits', None, 'train').targets[i] for i in labels['index']]


@pytest.mark.parametrize('name', ['fixmatch', 'flexmatch', 'softmatch', 'freematch', 'uda', 'adamatch', 'dash'])
def test_the_extra_class_is_no_pseudo_label_and_takes_no_confidence(name):
    """Logits that put it far on top everywhere: pseudo-labels and weights are those of the real classes alone."""
    class Fixed(torch.nn.Module):
        def __init__(self, extra):
            super().__init__()
            self.extra = extra

        def forward(self, x):
            logits = torch.zeros(len(x), 5)
            logits[:, 1], logits[:, 4] = 9, 50
            return torch.zeros(len(x), 2), logits[:, :4 + self.extra].requires_grad_()

    rates = []
    for extra in (False, True):
        args = train_ssl._parse_args(['--algorithm', name])
        args.aum_threshold_samples = 1 if extra else None
        method = methods.ALGORITHMS[name](6, 4, args)
        labeled = dict(image=torch.zeros(2, 1), target=torch.tensor([0, 1]), index=torch.arange(2))
        unlabeled = dict(weak=torch.zeros(6, 1), strong=torch.zeros(6, 1), target=torch.ones(6).long(),
                         index=torch.arange(6))
        terms = train_ssl.semi_supervised_step(
            Fixed(extra), labeled, unlabeled, method, None, 5000, Accelerator(cpu=True), args,
        )
        assert terms['pseudo_label_right'] == 1
        rates.append(terms['mask_rate'].item())
    assert rates[0] == rates[1] > 0


# --- The contact sheet ------------------------------------------------------------------------------------------------

def inked(path: Path) -> tuple[tuple[int, int], float, float]:
    """Size, share of pixels that are not white, and share of the colour of wrong labels."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert('RGB')).astype(int)
    orange = np.abs(pixels - np.array([0xD5, 0x5E, 0x00])).sum(2) < 20
    return pixels.shape[1::-1], float((pixels.sum(2) < 760).mean()), float(orange.mean())


def test_the_contact_sheet_shows_both_ends_and_frames_the_wrong_labels(noisy, tmp_path):
    find(tmp_path, *noisy, '--num-images', 32)
    size, ink, orange = inked(tmp_path / 'contact_sheet.png')
    assert size == (1620, 2400) and 0.4 < ink < 0.8 and orange > 0.01
    find(tmp_path, *noisy, '--num-images', 3)
    assert inked(tmp_path / 'contact_sheet.png')[0] == (1620, 735)


@pytest.mark.parametrize('number', [1, 2, 5])
def test_the_contact_sheet_takes_images_of_any_size_and_long_names(tmp_path, number):
    """All images are red: their area shows that each of them is drawn once, however few there are."""
    names = ['an_unusually_long_name_of_a_class_that_goes_on', 'Coelacanth-of-the-Comoros', 'Rindfleischetikett'] * 2
    sizes = [(8, 8), (700, 20), (20, 700), (1, 1), (300, 300)][:number]
    red = [np.broadcast_to(np.array([255, 0, 0], np.uint8), (1, *size, 3)) for size in sizes]
    source = sources.JoinedSource([sources.ArraySource(image, [k], names, 'toy') for k, image in enumerate(red)])
    label, wrong = np.arange(number), np.arange(number) % 2 == 0
    ranking = mislabeled.Ranking(
        index=label, label=label, flipped=wrong, true_label=(label + 1) % 6, aum=np.linspace(-1, 1, number),
        flagged=None, judged=np.zeros(number, bool), thresholds=[],
    )
    mislabeled.draw_contact_sheet(tmp_path / 'sheet.png', ranking, source, 32)
    with Image.open(tmp_path / 'sheet.png') as picture:
        pixels = np.asarray(picture.convert('RGB')).astype(int)
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((edge == 255).all() for edge in edges)  # nothing reaches the border, so nothing is cut
    area = (np.abs(pixels - np.array([255, 0, 0])).sum(2) < 60).sum()
    cells = sum(min(size) / max(size) for size in sizes)
    assert 0.9 * cells < area / 180 ** 2 < 1.3 * cells


# --- Mistakes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags, message', [
    (['--label-noise', '1'], '--label-noise 1.0: expected a number in [0, 1)'),
    (['--label-noise', '-0.1'], '--label-noise -0.1: expected a number in [0, 1)'),
    (['--label-noise', '0.1', '--labels-file', 'labels.json'], 'give --label-noise 0'),
    (['--aum-threshold-samples', '1'], 'add --save-margins'),
    (['--aum-threshold-samples', '3', '--save-margins'], 'invalid choice: 3'),
    (['--aum-threshold-samples', '1', '--save-margins', '--algorithm', 'marginmatch'], 'choose another --algorithm'),
])
def test_training_arguments_that_make_no_sense_end_with_status_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_ssl._parse_args(flags)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and 'error: ' in last and message in last


@pytest.mark.parametrize('arguments, message', [
    (['{tmp}/none'], 'none: no margins.parquet in it; train with --save-margins'),
    (['{tmp}/text'], 'text/margins.parquet: not written by train_ssl.py --save-margins'),
    (['{tmp}/other'], "other/margins.parquet: not written by train_ssl.py --save-margins"),
    (['{tmp}/a', '{tmp}/b'], 'b has other labels than'),
    (['{tmp}/a', '{run}'], 'has other classes than '),
    (['{run}', '{run}/../{run.name}'], 'is given 2 times; each run counts once'),
    (['{tmp}/unseen'], 'no labeled image has an AUM yet'),
    (['{tmp}/a'], 'args.yaml: '),
    (['{run}', '--num-images', '0'], '--num-images 0: expected 1 or more'),
    (['{run}', '--threshold-percentile', '101'], '--threshold-percentile 101.0: expected a number in [0, 100]'),
    (['{run}', '--results-dir', '{tmp}/text/margins.parquet'], '--results-dir'),
])
def test_a_mistake_is_told_in_one_line_with_status_2(noisy, tmp_path, monkeypatch, capsys, arguments, message):
    made_up(tmp_path / 'a', [1., 2.], [False, False])
    made_up(tmp_path / 'b', [1., 2.], [False, False], index=[0, 5])
    made_up(tmp_path / 'unseen', [None, None], [False, False])
    (tmp_path / 'text').mkdir()
    (tmp_path / 'text/margins.parquet').write_text('no table')
    (tmp_path / 'other').mkdir()
    pq.write_table(pa.table(dict(x=[1])), tmp_path / 'other/margins.parquet')
    arguments = [a.format(tmp=tmp_path, run=noisy[0]) for a in arguments]
    monkeypatch.setattr(sys, 'argv', ['mislabeled.py', '--results-dir', str(tmp_path / 'out'), *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / 'mislabeled.py'), run_name='__main__')
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and lines[-1].startswith('mislabeled.py: error: ') and message in lines[-1]
    assert not any('Traceback' in line for line in lines)


def test_a_data_set_that_shrank_is_refused(noisy, tmp_path):
    run = tmp_path / 'run'
    run.mkdir()
    for name in ('margins.parquet', 'args.yaml'):
        (run / name).write_bytes((noisy[0] / name).read_bytes())
    text = (run / 'args.yaml').read_text().replace('train_split: train\n', 'train_split: train[:50]\n')
    (run / 'args.yaml').write_text(text)
    with pytest.raises(UsageError, match='margins.parquet: the data has changed since: picture'):
        find(tmp_path / 'out', run)
