"""Any timm model: every kind of head, sizes that do not fit, and the averages and models that are chosen by default."""
import copy
import logging
from argparse import Namespace

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from conftest import train_in_process
from images import noise
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import backbone
import checkpoint
import data
import schedule
import sources
import train_ssl
from program import UsageError

# Three families of each kind of head, cut down, at 64 px: a linear layer, a 1x1 convolution, two heads, several.
HEADS = {
    'resnet10t': {},
    'test_vit': {},
    'mobilenetv3_small_050': {},
    'cpubone_nano': {},  # its last layer is linear within a module of its own, behind batch-norm
    'resnetv2_50': dict(layers=(1, 1, 1, 1)),
    'dla46x_c': {},
    'dpn48b': dict(k_sec=(1, 1, 1, 1)),
    'deit_tiny_distilled_patch16_224': dict(depth=2),
    'levit_128s': dict(depth=(1, 1, 1)),
    'swiftformer_xs': dict(layers=(1, 1, 1, 1)),
    'crossvit_tiny_240': {},
    'efficientvim_m1': {},
    'sequencer2d_s': dict(layers=(1, 1, 1, 1)),
}
SIZE = dict(crossvit_tiny_240=120)  # its two scales of an image have to divide into patches
SPLIT = ('resnet10t', 'test_vit', 'mobilenetv3_small_050', 'cpubone_nano')


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    kwargs = dict(dict(HEADS.get(name, {}), num_classes=10), **kwargs)
    return timm.create_model(**timm.models.resolve_model_input_args(name, dict(img_size=SIZE.get(name, 64)), **kwargs))


def asked(*flags: str) -> Namespace:
    return train_ssl._parse_args([str(flag) for flag in flags])


# --- Heads ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', HEADS)
def test_gradient_and_weights_of_every_kind_of_head_are_those_of_timms_own_forward(name):
    own = create(name).train()
    ours = backbone.FeaturesAndLogits(copy.deepcopy(own)).train()
    assert ours.split == (name in SPLIT)
    size = SIZE.get(name, 64)
    backbone.check_head(own, asked('--model', name), (3, size, size))
    x, target = torch.rand(4, 3, size, size), torch.arange(4)
    for forward, model in ((own, own), (lambda x: ours(x)[1], ours.model)):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        F.cross_entropy(forward(x), target).backward()
        optimizer.step()
    gradients = dict(own.named_parameters())
    for parameter_name, parameter in ours.model.named_parameters():
        assert (parameter.grad is None) == (gradients[parameter_name].grad is None), parameter_name
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, gradients[parameter_name].grad), parameter_name
    for key, value in own.state_dict().items():  # weights, and statistics that moved once
        assert torch.equal(ours.model.state_dict()[key], value), key
    own.eval()
    features, logits = ours.eval()(x)
    assert features.ndim == 2 and logits.requires_grad and features.requires_grad == ours.split
    assert torch.equal(logits, own(x))
    assert torch.equal(features, own.forward_head(own.forward_features(x), pre_logits=True))


def test_a_head_that_is_a_convolution_takes_an_extra_class_and_leaves_without_it():
    model, x = create('dla46x_c', num_classes=11).eval(), torch.rand(2, 3, 64, 64)
    extra = asked('--algorithm', 'marginmatch')
    backbone.check_head(model, extra, (3, 64, 64))
    left = checkpoint.exportable(Namespace(eval_model=model, num_classes=10, identity=Namespace(class_names=None)))
    assert torch.equal(left(x), model(x)[:, :10])
    with pytest.raises(UsageError, match='an extra class .* one linear layer, and this one\'s is tuple'):
        backbone.check_head(create('levit_128s'), extra, (3, 64, 64))


class Tied(nn.Module):
    """One layer under two names, and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(2, 2)
        self.c = nn.Linear(2, 2)
        self.register_buffer('count', torch.tensor(0))
        self.num_classes = 2


def test_the_average_moves_tied_weights_once():
    model = Tied()
    average = backbone.Average(model, decay=0.9)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        model.count += 7
    average.update(model)
    for key in ('a.weight', 'b.weight', 'c.weight', 'c.bias'):
        assert torch.allclose(average.module.state_dict()[key], before[key] + 0.1, atol=1e-6), key
    assert average.module.count == 7


def test_tied_weights_are_saved_and_load_into_timm(tmp_path):
    small = dict(img_size=64, serial_depths=(2, 1, 1, 1), parallel_depth=1, num_classes=10)
    model = timm.create_model('coat_tiny', **small).eval()
    assert len(model.state_dict()) > len({*map(id, [*model.parameters(), *model.buffers()])})
    config = data.DataConfig((3, 64, 64), (0.5,) * 3, (0.5,) * 3, 'bicubic', 1.)
    run = Namespace(eval_model=model, num_classes=10, identity=Namespace(class_names=None, bits=8))
    checkpoint.write_weights(run, tmp_path / 'last', config, {})
    state = load_file(tmp_path / 'last/model.safetensors')
    assert state.keys() == model.state_dict().keys()
    reloaded = timm.create_model(f'local-dir:{tmp_path / "last"}', pretrained=True, **small).eval()
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(reloaded(x), model(x))


# --- Refusals ---------------------------------------------------------------------------------------------------------

def test_a_refusal_says_size_or_head_the_size_that_is_wanted_and_why():
    with pytest.raises(UsageError, match=r'halonet_h1 does not take images of 3x64x64; it was made for 256 px.*'
                                         r'\(--img-size\): AssertionError at `_assert\(.*` in halo_attn.py'):
        backbone.check_head(timm.create_model('halonet_h1', num_classes=10), asked('--model', 'halonet_h1'),
                            (3, 64, 64))
    with pytest.raises(UsageError, match='cannot be built at --img-size 40 .it was made for 224 px.*: .+'):
        backbone.build_model(asked('--model', 'vit_tiny_patch16_224', '--img-size', '40', '--model-kwargs',
                                   'dynamic_img_size=3', 'nonsense=1'), 10)

    with pytest.raises(UsageError, match=r'test_vit cannot be built at --img-size 32 \(it was made for 160 px\): .*'):
        backbone.build_model(asked('--model', 'test_vit', '--img-size', '32', '--model-kwargs', 'wrong=1'), 10)

    class Headless(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    with pytest.raises(UsageError, match='--model own: its head has no forward_features and forward_head.*Headless'):
        backbone.check_head(Headless(), asked('--model', 'own'), (3, 8, 8))


def test_an_error_without_words_is_told_by_its_line():
    try:
        assert 1 > 2
    except AssertionError as error:
        error.args = ()
        assert backbone.reason_of(error) == 'AssertionError at `assert 1 > 2` in test_backbone.py'


# --- Averages ---------------------------------------------------------------------------------------------------------

def momenta(model: nn.Module) -> set[float]:
    return {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)}


def test_running_averages_look_back_over_a_hundredth_of_the_run_and_published_runs_are_as_they_were():
    for updates, share in ((1, 0.1), (300, 0.1), (1000, 0.1), (2500, 0.04), (10_000, 0.01), (100_000, 0.001)):
        assert schedule.newest_share(updates) == pytest.approx(share)
    paper = asked('--model', 'wide_resnet10_1')
    assert paper.epochs * paper.train_steps_per_epoch == 2 ** 20
    assert (paper.model_ema_warmup, paper.stat_momentum) == (False, 0.999)
    model = backbone.build_model(paper, 10)
    assert paper.bn_momentum is None and momenta(model) == {0.001}
    assert backbone.describe_averages(model, paper) == (
        '1,048,576 updates; evaluated: averaged weights, decay 0.999 from the first update on; '
        'batch-norm momentum 0.001')

    short = asked('--model', 'wide_resnet10_1', '--epochs', 25, '--train-steps-per-epoch', 100, '--algorithm',
                  'freematch')
    model = backbone.build_model(short, 10)
    assert short.model_ema_warmup and short.stat_momentum == 0.96
    assert momenta(model) == {0.04} == {short.bn_momentum}
    line = backbone.describe_averages(model, short)
    assert 'growing from 0' in line and 'batch-norm momentum 0.04' in line and '--stat-momentum 0.96' in line

    # A shorter look-back needs a shorter run; what is given is obeyed; a model that fits keeps its own.
    assert not asked('--epochs', 10, '--train-steps-per-epoch', 100, '--model-ema-decay', '0.9').model_ema_warmup
    given = asked('--epochs', 1, '--no-model-ema-warmup', '--stat-momentum', '0.999', '--bn-momentum', '0.001')
    assert (given.model_ema_warmup, given.stat_momentum, given.bn_momentum) == (False, 0.999, 0.001)
    other = asked('--model', 'resnet10t', '--epochs', 1)
    backbone.build_model(other, 10)
    assert other.bn_momentum is None


@pytest.fixture(scope='module')
def short_runs(tmp_path_factory):
    """A run of the defaults, and one with the published run's averages, with what they logged."""
    flags = ('--num-labels', 300, '-b', 16, '--algorithm', 'supervised', '--val-split', 'test[:300]', '--epochs', 1,
             '--train-steps-per-epoch', 100)
    output, runs = tmp_path_factory.mktemp('short'), {}
    for name, further in (('default', ()), ('published', ('--no-model-ema-warmup', '--bn-momentum', '0.001'))):
        records = []
        handler = logging.Handler()
        handler.emit = lambda record, records=records: records.append(record.getMessage())
        logging.getLogger('train').addHandler(handler)
        try:
            folder = train_in_process(name, *flags, *further, output=output, without='--bn-momentum')
        finally:
            logging.getLogger('train').removeHandler(handler)
        runs[name] = (folder, records)
    return runs


def test_the_defaults_of_a_short_run_evaluate_a_network_that_has_learned(short_runs):
    error = {name: float(yaml.safe_load((folder / 'last/metrics.json').read_text())['error'])
             for name, (folder, _) in short_runs.items()}
    assert error['default'] < 50 < error['published']  # of 90 for ten classes


def test_a_run_says_and_keeps_the_averages_in_force_and_replays(short_runs, tmp_path):
    folder, records = short_runs['default']
    kept = yaml.safe_load((folder / 'args.yaml').read_text())
    assert (kept['model_ema_warmup'], kept['bn_momentum'], kept['stat_momentum']) == (True, 0.1, 0.9)
    assert sum('100 updates; evaluated: averaged weights' in line for line in records) == 1
    again = train_in_process('again', '--config', folder / 'args.yaml', output=tmp_path, without='--bn-momentum')
    assert (again / 'summary.csv').read_text().splitlines()[0] == (folder / 'summary.csv').read_text().splitlines()[0]
    for key in ('model_ema_warmup', 'bn_momentum', 'stat_momentum'):
        assert yaml.safe_load((again / 'args.yaml').read_text())[key] == kept[key]


def test_a_run_whose_average_lags_says_so_and_another_does_not(short_runs):
    lines = [line for line in short_runs['published'][1] if 'far worse' in line]
    assert len(lines) == 1 and '--model-ema-warmup' in lines[0] and '--bn-momentum' in lines[0]
    assert not [line for line in short_runs['default'][1] if 'far worse' in line]


# --- Models and loading -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dataset, size, flags, chosen', [
    ('cifar10', None, (), ('wide_resnet28_2', None)),
    ('stl10', None, (), ('wide_resnet28_2', None)),
    ('photos', 40, (), ('wide_resnet28_2', None)),
    ('photos', 300, (), ('resnet18', 128)),
    ('imagenet', None, (), ('resnet18', 128)),
    ('photos', 300, ('--img-size', '96'), ('resnet18', 96)),
    ('photos', 300, ('--img-size', '32'), ('wide_resnet28_2', 32)),
    ('photos', 300, ('--model', 'resnet10t'), ('resnet10t', None)),
])
def test_photographs_get_a_network_for_photographs_and_the_size_is_told(caplog, dataset, size, flags, chosen):
    args = asked('--dataset', dataset, *flags)
    train = sources.ArraySource(noise(2, size or 8), [0, 1], None, 'noise')
    with caplog.at_level(logging.INFO, 'train'):
        backbone.choose_model(args, train)
    assert (args.model, args.img_size) == chosen
    assert ('--model is not given: ' + chosen[0] in caplog.text) == ('--model' not in flags)
    if chosen == ('resnet18', 128) and size:
        assert '128 px (--img-size), as the first image has 300x300 px; --pretrained would' in caplog.text


def test_a_folder_of_photographs_trains_without_a_model_at_imagenets_mean(tmp_path, caplog):
    for split in ('train', 'val'):
        for number, name in enumerate(('ants', 'bees')):
            (tmp_path / 'photos' / split / name).mkdir(parents=True)
            for i in range(2):
                color = (100 * number, 50 * i, len(split))
                Image.new('RGB', (160, 120), color).save(tmp_path / 'photos' / split / name / f'{i}.png')
    with caplog.at_level(logging.INFO, 'train'):
        folder = train_in_process(
            'run', '--dataset', tmp_path / 'photos', '--num-labels', 2, '-b', 1, '--mu', 1, '--epochs', 1,
            '--train-steps-per-epoch', 1, output=tmp_path, without='--model',
        )
    kept = yaml.safe_load((folder / 'args.yaml').read_text())
    assert (kept['model'], kept['img_size']) == ('resnet18', 128)
    assert 'images 3x128x128, mean (0.485, 0.456, 0.406)' in caplog.text


def test_there_are_no_more_workers_than_processors_and_the_change_is_told(monkeypatch, caplog):
    monkeypatch.setattr(data.os, 'sched_getaffinity', lambda _: {0, 1}, raising=False)
    with caplog.at_level(logging.INFO, 'train'):
        assert [data.limit_workers(asked) for asked in (0, 2, 4, None)] == [0, 2, 2, 2]
    assert caplog.messages == ['--workers 4: 2 instead, one for each processor that there is']


@pytest.mark.parametrize('share', ['5', '0', '-1', 'nan'])
def test_a_centre_crop_is_a_share(capsys, share):
    with pytest.raises(SystemExit) as error:
        asked('--crop-pct', share)
    assert error.value.code == 2 and '--crop-pct' in capsys.readouterr().err
    assert asked('--crop-pct', '0.9').crop_pct == 0.9
