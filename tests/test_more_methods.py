"""The methods beyond the first seven: each step against a slow re-computation, edges, processes, resumes, learning."""
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import step_on_processes
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import run_script
from safetensors.torch import load_file
from test_train import Toy
from torch import nn

import checkpoint
import methods
import passes
import train_ssl
from calibratemix import CalibrateMix
from program import UsageError
from pseudo_labels import move_mean

B, U, K, STEPS = 5, 12, 4, 50
WEIGHING = ('uda', 'adamatch', 'dash')  # they weigh pseudo-labels; the others compute losses of their own
OWN = ('defixmatch', 'pi_model', 'meanteacher', 'vat', 'mixmatch', 'remixmatch')
NEW = (*WEIGHING, *OWN)


def parse(name: str, *flags) -> SimpleNamespace:
    return train_ssl._parse_args(['--algorithm', name, *map(str, flags)])


def build(name: str, *flags, classes: int = K, images: int = 40) -> tuple[methods.Method, SimpleNamespace]:
    args = parse(name, *flags)
    return methods.ALGORITHMS[name](images, classes, args), args


class Given(nn.Module):
    """A network that answers with given logits, whatever the images."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return torch.zeros(len(x), 2), self.logits[:len(x)]


def random_logits(seed: int, columns: int = K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Confident and unsure rows of labeled, weak and strong images, and labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = B + 2 * U
    logits = 5 * torch.rand(rows, 1, generator=generator) * torch.randn(rows, columns, generator=generator)
    return logits, torch.randint(K, (B,), generator=generator), torch.randint(40, (U,), generator=generator)


def take_step(method, args, logits, target, index, num_updates, calmix=None) -> tuple[dict, torch.Tensor]:
    """Terms and the gradient of the logits of one step."""
    logits = logits.clone().requires_grad_()
    labeled = dict(image=torch.zeros(B, 1), target=target, index=torch.arange(B))
    unlabeled = dict(weak=torch.zeros(U, 1), strong=torch.zeros(U, 1), target=torch.zeros(U).long(), index=index)
    terms = train_ssl.semi_supervised_step(
        Given(logits), labeled, unlabeled, method, calmix, num_updates, Accelerator(cpu=True), args,
    )
    terms['loss'].backward()
    return terms, logits.grad


def scaling(scale: float) -> CalibrateMix | None:
    """CalibrateMix of which nothing is seen but what it does to the logits that the method chooses by."""
    return None if scale == 1 else CalibrateMix(B, 40, K, 'steered', weight=0, mask_scale=scale, warmup_steps=0)


def probabilities(row: list[float], temperature: float = 1.) -> list[float]:
    powers = [math.exp((z - max(row)) / temperature) for z in row]
    return [p / sum(powers) for p in powers]


def entropy_like(target: list[float], row: list[float]) -> float:
    """Cross-entropy of a row of logits with target probabilities."""
    return -sum(q * math.log(p) for q, p in zip(target, probabilities(row)) if q)


def one_hot(k: int) -> list[float]:
    return [float(k == c) for c in range(K)]


class PlainUDA:
    def weigh(self, labeled, labels, weak, num_updates):
        weights = [float(max(probabilities(row)) >= 0.8) for row in weak]
        return weights, [probabilities(row, 0.4) for row in weak]

    def check(self, method):
        assert not method.state_dict()


class PlainAdaMatch:
    def __init__(self):
        self.of_labeled, self.of_unlabeled = [1 / K] * K, [1 / K] * K

    def weigh(self, labeled, labels, weak, num_updates):
        p, q = [probabilities(row) for row in labeled], [probabilities(row) for row in weak]
        for k in range(K):
            self.of_labeled[k] = 0.9 * self.of_labeled[k] + 0.1 * sum(row[k] for row in p) / len(p)
            self.of_unlabeled[k] = 0.9 * self.of_unlabeled[k] + 0.1 * sum(row[k] for row in q) / len(q)
        targets = []
        for row in q:
            raised = [row[k] * self.of_labeled[k] / self.of_unlabeled[k] for k in range(K)]
            targets.append([value / sum(raised) for value in raised])
        least = 0.95 * sum(max(row) for row in p) / len(p)
        return [float(max(row) >= least) for row in targets], targets

    def check(self, method):
        assert method.labeled_mean.tolist() == pytest.approx(self.of_labeled, abs=1e-5)
        assert method.class_mean.tolist() == pytest.approx(self.of_unlabeled, abs=1e-5)


class PlainDash:
    """20 x 2^10 updates: a warmup of 40, the last 4 of which are looked at, and a fall every 200."""

    def __init__(self):
        self.losses, self.threshold = [], None

    def weigh(self, labeled, labels, weak, num_updates):
        if 36 <= num_updates < 40:
            self.losses += [entropy_like(one_hot(k), row) for row, k in zip(labeled, labels)]
        if num_updates < 40:
            return [0.] * U, [one_hot(0)] * U
        falls = (num_updates - 40) // 200
        self.threshold = max(0.05, 1.0001 / 1.27 ** falls * sum(self.losses) / len(self.losses))
        targets = []
        for row in weak:
            soft = probabilities(row, 0.5)
            targets.append(one_hot(row.index(max(row))) if self.threshold == 0.05 else soft)
        return [float(entropy_like(q, row) <= self.threshold) for q, row in zip(targets, weak)], targets

    def check(self, method):
        if self.threshold is not None:
            assert method.threshold.item() == pytest.approx(self.threshold, rel=1e-5)


@pytest.mark.parametrize('scale', [1, 1.5])
@pytest.mark.parametrize('name, plain, stride, flags', [
    ('uda', PlainUDA, 1, ()),
    ('adamatch', PlainAdaMatch, 1, ('--stat-momentum', 0.9)),
    ('dash', PlainDash, 1, ('--epochs', 20)),
    ('dash', PlainDash, 120, ('--epochs', 20)),
])
def test_fifty_steps_equal_the_paper_s_equations_row_by_row(name, plain, stride, flags, scale):
    """Weights, targets, statistics, loss and gradient; in float64 and plain numbers on the other side.

    With a scale the equations get scaled logits, but the losses are of the logits as they are.
    """
    (method, args), plain, calmix = build(name, *flags), plain(), scaling(scale)
    counted = 0
    for step in range(STEPS):
        num_updates = step if stride == 1 or step < 40 else 40 + (step - 40) * 10 * stride
        num_updates = num_updates + 30 if stride == 1 and name == 'dash' else num_updates
        logits, target, index = random_logits(step)
        exact = logits.double().requires_grad_()
        z, weak, strong = exact.split([B, U, U])
        weights, targets = plain.weigh((scale * z).tolist(), target.tolist(), (scale * weak).tolist(), num_updates)
        labeled = -sum(z[b].log_softmax(0)[k] for b, k in enumerate(target.tolist())) / B
        unlabeled = -sum(
            w * q[k] * strong[u].log_softmax(0)[k] for u, (w, q) in enumerate(zip(weights, targets)) for k in range(K)
        ) / U
        (labeled + unlabeled).backward()
        terms, gradient = take_step(method, args, logits, target, index, num_updates, calmix)
        assert terms['mask_rate'].item() == pytest.approx(sum(weights) / U)
        assert terms['loss_unlabeled'].item() == pytest.approx(unlabeled.item(), abs=1e-5)
        assert terms['loss'].item() == pytest.approx((labeled + unlabeled).item(), abs=1e-5)
        assert torch.allclose(gradient.double(), exact.grad, atol=1e-5)
        found = method.target(scale * weak.detach().float(), weak.argmax(1), index)
        if sum(weights):
            assert torch.allclose(found.double(), torch.tensor(targets, dtype=torch.float64), atol=1e-5)
        plain.check(method)
        counted += sum(weights)
    assert 0 < counted < U * STEPS


def test_dash_s_threshold_falls_by_gamma_down_to_a_twentieth_and_makes_pseudo_labels_hard_there():
    """Labeled loss 1 in the warmup of 40 updates; then C, C / gamma and C / gamma^10 after 0, 1 and 10 falls."""
    method, _ = build('dash', '--epochs', 20)
    method.loss_sum.fill_(3.), method.loss_count.fill_(3)
    for falls, expected in ((0, 1.0001), (1, 1.0001 / 1.27), (10, 1.0001 / 1.27 ** 10), (13, 0.05), (100, 0.05)):
        assert method.threshold_at(40 + 200 * falls).item() == pytest.approx(expected, rel=1e-5)
    assert method.threshold_at(239) == method.threshold_at(40) > method.threshold_at(240)
    weak, index = torch.tensor([[2., 0., 0., 0.]]), torch.arange(1)
    method(weak, index, 40)
    soft = method.target(weak, weak.argmax(1), index)
    assert soft[0].tolist() == pytest.approx(probabilities([2., 0, 0, 0], 0.5), abs=1e-5)
    method(weak, index, 40 + 200 * 13)
    assert method.target(weak, weak.argmax(1), index).tolist() == [[1, 0, 0, 0]]


def finite_state(method) -> bool:
    return all(value.isfinite().all() for name, value in method.state_dict().items() if name != 'threshold')


@pytest.mark.parametrize('name', WEIGHING)
def test_edges_one_row_one_class_all_equal_and_no_confident_row(name):
    for classes in (K, 1):
        for rows in (torch.randn(1, classes), torch.ones(6, classes), 1e-3 * torch.randn(6, classes)):
            method, _ = build(name, '--epochs', 1, '--train-steps-per-epoch', 4, classes=classes)
            for num_updates in range(3):
                method.see_labeled(rows, torch.zeros(len(rows)).long(), num_updates)
                weight = method(rows, torch.arange(len(rows)), num_updates)
                assert weight.shape == (len(rows),) and weight.dtype == torch.float32
                assert ((0 <= weight) & (weight <= 1)).all() and finite_state(method)
                target = method.target(rows, rows.argmax(1), torch.arange(len(rows)))
                assert target.shape == rows.shape and torch.allclose(target.sum(1), torch.ones(len(rows)))


@pytest.mark.parametrize('name', WEIGHING)
def test_a_row_of_nan_counts_nowhere(name):
    """The other rows' weights and the statistics are those of the batch without it."""
    logits, target, index = random_logits(3)
    states, weights = [], []
    for nan in (False, True):
        method, _ = build(name, '--epochs', 1, '--train-steps-per-epoch', 4, '--stat-momentum', 0.5)
        z, weak, labels = logits[:B], logits[B:B + U], target
        if nan:
            row = torch.full((1, K), torch.nan)
            z, weak, labels = torch.cat([z, row]), torch.cat([row, weak]), torch.cat([target, target[:1]])
        for num_updates in range(2):
            method.see_labeled(z, labels, num_updates)
            weight = method(weak, torch.arange(len(weak)), num_updates)
        assert not nan or weight[0] == 0
        weights.append(weight[nan:])
        states.append(method.state_dict())
    assert torch.equal(*weights) and finite_state(method)
    assert all(torch.allclose(states[0][key].float(), states[1][key].float()) for key in states[0])


@pytest.mark.parametrize('name', NEW)
def test_published_defaults_hold_where_nothing_is_given_and_another_method_takes_its_own(name, tmp_path):
    args, path = parse(name), tmp_path / 'args.yaml'
    checkpoint.write_args(path, args)
    assert vars(train_ssl._parse_args(['--config', str(path)])) == {**vars(args), 'config': str(path)}
    other = train_ssl._parse_args(['--config', str(path), '--algorithm', 'fixmatch'])
    plain = train_ssl._parse_args(['--algorithm', 'fixmatch'])
    assert vars(other) == {**vars(plain), 'config': str(path)}


@pytest.mark.parametrize('flags, expected', [
    (('uda',), dict(mu=7, lambda_u=1, threshold=0.8, temperature=0.4, lambda_u_warmup=0)),
    (('uda', '--threshold', 0.7), dict(threshold=0.7, temperature=0.4)),
    (('adamatch',), dict(mu=7, lambda_u=1, threshold=0.95)),
    (('dash',), dict(mu=7, lambda_u=1, temperature=0.5)),
    (('defixmatch',), dict(mu=7, lambda_u=0.5, threshold=0.95)),
    (('pi_model',), dict(mu=1, lambda_u=10, lambda_u_warmup=0.4)),
    (('meanteacher',), dict(mu=1, lambda_u=50, lambda_u_warmup=0.4)),
    (('vat',), dict(mu=1, lambda_u=1, lambda_u_warmup=0.4, vat_eps=6)),
    (('mixmatch',), dict(mu=1, lambda_u=100, lambda_u_warmup=0.4, temperature=0.5, mixmatch_alpha=0.5)),
    (('mixmatch', '--dataset', 'torch/cifar100'), dict(lambda_u=150)),
    (('remixmatch',), dict(mu=1, lambda_u=1.5, lambda_u_warmup=1 / 64, temperature=0.5, mixmatch_alpha=0.75)),
    (('fixmatch',), dict(mu=7, lambda_u=1, threshold=0.95, lambda_u_warmup=0)),
    (('pseudo_label',), dict(mu=7, lambda_u=1, threshold=0.95, lambda_u_warmup=0.4)),
])
def test_defaults_are_those_of_the_published_recipes(flags, expected):
    args = parse(*flags)
    assert {key: getattr(args, key) for key in expected} == expected


def test_weights_apart_are_refused_where_there_is_nothing_to_part(capsys):
    with pytest.raises(SystemExit):
        parse('pseudo_label', '--weak-forward', 'no-grad')
    assert '--weak-forward no-grad: with pseudo_label there is no pass' in capsys.readouterr().err


PENALTY = '--logit-margin-penalty,1,--logit-margin,0,--logit-margin-rows,agreeing'
MOVING = ('flexmatch,--threshold,0.3', f'softmatch,--stat-momentum,0.9,{PENALTY}',
          f'freematch,--stat-momentum,0.9,--freematch-fairness,1,{PENALTY}', f'marginmatch,--threshold,0.3,{PENALTY}')
ON_PROCESSES = (
    *MOVING,
    'uda,--threshold,0.3', 'adamatch,--stat-momentum,0.5', 'dash,--temperature,0.9', 'defixmatch,--threshold,0.3',
    'pi_model', 'meanteacher', 'vat,--vat-eps,0', 'mixmatch,--mixmatch-alpha,0', 'vat', 'mixmatch',
    'remixmatch,--mixmatch-alpha,0',
)
DRAWING = ('vat', 'mixmatch', 'remixmatch,--mixmatch-alpha,0')  # each process for itself; that all agree is checked


MIXING = [f'{name},--calibratemix,--calmix-warmup-epochs,0.25,--calmix-weight-rate,0.1,--threshold,0.3'
          for name in methods.ALGORITHMS if name != 'supervised']


def test_two_processes_take_the_steps_of_one_and_with_the_bank_in_parts_those_with_a_whole_one(tmp_path):
    """Statistics, thresholds, margins and weights, in one launch for all methods."""
    parts = [f'{text},--calmix-bank-shards' for text in MIXING]
    result = run_script('tests/step_on_processes.py', tmp_path / 'two', *ON_PROCESSES, *MIXING, *parts, processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    AcceleratorState._reset_state(reset_partial_state=True)
    step_on_processes.main(tmp_path / 'one', *ON_PROCESSES)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ('one', 'two'))
    for text in ON_PROCESSES:
        for key in one[text]:
            alike = torch.allclose(one[text][key].float(), two[text][key].float(), atol=1e-5)
            assert alike or text in DRAWING, (text, key)
    assert torch.equal(one['remixmatch,--mixmatch-alpha,0']['method.class_count'], torch.tensor([1, 1, 1, 1]) + sum(
        step_on_processes.joined_batches(step)[0]['target'].bincount(minlength=4) for step in range(3)))
    assert torch.equal(*(states['remixmatch,--mixmatch-alpha,0']['method.class_count'] for states in (one, two)))
    for text in MOVING:
        fresh = build(text.split(',')[0])[0].state_dict()
        for key in [key for key in fresh if not key.startswith('wrong_apm')]:  # whose one image may not be in the batch
            assert not torch.equal(one[text][f'method.{key}'], fresh[key]), key
    for whole, part in zip(MIXING, parts):
        assert two[whole].keys() == two[part].keys() and two[whole]['apm.count'].sum() == 3 * 16
        assert all(torch.equal(two[whole][key], two[part][key]) for key in two[whole]), part


@pytest.mark.parametrize('name', NEW)
def test_a_run_on_the_digits_learns(train, name):
    """More than 40 % right of ten classes after 200 updates from 60 labels.

    The published unlabeled factors of the two that mix are made for more images a step and a slow start.
    """
    slower = dict(mixmatch=('--lambda-u', 10, '--lr', 0.01), remixmatch=('--lr', 0.01)).get(name, ())
    folder = train('run', '--algorithm', name, '--num-labels', 60, '-b', 8, '--mu', 1, '--epochs', 1, *slower,
                   '--train-steps-per-epoch', 200, '--val-split', 'test[:200]', '--log-interval', 200)
    assert json.loads((folder / 'last/metrics.json').read_text())['error'] < 60


# --- Methods with losses of their own ---------------------------------------------------------------------------------

SIDE = 2


class Linear(nn.Module):
    """Logits that are linear in the pixels, so that every loss and gradient can be written down."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x):
        return x.flatten(1), x.flatten(1) @ self.weight


def random_batches(seed: int) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(seed)

    def images(number):
        return torch.randn(number, 3, SIDE, SIDE, generator=generator)

    labeled = dict(image=images(B), strong=images(B), target=torch.randint(K, (B,), generator=generator),
                   index=torch.arange(B))
    unlabeled = {name: images(U) for name in ('weak', 'strong', 'first', 'second')}
    return labeled, dict(unlabeled, target=torch.zeros(U).long(), index=torch.arange(U))


def only_views(method, labeled: dict, unlabeled: dict) -> tuple[dict, dict]:
    kinds = ((labeled, method.labeled_views), (unlabeled, method.views))
    return tuple({key: v for key, v in batch.items() if key in {*views, 'target', 'index'}} for batch, views in kinds)


def softmaxes(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Probabilities of each image, of the first K outputs."""
    return [(image.flatten().double() @ weight)[:K].softmax(0) for image in x]


def plain_cross_entropy(targets: list, probs: list) -> torch.Tensor:
    """Mean over the rows; a target is a class or probabilities."""
    total = 0.
    for q, p in zip(targets, probs):
        q = one_hot(q) if isinstance(q, int) else q
        total = total - sum(float(q[k]) * p[k].log() for k in range(K))
    return total / len(probs)


def plain_square(targets: list, probs: list) -> torch.Tensor:
    return sum((p[k] - q[k]) ** 2 for q, p in zip(targets, probs) for k in range(K)) / (K * len(probs))


def sharpened(p: list[float], temperature: float) -> list[float]:
    powers = [value ** (1 / temperature) for value in p]
    return [value / sum(powers) for value in powers]


def plain_defixmatch(state, weight, teacher, x, u, y):
    def counted(weak, strong):
        total = 0 * weight.sum()
        for p, s in zip(softmaxes(weak, weight), softmaxes(strong, weight)):
            if p.max() >= 0.95:
                total = total - s[p.argmax()].log()
        return total / len(weak)

    labeled = [plain_cross_entropy(y, softmaxes(x[name], weight)) for name in ('image', 'strong')]
    return sum(labeled) / 2, counted(u['weak'], u['strong']) - counted(x['image'], x['strong']), 0.


def plain_pi_model(state, weight, teacher, x, u, y):
    return plain_meanteacher(state, weight, weight.detach(), x, u, y)


def plain_meanteacher(state, weight, teacher, x, u, y):
    first, second = softmaxes(u['weak'], teacher.double()), softmaxes(u['strong'], weight)
    return plain_cross_entropy(y, softmaxes(x['image'], weight)), plain_square(first, second), 0.


def plain_vat(state, weight, teacher, x, u, y):
    """The divergence's gradient for the pixels is W (q - p), q being the probabilities after the trial step."""
    drawn = torch.randn_like(u['weak']).double()
    loss = entropy = 0.
    for image, noise, p in zip(u['weak'].double(), drawn, softmaxes(u['weak'], weight)):
        entropy = entropy - sum(p[k] * p[k].log() for k in range(K)) / U
        p = p.detach()
        q = softmaxes([image + noise / noise.norm()], weight.detach())[0]
        gradient = weight.detach() @ (q - p)
        there = softmaxes([image.flatten() + 6 * gradient / gradient.norm()], weight)[0]
        loss = loss + sum(p[k] * (p[k].log() - there[k].log()) for k in range(K)) / U
    return plain_cross_entropy(y, softmaxes(x['image'], weight)), loss, 0.06 * entropy


def plain_mix(images, targets, alpha):
    partner = torch.randperm(len(images)).tolist()
    drawn = torch.distributions.Beta(alpha, alpha).sample((len(images),)).tolist()
    mixed = []
    for i, j, gamma in zip(range(len(images)), partner, drawn):
        gamma = max(gamma, 1 - gamma)
        target = [gamma * a + (1 - gamma) * b for a, b in zip(targets[i], targets[j])]
        mixed.append((gamma * images[i].double() + (1 - gamma) * images[j].double(), target))
    return zip(*mixed)


def plain_mixmatch(state, weight, teacher, x, u, y):
    guesses = []
    for p, q in zip(*(softmaxes(u[name], weight.detach()) for name in ('weak', 'strong'))):
        guesses.append(sharpened([(a + b) / 2 for a, b in zip(p.tolist(), q.tolist())], 0.5))
    images, targets = plain_mix([*x['image'], *u['weak'], *u['strong']], [*map(one_hot, y), *guesses, *guesses], 0.5)
    probs = softmaxes(images, weight)
    return plain_cross_entropy(targets[:B], probs[:B]), plain_square(targets[B:], probs[B:]), 0.


def plain_remixmatch(state, weight, teacher, x, u, y):
    counts, mean = state.setdefault('counts', [1] * K), state.setdefault('mean', [1 / K] * K)
    for k in y:
        counts[k] += 1
    weak = [p.tolist() for p in softmaxes(u['weak'], weight.detach())]
    for k in range(K):
        mean[k] = 0.9 * mean[k] + 0.1 * sum(p[k] for p in weak) / U
    guesses = []
    for p in weak:
        raised = [p[k] * counts[k] / sum(counts) / mean[k] for k in range(K)]
        guesses.append(sharpened([value / sum(raised) for value in raised], 0.5))
    images, targets = plain_mix([*x['strong'], *u['first'], *u['second'], *u['weak']],
                                [*map(one_hot, y), *guesses, *guesses, *guesses], 0.75)
    probs = softmaxes(images, weight)
    unlabeled = plain_cross_entropy(targets[B:], probs[B:])
    unlabeled = unlabeled + plain_cross_entropy(guesses, softmaxes(u['first'], weight)) / 3
    turned = 0.
    for image, turn in zip(u['first'].double(), torch.randint(4, (U,)).tolist()):
        for _ in range(turn):
            image = image.flip(2).transpose(1, 2)  # a quarter turn counter-clockwise: mirrored, then transposed
        turned = turned - (image.flatten() @ weight)[K:].log_softmax(0)[turn] / U
    return plain_cross_entropy(targets[:B], probs[:B]), unlabeled, 0.5 * turned


@pytest.mark.parametrize('name', OWN)
def test_fifty_steps_of_own_losses_equal_the_paper_s_equations_image_by_image(name):
    """Losses, gradient of the weights, statistics; 0.4 of the 50 updates are the published growth of lambda."""
    method, args = build(name, '--epochs', 1, '--train-steps-per-epoch', STEPS, '--stat-momentum', 0.9)
    spread = 0.3 if name == 'vat' else 1  # sure of an image, float32 keeps few digits of where it is least so
    generator, state = torch.Generator().manual_seed(1), {}
    plain = globals()[f'plain_{name}']
    grown = dict(defixmatch=0, remixmatch=STEPS / 64).get(name, 0.4 * STEPS)
    factor = dict(defixmatch=0.5, pi_model=10, meanteacher=50, vat=1, mixmatch=100, remixmatch=1.5)[name]
    for step in range(STEPS):
        model, teacher = (
            Linear(spread * torch.randn(3 * SIDE ** 2, K + method.further_outputs, generator=generator))
            for _ in range(2)
        )
        labeled, unlabeled = only_views(method, *random_batches(step))
        torch.manual_seed(step)
        terms = train_ssl.semi_supervised_step(
            model, labeled, unlabeled, method, None, step, Accelerator(cpu=True), args,
            average=teacher if method.takes_average else None,
        )
        terms['loss'].backward()
        torch.manual_seed(step)
        exact = model.weight.detach().double().requires_grad_()
        of_labeled, of_unlabeled, further = plain(
            state, exact, teacher.weight.detach(), labeled, unlabeled, labeled['target'].tolist())
        total = of_labeled + factor * (min(1, step / grown) if grown else 1) * of_unlabeled + further
        total.backward()
        assert terms['loss_labeled'].item() == pytest.approx(of_labeled.item(), rel=1e-5, abs=1e-5)
        assert terms['loss_unlabeled'].item() == pytest.approx(of_unlabeled.item(), rel=1e-5, abs=1e-5)
        assert terms['loss'].item() == pytest.approx(total.item(), rel=1e-5, abs=1e-5)
        scale = max(1, exact.grad.abs().max().item())
        assert torch.allclose(model.weight.grad.double() / scale, exact.grad / scale, atol=1e-5)
        assert teacher.weight.grad is None  # none through the teacher
        if state:
            assert method.class_count.tolist() == state['counts']
            assert method.class_mean.tolist() == pytest.approx(state['mean'], abs=1e-5)


def test_losses_of_a_method_s_own_and_their_mask_rate_are_of_the_logits_as_they_are():
    method, args = build('defixmatch', '--threshold', 0.5)
    labeled, unlabeled = only_views(method, *random_batches(0))
    model = Linear(torch.randn(3 * SIDE ** 2, K, generator=torch.Generator().manual_seed(0)) / 2)
    alone, scaled = (train_ssl.semi_supervised_step(
        model, labeled, unlabeled, method, calmix, 0, Accelerator(cpu=True), args,
    ) for calmix in (None, scaling(30)))
    assert 0 < alone['mask_rate'] < 1 and scaled['loss_mixup'] > 0
    for name in ('loss', 'loss_unlabeled', 'mask_rate'):
        assert alone[name] == scaled[name]


def test_mixing_keeps_rows_at_1_and_pairs_images_with_labels_alike():
    """Each pixel is its image's class number, so a mixed one is the mean class number of its target."""
    torch.manual_seed(0)
    label = torch.arange(24) % K
    images, target = label.float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4), torch.eye(K)[label]
    mixed, mixed_target = passes.mix(images, target, 0.75)
    assert torch.allclose(mixed_target.sum(1), torch.ones(24))
    assert torch.allclose(mixed, (mixed_target @ torch.arange(K).float()).view(-1, 1, 1, 1).expand_as(mixed), atol=1e-5)
    assert (mixed_target.gather(1, label[:, None]) >= 0.5).all() and (mixed_target.amax(1) < 0.99).any()
    assert all(torch.equal(*pair) for pair in zip(passes.mix(images, target, 0), (images, target)))


def test_images_turn_by_quarters():
    images, turns = torch.randn(8, 3, 5, 5), torch.tensor([0, 1, 2, 3, 3, 0, 1, 2])
    expected = [torch.rot90(image, k, (1, 2)) for image, k in zip(images, turns.tolist())]
    assert torch.equal(passes.rotate(images, turns), torch.stack(expected))


def test_vat_s_perturbation_has_the_length_asked_for_moves_no_statistics_and_carries_no_gradient():
    torch.manual_seed(0)
    model, images = Toy().train(), torch.randn(6, 3, 8, 8)
    logits = model(images)[1].detach()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if 'running' in name}
    with passes.still_statistics(model):
        moved = passes.find_adversary(model, images, logits, 6.)
    assert torch.allclose(moved.flatten(1).norm(dim=1), torch.full((6,), 6.)) and not moved.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers() if name in before)
    assert all(norm.track_running_stats for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    there = model.eval()(images)[1]
    noise = 6 * passes.unit(torch.randn_like(images))
    grown = [passes.divergence(there, model(images + step)[1]).mean().item()
             for step in (passes.find_adversary(model, images, there.detach(), 6.), noise)]
    assert grown[0] > 3 * grown[1] > 0  # a random step of the same length does far less
    nn.init.zeros_(model.fc.weight)
    assert not passes.find_adversary(model, images, model(images)[1].detach(), 6.).any()  # no direction is worse


def test_vat_without_a_perturbation_has_no_loss_whatever_batch_norm_makes_of_the_labeled_images():
    torch.manual_seed(0)
    method, args = build('vat', '--vat-eps', 0, '--lambda-u-warmup', 0, images=12)
    labeled = dict(image=3 + 2 * torch.randn(6, 3, 8, 8), target=torch.arange(6) % K, index=torch.arange(6))
    unlabeled = dict(weak=torch.randn(12, 3, 8, 8), target=torch.full((12,), -1), index=torch.arange(12))
    model = Toy().train()
    terms = train_ssl.semi_supervised_step(model, labeled, unlabeled, method, None, 0, Accelerator(cpu=True), args)
    assert abs(float(terms['loss_unlabeled'])) < 1e-6
    assert model(labeled['image'])[1].var(0).sum() > 1e-3  # it does tell images apart


def test_running_means_and_the_steered_weight_move_as_fast_an_update_however_many_batches_it_has(monkeypatch):
    """Of the same rows in one batch or in four, a mean moves alike up to the order within an update."""
    rows = torch.rand(16, K, generator=torch.Generator().manual_seed(0))
    moved = []
    for steps in (1, 4):
        args = parse('softmatch', '--stat-momentum', 0.9, '--grad-accum-steps', steps)
        method, mean = methods.ALGORITHMS['softmatch'](40, K, args), torch.zeros(K)
        assert method.momentum ** steps == pytest.approx(0.9)
        for part in rows.chunk(steps):
            move_mean(mean, part.mean(0, keepdim=True).expand_as(part), method.momentum)
        moved.append(mean)
    assert torch.allclose(*moved, atol=0.02) and (moved[0] > 0.03).all()
    for steps in (1, 4):
        args = parse('fixmatch', '--calibratemix', '--calmix-preset', 'steered', '--grad-accum-steps', steps)
        sets = SimpleNamespace(labeled=range(4), unlabeled=range(40), labeled_to_unlabeled=None)
        calmix = train_ssl.build_calmix(args, sets, K, SimpleNamespace(num_processes=1, process_index=0))
        assert calmix.weight_rate * steps == pytest.approx(0.1)


def test_marginmatch_has_no_wrong_images_in_its_last_tenth_also_where_a_resume_moved_that(monkeypatch):
    method, _ = build('marginmatch', '--epochs', 1, '--train-steps-per-epoch', 100, images=400)
    logits, index = torch.randn(8, K + 1), torch.arange(8)
    method(logits, index, 50)
    method.redraw(method.first)
    assert (method.slot >= 0).any()
    before = method.slot.clone()
    method.wrong_apm.count.fill_(1)
    method.redraw(method.first)  # at the next batch of the same update
    assert torch.equal(method.slot, before) and (method.wrong_apm.count == 1).all()
    method.redraw(method.last + 3)
    assert (method.slot < 0).all()


def test_marginmatch_keeps_margins_of_one_scale_and_judges_alike_before_and_after_the_logits_are_scaled():
    args = parse('marginmatch', '--epochs', 1, '--train-steps-per-epoch', 100, '--threshold', 0.1)
    plain, scaled = (methods.MarginMatch(400, K, args) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    known = 3 * torch.randn(400, K + 1, generator=generator)
    for update in range(60):
        index = torch.randperm(400, generator=generator)[:200]
        logits = known[index] + 0.1 * torch.randn(200, K + 1, generator=generator)
        scaled.mask_scale = 1.5 if update >= 30 else 1.
        weight = plain(logits, index, update), scaled(logits * scaled.mask_scale, index, update)
        assert torch.equal(*((value > 0) & ~plain.is_wrong(index) for value in weight))
    assert torch.allclose(plain.apm.value, scaled.apm.value, atol=1e-5) and 0 < (weight[0] > 0).float().mean() < 1
    assert torch.allclose(plain.wrong_apm.value, scaled.wrong_apm.value, atol=1e-5)


def test_defixmatch_is_unbiased_over_all_splits_of_a_small_set():
    """The mean over all splits of six images into two labeled and four unlabeled is the labeled loss of all six."""
    method, args = build('defixmatch', '--threshold', 0.5)
    model = Linear(torch.randn(3 * SIDE ** 2, K, generator=torch.Generator().manual_seed(0)))
    images = torch.randn(6, 2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    label, losses = torch.tensor([0, 1, 2, 3, 0, 1]), []

    def loss(labeled, unlabeled):
        x, u = images[labeled], images[unlabeled]
        return train_ssl.semi_supervised_step(
            model, dict(image=x[:, 0], strong=x[:, 1], target=label[labeled], index=torch.tensor(labeled)),
            dict(weak=u[:, 0], strong=u[:, 1], target=label[unlabeled], index=torch.tensor(unlabeled)),
            method, None, 0, Accelerator(cpu=True), args,
        )

    for pair in itertools.combinations(range(6), 2):
        losses.append(loss([*pair], [i for i in range(6) if i not in pair]))
    everything = loss([*range(6)], [*range(6)])
    assert everything['mask_rate'] > 0 and everything['loss_unlabeled'].item() == pytest.approx(0, abs=1e-6)
    assert any(abs(terms['loss_unlabeled']) > 0.1 for terms in losses)
    mean = sum(terms['loss'].item() for terms in losses) / len(losses)
    assert mean == pytest.approx(everything['loss_labeled'].item(), rel=1e-5)


@pytest.mark.parametrize('name', OWN)
def test_own_losses_are_finite_for_one_image_one_class_and_equal_images_and_tell_of_nan(name):
    for classes, scale in ((K, 1.), (K, 0.), (1, 1.)):
        method, args = build(name, '--epochs', 1, '--train-steps-per-epoch', 4, classes=classes)
        model = Linear(scale * torch.randn(3 * SIDE ** 2, classes + method.further_outputs))
        for number, value in ((1, 0.), (3, 0.), (3, math.nan)):
            labeled, unlabeled = only_views(method, *random_batches(0))
            labeled, unlabeled = ({key: v[:number].clone() for key, v in part.items()} for part in (labeled, unlabeled))
            labeled['target'].zero_()
            unlabeled['weak'][0] += value
            terms = train_ssl.semi_supervised_step(
                model, labeled, unlabeled, method, None, 3, Accelerator(cpu=True), args,
                average=model if method.takes_average else None,
            )
            terms['loss'].backward()
            assert model.weight.grad.isfinite().all() == (not value) or name == 'defixmatch'
            assert terms['loss'].isfinite() == (not value) or name == 'defixmatch'
            assert finite_state(method)
            model.zero_grad()


@pytest.mark.parametrize('name', [name for name in methods.ALGORITHMS if name != 'supervised'])
def test_a_step_compiles_the_network_no_more_often_than_it_first_had_to(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    method, args = build(name, '--epochs', 1, '--train-steps-per-epoch', 9)
    network = Toy(methods.num_outputs(args, K))
    model, seen = torch.compile(network, backend='eager'), []
    for step in range(4):
        labeled, unlabeled = only_views(method, *random_batches(step))
        for batch in (labeled, unlabeled):
            for key in batch.keys() - {'target', 'index'}:
                batch[key] = torch.randn(len(batch[key]), 3, 8, 8)
        terms = train_ssl.semi_supervised_step(
            model, labeled, unlabeled, method, None, step, Accelerator(cpu=True), args,
            average=network if method.takes_average else None,
        )
        terms['loss'].backward()
        seen.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert 0 < seen[0] <= 4 and seen[1] == seen[3]


@pytest.mark.parametrize('name', [name for name in methods.ALGORITHMS if name != 'supervised'])
def test_every_method_runs_with_pil_views_in_bfloat16_with_accumulation_and_calibratemix(train, name):
    folder = train('run', '--algorithm', name, '--aug-device', 'pil', '--amp', '--grad-accum-steps', 2,
                   '--calibratemix', '--calmix-warmup-epochs', 0, '--epochs', 1, '--train-steps-per-epoch', 2,
                   '--val-split', 'test[:20]')
    state = checkpoint.read_checkpoint(folder / 'checkpoint-2.safetensors')
    assert all(value.isfinite().all() for value in state['model'].values())
    assert state['calmix']['aum.count'].sum() == 16 and state['calmix']['apm.count'].sum() == 32


@pytest.mark.parametrize('flags, told', [
    (('meanteacher', '--no-model-ema'), '--no-model-ema: meanteacher needs the averaged network'),
    (('mixmatch', '--logit-margin-penalty', 1), '--logit-margin-penalty: mixmatch trains on mixed images'),
    (('remixmatch', '--weak-forward', 'no-grad'), '--weak-forward no-grad: with remixmatch there is no pass'),
    (('pi_model', '--logit-adjustment', 1), '--logit-adjustment: pi_model has no plain pseudo-labeled loss'),
    (('vat', '--vat-eps', -1), '--vat-eps -1.0: expected 0 or more'),
    (('fixmatch', '--calibratemix', '-b', 1, '--mu', 1), 'with -b 1 --mu 1 a batch never has an easy and a hard image'),
    (('uda', '--temperature', 0), '--temperature 0.0: expected a number above 0'),
])
def test_what_a_method_cannot_take_is_refused_in_a_line(flags, told, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*flags)
    assert ended.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize('flags, idle', [
    (('fixmatch',), ''),
    (('fixmatch', '--calmix-warmup-epochs', 2, '--save-margins', '--calmix-bank-dtype', 'float16'), ''),
    (('fixmatch', '--calibratemix', '--calmix-preset', 'steered', '--calmix-mask-scale', 2, '--threshold', 0.8), ''),
    (('fixmatch', '--calmix-preset', 'steered', '--calmix-topk', 0),
     '--calmix-preset steered (without --calibratemix), --calmix-topk 0.0 (without --calibratemix)'),
    (('softmatch', '--threshold', 0.8, '--vat-eps', 6), '--threshold 0.8 (with softmatch)'),  # 6 is the default
    (('pi_model', '--calibratemix', '--calmix-preset', 'steered'), ''),
    (('pi_model', '--calibratemix', '--calmix-mask-scale', 2), '--calmix-mask-scale 2.0 (with pi_model)'),
    (('supervised', '--temperature', 1), '--temperature 1.0 (with supervised)'),
    (('fixmatch', '--calibratemix', '--calmix-preset', 'ours', '--calmix-similarity', 'dot', '--calmix-split', 'bank'),
     '--calmix-similarity dot (as pairs are drawn at random or without ranking, --calmix-preset ours)'),
    (('fixmatch', '--calibratemix', '--calmix-preset', 'ours', '--calmix-similarity', 'dot', '--calmix-topk', 0.1), ''),
    (('fixmatch', '--calibratemix', '--calmix-pairing', 'random', '--calmix-topk', 0.1),
     '--calmix-topk 0.1 (as pairs are drawn at random or without ranking, --calmix-preset paper)'),
    (('fixmatch', '--min-lr', 0.02, '--clip-mode', 'agc', '--amp-dtype', 'float16', '--torchcompile-mode', 'foo'),
     '--min-lr 0.02 (with --sched cosine-7-16), --clip-mode agc (without --clip-grad), --amp-dtype float16 (without '
     '--amp), --torchcompile-mode foo (without --torchcompile)'),
    (('fixmatch', '--sched', 'cosine', '--min-lr', 0.02, '--clip-mode', 'agc', '--clip-grad', 1, '--amp', '--amp-dtype',
      'float16', '--warmup-lr', 0.1, '--warmup-epochs', 1, '--logit-margin-penalty', 1, '--logit-margin', 2), ''),
    (('fixmatch', '--sched', 'step', '--opt', 'adamw', '--momentum', 0.5, '--no-model-ema', '--model-ema-decay', 0.9,
      '--min-lr', 0.1),
     '--min-lr 0.1 (with --sched step), --momentum 0.5 (with --opt adamw), --model-ema-decay 0.9 (with '
     '--no-model-ema)'),
    (('fixmatch', '--no-resume-opt', '--wandb-tags', 'a', 'b', '--val-seed', 1),
     '--val-seed 1 (without --val-fraction), --no-resume-opt (without --resume), --wandb-tags a b (without '
     '--log-wandb)'),
])
def test_what_is_given_and_a_run_does_not_look_at_is_told_in_a_line(flags, idle):
    assert methods.tell_idle(parse(*flags)) == (f'Without effect in this run: {idle}' if idle else '')


def test_a_preset_without_calibratemix_is_told_at_the_start_of_a_run(train, caplog):
    train('run', '--calmix-preset', 'steered', '--epochs', 1, '--train-steps-per-epoch', 1)
    told, = [line for line in caplog.messages if 'Without effect' in line]
    assert told == 'Without effect in this run: --calmix-preset steered (without --calibratemix)'


def test_remixmatch_refuses_a_head_that_cannot_take_its_turns_and_saves_none_of_them(train):
    with pytest.raises(UsageError, match='the turns of remixmatch need a head that is one linear layer'):
        train('none', '--algorithm', 'remixmatch', '--model', 'levit_128s', '--img-size', 224)
    folder = train('run', '--algorithm', 'remixmatch', '--epochs', 1, '--train-steps-per-epoch', 1)
    state = checkpoint.read_checkpoint(folder / 'checkpoint-1.safetensors')['model']
    assert len(state['fc.weight']) == 14
    saved = load_file(folder / 'last/model.safetensors')
    assert len(saved['fc.weight']) == 10
