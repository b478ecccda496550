"""The training script: its losses, its data flow, its files, and its answers to mistakes."""
import copy
import csv
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import ROOT, TINY, run_script
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from timm.layers.evo_norm import EvoNorm2dB0
from torch import nn

import backbone
import checkpoint
import data
import methods
import passes
import schedule
import sources
import train_ssl
from calibratemix import CalibrateMix
from program import RunError, UsageError
from schedule import SevenSixteenthsCosine
from views import build_views

CALMIX = ('--calibratemix', '--calmix-warmup-epochs', '1')


def weights(folder: Path, which: str = 'last') -> dict[str, torch.Tensor]:
    return load_file(folder / which / 'model.safetensors')


def summary(folder: Path) -> list[dict[str, str]]:
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def run_on(processes: int, train, output: Path, experiment: str, *flags) -> Path:
    """A run in this process, or on several real ones."""
    if processes == 1:
        return train(experiment, *flags, output=output)
    flags = (*TINY, *flags, '--output', output, '--experiment', experiment)
    result = run_script('train_ssl.py', *flags, processes=processes)
    assert result.returncode == 0 and f'on each of {processes} processes' in result.stderr, result.stderr
    return output / experiment


def assert_same_run(a: Path, b: Path) -> None:
    """The very same weights, bank, table of results and labels."""
    for name in ('summary.csv', 'labels.json', 'last/model.safetensors', 'best/model.safetensors', 'last/metrics.json'):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    states = [checkpoint.read_checkpoint(checkpoint.list_checkpoints(folder)[0]) for folder in (a, b)]
    tensors = [{}, {}]
    for state, found in zip(states, tensors):
        del state['args']
        checkpoint.pack(state, found)
    assert tensors[0].keys() == tensors[1].keys() and len(tensors[0]) > 10
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name


def rewind(folder: Path, to: Path, num_updates: int) -> Path:
    """A copy of a run that kept every checkpoint, as a kill after `num_updates` would have left it."""
    shutil.copytree(folder, to)
    for path in checkpoint.list_checkpoints(to):
        if int(path.stem.split('-')[1]) > num_updates:
            path.unlink()
    return to


class Toy(nn.Module):
    """Features and logits, as FeaturesAndLogits returns them, with batch-norm so that statistics matter."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                                  nn.Flatten())
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        features = self.body(x)
        return features, 4 * self.fc(features)


def toy_batches(labeled: int = 6, unlabeled: int = 12, num_classes: int = 4) -> tuple[dict, dict]:
    return (
        dict(image=torch.randn(labeled, 3, 8, 8), target=torch.randint(num_classes, (labeled,)),
             index=torch.arange(labeled)),
        dict(weak=torch.randn(unlabeled, 3, 8, 8), strong=torch.randn(unlabeled, 3, 8, 8),
             target=torch.randint(num_classes, (unlabeled,)), index=torch.arange(unlabeled)),
    )


def step_args(**changes) -> Namespace:
    args = train_ssl._parse_args([])
    vars(args).update(changes)
    return args


def take_step(model, labeled, unlabeled, args, calmix=None, num_updates=0) -> dict[str, torch.Tensor]:
    method = methods.ALGORITHMS[args.algorithm](len(unlabeled['index']), 4, args)
    accelerator = Accelerator(cpu=True)
    return train_ssl.semi_supervised_step(
        model, labeled, unlabeled, method, calmix, num_updates, accelerator, args,
    )


# --- The step ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('weak_forward', ['joint', 'no-grad'])
def test_fixmatch_losses_equal_a_plain_recomputation(weak_forward):
    torch.manual_seed(0)
    model, (labeled, unlabeled) = Toy().train(), toy_batches()
    if weak_forward == 'joint':
        logits = model(torch.cat([labeled['image'], unlabeled['weak'], unlabeled['strong']]))[1]
        z, z_weak, z_strong = logits[:6], logits[6:18], logits[18:]
    else:
        z_weak = model(unlabeled['weak'])[1]
        logits = model(torch.cat([labeled['image'], unlabeled['strong']]))[1]
        z, z_strong = logits[:6], logits[6:]
    threshold = z_weak.softmax(1).amax(1).median().item()
    args = step_args(threshold=threshold, weak_forward=weak_forward, lambda_u=2.0)
    terms = take_step(model, labeled, unlabeled, args)

    total, counted = 0., 0
    for weak, strong in zip(z_weak, z_strong):
        probs = weak.softmax(0)
        if probs.max() >= threshold:
            total += -strong.log_softmax(0)[probs.argmax()].item()
            counted += 1
    assert 0 < counted < 12  # both kinds are there, and those below the threshold still count in the mean
    assert terms['loss_unlabeled'].item() == pytest.approx(total / 12, rel=1e-5)
    supervised = F.cross_entropy(z, labeled['target']).item()
    assert terms['loss'].item() == pytest.approx(supervised + 2 * total / 12, rel=1e-5)
    assert terms['mask_rate'].item() == pytest.approx(counted / 12)


def test_images_below_the_threshold_add_nothing_but_count_in_the_mean():
    """Confidences 0.99 and 0.60 with strong losses 0.8 and 5.0: (0.8 + 0) / 2 = 0.4."""
    class Fixed(nn.Module):
        def forward(self, x):
            weak = torch.tensor([[0.99, 0.01], [0.60, 0.40]]).log()
            strong = torch.tensor([[-0.8, math.log(1 - math.exp(-0.8))], [-5.0, math.log(1 - math.exp(-5.0))]])
            return torch.zeros(5, 3), torch.cat([torch.zeros(1, 2), weak, strong]).requires_grad_()

    labeled, unlabeled = toy_batches(1, 2, 2)
    terms = take_step(Fixed(), labeled, unlabeled, step_args())
    assert terms['loss_unlabeled'].item() == pytest.approx(0.4, rel=1e-5)


def test_a_step_without_any_confident_image_has_zero_loss_and_finite_gradients():
    torch.manual_seed(0)
    model, (labeled, unlabeled) = Toy(), toy_batches()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    terms = take_step(model, labeled, unlabeled, step_args())
    terms['loss'].backward()
    assert terms['loss_unlabeled'] == 0 and terms['mask_rate'] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradients_flow_from_labeled_strong_and_mixed_images_and_not_from_weak_ones():
    torch.manual_seed(0)
    model, (labeled, unlabeled) = Toy().eval(), toy_batches()  # eval: no coupling through batch statistics
    for batch, names in ((labeled, ['image']), (unlabeled, ['weak', 'strong'])):
        for name in names:
            batch[name].requires_grad_()
    args = step_args(threshold=0.0)
    take_step(model, labeled, unlabeled, args)['loss'].backward()
    assert labeled['image'].grad.abs().sum() > 0 and unlabeled['strong'].grad.abs().sum() > 0
    assert unlabeled['weak'].grad is None or unlabeled['weak'].grad.abs().sum() == 0

    grads = []
    for weight in (0.0, 1.0):
        calmix = CalibrateMix(6, 12, 4, warmup_steps=0, topk=1e-9, weight=weight)
        model.zero_grad()
        terms = take_step(model, labeled, unlabeled, args, calmix)
        terms['loss'].backward()
        grads.append(model.fc.weight.grad.clone())
    assert terms['loss_mixup'] > 0 and not torch.allclose(*grads)


def test_preset_authors_code_is_their_two_pass_loop_at_twice_the_learning_rate_and_half_the_decay():
    """Their objective, written out: base losses on one pass, the same again beside the mixed images on another."""
    torch.manual_seed(0)
    ours, (labeled, unlabeled) = Toy().eval(), toy_batches()  # eval: no coupling through batch statistics
    theirs = copy.deepcopy(ours)
    calmix, args = CalibrateMix(6, 12, 4, 'authors-code', warmup_steps=0), step_args(threshold=0.4)
    mix, seen = calmix.mix, []
    calmix.mix = lambda *arguments: seen.append(mix(*arguments)) or seen[-1]
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=decay)
                  for model, lr, decay in ((ours, 0.06, 0.05), (theirs, 0.03, 0.1))]

    def base(model):
        z, z_weak, z_strong = (model(x)[1] for x in (labeled['image'], unlabeled['weak'], unlabeled['strong']))
        confidence, pseudo_label = z_weak.detach().softmax(1).max(1)
        counted = F.cross_entropy(z_strong, pseudo_label, reduction='none') * (confidence >= 0.4)
        return F.cross_entropy(z, labeled['target']) + counted.mean(), pseudo_label

    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        take_step(ours, labeled, unlabeled, args, calmix, step)['loss'].backward()
        (first, pseudo_label), (second, _), mixup = base(theirs), base(theirs), 0.
        for easy in (True, False):
            group = []
            for i in (seen[-1].easy == easy).nonzero().squeeze(1).tolist():
                j, share = seen[-1].partner[i], seen[-1].gamma[i]
                image = share * labeled['image'][i] + (1 - share) * unlabeled['weak'][j]
                probs = theirs(image[None])[1][0].sigmoid()
                parts = [-(probs[k].log() + (1 - probs).log().sum() - (1 - probs[k]).log()) / 4
                         for k in (labeled['target'][i], pseudo_label[j])]
                group.append(share * parts[0] + (1 - share) * parts[1])
            mixup += sum(group) / len(group)
        (first + second + mixup).backward()
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(2 * p.grad, q.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert len(seen) == 3 and all(mixed.paired.all() for mixed in seen)


def test_joint_forward_moves_the_statistics_as_one_pass_over_the_concatenation():
    torch.manual_seed(0)
    model, (labeled, unlabeled) = Toy().train(), toy_batches()
    joined = torch.cat([labeled['image'], unlabeled['weak'], unlabeled['strong']])
    take_step(model, labeled, unlabeled, step_args())
    x = model.body[0](joined)
    assert torch.allclose(model.body[1].running_mean, 0.1 * x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(model.body[1].running_var, 0.9 + 0.1 * x.var((0, 2, 3)), atol=1e-5)
    assert model.body[1].num_batches_tracked == 1


@pytest.mark.parametrize('norm', [
    nn.BatchNorm2d(1), nn.BatchNorm2d(1, momentum=None), BatchNormAct2d(1), EvoNorm2dB0(1),
    nn.InstanceNorm2d(1, track_running_stats=True),
], ids=['plain', 'cumulative', 'with-activation', 'evonorm', 'instance'])
def test_norms_after_passes_with_still_statistics_are_as_without_them_also_where_one_overflowed_or_failed(norm):
    alone, seen = copy.deepcopy(norm).train(), norm.train()
    for batch in torch.randn(3, 4, 1, 5, 5) + torch.arange(3).view(-1, 1, 1, 1, 1):
        alone(batch)
        seen(batch)
        with passes.still_statistics(seen):
            seen(batch + 9)
            if isinstance(norm, nn.BatchNorm2d):
                seen(batch / 0)
        with pytest.raises((ValueError, AssertionError)), passes.still_statistics(seen):
            seen(batch[0, 0])
    assert all(torch.equal(*both) for both in zip(alone.buffers(), seen.buffers()))
    assert not torch.equal(alone.running_var, torch.ones(1))


def test_gradient_checkpointing_moves_no_statistics_of_a_pass_that_is_to_move_none():
    model = timm.create_model('resnet10t', num_classes=4).train()
    model.set_grad_checkpointing()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if 'running' in name}
    for still in (True, False):
        with passes.still_statistics(model) if still else nullcontext():
            loss = model(torch.randn(4, 3, 32, 32)).sum()
        loss.backward()
        assert still == all(torch.equal(before[name], model.get_buffer(name)) for name in before)
    assert model.grad_checkpointing


def test_mixed_images_train_the_network_and_move_its_running_statistics_only_if_asked():
    gradients, statistics = [], []
    for options in ({}, dict(mixed_statistics=False), dict(mixed_statistics=True), None):
        torch.manual_seed(0)
        model, (labeled, unlabeled) = Toy().train(), toy_batches()
        calmix = None if options is None else CalibrateMix(9, 99, 4, warmup_steps=0, **options)
        take_step(model, labeled, unlabeled, step_args(), calmix)['loss'].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        statistics.append(torch.cat([model.body[1].running_mean, model.body[1].running_var]))
        assert model.body[1].track_running_stats
    assert torch.equal(statistics[0], statistics[3]) and torch.equal(statistics[1], statistics[3])
    assert not torch.allclose(statistics[2], statistics[3], rtol=1e-3)
    assert torch.equal(gradients[0], gradients[2]) and not torch.allclose(gradients[0], gradients[3], rtol=1e-3)


def test_the_mixed_images_are_the_only_second_pass():
    """960 images for the base method, 64 more with CalibrateMix (B 64, mu 7)."""
    torch.manual_seed(0)
    seen = []
    model, (labeled, unlabeled) = Toy(), toy_batches(64, 448)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    calmix = CalibrateMix(64, 448, 4, warmup_steps=1)
    for step in (0, 1):
        take_step(model, labeled, unlabeled, step_args(), calmix, step)
    assert seen == [960, 960, 64]


def test_pseudo_label_accuracy_counts_known_labels_only():
    monitor = train_ssl.Monitor(Accelerator(cpu=True))
    terms = dict.fromkeys(train_ssl.Monitor.TERMS, torch.tensor(0.))
    monitor.add(dict(terms, pseudo_label_right=torch.tensor(0.25), pseudo_label_known=torch.tensor(0.5)), 0)
    assert monitor.read()['pseudo_label_accuracy'] == pytest.approx(0.5)
    monitor.reset()
    monitor.add(terms, 1)
    assert math.isnan(monitor.read()['pseudo_label_accuracy'])


# --- Models -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('model, size', [
    ('test_resnet', 32), ('resnet10t', 32), ('test_vit', 32), ('test_efficientnet', 32), ('mobilenetv3_small_050', 32),
    ('test_convnext', 32), ('wide_resnet16_2', 16),
])
def test_any_backbone_trains_with_calibratemix(train, model, size):
    folder = train('run', '--model', model, '--img-size', size, '--epochs', 1, '--train-steps-per-epoch', 2,
                   '--calibratemix', '--calmix-warmup-epochs', '0')
    reloaded = timm.create_model(f'local-dir:{folder / "last"}', pretrained=True)
    assert reloaded.num_classes == 10
    assert float(summary(folder)[0]['train_loss_mixup']) > 0


def test_a_head_that_drops_out_behind_its_features_is_refused(train):
    with pytest.raises(UsageError, match='--drop 0.5: lcnetv2_base drops out behind'):
        train('run', '--model', 'lcnetv2_base', '--img-size', 32, '--drop', 0.5)


def test_features_and_logits_are_the_models_own():
    model = timm.create_model('wide_resnet10_1', drop_rate=0.0).eval()
    x = torch.randn(3, 3, 32, 32)
    features, logits = backbone.FeaturesAndLogits(model)(x)
    assert torch.equal(logits, model(x))
    assert torch.equal(features, model.forward_head(model.forward_features(x), pre_logits=True))


def test_averaged_weights_follow_batch_norm_and_copy_integer_counters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    ema = train_ssl.build_ema(model, step_args(model_ema_decay=0.9))
    for step in range(1, 201):
        model(5 + torch.randn(8, 3, 4, 4))
        ema.update(model, step=step)
    student, average = model[1], ema.module[1]
    assert torch.allclose(average.running_mean, student.running_mean, rtol=0.05)
    assert average.num_batches_tracked == student.num_batches_tracked == 200
    assert average.num_batches_tracked.dtype == torch.int64


# --- Schedule ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('processes, accumulation', [(1, 1), (1, 2), (2, 1)])
def test_the_seven_sixteenths_cosine_steps_once_an_update(train, tmp_path, processes, accumulation):
    flags = ('--algorithm', 'supervised', '--lr', 0.03, '--epochs', 2, '--train-steps-per-epoch', 50, '-b', 2,
             '--grad-accum-steps', accumulation)
    rates = [float(row['lr']) for row in summary(run_on(processes, train, tmp_path, 'run', *flags))]
    assert rates == pytest.approx([0.023190, 0.005853], abs=1e-6)


def test_the_optimizer_is_fused_only_on_request_does_the_same_then_and_is_refused_where_float16_skips_updates():
    models = [copy.deepcopy(model) for model in [Toy()] * 2]
    asked = train_ssl._parse_args(['--opt-kwargs', 'fused=True'])
    optimizers = [schedule.build_optimizer(*both) for both in zip(models, (step_args(), asked))]
    assert [[(group['fused'], group['foreach']) for group in optimizer.param_groups] for optimizer in optimizers] == [
        [(None, None)] * 2, [(True, None)] * 2]
    x = torch.randn(6, 3, 8, 8)
    for _ in range(3):
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            model(x)[1].square().mean().backward()
            optimizer.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(*(model.parameters() for model in models)))
    asked.amp, asked.amp_dtype = True, 'float16'
    with pytest.raises(UsageError, match='--opt sgd --opt-kwargs fused=True: with --amp-dtype float16 .* bfloat16'):
        schedule.build_optimizer(models[0], asked)


def test_a_warmup_of_the_learning_rate_is_linear():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = SevenSixteenthsCosine(optimizer, length=100, warmup=10, warmup_lr=0.1)
    seen = []
    for step in range(11):
        scheduler.step_update(step)
        seen.append(optimizer.param_groups[0]['lr'])
    assert seen[:10] == pytest.approx([0.1 + 0.09 * t for t in range(10)])
    assert seen[10] == pytest.approx(math.cos(7 * math.pi / 160))


@pytest.mark.parametrize('decay', [0.5, 0])
def test_the_learning_rate_that_is_told_is_the_schedule_s_also_where_layers_have_shares_of_it(decay, train, caplog):
    flags = ('--lr', 0.04, '--sched', 'constant', '--epochs', 1, '--opt-kwargs', f'layer_decay={decay}')
    with caplog.at_level('INFO', 'train'):
        folder = train('run', *flags)
    assert [float(row['lr']) for row in summary(folder)] == [0.04] and 'lr 0.04 ' in caplog.text
    state = checkpoint.read_checkpoint(folder / 'checkpoint-4.safetensors')['optimizer']
    assert state['param_groups'][0]['lr'] < 0.04


def test_a_schedule_by_epochs_moves_at_their_ends_only(train):
    folder = train('run', '--no-sched-on-updates', '--sched', 'cosine', '--epochs', 4, '--lr', 1)
    rates = [float(row['lr']) for row in summary(folder)]
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * t / 4)) for t in (1, 2, 3, 4)])


def test_a_compiled_network_trains_like_the_plain_one(train):
    flags = (*CALMIX, '--train-steps-per-epoch', 2)
    plain, compiled = train('plain', *flags), train('compiled', *flags, '--torchcompile', 'aot_eager')
    assert all(torch.allclose(weights(plain)[k], weights(compiled)[k], atol=1e-4) for k in weights(plain))


@pytest.mark.parametrize('flags', [('--amp',), ('--channels-last',), ('--clip-grad', 1), ('--weak-forward', 'no-grad')])
def test_precision_layout_clipping_and_the_cheaper_forward_train_and_export(train, flags):
    folder = train('run', *CALMIX, *flags)
    assert math.isfinite(float(summary(folder)[-1]['train_loss_mixup']))
    assert timm.create_model(f'local-dir:{folder / "last"}', pretrained=True).num_classes == 10
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights(folder).values())


@pytest.mark.parametrize('split', ['train', 'test+train', 'train+test', 'train[:50%]+train[50%:]'])
def test_labeled_images_are_excluded_or_known_wherever_the_unlabeled_set_has_them(split, caplog):
    args = train_ssl._parse_args(['--dataset', 'digits', '--unlabeled-split', split, '--num-labels', '20'])
    opened = train_ssl.open_sources(args)
    config = data.DataConfig((3, 8, 8), (0.,) * 3, (1.,) * 3, 'bilinear', 1.)
    known = train_ssl.build_datasets(args, opened, 10, config)
    args.exclude_labeled = True
    excluded = train_ssl.build_datasets(args, opened, 10, config)

    def pictures(source, index):
        return [source.image(i).tobytes() for i in index.tolist()]
    labeled = pictures(opened.train, known.labels.index)
    assert pictures(opened.unlabeled, known.labeled_to_unlabeled) == labeled
    assert len(excluded.unlabeled) == len(known.unlabeled) - 20 and excluded.labeled_to_unlabeled is None
    assert not {*labeled} & {*pictures(opened.unlabeled, excluded.unlabeled.index)}
    assert 'no labeled image' not in caplog.text
    assert ('500 of the 500 images to evaluate (test) are in the unlabeled set' in caplog.text) == ('test' in split)
    args.unlabeled_split = 'test'
    disjoint = train_ssl.build_datasets(args, train_ssl.open_sources(args), 10, config)
    assert len(disjoint.unlabeled) == 500 and 'no labeled image is known to be in split test' in caplog.text


@pytest.mark.parametrize('name', ['efficientnet_b0', 'densenet121'])
def test_synchronised_batch_norm_keeps_the_activations_that_timm_puts_into_its_norms(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for module in model.modules():  # statistics under which an activation matters
        if hasattr(module, 'running_var'):
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(x)
        assert torch.allclose(train_ssl.convert_sync_batchnorm(model).eval()(x), plain, atol=1e-5)


def test_accelerates_environment_does_not_scale_the_loss(train, monkeypatch):
    plain = weights(train('plain', '--grad-accum-steps', 2))
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '2')
    again = weights(train('again', '--grad-accum-steps', 2))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_every_image_labeled_and_excluded_leaves_nothing_unlabeled(train):
    with pytest.raises(UsageError, match='no unlabeled image is left'):
        train('run', '--exclude-labeled', without='--num-labels')


def test_tensorboard_receives_every_evaluation(train):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = train('run', '--log-tensorboard')
    events = EventAccumulator(str(next(folder.rglob('events.out*')).parent))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars('eval_ece')]
    expected = [(int(row['num_updates']), pytest.approx(float(row['eval_ece']), rel=1e-5)) for row in summary(folder)]
    assert found == expected


# --- Evaluation -------------------------------------------------------------------------------------------------------

def test_evaluation_leaves_mode_statistics_and_random_state_alone(train):
    accelerator = Accelerator(cpu=True)
    model = timm.create_model('wide_resnet10_1').train()
    model.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    source = sources.create_source('digits', None, 'test')
    view = build_views(8, (0.5,) * 3)['eval']
    config = data.DataConfig((3, 8, 8), (0.5,) * 3, (0.5,) * 3, 'bilinear', 1.0)
    dataset = data.ViewDataset(source, {'image': view}, torch.arange(9))
    feed = data.Feed(data.create_loader(dataset, data.evaluation_batches(9, 2)), config, accelerator.device, False)
    assert train_ssl.validate(model, feed, accelerator, 10, 2).compute()['count'] == 9
    assert torch.equal(random_state, torch.get_rng_state())
    assert model.training and not model.layer1.training and model.layer2.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


COUNTING = '''
import sys
import timm, torch
sys.path.insert(0, {root!r})
import data, program, sources, train_ssl, views
args = train_ssl._parse_args(['--device', 'cpu'])
accelerator = program.setup_accelerator(args.device)
torch.manual_seed(0)
model = timm.create_model('wide_resnet10_1')
view = views.build_views(8, (0.5,) * 3)['eval']
config = data.DataConfig((3, 8, 8), (0.5,) * 3, (0.5,) * 3, 'bilinear', 1.0)
results = []
for number, batch_size in ((9, 2), (3, 4), (1, 1)):
    source = sources.create_source('digits', None, 'test')
    dataset = data.ViewDataset(source, {{'image': view}}, torch.arange(number))
    batches = data.evaluation_batches(number, batch_size, accelerator.process_index, accelerator.num_processes)
    feed = data.Feed(data.create_loader(dataset, batches), config, accelerator.device, False)
    results.append(train_ssl.validate(model, feed, accelerator, 10, batch_size).compute())
if accelerator.is_main_process:
    import json
    print(json.dumps([accelerator.num_processes, results]), flush=True)
accelerator.end_training()
'''


def test_every_process_count_counts_each_image_once_with_the_same_metrics(tmp_path):
    script = tmp_path / 'count.py'
    script.write_text(COUNTING.format(root=str(ROOT)))
    seen = {}
    for processes in (1, 2, 3):
        result = run_script(script, processes=processes)
        assert result.returncode == 0, result.stderr
        world, seen[processes] = json.loads(result.stdout.strip().splitlines()[-1])
        assert world == processes
    assert [metrics['count'] for metrics in seen[1]] == [9, 3, 1]
    for processes in (2, 3):
        for one, many in zip(seen[1], seen[processes]):
            assert many == pytest.approx(one, abs=1e-6)


# --- Whole runs -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def shipped(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The main job as a user runs it, from another folder."""
    output = tmp_path_factory.mktemp('shipped')
    result = run_script('train_ssl.py', *TINY, *CALMIX, '--output', output, '--experiment', 'run', cwd=output)
    assert result.returncode == 0, result.stderr
    return output / 'run', result


def test_the_main_job_leaves_every_promised_file_and_a_result_line(shipped):
    folder, result = shipped
    for name in ('args.yaml', 'labels.json', 'summary.csv', 'checkpoint-8.safetensors', 'best/metrics.json',
                 'last/metrics.json', 'best/model.safetensors', 'best/config.json', 'last/config.json'):
        assert (folder / name).is_file(), name
    before, result_json = result.stdout.split('--result\n')
    assert before == ''
    assert json.loads(result_json)['count'] == 500
    assert not list(folder.rglob('*part*'))


def test_the_summary_has_one_row_per_epoch_with_the_same_columns(shipped):
    rows = summary(shipped[0])
    assert [row['epoch'] for row in rows] == ['0', '1'] and [row['num_updates'] for row in rows] == ['4', '8']
    assert tuple(rows[0]) == checkpoint.SUMMARY_COLUMNS
    assert [row.pop('eval_tail_error') for row in rows] == ['', '']  # balanced labels have no rarest classes
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert float(rows[0]['train_loss_mixup']) == 0 and float(rows[1]['train_loss_mixup']) > 0


def test_timm_loads_the_saved_weights_and_gets_the_runs_own_metrics(shipped):
    folder = shipped[0]
    model = timm.create_model(f'local-dir:{folder / "last"}', pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model)
    assert config['input_size'] == (3, 8, 8) and config['crop_pct'] == 1.0
    transform = timm.data.create_transform(**config)
    source = sources.create_source('digits', None, 'test')
    with torch.no_grad():
        logits = model(torch.stack([transform(source.image(i)) for i in range(len(source))]))
    metrics = json.loads((folder / 'last/metrics.json').read_text())
    assert 100 * (logits.argmax(1) != source.targets).float().mean() == pytest.approx(metrics['error'], abs=1e-4)
    assert F.cross_entropy(logits, source.targets).item() == pytest.approx(metrics['nll'], abs=1e-5)


def test_the_labels_are_balanced_and_recorded(shipped):
    labels = json.loads((shipped[0] / 'labels.json').read_text())
    assert labels['num_labels'] == len(labels['index']) == 20
    assert torch.bincount(torch.tensor(labels['target'])).tolist() == [2] * 10
    targets = sources.create_source('digits', None, 'train').targets
    assert targets[labels['index']].tolist() == labels['target']


def test_args_yaml_replays_the_run_to_identical_weights(shipped, train, tmp_path):
    replay = train('replay', '--config', shipped[0] / 'args.yaml')
    assert_same_run(shipped[0], replay)
    assert yaml.safe_load((replay / 'args.yaml').read_text())['calibratemix'] is True


def test_accelerate_launch_runs_the_script_to_the_same_weights(shipped, tmp_path):
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '1']
    flags = [*TINY, *CALMIX, '--output', tmp_path, '--experiment', 'run']
    command = [*launch, *map(str, [ROOT / 'train_ssl.py', *flags])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert_same_run(shipped[0], tmp_path / 'run')


def test_the_same_seed_gives_identical_weights_after_20_steps_and_another_seed_does_not(train):
    flags = (*CALMIX, '--train-steps-per-epoch', 10)
    a, b, c = train('a', *flags), train('b', *flags, '--workers', 2), train('c', *flags, '--seed', 1)
    assert_same_run(a, b)
    assert not torch.equal(weights(a)['fc.weight'], weights(c)['fc.weight'])
    assert (a / 'labels.json').read_text() != (c / 'labels.json').read_text()


def test_a_labels_file_gives_the_same_labeled_set_under_another_seed(train, shipped):
    folder = train('run', '--seed', 5, '--labels-file', shipped[0] / 'labels.json', '--num-labels', 20)
    index = [json.loads((f / 'labels.json').read_text())['index'] for f in (folder, shipped[0])]
    assert index[0] == index[1]


def test_a_second_evaluation_set_is_measured_beside_the_first(train):
    folder = train('run', '--extra-val', 'digits', '--epochs', 1)
    metrics = json.loads((folder / 'last/metrics.json').read_text())
    assert metrics['extra_val'].pop('source') == 'digits'
    assert metrics['extra_val'] == {key: metrics[key] for key in metrics['extra_val']} and 'ece' in metrics['extra_val']


def test_labels_are_drawn_by_class_or_by_share_too(train):
    drawn = {}
    for flag, value in (('--labels-per-class', '3'), ('--label-fraction', '0.05')):
        flags = (flag, value, '--epochs', 1, '--train-steps-per-epoch', 1)
        labels = json.loads((train(flag.strip('-'), *flags, without='--num-labels') / 'labels.json').read_text())
        drawn[flag] = torch.bincount(torch.tensor(labels['target'])).tolist()
    assert drawn['--labels-per-class'] == [3] * 10
    counts = torch.bincount(sources.create_source('digits', None, 'train').targets).tolist()
    assert drawn['--label-fraction'] == [math.floor(0.05 * n + 0.5) for n in counts]


def test_supervised_training_sees_no_unlabeled_image(train):
    folder = train('run', '--algorithm', 'supervised')
    assert float(summary(folder)[-1]['train_loss_unlabeled']) == 0
    assert summary(folder)[-1]['train_pseudo_label_accuracy'] == 'nan'


def test_accumulated_small_batches_equal_one_large_batch(train):
    """Without batch-norm; gradients of means over halves average to the gradient of the whole's mean."""
    flags = ('--model', 'test_vit', '--img-size', 32, '--train-steps-per-epoch', 2, '--weak-forward', 'joint')
    large, small = train('large', *flags, '-b', 8), train('small', *flags, '-b', 4, '--grad-accum-steps', 2)
    for name, tensor in weights(large).items():
        assert torch.allclose(tensor, weights(small)[name], atol=1e-5), name


# --- Resume -----------------------------------------------------------------------------------------------------------

EVERY_UPDATE = ('--recovery-interval', 1, '--checkpoint-hist', 99)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp('uninterrupted')
    result = run_script('train_ssl.py', *TINY, *CALMIX, *EVERY_UPDATE, '--output', output, '--experiment', 'run')
    assert result.returncode == 0, result.stderr
    return output / 'run'


@pytest.mark.parametrize('num_updates, workers', [(1, 0), (3, 2), (4, 0), (6, 2), (8, 0)])
def test_a_killed_and_resumed_run_ends_bit_identical(train, uninterrupted, tmp_path, num_updates, workers):
    """Within an epoch, before, at and after the end of warmup (update 4), and at the end."""
    folder = rewind(uninterrupted, tmp_path / 'run', num_updates)
    train('run', *CALMIX, *EVERY_UPDATE, '--resume', 'auto', '--workers', workers)
    assert_same_run(uninterrupted, folder)


def test_a_run_resumed_on_two_processes_ends_bit_identical_to_one_on_two(tmp_path):
    flags = (*TINY, *CALMIX, *EVERY_UPDATE, '--output', tmp_path, '--experiment')
    result = run_script('train_ssl.py', *flags, 'straight', processes=2)
    assert result.returncode == 0 and 'on each of 2 processes' in result.stderr, result.stderr
    rewind(tmp_path / 'straight', tmp_path / 'resumed', 6)
    result = run_script('train_ssl.py', *flags, 'resumed', '--resume', 'auto', processes=2)
    assert result.returncode == 0 and 'at update 6' in result.stderr, result.stderr
    assert_same_run(tmp_path / 'straight', tmp_path / 'resumed')


def test_resume_refuses_other_labels_other_data_and_broken_files(train, uninterrupted, tmp_path):
    newest = checkpoint.list_checkpoints(uninterrupted)[0]
    with pytest.raises(UsageError, match='other labeled images'):
        train('a', *CALMIX, '--resume', newest, '--label-seed', 7)
    with pytest.raises(UsageError, match='--model wide_resnet10_1 -> wide_resnet16_2'):
        train('b', *CALMIX, '--resume', newest, '--model', 'wide_resnet16_2')
    broken = {'truncated': newest.read_bytes()[:5000], 'empty': b'', 'foreign': b'not a checkpoint' * 99}
    for name, content in broken.items():
        path = tmp_path / f'{name}.safetensors'
        path.write_bytes(content)
        with pytest.raises(UsageError, match='no intact checkpoint'):
            train('c', *CALMIX, '--resume', path)
    with pytest.raises(UsageError, match='no intact checkpoint'):
        train('c', *CALMIX, '--resume', tmp_path / 'absent.safetensors')


def test_a_checkpoint_of_another_version_of_the_script_is_told_as_such(train, uninterrupted, monkeypatch):
    newest = checkpoint.list_checkpoints(uninterrupted)[0]
    monkeypatch.setattr(checkpoint, 'CHECKPOINT_FORMAT', 99)
    with pytest.raises(UsageError, match=r'another version of this script made the checkpoint, of format \d .* 99'):
        train('run', *CALMIX, '--resume', newest)


def test_a_resume_that_is_refused_or_finds_the_run_finished_leaves_its_arguments_as_they_are(
        train, uninterrupted, tmp_path,
):
    folder = shutil.copytree(uninterrupted, tmp_path / 'run')
    before = (folder / 'args.yaml').read_bytes()
    with pytest.raises(UsageError, match='--model wide_resnet10_1 -> wide_resnet16_2'):
        train('run', *CALMIX, '--resume', 'auto', '--model', 'wide_resnet16_2')
    train('run', *CALMIX, '--resume', 'auto', '--lr', 7)
    assert (folder / 'args.yaml').read_bytes() == before


def test_going_back_leaves_the_abandoned_checkpoints_behind_for_good(train, uninterrupted, tmp_path):
    """From update 2 on with another learning rate: neither does --resume auto return, nor are new ones pruned."""
    folder = shutil.copytree(uninterrupted, tmp_path / 'run')
    back = folder / 'checkpoint-2.safetensors'
    flags = ('--calibratemix', '--calmix-warmup-epochs', 0.5, '--lr', 0.01, '--recovery-interval', 1)
    train('run', *flags, '--resume', back, '--epochs', 1, '--checkpoint-hist', 2)
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == [
        'checkpoint-4.safetensors', 'checkpoint-3.safetensors']
    assert {path.name for path in folder.glob('abandoned-*')} == {f'abandoned-{n}.safetensors' for n in range(3, 9)}
    assert checkpoint.read_checkpoint(checkpoint.newest_intact(folder))['args']['lr'] == 0.01


def test_changed_settings_of_the_optimizer_hold_after_a_resume(train, uninterrupted, tmp_path):
    folder = rewind(uninterrupted, tmp_path / 'run', 4)
    train('run', *CALMIX, '--resume', 'auto', '--weight-decay', 0.5, '--momentum', 0.8, '--opt-kwargs', 'fused=True')
    state = checkpoint.read_checkpoint(checkpoint.list_checkpoints(folder)[0])
    groups = state['optimizer']['param_groups']
    assert sorted(group['weight_decay'] for group in groups) == [0, 0.5]
    assert {(group['momentum'], group['fused']) for group in groups} == {(0.8, True)}
    train('run', *CALMIX, '--resume', 'auto', '--epochs', 3, '--train-steps-per-epoch', 3)
    state = checkpoint.read_checkpoint(checkpoint.list_checkpoints(folder)[0])
    assert {group['fused'] for group in state['optimizer']['param_groups']} == {None}


def test_the_optimizer_may_be_another_one_after_a_resume_without_its_state(train, uninterrupted, tmp_path, caplog):
    folder = rewind(uninterrupted, tmp_path / 'run', 4)
    with pytest.raises(UsageError, match='other arguments: --opt sgd -> adamw'):
        train('run', *CALMIX, '--resume', 'auto', '--opt', 'adamw')
    flags = (*CALMIX, '--resume', 'auto', '--lr', 0.001, '--opt', 'adamw')
    train('run', *flags, '--no-resume-opt')
    assert 'Resuming with changed arguments: ' in caplog.text and '--opt sgd -> adamw' in caplog.text
    state = checkpoint.read_checkpoint(folder / 'checkpoint-8.safetensors')['optimizer']['state']
    assert all(values['step'] == 4 for values in state.values())
    train('run', *flags, '--epochs', 3)
    state = checkpoint.read_checkpoint(folder / 'checkpoint-12.safetensors')['optimizer']['state']
    assert all(values['step'] == 8 for values in state.values())


def test_best_starts_anew_where_a_resume_changes_its_metric_and_changed_presets_are_told(
        train, uninterrupted, tmp_path, caplog, monkeypatch,
):
    """A best top1 is above every NLL, and would never be reached by one."""
    def read_older(path, read=checkpoint.read_checkpoint):
        state = read(path)
        del state['args']['calmix_mixed_statistics']
        return state

    monkeypatch.setattr(train_ssl, 'read_checkpoint', read_older)
    folder = rewind(uninterrupted, tmp_path / 'run', 4)
    train('run', *CALMIX, '--resume', 'auto', '--eval-metric', 'nll')
    told, = [line for line in caplog.messages if 'with changed arguments' in line]
    assert '--calmix-mixed-statistics True -> None' in told and '--calmix-weight 1.0 -> None' in told
    told, = [line for line in caplog.messages if 'best starts anew' in line]
    assert told.startswith('--eval-metric top1 -> nll: ')
    best = json.loads((folder / 'best' / 'metrics.json').read_text())
    assert best['num_updates'] == 8 and best['best_chosen_by'].startswith('nll on ')
    assert checkpoint.read_checkpoint(checkpoint.list_checkpoints(folder)[0])['best_metric'] == best['nll']


def test_a_resume_with_more_epochs_tells_what_becomes_of_learning_rate_and_warmup(
        train, uninterrupted, tmp_path, caplog):
    """After 4 of 8 updates; the preset's warmup is 102,400 of 2^20 updates, 1 of 8 and 6 of 64."""
    train('run', '--calibratemix', '--epochs', 2)
    rewind(tmp_path / 'run', tmp_path / 'longer', 4)
    caplog.clear()
    train('longer', '--calibratemix', '--resume', 'auto', '--epochs', 16, '--val-interval', 16)
    first, last = (0.03 * math.cos(7 * math.pi * 4 / (16 * updates)) for updates in (8, 64))
    assert (f'With the changed arguments move, at update 4: the learning rate from {first:.4g} to {last:.4g}; the end '
            'of CalibrateMix\'s warmup from update 1 to 6, so that mixing stops until then') in caplog.messages
    caplog.clear()
    rewind(uninterrupted, tmp_path / 'same', 6)
    train('same', *CALMIX, '--resume', 'auto')
    assert not [line for line in caplog.messages if 'arguments move' in line]


@pytest.mark.parametrize('method, told', [
    ('dash', 'the end of Dash\'s warmup from 1 to 16; the updates between two falls of its threshold from 1 to 80'),
    ('marginmatch', 'the start of MarginMatch\'s threshold from 1 to 625; the updates between two of its draws from 1 '
                    'to 391; the end of its draws from 7 to 7373'),
])
def test_a_resume_with_more_epochs_tells_what_moves_in_the_method_s_own_schedule(
        train, tmp_path, caplog, monkeypatch, method, told):
    """8 and 8,192 updates, of which the published numbers, of 2^20, are 1 in 131,072 and in 128."""
    def enough(*_):
        raise InterruptedError

    folder = train('run', '--algorithm', method)
    rewind(folder, tmp_path / 'longer', 4)
    monkeypatch.setattr(train_ssl, 'train_one_epoch', enough)
    with pytest.raises(InterruptedError):
        train('longer', '--algorithm', method, '--resume', 'auto', '--epochs', 2048)
    line, = [line for line in caplog.messages if 'With the changed arguments move' in line]
    assert line.endswith(f'; {told}')


def test_a_run_resumed_into_another_folder_has_a_best_of_its_own(train, uninterrupted, tmp_path):
    folder = train('other', *CALMIX, '--resume', uninterrupted / 'checkpoint-4.safetensors')
    assert (folder / 'best' / 'model.safetensors').is_file()
    with pytest.raises(UsageError, match='checkpoint-8.safetensors: it is at the end of its 2 epochs; raise --epochs'):
        train('third', *CALMIX, '--resume', uninterrupted / 'checkpoint-8.safetensors')


def test_a_finished_run_gives_the_result_of_the_run_that_finished(train, tmp_path, monkeypatch):
    results, main = [], train_ssl.main
    monkeypatch.setattr(train_ssl, 'main', lambda args: results.append(main(args)))
    for _ in range(2):
        train('run', '--resume', 'auto')
    assert results[0] == results[1] and 'ece' in results[0]


def test_resume_auto_passes_over_a_broken_newest_checkpoint(train, uninterrupted, tmp_path):
    folder = rewind(uninterrupted, tmp_path / 'run', 6)
    newest = checkpoint.list_checkpoints(folder)[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    train('run', *CALMIX, *EVERY_UPDATE, '--resume', 'auto')
    assert_same_run(uninterrupted, folder)


# --- Two processes ----------------------------------------------------------------------------------------------------

def test_two_processes_draw_the_same_labels_and_fill_the_same_bank_as_one(train, tmp_path):
    """Frozen weights, no batch-norm: each image's margins then do not depend on its batch."""
    flags = (*CALMIX, '--model', 'test_vit', '--img-size', 32, '--lr', 0, '--calmix-weight-rate', 0.1,
             '--head-init-scale', 30,  # surer than it is right, so that the weight rises
             '--train-split', 'train[:60]')  # few images, so that some are visited twice and move the weight
    folders = [run_on(n, train, tmp_path, f'on{n}', *flags, '-b', 8 // n) for n in (1, 2)]
    assert (folders[0] / 'labels.json').read_bytes() == (folders[1] / 'labels.json').read_bytes()
    one, two = (checkpoint.read_checkpoint(checkpoint.list_checkpoints(folder)[0])['calmix'] for folder in folders)
    assert one['apm.count'].sum() == 8 * 16 and one['aum.count'].sum() == 8 * 8
    assert (one['last_label'] != 10).sum() == 60 and 0 < one['weight'] < 1
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), atol=1e-5), name


def test_two_processes_train_to_the_weights_of_one_on_the_joined_batch(train, tmp_path):
    flags = ('--model', 'test_vit', '--img-size', 32, '--threshold', 0.1)
    folders = [run_on(n, train, tmp_path, f'on{n}', *flags, '-b', 8 // n) for n in (1, 2)]
    one, two = map(weights, folders)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    rows = [summary(folder)[-1] for folder in folders]
    assert float(rows[0]['train_loss_unlabeled']) > 0
    for name in ('train_loss', 'train_loss_unlabeled', 'train_mask_rate', 'train_pseudo_label_accuracy', 'eval_nll'):
        assert float(rows[0][name]) == pytest.approx(float(rows[1][name]), abs=1e-4), name


def test_a_bank_in_shards_gives_the_same_run_margins_and_checkpoint_as_a_whole_one(train, tmp_path):
    flags = (*CALMIX, '--save-margins', '--calmix-weight-rate', 0.1, '--head-init-scale', 10)
    whole = run_on(2, train, tmp_path, 'whole', *flags)
    shards = run_on(2, train, tmp_path, 'shards', *flags, '--calmix-bank-shards')
    assert_same_run(whole, shards)
    assert (whole / 'margins.parquet').read_bytes() == (shards / 'margins.parquet').read_bytes()
    first = rewind(shards, tmp_path / 'again', 4)
    run_on(2, train, tmp_path, 'again', *flags, '--calmix-bank-shards', '--resume', 'auto')
    assert_same_run(first, shards)


# --- Faults and mistakes ----------------------------------------------------------------------------------------------

def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_over_good_weights(train, tmp_path):
    folder = train('run', '--epochs', 1)
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and path.name != 'args.yaml'}
    with pytest.raises(RunError, match=r'not finite at update \d+ on process 0 \(loss_labeled .*--lr'):
        train('run', '--epochs', 2, '--lr', '1e30', '--resume', 'auto')
    assert before == {path: path.read_bytes() for path in before}


def test_an_overflow_in_the_last_update_before_an_evaluation_stops_the_run_in_one_line(train, tmp_path):
    """The loss of that update is finite still, and the evaluation is the first to see its weights."""
    with pytest.raises(RunError, match='^the loss is not finite: .* in an evaluation; nothing was saved .*--lr'):
        train('run', '--lr', '1e38', '--epochs', 1, '--train-steps-per-epoch', 1)
    assert not list((tmp_path / 'run').glob('checkpoint-*')) and not (tmp_path / 'run' / 'last').exists()


def test_no_checkpoint_is_written_of_weights_after_a_loss_that_is_not_finite(train, tmp_path):
    with pytest.raises(RunError, match='not finite'):
        train('run', '--lr', '1e30', '--log-interval', 99, *EVERY_UPDATE)
    for path in checkpoint.list_checkpoints(tmp_path / 'run'):
        model = checkpoint.read_checkpoint(path)['model']
        assert all(tensor.isfinite().all() for tensor in model.values())


def test_an_update_that_float16_skipped_moves_neither_schedule_nor_average_and_is_counted(train, monkeypatch):
    """The third update overflows: nine steps are taken for the eight updates."""
    steps, averages = [], []
    step, average = AcceleratedOptimizer.step, timm.utils.ModelEmaV3.update

    def skipping(self, closure=None):
        steps.append(self)
        self._is_overflow = len(steps) == 3
        if not self._is_overflow:
            step(self, closure)

    def counting(self, model, step=None):
        averages.append(step)
        average(self, model, step)

    monkeypatch.setattr(AcceleratedOptimizer, 'step', skipping)
    monkeypatch.setattr(timm.utils.ModelEmaV3, 'update', counting)
    rows = summary(train('run', *CALMIX))
    assert len(steps) == 9 and averages == list(range(1, 9))
    assert [row['num_updates'] for row in rows] == ['4', '8']
    assert [row['train_skipped_updates'] for row in rows] == ['1', '1']
    assert float(rows[-1]['lr']) == pytest.approx(0.005853, abs=1e-6)


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(tmp_path):
    result = run_script('train_ssl.py', '--dataset', 'digits', '--model', 'resnet500', '--output', tmp_path)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith('train_ssl.py: error: --model resnet500: timm has no such')
    assert 'Traceback' not in result.stderr and result.stdout == ''


def test_a_mistake_on_two_processes_is_told_once_and_both_exit_with_2(tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
               str(ROOT / 'train_ssl.py'), *TINY, '--val-split', 'dev', '--output', str(tmp_path)]
    environment = dict(os.environ, ACCELERATE_USE_CPU='true')
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert result.stderr.count('train_ssl.py: error: digits: no split dev') == 1
    assert 'exitcode  : 2 ' in result.stderr and 'SIGABRT' not in result.stderr


def test_a_full_disk_stops_a_run_in_one_line_and_leaves_no_half_written_file(tmp_path):
    """Files may grow to 250 kB, which the weights exceed."""
    command = [sys.executable, ROOT / 'train_ssl.py', *TINY, '--output', tmp_path, '--experiment', 'run']
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000)),
    )
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert 'cannot be written' in result.stderr.strip().splitlines()[-1]
    assert not list((tmp_path / 'run').glob('*.part'))


def test_a_corrupt_image_stops_a_run_with_its_name_and_exit_code_1(tmp_path):
    folder = digits_folder(tmp_path / 'images', broken=True)
    flags = (*TINY, '--dataset', folder, '--img-size', 8, '--num-labels', 4, '--output', tmp_path, '--experiment')
    result = run_script('train_ssl.py', *flags, 'run', '--workers', 2)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert 'cannot be decoded' in last and 'broken.png' in last and 'Traceback' not in result.stderr
    result = run_script('train_ssl.py', *flags, 'skipping', '--skip-bad-images')
    assert result.returncode == 0, result.stderr
    assert summary(tmp_path / 'skipping')[-1]['train_skipped_images'] == '1'


def test_each_skipped_image_is_told_once_by_name_and_a_class_that_loses_all_is_an_error(train, tmp_path, caplog):
    """Of the eight labeled pictures of class 1, which are unlabeled ones too, seven are broken, and then all."""
    folder = digits_folder(tmp_path / 'images')
    paths = sorted((folder / 'train' / '1').glob('*.png'))
    for path in paths[:7]:
        path.write_bytes(path.name.encode())
    flags = ('--dataset', folder, '--img-size', 8, '--num-labels', 16, '--skip-bad-images')
    run = train('run', *flags)
    train('run', *flags, '--epochs', 3, '--resume', 'auto')
    told = [line for line in caplog.messages if line.startswith('--skip-bad-images')]
    names = [line.split(': ')[1].removesuffix(' cannot be decoded, and is stepped over') for line in told]
    assert sorted(name for name in names if not name.endswith('in all cannot be decoded')) == [*map(str, paths[:7])]
    assert told[-1] == '--skip-bad-images: 7 images in all cannot be decoded'
    assert [row['train_skipped_images'] for row in summary(run)] == ['7'] * 3
    paths[7].write_bytes(b'')
    with pytest.raises(RunError, match='class 1 has none left of its 8 labeled images, .*png and 3 more. Mend them'):
        train('lost', *flags)


def test_skipped_images_are_those_of_all_processes_and_of_before_a_resume(tmp_path):
    """Every second evaluation image is broken, and both processes meet two; of training one, in the first epoch."""
    folder = digits_folder(tmp_path / 'images', broken=True)
    for path in (folder / 'test').glob('*/*.png'):
        if int(path.stem) % 2:
            path.write_bytes(b'')
    broken = sum(not path.stat().st_size for path in (folder / 'test').glob('*/*.png'))
    assert 2 < broken < 14
    flags = (*TINY, '--dataset', folder, '--img-size', 8, '--num-labels', 4, '--skip-bad-images', '--output', tmp_path,
             '--experiment', 'run')
    result = run_script('train_ssl.py', *flags, '-vb', 4, processes=2)
    assert result.returncode == 0 and 'on each of 2 processes' in result.stderr, result.stderr
    assert [row['train_skipped_images'] for row in summary(tmp_path / 'run')] == [str(broken + 1)] * 2
    state = checkpoint.read_checkpoint(checkpoint.list_checkpoints(tmp_path / 'run')[0])
    assert [len(skipped) for skipped in state['skipped_images']] in ([0, 1], [1, 1])
    before = (tmp_path / 'run' / 'summary.csv').read_bytes()
    checkpoint.list_checkpoints(tmp_path / 'run')[0].unlink()
    result = run_script('train_ssl.py', *flags, '-vb', 4, '--resume', 'auto', processes=2)
    assert result.returncode == 0 and 'at update 4' in result.stderr, result.stderr
    assert (tmp_path / 'run' / 'summary.csv').read_bytes() == before


def digits_folder(root: Path, broken: bool = False) -> Path:
    """A few digits of two classes as an image folder."""
    for split in ('train', 'test'):
        source = sources.create_source('digits', None, split)
        for label in (0, 1):
            (root / split / str(label)).mkdir(parents=True)
            for i in (source.targets == label).nonzero().squeeze(1)[:8].tolist():
                source.image(i).save(root / split / str(label) / f'{i}.png')
    if broken:
        whole = next((root / 'train/1').glob('*.png'))
        (whole.parent / 'broken.png').write_bytes(whole.read_bytes()[:60])
    return root


@pytest.mark.parametrize('flags, message', [
    (('--dataset', 'cifar11'), 'neither a known data set nor'),
    (('--train-split', 'training'), 'no split training; it has test, train'),
    (('--val-split', 'dev'), 'no split dev'),
    (('--num-labels', '9'), 'at least one for each of the 10 classes'),
    (('--num-labels', '1290'), 'asks for 129 images of class 0'),
    (('--num-classes', '4'), 'labels up to 9'),
    (('--in-chans', '2'), 'expected 1 or 3'),
    (('--initial-checkpoint', 'absent.pth'), 'absent.pth'),
    (('--pretrained',), 'No pretrained weights exist'),
    (('--calibratemix', '--calmix-topk', '7'), r'--calmix-topk: expected a number in \[0, 1\], got 7'),
    (('--calibratemix', '--calmix-gamma', '2'), '--calmix-gamma: expected a number in'),
    (('--mean', '0.1', '0.2'), 'expected 3 numbers or one'),
    (('--val-split', 'test[:0%]'), 'no image in it'),
    (('--opt', 'adamw', '--opt-betas', '0.9'), '--opt adamw: '),
    (('--opt-eps', '0.1'), '--opt-eps: sgd has no eps'),
    (('--interpolation', 'nearest-exact'), '--interpolation nearest-exact: expected one of nearest, bilinear, '),
    (('--opt-kwargs', 'foo=1'), "--opt sgd: .* unexpected keyword argument 'foo'"),
    (('--opt-kwargs', 'fused=True', 'foreach=True'), '--opt sgd: `fused` and `foreach` cannot be'),
    (('--grad-checkpointing', '--model', 'vgg11', '--img-size', '32'), '--grad-checkpointing: vgg11 does not support'),
    (('--sync-bn',), '--sync-bn: needs GPUs'),
    (('--amp', '--amp-dtype', 'float16'), '--amp-dtype float16: not available on the device cpu'),
])
def test_a_mistake_is_told_by_what_it_is(train, flags, message):
    with pytest.raises(UsageError, match=message):
        train('run', *flags)


@pytest.mark.parametrize('flags, message', [
    (('--calibratemix', '--calmix-warmup-epochs', '2', '--epochs', '2'), 'CalibrateMix would never run'),
    (('--calibratemix', '--algorithm', 'supervised'), 'needs pseudo-labels'),
    (('--opt', 'sdg'), '--opt sdg: unknown'),
    (('--opt', 'lookahead_sdg'), '--opt lookahead_sdg: unknown'),
    (('--epochs', '0'), '--epochs 0: expected 1 or more'),
    (('-vb', '0'), '--validation-batch-size 0: expected 1 or more'),
    (('--torchcompile', 'nosuch'), '--torchcompile nosuch: unknown; there are '),
    (('--resume', 'auto'), '--resume auto: the default run folder is named by the time'),
    (('--threshold', '1.5'), '--threshold 1.5: expected a number in'),
    (('--momentum', '-1'), '--momentum -1.0: expected a number in [0, 1)'),
    (('--momentum', '1'), '--momentum 1.0: expected a number in [0, 1)'),
    (('--opt-betas', '0.9', '2'), '--opt-betas 2.0: expected a number in [0, 1)'),
    (('--opt-eps', '-1'), '--opt-eps -1.0: expected 0 or more'),
    (('--clip-grad', '-1'), '--clip-grad -1.0: expected a number above 0'),
    (('--clip-grad', 'nan'), '--clip-grad nan: expected a number above 0'),
    (('--min-lr', '-1'), '--min-lr -1.0: expected 0 or more'),
    (('--warmup-lr', '-1'), '--warmup-lr -1.0: expected 0 or more'),
    (('--label-seed', '-1'), '--label-seed -1: expected 0 or more'),
    (('--label-smoothing', '1'), '--label-smoothing 1.0: expected a number in [0, 1)'),
    (('--max-pixels', '0'), '--max-pixels 0: expected 1 or more'),
    (('--bn-momentum', '2'), '--bn-momentum 2.0: expected a number in [0, 1]'),
    (('--head-init-scale', '-1'), '--head-init-scale -1.0: expected 0 or more'),
    (('--drop-path', '2'), '--drop-path 2.0: expected a number in [0, 1)'),
    (('--mean', '127', '127', '127', '--std', '50', '50', '50'), '--mean 127.0: expected a number in [0, 1]'),
    (('--std', '0', '0', '0'), '--std 0.0: expected a number above 0'),
    (('--std', '-1', '1', '1'), '--std -1.0: expected a number in [0, 1]'),
    (('--img-size', '0'), '--img-size 0: expected 1 or more'),
    (('--model-kwargs', 'a=1', 'foo'), '--model-kwargs foo: expected K=V'),
    (('--opt-kwargs', 'foo'), '--opt-kwargs foo: expected K=V'),
    (('--calmix-pair', 'random'), '--calmix-pair: there is no such flag; did you mean --calmix-pairing?'),
])
def test_a_wrong_argument_exits_with_2_and_says_which(capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        train_ssl._parse_args(list(flags))
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('content, message', [
    ('epoch: 3', 'unknown epoch'),
    ('epochs: three', 'invalid int value'),
    ('calibratemix: 1', 'must be true or false'),
    ('algorithm: fixmach', 'invalid choice'),
    ('[1, 2]', 'expected a mapping'),
    ('a: [', '--config'),
])
def test_a_config_file_is_checked_like_the_command_line(tmp_path, capsys, content, message):
    path = tmp_path / 'config.yaml'
    path.write_text(content)
    with pytest.raises(SystemExit) as error:
        train_ssl._parse_args(['--config', str(path)])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_the_command_line_wins_over_the_config_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / 'config.yaml'
    path.write_text('epochs: 5\nlr: 0.1\nmodel_ema: false\nopt_betas: [0.8, 0.9]\nmodel_kwargs: {act_layer: relu}\n')
    args = train_ssl._parse_args(['--config', str(path), '--epochs', '6'])
    assert (args.epochs, args.lr, args.model_ema, args.opt_betas) == (6, 0.1, False, [0.8, 0.9])
    assert args.model_kwargs == {'act_layer': 'relu'}


def test_averages_that_were_fitted_to_a_runs_length_are_fitted_anew_to_another_one(tmp_path):
    path, keys = tmp_path / 'args.yaml', ('stat_momentum', 'bn_momentum', 'model_ema_warmup')
    short = train_ssl._parse_args(['--algorithm', 'softmatch', '--epochs', '2', '--train-steps-per-epoch', '4'])
    short.bn_momentum = 0.1  # as fit_batch_norm sets it when the network is built
    path.write_text(yaml.safe_dump(vars(short)))

    def replayed(*given):
        args = train_ssl._parse_args(['--config', str(path), *given])
        return tuple(getattr(args, key) for key in keys)

    assert replayed() == (0.9, 0.1, True)
    assert replayed('--epochs', '1024', '--train-steps-per-epoch', '1024') == (0.999, None, False)
    path.write_text(yaml.safe_dump(dict(vars(short), stat_momentum=0.5, bn_momentum=0.02)))
    assert replayed('--epochs', '1024', '--train-steps-per-epoch', '1024')[:2] == (0.5, 0.02)


@pytest.mark.parametrize('flags, message', [
    (('--warmup-epochs', '5', '--epochs', '5'), '--warmup-epochs 5: expected less than --epochs 5'),
    (('--sched', 'step', '--epochs', '20'), '--decay-epochs 90: --sched step would not lower the learning rate'),
])
def test_a_schedule_that_cannot_act_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        train_ssl._parse_args(flags)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_steps_of_the_learning_rate_are_where_and_as_large_as_timm_s_flags_say():
    args = train_ssl._parse_args(['--sched', 'step', '--epochs', '10', '--train-steps-per-epoch', '3', '--decay-epochs',
                                  '4', '--decay-rate', '0.5', '--lr', '0.8'])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    scheduler, found = schedule.build_scheduler(args, optimizer), []
    for update in range(30):
        schedule.step_scheduler(scheduler, update, args)
        found.append(optimizer.param_groups[0]['lr'])
    assert found == pytest.approx([0.8] * 12 + [0.4] * 12 + [0.2] * 6)


def test_adaptive_clipping_leaves_the_classifier_as_timm_s_train_script_does():
    torch.manual_seed(0)
    model = timm.create_model('wide_resnet10_1', num_classes=4)
    for mode, same in (('agc', {'fc.weight', 'fc.bias'}), ('norm', set())):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        schedule.clip_gradients(model, step_args(clip_grad=0.01, clip_mode=mode))
        kept = {name for name, parameter in model.named_parameters() if (parameter.grad == 1).all()}
        assert kept == same


def test_optimizers_whose_state_holds_tuples_resume_and_such_of_second_order_are_refused(train):
    few = ('--train-steps-per-epoch', 3, '--lr', 0.001)
    with pytest.raises(UsageError, match='--opt adahessian: needs second derivatives'):
        train('a', *few, '--opt', 'adahessian')
    train('k', *few, '--opt', 'kron', '--epochs', 1)
    whole, resumed = train('w', *few, '--opt', 'kron'), train('k', *few, '--opt', 'kron', '--resume', 'auto')
    assert json.loads((resumed / 'last' / 'metrics.json').read_text())['num_updates'] == 6
    assert json.loads((whole / 'last' / 'metrics.json').read_text())['num_updates'] == 6
    train('f', *few, '--opt', 'adafactorbv', '--epochs', 1)
    train('f', *few, '--opt', 'adafactorbv', '--resume', 'auto')
    state = dict(a=(torch.ones(1), [1, (2,)]), kind=torch.bfloat16)
    found = {}
    assert checkpoint.unpack(json.loads(json.dumps(checkpoint.pack(state, found))), found) == state


def test_an_optimizer_with_lookahead_resumes_bit_identical_with_its_slow_weights(train, tmp_path):
    """Which move with every sixth update."""
    flags = ('--opt', 'lookahead_adamw', '--lr', 0.001, '--epochs', 3, *EVERY_UPDATE)
    whole = train('whole', *flags)
    folder = rewind(whole, tmp_path / 'resumed', 7)
    state = checkpoint.read_checkpoint(folder / 'checkpoint-7.safetensors')['optimizer']
    assert all('lookahead_slow_buff' in tensors for tensors in state['state'].values())
    train('resumed', *flags, '--resume', 'auto')
    assert_same_run(whole, folder)


def test_the_arguments_of_a_run_of_older_presets_run_it_again_and_a_file_written_by_hand_means_todays(tmp_path):
    path = tmp_path / 'args.yaml'

    def replayed(*flags, preset='paper', drop=('calmix_mixed_statistics',), given=()):
        entries = vars(train_ssl._parse_args(['--calibratemix', '--calmix-preset', preset, *flags]))
        path.write_text(yaml.safe_dump({k: v for k, v in entries.items() if k not in drop}))
        args = train_ssl._parse_args(['--config', str(path), *given])
        return args.calmix_mixed_statistics, args.calmix_weight, args.calmix_mask_scale

    assert replayed() == replayed(preset='ours') == (True, 1, None)
    assert replayed('--calmix-weight', '0.2') == (True, 0.2, None)
    assert replayed(given=('--calmix-weight', '0.2', '--no-calmix-mixed-statistics')) == (False, 0.2, None)
    assert replayed(preset='steered', drop=('calmix_mask_scale',)) == (None, None, 1)
    for other in (dict(preset='authors-code'), dict(drop=()), dict(given=('--calmix-preset', 'authors-code'))):
        assert replayed(**other) == (None, None, None)
    path.write_text('calibratemix: true\ncalmix_preset: ours\n')
    assert train_ssl._parse_args(['--config', str(path)]).calmix_mixed_statistics is None


def test_the_command_line_puts_out_what_the_config_file_says_of_the_same_choice(tmp_path):
    path = tmp_path / 'config.yaml'
    checkpoint.write_args(path, train_ssl._parse_args(['--num-labels', '40', '-b', '8']))
    asked = train_ssl._parse_args(['-c', str(path), '--global-batch-size', '64', '--labels-per-class', '3',
                                   '--algorithm', 'pseudo_label'])
    assert (asked.batch_size, asked.global_batch_size) == (None, 64)
    assert (asked.num_labels, asked.labels_per_class) == (None, 3)
    plain = train_ssl._parse_args(['--algorithm', 'pseudo_label'])
    lambda_asked, lambda_plain = (methods.lambda_u(1000, args) for args in (asked, plain))
    assert lambda_asked == lambda_plain < 0.01
    assert train_ssl._parse_args(['-c', str(path)]).batch_size == 8


def test_a_run_folder_is_never_overwritten_unasked(train):
    folder = train('run')
    before = (folder / 'summary.csv').read_bytes()
    with pytest.raises(UsageError, match='holds a run already'):
        train('run')
    assert (folder / 'summary.csv').read_bytes() == before


def test_a_checkpoint_of_elsewhere_does_not_go_on_in_the_folder_of_another_run(train, tmp_path):
    first, second = train('first'), train('second', '--seed', 1)
    before = {path: path.read_bytes() for path in second.rglob('*') if path.is_file()}
    checkpoint_4 = first / 'checkpoint-4.safetensors'
    with pytest.raises(UsageError, match='second holds a run already'):
        train('second', '--resume', checkpoint_4)
    assert {path: path.read_bytes() for path in second.rglob('*') if path.is_file()} == before
    (tmp_path / 'link').symlink_to(first)
    train('first', '--resume', tmp_path / 'link' / checkpoint_4.name)  # its own, by whatever path


def test_best_follows_the_metric_and_knows_which_metrics_fall(train):
    folder = train('run', '--eval-metric', 'nll', '--epochs', 4)
    values = [float(row['eval_nll']) for row in summary(folder)]
    assert len(set(values)) == 4
    best = json.loads((folder / 'best/metrics.json').read_text())
    assert best['nll'] == pytest.approx(min(values)) and best['epoch'] == values.index(min(values))


def test_photographs_of_unequal_size_train_from_a_folder(train, shared_data):
    folder = train('run', '--dataset', shared_data / 'ants_bees', '--num-labels', 4, '--img-size', 32, '--epochs', 1,
                   '--train-steps-per-epoch', 1)
    assert json.loads((folder / 'last/metrics.json').read_text())['count'] == 60


def test_real_cifar_trains_from_parquet(train, shared_data):
    folder = train('run', '--dataset', f'hfds/{shared_data / "cifar10"}', '--val-split', 'test[:50]',
                   '--num-labels', 40, '--epochs', 1, '--train-steps-per-epoch', 1)
    assert json.loads((folder / 'last/metrics.json').read_text())['count'] == 50
