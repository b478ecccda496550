import math
import random

import numpy as np
import pytest
import torch
from images import noise, noise_source, plain
from PIL import Image, ImageOps
from timm.data import create_transform
from torchvision import transforms
from torchvision.transforms import functional

import data
import seeds
import views
from data import BatchDataset, ViewDataset, create_loader, decode_all
from program import UsageError
from sources import KNOWN, ArraySource, ImageError
from views import ALL_OPS, GEOMETRIC_OPS, PIXEL_OPS, BatchViews, FlipCrop, StrongAugment, build_views

RED = (255, 0, 0)
FILL = (120, 60, 200)
KINDS = {'weak': 'weak', 'strong': 'strong'}


def scenes(n, size):
    """Smooth pictures with an edge: neither noise nor one colour, each with its own range."""
    generator, pictures = np.random.default_rng(0), []
    for _ in range(n):
        coarse = generator.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        picture = np.array(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
        picture[:, size // 2:] = picture[:, size // 2:] // 2 + generator.integers(0, 100)
        pictures.append(picture)
    return np.stack(pictures)


# --- Images through PIL -----------------------------------------------------------------------------------------------

def below(values, low, high):
    """Largest distance between the distribution of values and the uniform one, in units of its usual size."""
    values = np.sort((np.asarray(values) - low) / (high - low))
    assert values[0] >= -1e-9 and values[-1] <= 1 + 1e-9
    return np.abs(values - np.arange(len(values)) / len(values)).max() * math.sqrt(len(values))


@pytest.mark.parametrize('width, height', [(5, 5), (7, 5), (5, 8)])
def test_flip_crop_equals_padding_by_reflection_at_every_offset(monkeypatch, width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, crop = Image.fromarray(pixels), FlipCrop(5, 2, 0.5, transforms.Resize(5))
    padded = functional.pad(image, [2, 2, 2, 2], padding_mode='reflect')
    for top in range(height + 4 - 5 + 1):
        for left in range(width + 4 - 5 + 1):
            for flip in (False, True):
                starts = iter([top - 2, left - 2])
                monkeypatch.setattr(random, 'randint', lambda low, high, starts=starts: next(starts))
                monkeypatch.setattr(random, 'random', lambda flip=flip: 0.1 if flip else 0.9)
                expected = functional.crop(padded, top, left, 5, 5)
                expected = ImageOps.mirror(expected) if flip else expected
                assert np.array_equal(crop(image), expected)


@pytest.mark.parametrize('hflip', [0.0, 0.5, 1.0])
def test_weak_views_are_all_crops_of_a_reflected_border_and_flips(hflip):
    pixels = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([pixels] * 3, -1))
    padded = np.pad(pixels, 2, mode='reflect')
    known = {}
    for top in range(5):
        for left in range(5):
            crop = padded[top:top + 16, left:left + 16]
            known[crop.tobytes()], known[crop[:, ::-1].tobytes()] = (top, left, False), (top, left, True)
    weak = build_views(16, (0.5,) * 3, hflip=hflip)['weak']
    with seeds.seeded(0):
        drawn = [known[weak(image)[0].numpy().tobytes()] for _ in range(600)]
    assert len(set(drawn)) == (50 if hflip == 0.5 else 25)
    assert abs(np.mean([flip for _, _, flip in drawn]) - hflip) < 0.1


def test_weak_views_of_a_photograph_take_its_shorter_side():
    image = Image.fromarray(noise(1, 64)[0][:32])  # 64 wide, 32 high
    weak = build_views(16, (0.5,) * 3)['weak']
    assert weak(image).shape == (3, 16, 16)
    assert weak(image.transpose(Image.Transpose.ROTATE_90)).shape == (3, 16, 16)


# What FixMatch's operations do (arXiv 2001.07685, table 12), as the range of PIL's or timm's argument.
RANGES = {
    'AutoContrast': None, 'Equalize': None, 'Brightness': (0.05, 0.95), 'Color': (0.05, 0.95),
    'Contrast': (0.05, 0.95), 'Sharpness': (0.05, 0.95), 'PosterizeOriginal': (4, 8), 'Rotate': (-30, 30),
    'ShearX': (-0.3, 0.3), 'ShearY': (-0.3, 0.3), 'SolarizeIncreasing': (0, 256), 'TranslateXRel': (-0.3, 0.3),
    'TranslateYRel': (-0.3, 0.3),
}


def test_strong_operations_have_equal_shares_and_uniform_magnitudes():
    strong, image, seen = StrongAugment(1, 0.0, (0, 0, 0)), plain(RED), {name: [] for name in RANGES}
    for op in strong.ops:
        op.aug_fn = lambda picture, *level, name=op.name, **_: seen[name].append(level) or picture
    with seeds.seeded(0):
        for _ in range(7000):
            strong(image)
    shares = {name: len(levels) for name, levels in seen.items()}
    shares['Identity'] = 7000 - sum(shares.values())
    assert len(shares) == 14
    assert all(abs(number - 500) < 5 * math.sqrt(500) for number in shares.values()), shares
    for name, levels in seen.items():
        if RANGES[name] is None:
            assert set(levels) == {()}
        elif name == 'PosterizeOriginal':  # whole bits, as in FixMatch: 4 to 7
            bits = np.bincount([level for level, in levels])
            assert len(bits) == 8 and (abs(bits[4:] - len(levels) / 4) < 60).all()
        else:
            assert below([level for level, in levels], *RANGES[name]) < 2, name


def test_strong_views_take_three_operations_on_top_of_a_weak_view(monkeypatch):
    strong = build_views(16, (0.5,) * 3)['strong'].transforms[1]
    calls = []
    for op in strong.ops:
        monkeypatch.setattr(type(op), '__call__', lambda op, picture: calls.append(op.name) or picture)
    image = plain(RED, (16, 16))
    for _ in range(10):
        strong(image.copy())
    assert len(calls) == 30


def blanked(image):
    """Width and height of what is white."""
    box = image.convert('L').point(lambda v: 255 * (v == 255)).getbbox()
    return (0, 0) if box is None else (box[2] - box[0], box[3] - box[1])


def test_cutout_is_a_square_with_a_side_uniform_up_to_half_the_image(monkeypatch):
    uniform, sides = random.uniform, []
    monkeypatch.setattr(random, 'uniform', lambda low, high: high / 2 if high == 200 else uniform(low, high))
    strong = StrongAugment(0, 0.5, (255, 255, 255))
    with seeds.seeded(0):
        for _ in range(400):
            width, height = blanked(strong(Image.new('RGB', (200, 200))))
            assert abs(width - height) <= 1
            sides.append(width / 200)
    assert below(np.array(sides) - 0.0025, -0.005, 0.5025) < 2


@pytest.mark.parametrize('place, expected', [(0.0, 10), (0.5, 20), (1.0, 10)])
def test_cutout_may_reach_over_the_edge(monkeypatch, place, expected):
    monkeypatch.setattr(random, 'uniform', lambda low, high: high if high == 0.5 else place * high)
    assert blanked(StrongAugment(0, 0.5, (255,) * 3)(Image.new('RGB', (40, 40)))) == (expected, expected)
    assert blanked(StrongAugment(0, 0.0, (255,) * 3)(Image.new('RGB', (40, 40)))) == (0, 0)


@pytest.mark.parametrize('crop_pct, interpolation', [(1.0, 'bilinear'), (0.875, 'bicubic'), (0.9, 'lanczos')])
def test_evaluation_views_are_timms_and_draw_nothing(crop_pct, interpolation):
    image = Image.fromarray(noise(1, 64)[0][:48])
    view = build_views(24, (0.5,) * 3, interpolation=interpolation, crop_pct=crop_pct)['eval']
    timms = create_transform((3, 24, 24), interpolation=interpolation, crop_pct=crop_pct, mean=(0.,) * 3, std=(1.,) * 3)
    state = random.getstate(), torch.get_rng_state()
    assert torch.allclose(view(image) / 255, timms(image), atol=1e-6) and torch.equal(view(image), view(image))
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_views_of_one_channel_are_grey():
    image = Image.fromarray(noise(1, 16)[0])
    transform = build_views(16, (0.3,), in_chans=1)
    assert all(transform[kind](image).shape == (1, 16, 16) for kind in ('weak', 'strong', 'eval'))
    assert torch.equal(transform['eval'](image)[0], functional.pil_to_tensor(image.convert('L'))[0])


@pytest.mark.parametrize('options, message', [
    (dict(in_chans=2), '--in-chans 2'), (dict(interpolation='cubic'), '--interpolation cubic: expected one of'),
])
def test_views_that_cannot_be_built_are_an_error(options, message):
    with pytest.raises(UsageError, match=message):
        build_views(16, (0.5,) * 3, **options)


def test_digits_and_house_numbers_are_not_mirrored():
    for name in ('digits', 'svhn', 'torch/svhn', 'torch/mnist', 'hfds/ufldl-stanford/svhn:cropped_digits'):
        assert KNOWN[name]['hflip'] == 0
    assert 'hflip' not in KNOWN['cifar10']


def test_a_weak_and_a_strong_view_of_an_item_are_drawn_apart():
    transform = build_views(16, (0.5,) * 3, num_ops=0, cutout=0.0)
    dataset = ViewDataset(noise_source(20), {kind: transform[kind] for kind in KINDS})
    assert sum(torch.equal(item['weak'], item['strong']) for item in map(dataset.__getitem__, range(20))) < 5


# --- Batches of tensors -----------------------------------------------------------------------------------------------

def channels_first(pictures):
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize('name', [*PIXEL_OPS, *GEOMETRIC_OPS])
def test_each_batched_operation_equals_pils_at_the_same_magnitude(monkeypatch, name):
    pictures = [Image.fromarray(picture) for picture in [*scenes(60, 24), *noise(40, 24)]] + [plain(RED, (24, 24))]
    level = torch.rand(len(pictures), generator=torch.Generator().manual_seed(0))
    level[:3] = torch.tensor([0., 0.5, 1 - 2 ** -24])
    sign = torch.where(torch.arange(len(pictures)) % 2 == 0, 1., -1.)
    op = next(op for op in StrongAugment(1, 0.0, FILL).ops if op.name == name)
    expected = []
    for picture, strength, direction in zip(pictures, level.tolist(), sign.tolist()):
        monkeypatch.setattr('timm.data.auto_augment._randomly_negate', lambda value, by=direction: by * value)
        args = op.level_fn(10 * strength, op.hparams) if op.level_fn else ()
        expected.append(op.aug_fn(picture, *args, **op.kwargs))
    images, expected = channels_first(pictures), channels_first(expected)
    if name in PIXEL_OPS:
        seen = PIXEL_OPS[name](images, level.view(-1, 1, 1, 1))
    else:
        which = torch.full((len(images),), GEOMETRIC_OPS.index(name))
        matrix = views._matrices(which, level * sign, 24, 24)
        seen = views._transform(images, matrix, torch.tensor(FILL, dtype=torch.uint8))
    difference = (seen.int() - expected.int()).abs()
    assert (expected != images).float().mean() > 0.1
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


def test_batched_operations_have_equal_shares_and_uniform_magnitudes(monkeypatch):
    levels = {name: [] for name in PIXEL_OPS}
    amounts = {name: [] for name in GEOMETRIC_OPS}
    for name in PIXEL_OPS:
        monkeypatch.setitem(PIXEL_OPS, name, lambda image, level, name=name: levels[name].append(level) or image)

    def matrices(op, amount, height, width):
        for k, name in enumerate(GEOMETRIC_OPS):
            amounts[name].append(amount[op == k])
        return torch.eye(2, 3).repeat(len(op), 1, 1)

    monkeypatch.setattr(views, '_matrices', matrices)
    batch_views = BatchViews({'strong': 'strong'}, 4, (0.5,) * 3)
    numbers = torch.rand(10_000, batch_views.num_numbers, generator=torch.Generator().manual_seed(0))
    batch_views(torch.zeros(10_000, 4, 4, 3, dtype=torch.uint8), numbers)
    seen = {name: torch.cat(parts).flatten() for name, parts in (*levels.items(), *amounts.items())}
    number = 30_000 / len(ALL_OPS)
    assert len(ALL_OPS) == 14 and all(abs(len(part) - number) < 5 * math.sqrt(number) for part in seen.values())
    for name, part in seen.items():
        assert below(part.numpy(), 0 if name in PIXEL_OPS else -1, 1) < 2, name


@pytest.mark.parametrize('width, height', [(5, 5), (7, 5), (5, 8)])
def test_batched_crops_equal_padding_by_reflection_at_every_offset(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    padded = functional.pad(Image.fromarray(pixels), [2, 2, 2, 2], padding_mode='reflect')
    batch_views = BatchViews({'image': 'weak'}, 5, (0.5,) * 3, crop_ratio=0.6)
    numbers, expected = [], []
    for top in range(height):
        for left in range(width):
            for flip in (False, True):
                numbers.append([(top + 0.5) / height, (left + 0.5) / width, 0.1 if flip else 0.9])
                crop = functional.crop(padded, top, left, 5, 5)
                expected.append(ImageOps.mirror(crop) if flip else crop)
    images = torch.from_numpy(pixels).expand(len(numbers), -1, -1, -1).contiguous()
    assert torch.equal(batch_views(images, torch.tensor(numbers))['image'], channels_first(expected))


def test_batched_cutout_blanks_what_the_image_by_image_one_does(monkeypatch):
    numbers = torch.rand(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    batch_views = BatchViews({'strong': 'strong'}, 20, (1.,) * 3)
    seen = batch_views._cutout(torch.zeros(200, 3, 20, 20, dtype=torch.uint8), numbers)
    for row, picture in zip(numbers.tolist(), seen):
        drawn = iter(row)
        monkeypatch.setattr(random, 'uniform', lambda low, high, drawn=drawn: high * next(drawn))
        expected = StrongAugment(0, 0.5, (255,) * 3)(plain((0, 0, 0), (20, 20)))
        assert torch.equal(picture, functional.pil_to_tensor(expected))


@pytest.mark.parametrize('kind', ['weak', 'strong'])
def test_batched_views_have_the_distribution_of_those_through_pil(kind):
    picture, draws = scenes(1, 16)[0], 4000
    batch_views = BatchViews({'view': kind}, 16, (0.5,) * 3)
    numbers = torch.rand(draws, batch_views.num_numbers, generator=torch.Generator().manual_seed(0))
    batched = batch_views(torch.from_numpy(picture).expand(draws, -1, -1, -1).contiguous(), numbers)['view'].float()
    view = build_views(16, (0.5,) * 3)[kind]
    with seeds.seeded(0):
        single = torch.stack([view(Image.fromarray(picture)) for _ in range(draws)]).float()
    error = ((batched.var(0) + single.var(0)) / draws).sqrt()
    assert ((batched.mean(0) - single.mean(0)).abs() / error).max() < 5  # of 768 pixels, in standard errors
    spread = [views.flatten(1).std(1).sort().values for views in (batched, single)]
    assert (spread[0] - spread[1]).abs().mean() < 0.03 * spread[1].mean()


def batched(source, kinds=KINDS, size=16, defer=False, **options):
    dataset = ViewDataset(source, {}, seed=3, stream='unlabeled', **options)
    return BatchDataset(dataset, *decode_all(dataset, build_views(size, (0.5,) * 3)['resize']),
                        BatchViews(kinds, size, (0.5,) * 3), defer)


@pytest.mark.parametrize('workers', [0, 2])
def test_an_image_of_a_batch_has_the_views_of_its_pass_and_index_whoever_stands_beside_it(workers):
    dataset = batched(noise_source(12))
    keys = [(0, 5), (1, 5), (0, 7), (2, 11), (0, 5)]
    together, *apart = create_loader(dataset, [keys, *([key] for key in keys)], workers)
    assert together['index'].tolist() == [5, 5, 7, 11, 5] and together['target'].tolist() == [1, 1, 1, 1, 1]
    for name in KINDS:
        assert torch.equal(together[name], torch.cat([batch[name] for batch in apart]))
        assert torch.equal(together[name][0], together[name][4])
        assert not torch.equal(together[name][0], together[name][1])
    assert not torch.equal(together['weak'], together['strong'])


def test_views_that_are_left_to_the_device_are_those_of_the_loader():
    keys = [(0, 5), (1, 5), (0, 7)]
    expected = batched(noise_source(12)).__getitems__(keys)
    config = data.DataConfig((3, 16, 16), (0., 0., 0.), (1 / 255,) * 3, 'bilinear', 1.0)
    feed = data.Feed(create_loader(batched(noise_source(12), defer=True), [keys]), config, 'cpu', False)
    [batch] = feed
    assert batch.pop('repeated') is True and batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name].float()) for name in KINDS)


def test_a_set_sent_to_a_worker_holds_its_decoded_images_once():
    dataset = batched(noise_source(8))
    loader = create_loader(dataset, [[(0, 1)], [(0, 2)]], workers=2)
    before = dataset.pixels.clone()
    list(loader)
    assert loader.dataset.pixels.data_ptr() == dataset.pixels.data_ptr() and torch.equal(dataset.pixels, before)


def test_evaluation_images_of_a_batch_are_timms():
    source, view = noise_source(9, 24), build_views(16, (0.5,) * 3, crop_pct=0.9)['eval']
    dataset = ViewDataset(source, {'image': view})
    batch = BatchDataset(dataset, *decode_all(dataset, view)).__getitems__([4, 0, 8])
    assert torch.equal(batch['image'], torch.stack([view(source.image(i)) for i in (4, 0, 8)]))
    assert batch['index'].tolist() == [4, 0, 8]


def test_batched_views_of_one_channel_are_grey():
    batch_views = BatchViews({'image': 'weak'}, 16, (0.3,), in_chans=1, hflip=0., crop_ratio=1.)
    [picture] = noise(1, 16)
    seen = batch_views(torch.from_numpy(picture)[None], torch.zeros(1, 3))['image'][0]
    assert torch.equal(seen, functional.pil_to_tensor(Image.fromarray(picture).convert('L')))


class Mixed(ArraySource):
    """Pictures of several sizes; None cannot be decoded."""

    def data(self, index):
        if self.images[index] is None:
            raise ValueError('broken')
        return self.images[index]


def test_a_set_of_large_or_differing_images_stays_with_pil(monkeypatch):
    resize = build_views(16, (0.5,) * 3)['resize']
    differing = Mixed([noise(1, 16)[0], noise(1, 16)[0][:, :12]], [0, 1], None, 'mixed')
    assert decode_all(ViewDataset(differing, {}), resize) is None
    assert decode_all(ViewDataset(noise_source(2, 128), {}), build_views(128, (0.5,) * 3)['resize']) is None
    monkeypatch.setattr(data, 'HOLD_DECODED', 3 * 16 * 16 * 4)
    assert decode_all(ViewDataset(noise_source(4), {}), resize) is not None
    assert decode_all(ViewDataset(noise_source(5), {}), resize) is None


def test_a_batch_steps_over_broken_images_as_single_items_do():
    images = [None if i in (3, 4, 9) else picture for i, picture in enumerate(noise(10, 16))]
    source = Mixed(images, range(10), None, 'mixed')
    with pytest.raises(ImageError, match='image 3 .row 3 of mixed. cannot be decoded: broken'):
        batched(source)
    index = torch.tensor([0, 3, 4, 5, 9])
    seen = batched(source, index=index, skip_bad=True).__getitems__([0, 1, 2, 3, 4])
    single = ViewDataset(source, {}, index, skip_bad=True)
    for name in ('index', 'target', 'skipped'):
        assert seen[name].tolist() == [single[i][name] for i in range(5)]
    with pytest.raises(ImageError, match='none of the 2 images'):
        batched(source, index=torch.tensor([3, 9]), skip_bad=True)


def test_every_interpolation_is_one_that_timm_knows_and_others_are_refused_in_a_line():
    for name in views.INTERPOLATIONS:
        assert build_views(8, (0.5,), interpolation=name)['eval'](plain(RED)).shape == (3, 8, 8)
    with pytest.raises(UsageError, match='--interpolation nearest-exact: expected one of nearest, '):
        build_views(8, (0.5,), interpolation='nearest-exact')
