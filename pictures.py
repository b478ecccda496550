"""One picture: an encoded file to 8-bit RGB, the formats that count, and how many bits and pixels it may have."""
import functools
import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps, TiffImagePlugin

MAX_PIXELS = 178_956_970  # where Pillow refuses by itself
Image.MAX_IMAGE_PIXELS = None  # decode_image has the limit, as a flag can then move it, in spawned workers as well
LOOKED_AT = 32  # pictures of a set by which its bits are told
FRAMES_LOOKED_AT = 500  # files whose kind may hold several pictures, which are looked at for that
FRAME_ENDINGS = ('.gif', '.tif', '.tiff', '.webp', '.apng')
# What Pillow's plugins raise on a file that is broken; AVIF's a RuntimeError, SPIDER's an AttributeError.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, LookupError, TypeError, AttributeError,
                 OverflowError, struct.error, zlib.error)
WHITE_IS_ZERO = 0  # of TIFF's PhotometricInterpretation


@functools.cache
def picture_extensions() -> frozenset[str]:
    """Endings, in lower case, of all files that Pillow can decode here."""
    def decodes(form: str) -> bool:
        opener = Image.OPEN[form][0]
        if isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile) or form == 'MPEG':
            return False  # Pillow knows such a file, but has no decoder for it
        return form != 'EPS' or bool(EpsImagePlugin.has_ghostscript())

    known = Image.registered_extensions()  # before OPEN, as it loads the plugins
    return frozenset(ending for ending, form in known.items() if form in Image.OPEN and decodes(form))


def bits_in_use(largest: int) -> int:
    """Bits of the range that a largest value points to: 8, 10, 12, 14, 16, and so on in twos."""
    return max(8, -(-largest.bit_length() // 2) * 2)


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith('I')


def decode_image(
        data: bytes | str | Path | np.ndarray,
        least: int | None = None,
        bits: int = 8,
        max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Encoded bytes, a path or a uint8 `[H, W, 3]` or `[H, W]` array to an upright 8-bit RGB picture.

    Honours the EXIF orientation, resolves palettes and CMYK, and drops an alpha channel. Greyscale of 16 or 32 bits is
    scaled by the range in use, which need not be the file's: cameras and microscopes store 10, 12 or 14 bits in 16. The
    range is `bits`, which is the whole set's, so that a dark picture stays darker than a bright one, and what is above
    it is cut; of a set without a known range (8) it is that of `bits_in_use` for the picture's largest value.

    Args:
        data: The picture.
        least: A JPEG is decoded at a half, a quarter or an eighth of its size as long as its sides keep that many
            pixels, which costs that much less.
        bits: Of the set that the picture belongs to; see `find_bits`.
        max_pixels: More are refused.

    Raises:
        One of DECODE_ERRORS: If the data is no complete image, or too large, or its values have no known range.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data).convert('RGB')
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f'its {image.width} x {image.height} pixels are more than {max_pixels}; --max-pixels '
                             f'{image.width * image.height} allows them')
        if least is not None:
            image.draft(None, (least, least))
        image.load()
        negative = getattr(image, 'tag_v2', {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
        image = ImageOps.exif_transpose(image)
        if _is_deep(image):
            image = _to_eight_bits(image, bits)
            if negative:  # of 8 bits or less Pillow turns it itself
                image = ImageOps.invert(image)
        elif image.mode == 'F':
            raise ValueError('floating-point pixels have no known range; store the image with 8 or 16 bits')
        if image.mode in ('P', 'PA', 'LA'):
            image = image.convert('RGBA')
        return image.convert('RGB')


def _to_eight_bits(image: Image.Image, bits: int) -> Image.Image:
    pixels = np.asarray(image)
    if pixels.min() < 0:
        raise ValueError('pixels below 0 (or from 2^31 on) have no known range; store the image with 8 or 16 bits')
    bits = bits if bits > 8 else bits_in_use(int(pixels.max()))
    most = min(2 ** bits - 1, np.iinfo(pixels.dtype).max)
    return Image.fromarray((np.minimum(pixels, most) >> (bits - 8)).astype(np.uint8))


def _find(
        data: Callable[[int], bytes | str | np.ndarray],
        index: Sequence[int],
        holds: Callable[[Image.Image], bool],
) -> list[int]:
    """Which of the pictures are such, as an opened one tells; arrays never are, nor is what cannot be opened."""
    found = []
    for i in index:
        try:
            content = data(i)
            if isinstance(content, np.ndarray):
                continue
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                if holds(image):
                    found.append(i)
        except DECODE_ERRORS:  # told where the picture is asked for, by name
            continue
    return found


def count_frames(data: Callable[[int], bytes | str | np.ndarray], index: Sequence[int]) -> list[int]:
    """Which of the pictures are several (pages of a TIFF, frames of a GIF), of which `decode_image` takes the first.

    What a camera stores behind a JPEG, its preview, does not count.
    """
    return _find(data, index, lambda image: image.format != 'MPO' and getattr(image, 'is_animated', False))


def _is_transparent(image: Image.Image) -> bool:
    return (image.has_transparency_data and image.width * image.height <= MAX_PIXELS
            and image.convert('RGBA').getextrema()[3][0] < 255)


def count_transparent(data: Callable[[int], bytes | str | np.ndarray], index: Sequence[int]) -> list[int]:
    """Which of the pictures have parts that can be seen through, whose hidden colours `decode_image` shows."""
    return _find(data, index, _is_transparent)


def spread_indices(length: int, most: int) -> list[int]:
    """`most` of the numbers below a length, evenly spread, or all."""
    return np.unique(np.linspace(0, length - 1, most).astype(int)).tolist()


def find_bits(data: Callable[[int], bytes | str | np.ndarray], length: int) -> tuple[int, str]:
    """Bits of the range that a set's greyscale pictures of 16 or 32 bits use, and what is to be told about depth.

    Looks at LOOKED_AT pictures of the set, evenly spread, of which most sets just need their headers read.

    Args:
        data: Picture of an index, as `decode_image` takes it.
        length: Pictures in the set.

    Returns:
        The bits, 8 without such pictures, and a sentence, empty without any of 16 or 32 bits.
    """
    deep, colour = [], []
    for index in spread_indices(length, LOOKED_AT):
        try:
            content = data(index)
            if isinstance(content, np.ndarray):
                continue
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                if image.width * image.height > MAX_PIXELS:
                    continue
                if _is_deep(image):
                    deep.append(int(np.asarray(image).max()))
                elif image.tile and ';16' in str(image.tile[0][3]):
                    colour.append(int(np.asarray(image.convert('RGB')).max()))
        except DECODE_ERRORS:  # told where the picture is asked for, by name
            continue
    bits = bits_in_use(max(deep, default=0))
    if deep:
        cut = f'; what is above {2 ** bits - 1} in others is cut' if length > LOOKED_AT and bits > 8 else ''
        return bits, (f'greyscale of more than 8 bits, whose largest value is {max(deep)} (in {len(deep)} pictures '
                      f'looked at): taken as {bits} bits, of which the upper 8 are kept{cut}')
    if colour and max(colour) < 64:
        return bits, (f'colour of 16 bits, of which Pillow keeps the upper 8, but no value is above {max(colour)} of '
                      f'255 there (in {len(colour)} pictures looked at): nearly black; store the pictures with 8 bits')
    return bits, ''
