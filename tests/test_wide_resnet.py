import copy
import io
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay

import wide_resnet

SMALL = 'wide_resnet10_1'


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**kwargs):
    return timm.create_model(SMALL, **dict(dict(num_classes=5), **kwargs))


def randomised(model):
    """Norms as after training: at their initial values, a mistake in one of them would not show."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.2, 2)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_()
    return model


@pytest.mark.parametrize('name, classes, size, parameters', [
    ('wide_resnet28_2', 10, 32, 1_467_626),
    ('wide_resnet28_8', 100, 32, 23_401_028),
    ('wide_resnet37_2', 10, 96, 5_929_450),
])
def test_parameter_counts_and_image_sizes_are_those_of_the_published_tables(name, classes, size, parameters):
    model = timm.create_model(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    config = resolve_data_config(model=model)
    assert config['input_size'] == (3, size, size) and config['crop_pct'] == 1
    assert model.pretrained_cfg['num_classes'] == 10 and model.pretrained_cfg['classifier'] == 'fc'
    assert sum(isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == {
        'wide_resnet28_2': 25, 'wide_resnet28_8': 25, 'wide_resnet37_2': 33}[name]


def test_the_pixel_statistics_are_those_of_cifar(shared_data):
    parquet, image = pytest.importorskip('pyarrow.parquet'), pytest.importorskip('PIL.Image')
    rows = next(parquet.ParquetFile(shared_data / 'cifar10' / 'train.parquet').iter_batches(1500, columns=['image']))
    pixels = np.stack([np.asarray(image.open(io.BytesIO(row['bytes']))) for row in rows['image'].to_pylist()]) / 255
    config = resolve_data_config(model=small())
    np.testing.assert_allclose(config['mean'], pixels.mean((0, 1, 2)), rtol=0, atol=0.01)
    np.testing.assert_allclose(config['std'], pixels.std((0, 1, 2)), rtol=0, atol=0.01)


def test_timm_lists_the_five_models():
    names = {'wide_resnet10_1', 'wide_resnet16_2', 'wide_resnet28_2', 'wide_resnet28_8', 'wide_resnet37_2'}
    assert set(timm.list_models(module='wide_resnet')) == names


@pytest.mark.parametrize('name, size, maps', [
    ('wide_resnet10_1', 32, (64, 8, 8)), ('wide_resnet28_2', 32, (128, 8, 8)), ('wide_resnet37_2', 96, (256, 6, 6))])
def test_forward_is_head_of_features(name, size, maps):
    model = randomised(timm.create_model(name, num_classes=7)).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        logits = model(x)
    assert features.shape == (2, *maps) and pooled.shape == (2, maps[0]) and logits.shape == (2, 7)
    assert model.num_features == model.head_hidden_size == maps[0]
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model.get_classifier()(pooled), logits)
    torch.testing.assert_close(model.forward_head(features), logits)


@pytest.mark.parametrize('name, size, strides', [('wide_resnet16_2', 32, (1, 2, 2)), ('wide_resnet37_2', 96, (2,) * 4)])
def test_the_forward_pass_equals_a_literal_one_from_the_weights(name, size, strides):
    model = randomised(timm.create_model(name, num_classes=7)).double().eval()
    w = model.state_dict()

    def norm_act(x, at, eps=1e-5):
        shape = (1, -1, 1, 1)
        x = (x - w[at + '.running_mean'].view(shape)) / (w[at + '.running_var'].view(shape) + eps).sqrt()
        x = x * w[at + '.weight'].view(shape) + w[at + '.bias'].view(shape)
        return torch.where(x > 0, x, 0.1 * x)

    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    x = F.conv2d(images, w['conv1.weight'], w['conv1.bias'], padding=1)
    for stage, stride in enumerate(strides, 1):
        depth = len({key.split('.')[1] for key in w if key.startswith(f'layer{stage}.')})
        for block in range(depth):
            at, stride = f'layer{stage}.{block}', stride if block == 0 else 1
            activated = norm_act(x, at + '.bn1')
            shortcut = activated if (stage, block) == (1, 0) else x
            if at + '.shortcut.weight' in w:
                shortcut = F.conv2d(shortcut, w[at + '.shortcut.weight'], stride=stride)
            out = F.conv2d(activated, w[at + '.conv1.weight'], stride=stride, padding=1)
            x = F.conv2d(norm_act(out, at + '.bn2'), w[at + '.conv2.weight'], padding=1) + shortcut
    x = norm_act(x, 'norm', eps=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), x)
        torch.testing.assert_close(model(images), x.mean((2, 3)) @ w['fc.weight'].T + w['fc.bias'])


def test_only_the_first_block_shares_its_activation_and_narrow_shortcuts_are_identities():
    model = timm.create_model('wide_resnet28_2')
    blocks = [m for m in model.modules() if isinstance(m, wide_resnet.Block)]
    assert [b.shared_act for b in blocks] == [True] + [False] * 11
    assert [isinstance(b.shortcut, torch.nn.Conv2d) for b in blocks] == [True, False, False, False] * 3


def test_batch_norm_counts_a_new_batch_one_thousandth_and_only_the_last_has_the_large_eps():
    model = small()
    norms = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert len(norms) == 7
    assert {m.momentum for m in norms.values()} == {0.001}
    assert {name: m.eps for name, m in norms.items() if m.eps != 1e-5} == {'norm': 0.001}
    x = torch.randn(4, 3, 32, 32)
    stem = model.conv1(x)
    model.train()(x)
    torch.testing.assert_close(norms['layer1.0.bn1'].running_mean, 0.001 * stem.mean((0, 2, 3)))


def test_weights_start_as_published():
    model = timm.create_model('wide_resnet28_2', num_classes=100)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            out = module.out_channels * module.kernel_size[0] ** 2
            assert float(module.weight.detach().std()) == pytest.approx(math.sqrt(2 / out), rel=0.2), name
            assert (module.bias is not None) == (name == 'conv1')
    assert float(model.fc.weight.detach().std()) == pytest.approx(math.sqrt(2 / (128 + 100)), rel=0.05)
    assert float(model.fc.weight.detach().abs().max()) > 2 * math.sqrt(2 / (128 + 100))  # normal, not uniform
    assert model.fc.bias.eq(0).all() and model.conv1.bias.eq(0).all()


def test_the_classifier_can_be_replaced_and_removed():
    model, x = small().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(11)
        assert model.num_classes == 11 and model.get_classifier().out_features == 11 and model(x).shape == (2, 11)
        model.reset_classifier(0)
        assert model.num_classes == 0 and torch.equal(model(x), pooled)
        model.reset_classifier(4, 'max')
        assert torch.equal(model.forward_head(model.forward_features(x), True), model.forward_features(x).amax((2, 3)))
        model.reset_classifier(6)  # keeps the pooling
        assert torch.equal(model.forward_head(model.forward_features(x), True), model.forward_features(x).amax((2, 3)))
        model.reset_classifier(4, 'catavgmax')
        assert model(x).shape == (2, 4)
        model.reset_classifier(0, '')
        assert torch.equal(model(x), model.forward_features(x))
    assert small(num_classes=0)(x).shape == (2, 64)
    assert small(num_classes=0, global_pool='')(x).shape == (2, 64, 8, 8)


@pytest.mark.parametrize('name, size, channels, reductions', [
    ('wide_resnet16_2', 32, [32, 64, 128], [1, 2, 4]), ('wide_resnet37_2', 96, [32, 64, 128, 256], [2, 4, 8, 16])])
def test_features_only_gives_each_stage_with_its_channels_and_reduction(name, size, channels, reductions):
    model = timm.create_model(name, features_only=True)
    assert model.feature_info.channels() == channels and model.feature_info.reduction() == reductions
    maps = model(torch.randn(1, 3, size, size))
    assert [tuple(m.shape) for m in maps] == [(1, c, size // r, size // r) for c, r in zip(channels, reductions)]
    two = timm.create_model(name, features_only=True, out_indices=(0, 2))
    assert two.feature_info.channels() == [channels[0], channels[2]]


def test_gradient_checkpointing_gives_the_same_gradients():
    plain = small()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    x, y, kept = torch.randn(4, 3, 32, 32), torch.arange(4), []
    for model in (plain, checkpointed):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            loss = F.cross_entropy(model.train()(x), y)
        kept.append(sum(sizes))
        loss.backward()
    assert kept[1] < kept[0] / 2  # it did save memory
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
        assert a.grad.any(), name


@pytest.mark.parametrize('in_chans', [1, 4])
def test_other_numbers_of_image_channels(in_chans):
    model = small(in_chans=in_chans)
    assert model(torch.randn(2, in_chans, 32, 32)).shape == (2, 5)
    assert model.conv1.weight.shape == (16, in_chans, 3, 3)


def test_drop_and_drop_path_act_in_training_only():
    x = torch.randn(8, 3, 32, 32)
    for option in (dict(drop_rate=0.5), dict(drop_path_rate=0.5)):
        torch.manual_seed(0)
        plain = small()
        torch.manual_seed(0)
        model = small(**option)
        assert not torch.equal(model.train()(x), plain.train()(x))
        model.load_state_dict(randomised(plain).state_dict())
        assert torch.equal(model.eval()(x), plain.eval()(x))
    deep = timm.create_model('wide_resnet28_2', drop_path_rate=0.3)
    rates = [getattr(b.drop_path, 'drop_prob', 0.) for b in deep.modules() if isinstance(b, wide_resnet.Block)]
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == pytest.approx(0.3)


def test_a_dropped_path_leaves_the_shortcut():
    block = wide_resnet.Block(8, 8, drop_path=0.999999)
    x = torch.randn(3, 8, 4, 4)
    assert torch.equal(block.train()(x), x)
    assert not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize('name', ['wide_resnet28_2', 'wide_resnet37_2'])
def test_pretrained_is_refused_with_a_plain_message(name):
    with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}'):
        timm.create_model(name, pretrained=True)


def test_a_saved_folder_loads_through_timm_with_equal_logits(tmp_path):
    model = randomised(small(num_classes=7, in_chans=1)).eval()
    mean_std = dict(mean=(0.3,), std=(0.2,), input_size=(1, 24, 24))
    save_for_hf(model, tmp_path, model_config=mean_std, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, in_chans=1).eval()
    x = torch.randn(3, 1, 24, 24)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert type(loaded) is wide_resnet.WideResNet and loaded.num_classes == 7
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


def test_a_saved_colour_model_loads_for_grey_images_and_other_classes(tmp_path):
    model = small(num_classes=7)
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, in_chans=1, num_classes=3)
    torch.testing.assert_close(loaded.conv1.weight, model.conv1.weight.sum(1, keepdim=True))  # as timm adapts its own
    assert loaded.fc.out_features == 3
    assert torch.equal(loaded.layer3[0].conv2.weight, model.layer3[0].conv2.weight)


def test_every_parameter_has_a_place_in_timms_layer_groups():
    model = small()
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    assert len(scale) == len(list(model.parameters()))
    order = [scale[id(p)] for p in (
        model.conv1.weight, model.layer1[0].conv1.weight, model.layer2[0].conv1.weight, model.fc.weight)]
    assert order == sorted(set(order)) and order[-1] == 1


def test_other_image_sizes_and_channels_last_give_the_same_logits():
    model = randomised(small()).eval()
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        plain = model(x)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(plain, last, rtol=1e-4, atol=1e-4)
