"""Unbalanced draws, what is measured of rare classes, and logit adjustment."""
import csv
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import Toy, assert_same_run, rewind, run_on, step_args, summary, toy_batches, weights

import checkpoint
import imbalance
import methods
import sources
import train_ssl
import validate
from imbalance import LogitAdjustment, class_sizes, largest_possible, rarest_third, share_out
from labels import select_labeled
from metrics import EvalMeter
from program import UsageError

quick = settings(max_examples=60, deadline=None, derandomize=True)
factors = st.sampled_from([1.5, 2, 10, 50, 100, 256, -2, -10, -100])
TARGETS = torch.arange(400) % 10  # 40 of each class
# Both sets of the digits unbalanced, reversed ones in the unlabeled set.
DRAWN = ('--labels-per-class', 20, '--imbalance-factor', 10, '--unlabeled-imbalance-factor', -4)


# --- Class sizes ------------------------------------------------------------------------------------------------------

@quick
@given(st.integers(1, 5000), st.integers(2, 12), st.sampled_from([1, 2, 10, 50, 100, 150, 1000]))
def test_class_sizes_are_the_formulas_in_exact_arithmetic(largest, num_classes, factor):
    """floor(N1 G^(-k/(K-1))) is the largest n with n^(K-1) G^k <= N1^(K-1): whole numbers alone."""
    expected = []
    for k in range(num_classes):
        n = largest
        while n ** (num_classes - 1) * factor ** k > largest ** (num_classes - 1):
            n -= 1
        expected.append(n)
    assert class_sizes(largest, num_classes, factor).tolist() == expected
    assert class_sizes(largest, num_classes, -factor).tolist() == expected[::-1]


def test_class_sizes_of_the_published_setting():
    """N1 = 1500 and gamma_l = 100, for CIFAR-10 in DARP, DASO and USB."""
    assert class_sizes(1500, 10, 100).tolist() == [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15]


@pytest.mark.parametrize('factor', [1, 10, -10])
def test_a_single_class_has_all_images_whatever_the_factor(factor):
    assert class_sizes(20, 1, factor).tolist() == share_out(20, 1, factor).tolist() == [20]
    assert largest_possible(np.array([7]), factor) == 7


@quick
@given(st.integers(0, 3000), st.integers(2, 12), factors)
def test_a_total_is_shared_out_to_the_image_and_no_class_is_off_by_one(total, num_classes, factor):
    sizes = share_out(total, num_classes, factor)
    weight = [abs(factor) ** (-k / (num_classes - 1)) for k in range(num_classes)]
    weight = weight if factor > 0 else weight[::-1]
    assert sizes.sum() == total
    assert all(abs(n - total * w / sum(weight)) < 1 for n, w in zip(sizes, weight))
    falling = sizes if factor > 0 else sizes[::-1]
    assert (np.diff(falling) <= 0).all()


@quick
@given(st.lists(st.integers(0, 60), min_size=2, max_size=8), factors)
def test_the_largest_possible_draw_is_the_one_that_a_loop_finds(has, factor):
    found = 0
    while (class_sizes(found + 1, len(has), factor) <= has).all():
        found += 1
    assert largest_possible(np.array(has), factor) == found


# --- The labeled draw -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('asked, expected', [
    (dict(labels_per_class=40), class_sizes(40, 10, 20)),
    (dict(num_labels=100), share_out(100, 10, 20)),
    (dict(label_fraction=0.5), class_sizes(20, 10, 20)),
    (dict(), class_sizes(40, 10, 20)),
])
@pytest.mark.parametrize('sign', [1, -1])
def test_the_labeled_draw_has_the_class_sizes_asked_for(asked, expected, sign):
    targets = torch.where(torch.arange(500) < 100, -1, torch.arange(500) % 10)  # the first 100 have no label
    options = dict(dict(num_labels=None), **asked, num_classes=10, imbalance_factor=20. * sign)
    index = select_labeled(targets, seed=3, **options)
    counts = Counter(targets[index].tolist())
    assert [counts[k] for k in range(10)] == expected.tolist()[::sign]
    assert index.tolist() == sorted({*index.tolist()}) and index.min() >= 100
    assert torch.equal(index, select_labeled(targets, seed=3, **options))
    if expected.sum() < 400:
        assert not torch.equal(index, select_labeled(targets, seed=4, **options))


@pytest.mark.parametrize('asked, told', [
    (dict(labels_per_class=9), '--labels-per-class 9 --imbalance-factor 10: leaves no image of class 9; ask for'),
    (dict(num_labels=10), r'--num-labels 10 --imbalance-factor 10: leaves no image of class'),
    (dict(labels_per_class=41), 'asks for 41 images of class 0, which has 40; the most frequent class can have 40'),
    (dict(labels_per_class=0), 'leaves no image of class 0'),
    (dict(label_fraction=3.), 'asks for 120 images of class 0'),
])
def test_a_draw_that_cannot_be_is_refused_with_class_and_numbers(asked, told):
    with pytest.raises(UsageError, match=told):
        select_labeled(TARGETS, **dict(dict(num_labels=None), **asked, num_classes=10, seed=0, imbalance_factor=10.))


def test_the_name_of_the_class_that_has_too_few_is_told():
    targets = torch.cat([TARGETS, torch.full((3,), 10)])
    with pytest.raises(UsageError, match='asks for 4 images of class newt, which has 3; .* can have 39 at the most'):
        select_labeled(targets, None, 11, 0, labels_per_class=40, class_names=[*map(str, range(10)), 'newt'],
                       imbalance_factor=10.)


@pytest.mark.parametrize('flags, told', [
    (['--imbalance-factor', '0'], '--imbalance-factor 0: expected 1 or more'),
    (['--imbalance-factor', '-0.5'], '--imbalance-factor -0.5: expected 1 or more'),
    (['--imbalance-factor', 'nan'], '--imbalance-factor nan: expected'),
    (['--unlabeled-imbalance-factor', 'inf'], '--unlabeled-imbalance-factor inf: expected'),
    (['--imbalance-factor', '5', '--labels-file', 'x.json'], 'would draw the labeled images that --labels-file x.json'),
    (['--imbalance-factor', '5', '--label-fold', '0'], 'would draw the labeled images that --label-fold 0 gives'),
    (['--unlabeled-per-class', '0'], '--unlabeled-per-class 0: expected 1 or more'),
    (['--unlabeled-per-class', '9', '--algorithm', 'supervised'], 'supervised has no unlabeled images'),
    (['--logit-adjustment', '-1'], '--logit-adjustment -1: expected 0 or more'),
    (['--logit-adjustment', 'nan'], '--logit-adjustment nan: expected'),
])
def test_arguments_that_make_no_sense_are_refused_in_one_line(flags, told, capsys):
    with pytest.raises(SystemExit) as exit:
        train_ssl._parse_args(flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and told in error and error.count('\n') == 1


# --- Both draws in a run ----------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """A run on unbalanced digits with logit adjustment, that kept its checkpoints."""
    from conftest import train_in_process

    return train_in_process('drawn', *DRAWN, '--exclude-labeled', '--logit-adjustment', 1, '--threshold', 0.2,
                            '--recovery-interval', 1, '--checkpoint-hist', 99, '--val-fraction', 0.2,
                            output=tmp_path_factory.mktemp('drawn'), without='--num-labels')


def test_the_draws_are_recorded_and_disjoint_and_leave_out_what_is_held_out(drawn):
    about = json.loads((drawn / 'labels.json').read_text())
    targets = sources.create_source('digits', None, 'train').targets
    assert about['imbalance_factor'] == 10 and about['unlabeled_imbalance_factor'] == -4
    assert targets[about['index']].bincount().tolist() == about['labeled_by_class'] == class_sizes(20, 10, 10).tolist()
    unlabeled = about['unlabeled_index']
    has = np.array([sum(1 for i in range(len(targets)) if targets[i] == k
                        and i not in {*about['held_out'], *about['index']}) for k in range(10)])
    expected = class_sizes(largest_possible(has, -4), 10, -4)
    assert targets[unlabeled].bincount().tolist() == about['unlabeled_by_class'] == expected.tolist()
    sets = [{*about[key]} for key in ('index', 'unlabeled_index', 'held_out')]
    assert sum(map(len, sets)) == len(set.union(*sets))


def test_each_draw_and_the_adjustment_are_told_in_one_line(train, caplog):
    with caplog.at_level('INFO'):
        train('told', *DRAWN, '--unlabeled-per-class', 50, '--logit-adjustment', 0.5, '--epochs', 1,
              '--train-steps-per-epoch', 1, without='--num-labels')
    assert ('--imbalance-factor 10: 78 of the 1,297 images that have a label are labeled, 20 15 11 9 7 5 4 3 2 2 of '
            'class 0 to 9') in caplog.messages
    assert ('--unlabeled-imbalance-factor -4 --unlabeled-per-class 50: 271 of 1,297 images are the unlabeled set, '
            '12 14 17 19 23 27 31 36 42 50 of class 0 to 9; the others are left out') in caplog.messages
    assert any(line.startswith('--logit-adjustment 0.5 by class frequencies: of labels 0.0')
               for line in caplog.messages)


def test_an_unlabeled_set_that_is_not_drawn_stays_whole_and_that_is_told(train, caplog):
    with caplog.at_level('INFO'):
        folder = train('whole', *DRAWN[:4], '--epochs', 1, '--train-steps-per-epoch', 1, without='--num-labels')
    assert any('; the unlabeled set stays as it is (--unlabeled-imbalance-factor)' in line for line in caplog.messages)
    assert '10 classes; 78 labeled images of train, 1297 unlabeled of train, 500 for evaluation of test' in caplog.text
    assert 'unlabeled_index' not in json.loads((folder / 'labels.json').read_text())


def draw_from(targets, **changes) -> torch.Tensor:
    args = step_args(**dict(dict(unlabeled_imbalance_factor=2.), **changes))
    return imbalance.draw_unlabeled(args, torch.tensor(targets), torch.arange(len(targets)), 2, 0, ['ant', 'bee'])


def test_unlabeled_images_without_a_label_are_left_out_and_counted(caplog):
    with caplog.at_level('INFO'):
        drawn = draw_from([0, 0, -1, 1, 1, -1, 0, 0])
    assert drawn.tolist() == [0, 1, 3, 4, 6, 7]  # 4 and 2 of each
    assert 'the others are left out, 2 of them as they have no label to draw by' in caplog.text


def test_an_unlabeled_set_that_cannot_be_drawn_is_refused():
    with pytest.raises(UsageError, match='--unlabeled-imbalance-factor 2: draws by class, and no unlabeled image has'):
        draw_from([-1, -1, -1])
    with pytest.raises(UsageError, match='leaves no image of class bee; it has none to draw from'):
        draw_from([0, 0, 0])
    with pytest.raises(UsageError, match='--unlabeled-per-class 9: asks for 9 images of class ant, which has 2'):
        draw_from([0, 0, 1, 1], unlabeled_per_class=9)


# --- Evaluation -------------------------------------------------------------------------------------------------------

def meter_of(logits, target) -> EvalMeter:
    meter = EvalMeter(logits.shape[1])
    for rows in torch.arange(len(target)).split(7):
        meter.update(logits[rows], target[rows])
    return meter


@quick
@given(st.integers(1, 80), st.integers(2, 9), st.floats(0.1, 20))
def test_figures_of_rare_classes_equal_sklearn_and_a_plain_loop(n, k, scale):
    from sklearn.metrics import f1_score, recall_score

    generator = torch.Generator().manual_seed(n)
    logits = scale * torch.randn(n, k, generator=generator)
    target = torch.randint(k, (n,), generator=generator)
    labeled = torch.randint(1, 30, (k,), generator=generator)
    found = imbalance.measure(meter_of(logits, target), labeled)
    predicted, probs = logits.argmax(1), logits.softmax(1)
    present = sorted({*target.tolist()})
    recall = dict(zip(present, recall_score(target, predicted, labels=present, average=None, zero_division=0)))
    assert found['balanced_accuracy'] == pytest.approx(100 * np.mean([*recall.values()]))
    assert found['macro_f1'] == pytest.approx(100 * f1_score(target, predicted, average='macro', zero_division=0))

    errors = []
    for label in {*predicted.tolist()}:
        bins = {}
        for row in range(n):
            if predicted[row] == label:
                top = probs[row].max().item()
                bins.setdefault(math.ceil(15 * top - 1e-6), []).append(top - float(target[row] == label))
        errors.append(sum(abs(sum(gaps)) for gaps in bins.values()) / sum(map(len, bins.values())))
    assert found['ece_balanced'] == pytest.approx(100 * np.mean(errors), abs=1e-3)

    order = sorted(range(k), key=lambda label: labeled[label])
    number = max(math.floor(k / 3 + 0.5), 1)
    rare = [label for label in range(k) if labeled[label] <= labeled[order[number - 1]]]
    measured = [1 - recall[label] for label in rare if label in recall]
    if labeled.max() - labeled.min() > 1 and measured:
        assert found['tail_error'] == pytest.approx(100 * np.mean(measured))
    else:
        assert 'tail_error' not in found


@pytest.mark.parametrize('labeled, rare', [
    ([9, 8, 7, 6, 5, 4, 3, 2, 1], [6, 7, 8]),
    ([1, 9, 9, 9], [0]),
    ([5, 1, 1, 1, 9, 9], [1, 2, 3]),  # equal ones belong to it together
    ([3, 1], [1]),
    ([2, 2, 3, 2], None),  # 9 labels over 4 classes: as even as can be
    ([4, 4], None),
])
def test_the_rarest_third_is_that_of_the_labeled_set(labeled, rare):
    found = rarest_third(torch.tensor(labeled))
    assert (None if found is None else found.tolist()) == rare


def test_a_run_and_its_report_tell_the_same_of_rare_classes(drawn, tmp_path, capsys):
    about = json.loads((drawn / 'last' / 'metrics.json').read_text())
    assert about['classes']['labeled'] == class_sizes(20, 10, 10).tolist()
    recall = about['classes']['recall']
    assert about['tail_error'] == pytest.approx(100 - sum(recall[7:]) / 3)
    assert about['balanced_accuracy'] == pytest.approx(sum(recall) / 10)
    assert float(summary(drawn)[-1]['eval_tail_error']) == about['tail_error']
    assert float(summary(drawn)[-1]['eval_macro_f1']) == about['macro_f1']
    validate.main(validate._parse_args([
        '--checkpoint', str(drawn / 'last'), '--split', 'held-out', '--results-dir', str(tmp_path), '--bootstrap', '0',
        '--device', 'cpu', '-j', '0',
    ]))
    report = json.loads((tmp_path / 'metrics.json').read_text())
    for key in ('tail_error', 'balanced_accuracy', 'macro_f1', 'ece_balanced'):
        assert report[key] == pytest.approx(about[key], abs=1e-3), key
    with open(tmp_path / 'classes.csv', newline='') as file:
        assert [int(row['labeled']) for row in csv.DictReader(file)] == about['classes']['labeled']
    lines = capsys.readouterr().out.splitlines()
    head, = [line for line in lines if 'class-balanced' in line]
    row = re.split(' {2,}', lines[lines.index(head) + 1])
    assert row[re.split(' {2,}', head).index('rarest third error %')] == f'{report["tail_error"]:.2f}'


def test_a_balanced_run_has_no_rarest_third(train, tmp_path, capsys):
    folder = train('even', '--epochs', 1, '--train-steps-per-epoch', 1)
    assert 'tail_error' not in json.loads((folder / 'last' / 'metrics.json').read_text())
    assert summary(folder)[0]['eval_tail_error'] == ''
    validate.main(validate._parse_args(['--checkpoint', str(folder / 'last'), '--results-dir', str(tmp_path / 'report'),
                                        '--bootstrap', '0', '--device', 'cpu', '-j', '0']))
    assert 'rarest third' not in capsys.readouterr().out
    assert json.loads((tmp_path / 'report' / 'metrics.json').read_text())['tail_error'] is None


# --- Logit adjustment -------------------------------------------------------------------------------------------------

def adjusted_loss(logits: list[float], frequency: list[float], tau: float, target: int) -> float:
    """Menon et al. 2021, eq. 10, in its second form: log(1 + sum over others of (pi_k / pi_y)^tau e^(f_k - f_y))."""
    others = [(frequency[k] / frequency[target]) ** tau * math.exp(logits[k] - logits[target])
              for k in range(len(logits)) if k != target]
    return math.log(1 + sum(others))


@pytest.mark.parametrize('tau', [0.5, 1.0, 2.0])
def test_the_adjusted_losses_equal_the_papers_over_50_steps(tau):
    torch.manual_seed(0)
    counts = torch.tensor([60, 25, 10, 5])
    adjustment = LogitAdjustment(tau, counts, momentum=0.9)
    prior, running = [0.6, 0.25, 0.1, 0.05], [0.25] * 4
    for _ in range(50):
        logits, strong, weak = (3 * torch.randn(n, 4) for n in (5, 8, 8))
        weight = (torch.rand(8) > 0.4) * torch.rand(8)
        z, z_strong = adjustment(logits, strong, weak, weight)
        for k in range(4):
            counted = sum(float(w) for row, w in zip(weak, weight) if row.argmax() == k) / 8
            running[k] += 0.1 * (counted - float(weight.mean()) * running[k])
        assert adjustment.pseudo.tolist() == pytest.approx(running, abs=1e-6)
        for rows, adjusted, frequency in ((logits, z, prior), (strong, z_strong, running)):
            target = torch.randint(4, (len(rows),))
            expected = [adjusted_loss(row, frequency, tau, y) for row, y in zip(rows.tolist(), target.tolist())]
            assert F.cross_entropy(adjusted, target, reduction='none').tolist() == pytest.approx(expected, abs=1e-5)
    assert sum(running) == pytest.approx(1) and max(running) > 0.27


def test_a_step_adjusts_both_losses_and_nothing_else():
    """Recomputed from the logits of a plain forward pass; weights, pseudo-labels and the penalty see plain logits."""
    torch.manual_seed(1)
    model, (labeled, unlabeled) = Toy().train(), toy_batches()
    z, z_weak, z_strong = model(torch.cat([labeled['image'], unlabeled['weak'], unlabeled['strong']]))[1].split(
        [6, 12, 12])
    confidence, pseudo_label = z_weak.softmax(1).max(1)
    args = step_args(threshold=confidence.median().item(), lambda_u=2., logit_margin_penalty=0.5, logit_margin=0.1)
    counts = torch.tensor([4, 3, 2, 1])
    adjustment = LogitAdjustment(1., counts, momentum=0.5)
    terms = train_ssl.semi_supervised_step(
        model, labeled, unlabeled, methods.FixMatch(12, 4, args), None, 0, Accelerator(cpu=True), args,
        adjustment=adjustment,
    )
    weight = (confidence >= args.threshold).float()
    share = torch.stack([weight[pseudo_label == k].sum() / 12 for k in range(4)])
    frequency = 0.25 + 0.5 * (share - weight.mean() * 0.25)
    assert torch.allclose(adjustment.pseudo, frequency, atol=1e-6)
    loss_labeled = F.cross_entropy(z + (counts / 10).log(), labeled['target'])
    loss_unlabeled = (F.cross_entropy(z_strong + frequency.log(), pseudo_label, reduction='none') * weight).mean()
    penalty = F.relu(z_strong.amax(1, keepdim=True) - z_strong - 0.1).mean()
    assert terms['loss_labeled'].item() == pytest.approx(loss_labeled.item(), rel=1e-5)
    assert terms['loss_unlabeled'].item() == pytest.approx(loss_unlabeled.item(), rel=1e-5)
    assert terms['loss'].item() == pytest.approx((loss_labeled + 2 * loss_unlabeled + 0.5 * penalty).item(), rel=1e-5)


def test_the_supervised_loss_is_adjusted_too():
    torch.manual_seed(2)
    model, labeled = Toy().eval(), toy_batches()[0]
    counts = torch.tensor([4, 3, 2, 1])
    loss = train_ssl.supervised_step(
        model, labeled, None, Accelerator(cpu=True), step_args(algorithm='supervised'),
        adjustment=LogitAdjustment(2., counts, 0.9),
    )['loss']
    expected = F.cross_entropy(model(labeled['image'])[1] + 2 * (counts / 10).log(), labeled['target'])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_no_confident_image_no_finite_row_and_no_label_leave_the_frequencies_alone():
    adjustment = LogitAdjustment(1., torch.tensor([3, 0, 1]), momentum=0.5)
    assert adjustment.labeled.tolist() == pytest.approx([0.6, 0.2, 0.2])  # a class without a label counts as with one
    adjustment.see(torch.randn(4, 3), torch.zeros(4))
    assert torch.equal(adjustment.pseudo, torch.full((3,), 1 / 3))
    broken = torch.tensor([[math.nan, 0, 0], [math.inf, 0, 0], [0, 0, 9.]])
    adjustment.see(broken, torch.tensor([1., 1., 0.]))
    adjustment.see(torch.eye(3), torch.tensor([math.nan] * 3))
    assert torch.equal(adjustment.pseudo, torch.full((3,), 1 / 3))
    adjustment.see(broken, torch.ones(3))
    assert adjustment.pseudo.tolist() == pytest.approx([1 / 3 * 5 / 6] * 2 + [1 / 3 + 0.5 * (1 / 3 - 1 / 9)])


def test_a_class_that_never_occurs_keeps_the_loss_finite():
    adjustment = LogitAdjustment(2., torch.tensor([5, 5]), momentum=0.)
    adjustment.see(torch.tensor([[9., 0.]] * 4), torch.ones(4))
    assert adjustment.pseudo.tolist() == [1, 0]
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = F.cross_entropy(logits + adjustment.offset(adjustment.pseudo, 2), torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_an_extra_class_counts_as_an_average_one_and_equal_frequencies_change_nothing():
    adjustment = LogitAdjustment(1.5, torch.tensor([7, 7, 7]), momentum=0.9)
    logits, target = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 3])
    plain, adjusted = (F.cross_entropy(rows, target) for rows in (logits, adjustment.adjust_labeled(logits)))
    assert adjusted.item() == pytest.approx(plain.item(), abs=1e-6)


def test_the_adjustment_takes_the_labels_that_are_trained(train):
    folder = train('noisy', '--labels-per-class', 20, '--imbalance-factor', 5, '--label-noise', 0.3,
                   '--algorithm', 'marginmatch', '--logit-adjustment', 1, '--epochs', 1, without='--num-labels')
    target = json.loads((folder / 'labels.json').read_text())['target']
    about = json.loads((folder / 'last' / 'metrics.json').read_text())
    assert about['classes']['labeled'] == np.bincount(target, minlength=10).tolist()


def test_an_adjusted_run_resumes_bit_identical(drawn, train, tmp_path):
    for stopped in (3, 5):
        folder = rewind(drawn, tmp_path / f'from{stopped}', stopped)
        flags = ('--config', drawn / 'args.yaml', '--output', tmp_path, '--experiment', folder.name, '--resume', 'auto')
        train_ssl.main(train_ssl._parse_args([*map(str, flags)]))
        assert_same_run(drawn, folder)
    state = checkpoint.read_checkpoint(drawn / 'checkpoint-8.safetensors')['adjustment']['pseudo']
    assert state.sum().item() == pytest.approx(1, abs=1e-5) and state.max() > 0.101


@pytest.mark.parametrize('changes, told', [
    (['--unlabeled-imbalance-factor', '-3'], '--unlabeled-imbalance-factor -4.0 -> -3.0'),
    (['--unlabeled-per-class', '20'], '--unlabeled-per-class None -> 20'),
])
def test_a_resume_with_another_draw_is_refused(drawn, tmp_path, changes, told):
    flags = ('--config', drawn / 'args.yaml', '--output', tmp_path, '--experiment', 'other',
             '--resume', drawn / 'checkpoint-4.safetensors', *changes)
    with pytest.raises(UsageError, match=told):
        train_ssl.main(train_ssl._parse_args([*map(str, flags)]))


def test_the_adjustment_cannot_begin_in_the_middle_of_a_run(train, tmp_path):
    folder = train('plain', '--epochs', 1)
    with pytest.raises(UsageError, match='holds no class frequencies; --logit-adjustment has to be given from the'):
        train('plain', '--logit-adjustment', 1, '--resume', folder / 'checkpoint-4.safetensors')


def test_two_processes_keep_the_frequencies_and_weights_of_one(train, tmp_path):
    """A network without batch-norm: an image's logits then do not depend on the batch it is in."""
    flags = ('--model', 'test_vit', '--img-size', 32, '--threshold', 0.11, '--stat-momentum', 0.9, *DRAWN[2:],
             '--num-labels', 90, '--logit-adjustment', 1, '--epochs', 1)
    folders = [run_on(n, train, tmp_path, f'on{n}', *flags, '-b', 8 // n) for n in (1, 2)]
    one, two = (checkpoint.read_checkpoint(checkpoint.list_checkpoints(folder)[0])['adjustment']['pseudo']
                for folder in folders)
    assert torch.allclose(one, two, atol=1e-6) and (one - 0.1).abs().max() > 0.001
    one, two = map(weights, folders)
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)
    assert (folders[0] / 'labels.json').read_text() == (folders[1] / 'labels.json').read_text()
    assert '--num-labels' in TINY  # which both commands override
