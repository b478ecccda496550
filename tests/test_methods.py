"""The base methods against slow re-computations from their papers' formulas, over several steps and at edges."""
import copy
import json
import math
from argparse import Namespace

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import forget_accelerator
from test_train import assert_same_run, rewind, summary

import backbone
import benchmark
import checkpoint
import methods
import passes
import sources
import train_ssl

CLASSES, IMAGES = 4, 30


def options(**changes) -> Namespace:
    args = train_ssl._parse_args([])
    vars(args).update(changes)
    return args


def build(name: str, classes: int = CLASSES, **changes) -> torch.nn.Module:
    return methods.ALGORITHMS[name](IMAGES, classes, options(**changes))


def logits_of(probs: list) -> torch.Tensor:
    return torch.tensor(probs).log()


def random_steps(seed: int, steps: int = 6, batch: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Confident and unsure rows, indices that repeat within a batch and between batches."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (6 * torch.rand(batch, 1, generator=generator) * torch.randn(batch, CLASSES, generator=generator),
         torch.randint(IMAGES, (batch,), generator=generator))
        for _ in range(steps)
    ]


def test_flexmatch_equals_its_paper_step_by_step():
    method = build('flexmatch', threshold=0.9)
    last_confident = {}  # image -> class
    for logits, index in random_steps(0):
        counts = [sum(c == k for c in last_confident.values()) for k in range(CLASSES)]
        denominator = max(max(counts), IMAGES - sum(counts))
        thresholds = []
        for k in range(CLASSES):
            beta = counts[k] / denominator
            thresholds.append(0.9 * beta / (2 - beta))
        expected = []
        for row in logits:
            p = row.softmax(0)
            expected.append(float(p.max() >= thresholds[p.argmax()]))
        assert torch.allclose(method.class_thresholds(), torch.tensor(thresholds), atol=1e-6)
        assert method(logits, index, 0).tolist() == expected
        for row, i in zip(logits, index.tolist()):
            p = row.softmax(0)
            if p.max() >= 0.9:
                last_confident[i] = p.argmax().item()
        assert method.selected.tolist() == [last_confident.get(i, -1) for i in range(IMAGES)]
    assert len(last_confident) > 10 and 0 < sum(thresholds)


def test_flexmatch_counts_in_the_loss_by_the_class_threshold_but_in_the_table_by_the_fixed_one():
    """Base 0.95, a class threshold of 0.158: confidence 0.80 counts and leaves the table; 0.96 updates it."""
    method = build('flexmatch', classes=2, threshold=0.95)
    method.selected[:] = torch.tensor([0] * 21 + [1] * 6 + [-1] * 3)
    assert method.class_thresholds()[1].item() == pytest.approx(0.95 * (6 / 21) / (2 - 6 / 21))  # 0.158
    before = method.selected.clone()
    assert method(logits_of([[0.2, 0.8]]), torch.tensor([29]), 0).item() == 1
    assert torch.equal(method.selected, before)
    method(logits_of([[0.04, 0.96]]), torch.tensor([29]), 0)
    assert method.selected[29] == 1 and torch.equal(method.selected[:29], before[:29])


def test_flexmatch_counts_30_million_images_exactly():
    """A float32 that counts by ones stays at 2^24, which here would make a threshold of 0.16635."""
    method = build('flexmatch', classes=2, threshold=0.95)
    method.selected = torch.full((30_000_000,), -1)
    method.selected[:5_000_000] = 0
    beta = 5 / 25
    assert method.class_thresholds().tolist() == pytest.approx([0.95 * beta / (2 - beta), 0])  # 0.10556


def test_flexmatch_at_its_first_step_and_with_a_class_never_predicted():
    method = build('flexmatch')
    assert method.class_thresholds().tolist() == [0] * CLASSES
    assert method(torch.zeros(3, CLASSES), torch.arange(3), 0).tolist() == [1, 1, 1]
    for _ in range(3):
        method(10 * torch.eye(CLASSES)[:3].repeat(10, 1), torch.arange(IMAGES), 0)
    thresholds = method.class_thresholds()
    assert thresholds[3] == 0 and thresholds[:3].tolist() == pytest.approx([0.95] * 3)


def test_flexmatch_refuses_an_index_outside_of_its_table():
    for index in (-1, IMAGES):
        with pytest.raises(RuntimeError, match='out of bounds'):
            build('flexmatch')(torch.zeros(1, CLASSES), torch.tensor([index]), 0)


@pytest.mark.parametrize('align, usb', [(True, False), (True, True), (False, False)])
def test_softmatch_equals_its_paper_step_by_step(align, usb):
    method = build('softmatch', stat_momentum=0.9, softmatch_align=align, softmatch_usb_stats=usb)
    mean, var, running = 1 / CLASSES, 1.0, [1 / CLASSES] * CLASSES
    for logits, index in random_steps(1):
        probs = logits.double().softmax(1).tolist()
        running = [0.9 * r + 0.1 * sum(p[k] for p in probs) / len(probs) for k, r in enumerate(running)]
        plain = [max(p) for p in probs]
        confidence = plain
        if align:
            confidence = []
            for p in probs:
                ratio = [p[k] / CLASSES / running[k] for k in range(CLASSES)]
                confidence.append(max(ratio) / sum(ratio))
        seen = confidence if usb else plain
        batch_mean = sum(seen) / len(seen)
        mean = 0.9 * mean + 0.1 * batch_mean
        var = 0.9 * var + 0.1 * sum((c - batch_mean) ** 2 for c in seen) / (len(seen) - 1)
        expected = [1 if c >= mean else math.exp(-(c - mean) ** 2 / (2 * var / 4)) for c in confidence]
        assert method(logits, index, 0).tolist() == pytest.approx(expected, abs=1e-5)
        assert method.mean.item() == pytest.approx(mean) and method.var.item() == pytest.approx(var)
        assert method.class_mean.tolist() == pytest.approx(running if align else [1 / CLASSES] * CLASSES)


@pytest.mark.parametrize('align', [True, False])
def test_softmatch_takes_mean_and_variance_of_the_plain_confidence(align):
    """Mean 0.1, variance 1, momentum 0.9, confidences 0.9 and 0.5: 0.16 and 0.908."""
    method = build('softmatch', classes=3, stat_momentum=0.9, softmatch_align=align)
    method.mean.fill_(0.1)
    weight = method(logits_of([[0.9, 0.05, 0.05], [0.5, 0.25, 0.25]]), torch.arange(2), 0)
    assert method.mean.item() == pytest.approx(0.16) and method.var.item() == pytest.approx(0.908)
    assert weight.tolist() == [1, 1]  # above the mean: exactly 1


def test_softmatch_stays_finite_for_one_row_equal_confidences_and_no_variance():
    method = build('softmatch', stat_momentum=0.0)
    for logits in (torch.randn(1, CLASSES), torch.ones(5, CLASSES), torch.eye(CLASSES)):
        weight = method(logits, torch.arange(len(logits)), 0)
        assert weight.isfinite().all() and method.var.isfinite() and ((0 <= weight) & (weight <= 1)).all()
    assert method.var < 1e-12


def test_softmatch_stays_finite_where_a_class_has_no_probability_left_in_any_row():
    """exp(-200) is 0 in float32, and with momentum 0 so is the class's mean: it is left out, and nothing is 0/0."""
    method = build('softmatch', classes=3, stat_momentum=0.0)
    assert method(torch.tensor([[200., 0, 0]]), torch.arange(1), 0).tolist() == [1]
    rows = torch.tensor([[200., 0, 0], [math.log(0.6), math.log(0.4), -200]])
    confidence = 0.4 / 0.2 / (0.6 / 0.8 + 0.4 / 0.2)  # of the second row, by the class means 0.8 and 0.2
    mean, var = 0.8, 0.08  # of the plain confidences, 1 and 0.6
    expected = [1, math.exp(-(confidence - mean) ** 2 / (2 * var / 4))]
    assert method(rows, torch.arange(2), 0).tolist() == pytest.approx(expected)


@pytest.mark.parametrize('bound', [1.0, 0.4])
def test_freematch_equals_its_paper_step_by_step(bound):
    method = build('freematch', stat_momentum=0.9, freematch_max_threshold=bound)
    tau, p_model, share = 1 / CLASSES, [1 / CLASSES] * CLASSES, [1 / CLASSES] * CLASSES
    for logits, index in random_steps(2):
        probs = logits.double().softmax(1).tolist()
        tau = min(bound, 0.9 * tau + 0.1 * sum(max(p) for p in probs) / len(probs))
        p_model = [0.9 * m + 0.1 * sum(p[k] for p in probs) / len(probs) for k, m in enumerate(p_model)]
        tops = [p.index(max(p)) for p in probs]
        share = [0.9 * s + 0.1 * tops.count(k) / len(tops) for k, s in enumerate(share)]
        thresholds = [m / max(p_model) * tau for m in p_model]
        expected = [float(max(p) >= thresholds[p.index(max(p))]) for p in probs]
        assert method(logits, index, 0).tolist() == expected
        assert method.tau.item() == pytest.approx(tau)
        assert method.class_share.tolist() == pytest.approx(share)

    assert (tau == bound) == (bound < 1)
    strong = torch.randn(12, CLASSES, requires_grad=True)
    weight = (torch.arange(12) % 3 > 0).float()
    chosen = strong.detach().softmax(1)[weight > 0].tolist()
    mean = [sum(p[k] for p in chosen) / len(chosen) for k in range(CLASSES)]
    tops = [p.index(max(p)) for p in chosen]
    ratio = [m / (tops.count(k) / len(tops)) if k in tops else 0 for k, m in enumerate(mean)]
    target = [m / s for m, s in zip(p_model, share)]
    expected = sum(t / sum(target) * math.log(r / sum(ratio) + 1e-12) for t, r in zip(target, ratio))
    fairness = method.further_loss(strong, weight, Accelerator(cpu=True)) / method.factor
    assert fairness.item() == pytest.approx(expected, rel=1e-4)
    fairness.backward()
    assert strong.grad[weight > 0].abs().sum() > 0 and (strong.grad[weight == 0] == 0).all()


@pytest.mark.parametrize('dataset, bound', [
    ('svhn', 0.95), ('torch/SVHN', 0.95), ('hfds/ufldl-stanford/svhn:cropped_digits', 0.95), ('cifar10', 1), ('', 1),
])
def test_freematch_has_the_published_configurations_fairness_and_on_svhn_their_bound_of_the_threshold(dataset, bound):
    args = train_ssl._parse_args(['--algorithm', 'freematch', '--dataset', dataset])
    assert (args.freematch_fairness, args.freematch_max_threshold) == (0.001, bound)
    told = backbone.describe_averages(torch.nn.Identity(), args)
    assert ('thresholds of at most 0.95 (--freematch-max-threshold)' in told) == (bound < 1)
    given = train_ssl._parse_args(['--dataset', dataset, '--freematch-max-threshold', '0.8'])
    assert given.freematch_max_threshold == 0.8


def test_freematch_fairness_without_any_counted_image_is_zero_with_finite_gradients():
    strong = torch.randn(5, CLASSES, requires_grad=True)
    fairness = build('freematch').further_loss(strong, torch.zeros(5), Accelerator(cpu=True))
    fairness.backward()
    assert fairness.item() == 0 and strong.grad.isfinite().all()


@pytest.mark.parametrize('name', ['fixmatch', 'flexmatch', 'softmatch', 'freematch', 'marginmatch'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_weights_are_finite_for_the_logits_of_a_half_precision_pass(name, dtype):
    method = build(name)
    for logits, index in random_steps(3):
        if name == 'marginmatch':
            logits = F.pad(logits, (0, 1))
        weight = method(logits.to(dtype).float(), index, 0)
        assert weight.dtype == torch.float32 and weight.isfinite().all()
        assert ((0 <= weight) & (weight <= 1)).all()


def test_marginmatch_equals_a_literal_recomputation():
    args = options(threshold=0.5, epochs=1, train_steps_per_epoch=26, seed=3)
    images = 250
    method = methods.MarginMatch(images, CLASSES, args)
    assert (method.first, method.every, method.last, method.num_wrong) == (2, 1, 23, 2)
    method.every = 7
    flexmatch = methods.FlexMatch(images, CLASSES, args)
    apm, visits, wrong, drawn = {}, {}, {}, []
    generator = torch.Generator().manual_seed(0)
    passed = dropped = 0
    for update in range(26):
        logits = 3 * torch.randn(200, CLASSES + 1, generator=generator)
        index = torch.randperm(images, generator=generator)[:200]
        weight = method(logits, index, update)
        if method.first <= update < method.last and (update - method.first) % 7 == 0:
            wrong = {i: [0.0, 0] for i in (method.slot >= 0).nonzero().squeeze(1).tolist()}
            drawn.append(set(wrong))
        if update == method.last:
            wrong = {}
        assert sorted(wrong) == (method.slot >= 0).nonzero().squeeze(1).tolist()
        for row, i in zip(logits.tolist(), index.tolist()):
            margins = [z - max(row[:c] + row[c + 1:]) for c, z in enumerate(row)]
            if i in wrong:
                value, t = wrong[i]
                wrong[i] = [margins[-1] * 0.997 / (1 + t) + value * (1 - 0.997 / (1 + t)), t + 1]
            else:
                t, old = visits.get(i, 0), apm.get(i, [0.0] * (CLASSES + 1))
                apm[i] = [m * 0.997 / (1 + t) + v * (1 - 0.997 / (1 + t)) for m, v in zip(margins, old)]
                visits[i] = t + 1
        seen = [value for value, t in wrong.values() if t]
        if update >= method.last:  # the last images' tables stay, and with them the threshold
            seen = method.wrong_apm.value.tolist()
        threshold = torch.tensor(seen).quantile(0.95).item() if seen else -math.inf
        right = torch.tensor([i not in wrong for i in index.tolist()])
        flex = flexmatch(logits[:, :CLASSES][right], index[right], update)
        expected = []
        for w, row, i in zip(flex.tolist(), logits[right].tolist(), index[right].tolist()):
            keep = apm[i][row.index(max(row[:CLASSES]))] >= threshold
            passed, dropped = passed + (w > 0 and keep), dropped + (w > 0 and not keep)
            expected.append(w * keep)
        assert weight[right].tolist() == expected
        assert torch.equal(method.flexmatch.selected, flexmatch.selected)
        assert weight[~right].tolist() == pytest.approx([sum(expected) / len(expected)] * int((~right).sum()))
    assert len(drawn) == 3 and drawn[0] != drawn[1] and passed > 100 and dropped > 100


def test_marginmatch_saves_the_real_classes_only_and_measures_them(train):
    folder = train('run', '--algorithm', 'marginmatch', '--train-steps-per-epoch', 10, '--threshold', 0.2)
    model = timm.create_model(f'local-dir:{folder / "last"}', pretrained=True).eval()
    source = sources.create_source('digits', None, 'test')
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.no_grad():
        logits = model(torch.stack([transform(source.image(i)) for i in range(len(source))]))
    assert logits.shape == (500, 10)
    metrics = json.loads((folder / 'last/metrics.json').read_text())
    assert F.cross_entropy(logits, source.targets).item() == pytest.approx(metrics['nll'], abs=1e-5)


def penalty_of(logits, pseudo_label, weight, rows: str) -> torch.Tensor:
    args = options(logit_margin=10.0, logit_margin_rows=rows)
    return methods.logit_margin_penalty(logits, pseudo_label, weight, Accelerator(cpu=True), args)


def test_the_logit_margin_penalty_adds_what_exceeds_the_margin():
    logits = torch.tensor([[12.0, 0.0, 3.0], [1.0, 0.0, 0.0]])
    assert penalty_of(logits, torch.tensor([1, 1]), torch.zeros(2), 'all').item() == pytest.approx(2 / 6)


def test_the_logit_margin_penalty_of_agreeing_rows_is_that_of_a_loop_over_them():
    generator = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(40, CLASSES, generator=generator)).requires_grad_()
    pseudo_label = torch.where(torch.arange(40) % 2 == 0, logits.argmax(1), 0)
    weight = torch.tensor([1.0, 1.0, 0.0, 0.7])[torch.arange(40) % 4]
    total, rows = 0., []
    for i, row in enumerate(logits.tolist()):
        if weight[i] == 1 and row.index(max(row)) == pseudo_label[i]:
            rows.append(i)
            total += sum(max(0, max(row) - z - 10) for z in row) / CLASSES
    penalty = penalty_of(logits, pseudo_label, weight, 'agreeing')
    assert 5 < len(rows) < 20 and penalty.item() == pytest.approx(total / len(rows), rel=1e-5)
    penalty.backward()
    assert logits.grad.abs().sum(1).nonzero().squeeze(1).tolist() == rows
    none = penalty_of(logits, pseudo_label, torch.zeros(40), 'agreeing')
    assert none.item() == 0 and none.requires_grad


def test_the_unlabeled_loss_of_pseudo_label_grows_over_its_warmup():
    args = options(lambda_u=2.0, lambda_u_warmup=0.5, epochs=2, train_steps_per_epoch=10)
    assert [methods.lambda_u(t, args) for t in (0, 5, 10, 15)] == [0, 1, 2, 2]
    asked = train_ssl._parse_args(['--algorithm', 'pseudo_label', '--epochs', '10', '--train-steps-per-epoch', '10'])
    assert [methods.lambda_u(t, asked) for t in (0, 20, 40, 60)] == [0, 0.5, 1, 1]
    assert methods.lambda_u(0, train_ssl._parse_args([])) == 1


def test_pseudo_label_trains_on_its_weak_views_and_loads_no_strong_ones(train):
    folder = train('run', '--algorithm', 'pseudo_label', '--threshold', 0, '--lambda-u-warmup', 0)
    assert float(summary(folder)[0]['train_mask_rate']) == 1
    logits = torch.randn(6, 3)

    class Fixed(torch.nn.Module):
        def forward(self, x):
            assert len(x) == 6
            return torch.zeros(6, 2), logits.requires_grad_()

    image, weak = torch.zeros(2, 3, 4, 4), torch.zeros(4, 3, 4, 4)
    *_, z_weak, z_strong, _ = passes.forward_views(Fixed(), dict(image=image), dict(weak=weak))
    assert torch.equal(z_weak, z_strong) and z_strong.requires_grad and not z_weak.requires_grad


@pytest.mark.parametrize('name', [name for name in methods.ALGORITHMS if name not in ('supervised', 'fixmatch')])
def test_every_method_with_calibratemix_resumes_bit_identical(train, tmp_path, name):
    flags = ('--algorithm', name, '--calibratemix', '--calmix-warmup-epochs', 1, '--calmix-weight-rate', 0.1,
             '--train-split', 'train[:40]', '--head-init-scale', 4,  # so that the weight of the mixup loss rises
             '--threshold', 0.3, '--stat-momentum', 0.9, '--train-steps-per-epoch', 3, '--recovery-interval', 1,
             '--checkpoint-hist', 99)
    straight = train('straight', *flags)
    rewind(straight, tmp_path / 'resumed', 4)
    resumed = train('resumed', *flags, '--resume', 'auto')
    assert_same_run(straight, resumed)
    assert float(summary(straight)[-1]['calmix_weight']) > 0


def batches_for(name: str, options: Namespace, device: str = 'cpu') -> tuple[dict, dict]:
    """A labeled and an unlabeled batch of random images with the views that a method asks for."""
    labeled, unlabeled = benchmark.create_batches(options, torch.device(device))
    method = methods.ALGORITHMS[name]
    for batch, image, views in ((labeled, 'image', method.labeled_views), (unlabeled, 'weak', method.views)):
        images = {view: torch.randn_like(batch[image]) for view in views}
        batch.pop('strong', None)
        batch.update(images)
    return labeled, unlabeled


def kept(run: checkpoint.Run) -> dict[str, torch.Tensor]:
    """Copies of all that an update moves: parameters, their average, momenta."""
    tensors = {}
    parts = dict(run.timm_model.named_parameters()), run.ema.module.state_dict(), run.optimizer.state_dict()
    checkpoint.pack(copy.deepcopy(parts), tensors)
    return tensors


@pytest.mark.parametrize('name', [name for name in methods.ALGORITHMS if name != 'supervised'])
def test_an_update_that_float16_skips_leaves_weights_and_average_and_counts_as_a_visit_to_method_and_bank(name):
    """Beside a run in which the second update does not overflow. The gradient scaler is torch's own, on the CPU."""
    asked = benchmark.create_parser().parse_args(['--model', 'wide_resnet10_1', '-b', '4', '--mu', '2'])
    asked.img_size = 8
    torch.manual_seed(0)
    forget_accelerator()
    batches, runs = batches_for(name, asked), []
    for overflow in (False, True):
        flags = ('--algorithm', name, '--calibratemix', '--calmix-preset', 'steered', '--threshold', '0.1')
        step = benchmark.our_step(asked, *batches, *flags)
        run, scaler = step.run, torch.amp.GradScaler('cpu', init_scale=1024.)
        run.accelerator.scaler = scaler
        run.optimizer = AcceleratedOptimizer(run.optimizer.optimizer, scaler=scaler)
        assert step()
        before, rate = kept(run), run.optimizer.param_groups[0]['lr']
        if overflow:
            scaler.update(math.inf)
        assert step() == (not overflow) and (run.num_updates, run.num_draws) == (2 - overflow, 2)
        runs.append(run)
    assert run.optimizer.step_was_skipped and run.optimizer.param_groups[0]['lr'] == rate
    assert all(torch.equal(value, kept(run)[key]) for key, value in before.items())
    for part in ('method', 'calmix'):
        one, other = (getattr(run, part).state_dict() for run in runs)
        assert all(torch.equal(one[key], other[key]) for key in one), part
    assert run.calmix.aum.count.sum() == 8 and run.calmix.apm.count.sum() == 16
    scaler.update(1024.)
    assert step() and run.num_updates == 2
    assert not all(torch.equal(value, kept(run)[key]) for key, value in before.items())


def test_label_smoothing_applies_to_the_labeled_loss():
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 2])

    class Fixed(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(3, 2), logits.requires_grad_()

    args = options(label_smoothing=0.2)
    loss = train_ssl.supervised_step(Fixed(), dict(image=torch.zeros(3, 1), target=target), None, None, args)['loss']
    assert loss.item() == pytest.approx(F.cross_entropy(logits, target, label_smoothing=0.2).item())
