"""Weak, strong and evaluation views of images (FixMatch, arXiv 2001.07685), in two forms with one distribution.

`build_views` works image by image through PIL, for images of any size. `BatchViews` works on batches of small decoded
images as tensors, on any device, at several times the rate; each image of a batch still has its own operations and
magnitudes, which torchvision's RandAugment does not give (one draw a batch).

What an operation moves in, and what Cutout blanks, has the mean colour of the data set. Google's RandAugment has
mid-grey there, USB's black, but for Cutout.
"""
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from torchvision import transforms
from torchvision.transforms import functional
from torchvision.transforms.v2 import functional as tv

from program import UsageError

# --- Images through PIL -----------------------------------------------------------------------------------------------

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')  # that timm has a name for
LONG = 16  # times as long as wide; what an image that is longer still becomes is worked out for the crop alone


def resized_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height with the shorter one at `side`, as torchvision rounds the longer one."""
    shorter, longer = min(size), max(size)
    longer = int(side * longer / shorter)
    return (side, longer) if size[0] <= size[1] else (longer, side)


def resize_part(
        image: Image.Image,
        size: tuple[int, int],
        box: tuple[int, int, int, int],
        resize: transforms.Resize,
) -> Image.Image:
    """`resize(image)`, of this size, cut to a box (left, top, right, bottom; pixels of the result) but for rounding.

    Of a strip of 4000 x 1 pixels a whole result 224 pixels high would have 896,000 columns.
    """
    sides = []
    for whole, part, low, high in zip(image.size, size, box[:2], box[2:]):
        scale = whole / part
        reach = math.ceil(4 * max(scale, 1))  # of the widest filter, and more
        start, end = max(math.floor(low * scale) - reach, 0), min(math.ceil(high * scale) + reach, whole)
        # Pillow has its box in float32: near zero it is exact.
        sides.append((start, end, low * scale - start, high * scale - start))
    (left, right, *width), (top, bottom, *height) = sides
    return image.crop((left, top, right, bottom)).resize(
        (box[2] - box[0], box[3] - box[1]),
        functional.pil_modes_mapping[resize.interpolation],
        box=(width[0], height[0], width[1], height[1]),
    )


class FlipCrop:
    """Random crop of a square out of an image with a reflected border, and a random mirror image of it.

    torchvision's RandomCrop pads by reflection too, at ten times the cost for a 32-pixel image.

    Args:
        size: Side of the crop in pixels.
        border: Width of the reflected border in pixels, below the image's size.
        hflip: Probability of mirroring.
        resize: Brings the image's shorter side to `size` before.
    """

    def __init__(self, size: int, border: int, hflip: float, resize: transforms.Resize):
        self.size, self.border, self.hflip, self.resize = size, border, hflip, resize

    def __call__(self, image: Image.Image) -> Image.Image:
        size = resized_size(image.size, self.size)
        rows, columns = (self._reflected(length) for length in reversed(size))
        if random.random() < self.hflip:
            columns = columns[::-1]
        if max(size) > LONG * self.size:
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            image, columns, rows = resize_part(image, size, box, self.resize), columns - box[0], rows - box[1]
        else:
            image = self.resize(image)
        return Image.fromarray(np.asarray(image)[rows[:, None], columns])

    def _reflected(self, length: int) -> np.ndarray:
        """Indices of a random window into `length` pixels, mirrored where it leaves them."""
        start = random.randint(-self.border, length + self.border - self.size)
        window = np.abs(np.arange(start, start + self.size))
        return np.where(window < length, window, 2 * (length - 1) - window)


class ResizeCentreCrop:
    """timm's Resize and CenterCrop, the same but for rounding and for the memory that a strip takes."""

    def __init__(self, resize: transforms.Resize, crop: transforms.CenterCrop):
        self.resize, self.crop = resize, crop

    def __call__(self, image: Image.Image) -> Image.Image:
        size = resized_size(image.size, self.resize.size)
        if max(size) <= LONG * self.resize.size:
            return self.crop(self.resize(image))
        box = []
        for length, kept in zip(size, reversed(self.crop.size)):
            start = max(round((length - kept) / 2), 0)
            box.append((start, min(start + kept, length)))
        (left, right), (top, bottom) = box
        return self.crop(resize_part(image, size, (left, top, right, bottom), self.resize))


def bound_memory(steps: Sequence[Callable]) -> list[Callable]:
    """timm's evaluation transforms, with their resizing and crop joined, so that no strip is scaled up as a whole."""
    steps = list(steps)
    if len(steps) > 1 and isinstance(steps[0], transforms.Resize) and isinstance(steps[0].size, int) and isinstance(
            steps[1], transforms.CenterCrop):
        steps[:2] = [ResizeCentreCrop(*steps[:2])]
    return steps


# RandAugment's operations as FixMatch uses them (arXiv 2001.07685, appendix), in timm's names.
STRONG_OPS = (
    'AutoContrast', 'Brightness', 'Color', 'Contrast', 'Equalize', 'PosterizeOriginal', 'Rotate', 'Sharpness',
    'ShearX', 'ShearY', 'SolarizeIncreasing', 'TranslateXRel', 'TranslateYRel',
)


def _enhance_factor(level: float, hparams: dict) -> tuple[float]:
    return 0.05 + 0.09 * level,


class StrongAugment:
    """RandAugment with uniform magnitudes, then Cutout.

    The operations are timm's, their ranges FixMatch's: the enhancements blend with a factor of 0.05 to 0.95 and never
    exaggerate (timm's reach 1.9). FixMatch's list has the identity as a 14th, which here is each operation's chance of
    1/14 to do nothing.

    Args:
        num_ops: Operations an image, drawn with replacement.
        cutout: Largest side of the blanked square, as a share of the image's; the side is drawn uniformly from zero on,
            and the square may reach over the edge.
        fill: Colour of what is blanked or moved in, 8 bits per channel.
    """

    def __init__(self, num_ops: int, cutout: float, fill: tuple[int, int, int]):
        hparams = dict(
            img_mean=fill,
            translate_pct=0.3,
            interpolation=Image.Resampling.BILINEAR,
            magnitude_std=float('inf'),  # timm then draws the magnitude uniformly from 0 to 10, the most
        )
        self.ops = [AugmentOp(name, prob=13 / 14, magnitude=10, hparams=hparams) for name in STRONG_OPS]
        for op in self.ops:
            if op.name in ('Brightness', 'Color', 'Contrast', 'Sharpness'):
                op.level_fn = _enhance_factor
        self.num_ops, self.cutout, self.fill = num_ops, cutout, fill

    def __call__(self, image: Image.Image) -> Image.Image:
        for op in random.choices(self.ops, k=self.num_ops):
            image = op(image)
        width, height = image.size
        side = random.uniform(0, self.cutout) * width
        x, y = random.uniform(0, width) - side / 2, random.uniform(0, height) - side / 2
        box = [round(v) for v in (max(x, 0), max(y, 0), min(x + side, width), min(y + side, height))]
        if box[0] < box[2] and box[1] < box[3]:
            image.paste(self.fill, box)
        return image


def _fill(mean: Sequence[float]) -> tuple[int, int, int]:
    """8-bit colour of a mean of three channels or one."""
    return tuple(round(255 * m) for m in (mean if len(mean) == 3 else (mean[0],) * 3))


def build_views(
        img_size: int,
        mean: Sequence[float],
        in_chans: int = 3,
        interpolation: str = 'bilinear',
        crop_pct: float = 1.0,
        hflip: float = 0.5,
        crop_ratio: float = 0.875,
        num_ops: int = 3,
        cutout: float = 0.5,
) -> dict[str, Callable]:
    """Transforms of PIL RGB images by name: weak, strong and eval give uint8 `[C, S, S]`, resize a PIL image.

    resize: shorter side to img_size, which weak and strong begin with.
    weak: shorter side to img_size, flip, and a random crop out of a reflected border of `(1 - crop_ratio) * img_size`.
    strong: the weak one, then RandAugment with uniform magnitudes, then Cutout. eval: timm's.

    Args:
        img_size: S, pixels.
        mean: Per channel, of pixels in [0, 1]: the colour of what is blanked.
        in_chans: 3, or 1 for greyscale.
        interpolation: timm's name, for resizing.
        crop_pct: Share of the evaluation image that its centre crop keeps.
        hflip: Probability of a mirrored training image.
        crop_ratio: See above; 1 crops nothing.
        num_ops: Operations a strong view.
        cutout: Largest side of the blanked square, as a share of img_size; 0 for none.

    Raises:
        UsageError: If in_chans is neither 1 nor 3, or interpolation unknown.
    """
    if in_chans not in (1, 3):
        raise UsageError(f'--in-chans {in_chans}: expected 1 or 3')
    if interpolation not in INTERPOLATIONS:
        raise UsageError(f'--interpolation {interpolation}: expected one of {", ".join(INTERPOLATIONS)}')
    to_tensor = [*([transforms.Grayscale()] if in_chans == 1 else []), transforms.PILToTensor()]
    resize = transforms.Resize(img_size, interpolation=transforms.InterpolationMode(interpolation))
    geometry = [FlipCrop(img_size, int(img_size * (1 - crop_ratio)), hflip, resize)]
    # timm's own transform ends in its own PILToTensor, after which there is nothing left to convert.
    *evaluate, _ = create_transform(
        img_size, interpolation=interpolation, crop_pct=crop_pct, normalize=False,
    ).transforms
    return dict(
        resize=resize,
        weak=transforms.Compose([*geometry, *to_tensor]),
        strong=transforms.Compose([*geometry, StrongAugment(num_ops, cutout, _fill(mean)), *to_tensor]),
        eval=transforms.Compose([*bound_memory(evaluate), *to_tensor]),
    )


# --- Batches of tensors -----------------------------------------------------------------------------------------------

def _grey(image: torch.Tensor) -> torch.Tensor:
    """Luma of uint8 `[B, 3, H, W]` as PIL rounds it: `[B, 1, H, W]` uint8."""
    red, green, blue = image.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)[:, None]


def _blend(degenerate: torch.Tensor, image: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """From the degenerate image (factor 0) towards the image (factor 1), truncated as PIL does."""
    degenerate = degenerate.float()
    return torch.lerp(degenerate, image.float(), factor).to(torch.uint8)


def _autocontrast(image: torch.Tensor) -> torch.Tensor:
    low, high = (bound.double() for bound in image.flatten(2).aminmax(dim=2))  # doubles, as PIL computes its table
    scale = torch.where(high > low, 255 / (high - low), 1)
    offset = torch.where(high > low, -low * scale, 0)
    table = torch.arange(256, device=image.device) * scale[..., None] + offset[..., None]
    table = table.clamp(0, 255).to(torch.uint8)  # [B, 3, 256]
    return table.gather(2, image.flatten(2).long()).view_as(image)


def _smooth(image: torch.Tensor) -> torch.Tensor:
    """PIL's SMOOTH filter: 1 around a 5, the border left as it is."""
    pixels, smooth = image.float(), image.clone()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * pixels[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = (total / 13 + 0.5).to(torch.uint8)
    return smooth


def _transform(image: torch.Tensor, matrix: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Bilinear affine transform, each image by its own `[B, 2, 3]`, from output to input pixels."""
    height, width = image.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=image.device) + 0.5, torch.arange(width, device=image.device) + 0.5, indexing='ij',
    )
    at = torch.stack([x, y, torch.ones_like(x)], 2).view(-1, 3) @ matrix.transpose(1, 2)  # [B, H*W, 2]
    size = torch.stack([at.new_full((), width), at.new_full((), height)])
    inside = ((at >= 0) & (at < size)).all(2).view(-1, 1, height, width)
    grid = (2 * at / size - 1).view(-1, height, width, 2)
    moved = F.grid_sample(image.float(), grid, padding_mode='border', align_corners=False)
    # Truncated as PIL does; whole numbers that float32 makes a trifle too small must not lose one.
    return torch.where(inside, (moved + 1e-3).to(torch.uint8), fill.view(1, -1, 1, 1))


# What follows takes images `[b, 3, H, W]` uint8 and levels `[b, 1, 1, 1]`: shares of the greatest magnitude, in [0, 1).

def _enhance(degenerate: Callable) -> Callable:
    return lambda image, level: _blend(degenerate(image), image, 0.05 + 0.9 * level)


def _mean_grey(image: torch.Tensor) -> torch.Tensor:
    return (_grey(image).float().mean((1, 2, 3), keepdim=True) + 0.5).floor()


def _posterize(image: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    return image & (0xFF << (4 - (4 * level).int())).to(torch.uint8)


def _solarize(image: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    return torch.where(image < 256 - (256 * level).int(), image, 255 - image)


PIXEL_OPS = {
    'AutoContrast': lambda image, level: _autocontrast(image),
    'Brightness': _enhance(torch.zeros_like),
    'Color': _enhance(_grey),
    'Contrast': _enhance(_mean_grey),
    'Equalize': lambda image, level: tv.equalize(image),
    'PosterizeOriginal': _posterize,
    'Sharpness': _enhance(_smooth),
    'SolarizeIncreasing': _solarize,
}
GEOMETRIC_OPS = ('Rotate', 'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel')
ALL_OPS = (*PIXEL_OPS, *GEOMETRIC_OPS, 'Identity')


def _matrices(op: torch.Tensor, amount: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`[b, 2, 3]` of geometric operations, positions in GEOMETRIC_OPS, and their signed levels `[b]`."""
    rotate, shear_x, shear_y, translate_x, translate_y = (op == k for k in range(len(GEOMETRIC_OPS)))
    angle, share = torch.deg2rad(-30 * amount) * rotate, 0.3 * amount
    cos, sin, x, y = angle.cos(), angle.sin(), width / 2, height / 2
    return torch.stack([
        cos, sin + share * shear_x, x - cos * x - sin * y + share * width * translate_x,
        -sin + share * shear_y, cos, y + sin * x - cos * y + share * height * translate_y,
    ], 1).view(-1, 2, 3)


class BatchViews:
    """Weak and strong views of a batch: the distribution of `build_views`, and its pixels but for a few last bits.

    Args:
        kinds: weak or strong, by the name of each view to make.
        others: As of `build_views`. Images come with their shorter side at img_size already.
    """

    def __init__(
            self,
            kinds: dict[str, str],
            img_size: int,
            mean: Sequence[float],
            in_chans: int = 3,
            hflip: float = 0.5,
            crop_ratio: float = 0.875,
            num_ops: int = 3,
            cutout: float = 0.5,
    ):
        self.img_size, self.in_chans, self.hflip = img_size, in_chans, hflip
        self.border, self.num_ops, self.cutout = int(img_size * (1 - crop_ratio)), num_ops, cutout
        self.fill = torch.tensor(_fill(mean), dtype=torch.uint8)
        self.kinds = kinds
        self.sizes = [3 if kind == 'weak' else 3 + 3 * num_ops + 3 for kind in kinds.values()]
        self.num_numbers = sum(self.sizes)

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views by name, each `[B, C, S, S]` uint8.

        Args:
            images: `[B, H, W, 3]` uint8, on the device that does the work.
            numbers: `[B, num_numbers]` float32 in [0, 1), on the CPU: the random numbers of each image. Which rows get
                which operation is worked out there, so that a GPU is never waited for.
        """
        views = {}
        for (name, kind), part in zip(self.kinds.items(), numbers.split(self.sizes, 1)):
            view = self._flip_crop(images, part[:, :3])
            if kind == 'strong':
                view = self._strong(view, part[:, 3:-3].reshape(len(part), self.num_ops, 3))
                view = self._cutout(view, part[:, -3:])
            views[name] = _grey(view) if self.in_chans == 1 else view
        return views

    def _flip_crop(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        rows, columns = (self._window(length, numbers[:, k]) for k, length in enumerate(images.shape[1:3]))
        columns = torch.where(numbers[:, 2:] < self.hflip, columns.flip(1), columns)
        at = (rows[:, :, None] * images.shape[2] + columns[:, None, :]).flatten(1)
        at += torch.arange(len(at))[:, None] * images.shape[1] * images.shape[2]
        pixels = images.view(-1, 3)[at.to(images.device, non_blocking=True)]
        return pixels.transpose(1, 2).reshape(len(images), 3, self.img_size, self.img_size)

    def _window(self, length: int, numbers: torch.Tensor) -> torch.Tensor:
        """As of FlipCrop, `[B, S]`."""
        start = (numbers * (length + 2 * self.border - self.img_size + 1)).long() - self.border
        window = (start[:, None] + torch.arange(self.img_size)).abs()
        return torch.where(window < length, window, 2 * (length - 1) - window)

    def _strong(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        device, (height, width) = images.device, images.shape[2:]
        op, level = (numbers[..., 0] * len(ALL_OPS)).long(), numbers[..., 1]
        sign = torch.where(numbers[..., 2] < 0.5, -1., 1.)
        for k in range(self.num_ops):
            for j, function in enumerate(PIXEL_OPS.values()):
                rows = (op[:, k] == j).nonzero().squeeze(1)
                strength = level[rows, k].view(-1, 1, 1, 1).to(device, non_blocking=True)
                rows = rows.to(device, non_blocking=True)
                images[rows] = function(images[rows], strength)
            which = op[:, k] - len(PIXEL_OPS)
            rows = ((which >= 0) & (which < len(GEOMETRIC_OPS))).nonzero().squeeze(1)
            matrix = _matrices(which[rows], (level * sign)[rows, k], height, width).to(device, non_blocking=True)
            rows = rows.to(device, non_blocking=True)
            images[rows] = _transform(images[rows], matrix, self.fill.to(device, non_blocking=True))
        return images

    def _cutout(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Blanks a square of each image; bounds are rounded to whole pixels, half to even, as of StrongAugment."""
        side, x, y = (numbers * torch.tensor([self.cutout, 1, 1])).T * self.img_size
        hidden = []
        for centre in (y, x):
            low, high = (centre - side / 2).clamp(min=0).round(), (centre + side / 2).clamp(max=self.img_size).round()
            pixel = torch.arange(self.img_size)
            hidden.append((pixel >= low[:, None]) & (pixel < high[:, None]))
        hidden = (hidden[0][:, :, None] & hidden[1][:, None, :])[:, None].to(images.device, non_blocking=True)
        return torch.where(hidden, self.fill.to(images.device, non_blocking=True).view(1, 3, 1, 1), images)
