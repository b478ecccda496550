"""The methods beyond the first seven: each step against a slow re-computation, edges, processes, resumes, learning."""
import json
import math
from types import SimpleNamespace

import pytest
import step_on_processes
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import run_script
from torch import nn

import checkpoint
import methods
import train_ssl

B, U, K, STEPS = 5, 12, 4, 50
WEIGHING = ('uda', 'adamatch', 'dash')  # they weigh pseudo-labels; the others compute losses of their own
NAMES = WEIGHING


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
        return torch.zeros(len(x), 2), self.logits


def random_logits(seed: int, columns: int = K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Confident and unsure rows of labeled, weak and strong images, and labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = B + 2 * U
    logits = 5 * torch.rand(rows, 1, generator=generator) * torch.randn(rows, columns, generator=generator)
    return logits, torch.randint(K, (B,), generator=generator), torch.randint(40, (U,), generator=generator)


def take_step(method, args, logits, target, index, num_updates) -> tuple[dict, torch.Tensor]:
    """Terms and the gradient of the logits of one step."""
    logits = logits.clone().requires_grad_()
    labeled = dict(image=torch.zeros(B, 1), target=target, index=torch.arange(B))
    unlabeled = dict(weak=torch.zeros(U, 1), strong=torch.zeros(U, 1), target=torch.zeros(U).long(), index=index)
    terms = train_ssl.semi_supervised_step(
        Given(logits), labeled, unlabeled, method, None, num_updates, Accelerator(cpu=True), args,
    )
    terms['loss'].backward()
    return terms, logits.grad


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


@pytest.mark.parametrize('name, plain, stride, flags', [
    ('uda', PlainUDA, 1, ()),
    ('adamatch', PlainAdaMatch, 1, ('--stat-momentum', 0.9)),
    ('dash', PlainDash, 1, ('--epochs', 20)),
    ('dash', PlainDash, 120, ('--epochs', 20)),
])
def test_fifty_steps_equal_the_paper_s_equations_row_by_row(name, plain, stride, flags):
    """Weights, targets, statistics, loss and gradient; in float64 and plain numbers on the other side."""
    (method, args), plain = build(name, *flags), plain()
    counted = 0
    for step in range(STEPS):
        num_updates = step if stride == 1 or step < 40 else 40 + (step - 40) * 10 * stride
        num_updates = num_updates + 30 if stride == 1 and name == 'dash' else num_updates
        logits, target, index = random_logits(step)
        exact = logits.double().requires_grad_()
        z, weak, strong = exact.split([B, U, U])
        weights, targets = plain.weigh(z.tolist(), target.tolist(), weak.tolist(), num_updates)
        labeled = -sum(z[b].log_softmax(0)[k] for b, k in enumerate(target.tolist())) / B
        unlabeled = -sum(
            w * q[k] * strong[u].log_softmax(0)[k] for u, (w, q) in enumerate(zip(weights, targets)) for k in range(K)
        ) / U
        (labeled + unlabeled).backward()
        terms, gradient = take_step(method, args, logits, target, index, num_updates)
        assert terms['mask_rate'].item() == pytest.approx(sum(weights) / U)
        assert terms['loss_unlabeled'].item() == pytest.approx(unlabeled.item(), abs=1e-5)
        assert terms['loss'].item() == pytest.approx((labeled + unlabeled).item(), abs=1e-5)
        assert torch.allclose(gradient.double(), exact.grad, atol=1e-5)
        found = method.target(weak.detach().float(), weak.argmax(1), index)
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


@pytest.mark.parametrize('name', NAMES)
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


@pytest.mark.parametrize('name', NAMES)
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
        assert not nan or weight[0] == 0 or methods.ALGORITHMS[name].own_losses
        weights.append(weight[nan:])
        states.append(method.state_dict())
    assert torch.equal(*weights) and finite_state(method)
    assert all(torch.allclose(states[0][key].float(), states[1][key].float()) for key in states[0])


@pytest.mark.parametrize('name', NAMES)
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


ON_PROCESSES = (
    'uda,--threshold,0.3', 'adamatch,--stat-momentum,0.5', 'dash,--temperature,0.9',
)


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Statistics, thresholds and weights, in one launch for all methods."""
    result = run_script('tests/step_on_processes.py', tmp_path / 'two', *ON_PROCESSES, processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    AcceleratorState._reset_state(reset_partial_state=True)
    step_on_processes.main(tmp_path / 'one', *ON_PROCESSES)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ('one', 'two'))
    fresh = step_on_processes.Linear(4).state_dict()
    for text in ON_PROCESSES:
        for key in one[text]:
            assert torch.allclose(one[text][key].float(), two[text][key].float(), atol=1e-5), (text, key)
            assert key.startswith('method.') or not torch.equal(one[text][key][:4], fresh[key][:4])


@pytest.mark.parametrize('name', [name for name in methods.ALGORITHMS])
def test_a_run_on_the_digits_learns(train, name):
    """More than 40 % right of ten classes after 200 updates from 60 labels."""
    folder = train('run', '--algorithm', name, '--num-labels', 60, '-b', 8, '--mu', 1, '--epochs', 1,
                   '--train-steps-per-epoch', 200, '--val-split', 'test[:200]')
    assert json.loads((folder / 'last/metrics.json').read_text())['error'] < 60
