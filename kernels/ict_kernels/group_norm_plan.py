"""Which algorithm computes a group norm of some shape, and with which tiles: measured facts as rules.

The algorithms are those of group_norm_resident.py and group_norm_split.py. `plan_of` chooses, and `planned`
overrides it to time others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

_TILE_BYTES = 65536  # tiles of twice as much spill (compiled ahead of time)
_CHUNK_BYTES = 20 * 2**20  # half of an A100's L2
_UNCHUNKED = 2**62
_MOST_WARPS = 16  # with more, sums of equal inputs differ: see FEW in group_norm_shared.py
_GRID_Y = 65535  # of CUDA: samples in a chunk, at most
_SECTOR_BYTES = 32


@dataclass(frozen=True)
class Plan:
    """How one shape is computed.

    Attributes:
        resident: one pass over tiles held in registers; else split.
        rows: pixels per tile, a power of two: all of them if resident.
        widths: channels of a tile, in two parts, each a power of two: 72 channels are 64 + 8. The second may
            be 0, and the first may be wider than what it holds.
        groups: whole groups per tile if resident; else 0.
        num_warps: of each program.
        maxnreg: the most registers of a thread; None: as the compiler sees fit.
        chunk: samples that a split pass takes at once.
        slices: forward, if resident: into how many the parts of a tile are cut, by rows; more than one keep
            it in 16 bits.
    """

    resident: bool
    rows: int
    widths: tuple[int, int]
    groups: int
    num_warps: int
    maxnreg: int | None
    chunk: int
    slices: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class _Wishes:
    """The arguments of `planned`."""

    resident: bool | None = None
    groups: int | None = None
    rows: int | None = None
    num_warps: int | None = None
    maxnreg: int | None = None
    chunk_bytes: int | None = None


_wishes = _Wishes()


@contextmanager
def planned(
    *,
    resident: bool | None = None,
    groups: int | None = None,
    rows: int | None = None,
    num_warps: int | None = None,
    maxnreg: int | None = None,
    chunk_bytes: int | None = None,
) -> Iterator[None]:
    """Overrides the plan of the Triton kernels, to time variants: `with planned(num_warps=8, maxnreg=128):`.

    In force for whatever is launched meanwhile, or captured into a graph: forward and backward, every shape,
    all threads. What is not given is chosen as ever; contexts do not add up, the innermost counts. Results
    stay within rounding, but are not bit for bit those of another plan.

    Args:
        resident: True for one pass over tiles in registers, False for split.
        groups: in a resident tile (and so implies one): divides the number of groups. The limits on a tile's
            size do not hold: it may spill.
        rows: pixels in a split tile, a power of two.
        num_warps: of each program, a power of two, at most 16. The small kernels that merge partial sums keep
            theirs.
        maxnreg: the most registers of a thread, in the same kernels.
        chunk_bytes: of x (and dy) that the passes of split take at once, to stay in L2; one sample at least.
    Raises:
        ValueError: for a number that is not a power of two where it must be, or too many warps; and by a norm
            whose shape cannot be computed so.
    """
    global _wishes
    for name, value in (("rows", rows), ("num_warps", num_warps)):
        if value is not None and value != power_of_2(value):
            raise ValueError(f"{name} must be a power of two, got {value}")
    if num_warps is not None and num_warps > _MOST_WARPS:
        raise ValueError(f"num_warps must be at most {_MOST_WARPS}, got {num_warps}")
    if groups is not None and resident is False:
        raise ValueError(f"groups = {groups} are of a resident tile, which resident=False excludes")
    before = _wishes
    _wishes = _Wishes(True if groups else resident, groups, rows, num_warps, maxnreg, chunk_bytes)
    try:
        yield
    finally:
        _wishes = before


@lru_cache
def chunk_bytes_of(device: torch.device) -> int:
    """Of x (and dy) that the passes of split take at once, so that the second finds them in L2.

    All of them on Hopper and Blackwell's data centre GPUs. A chunk costs microseconds, of launches and of
    processors that stand idle at its end; to read 20 MB again takes 13 us from an A100's memory, but 7 from
    an H100's and 5 from an H200's. There chunks of 20 MB took 1.2 to 2.1 times as long as none; the other
    GPUs were not timed.
    """
    if device.type != "cuda":
        return _UNCHUNKED
    properties = torch.cuda.get_device_properties(device)
    worth_it = properties.major not in (9, 10) and properties.L2_cache_size >= 2 * _CHUNK_BYTES
    return _CHUNK_BYTES if worth_it else _UNCHUNKED


def plan_of(
    count: int,
    channels: int,
    pixels: int,
    num_groups: int,
    itemsize: int,
    backward: bool,
    dropout: bool = False,
    chunk_bytes: int = _UNCHUNKED,
) -> Plan:
    """The algorithm for x (count, channels, pixels), or what `planned` wishes instead.

    Args:
        count, channels, pixels, num_groups: of x.
        itemsize: bytes of an element of x.
        backward: of the backward pass.
        dropout: some is applied.
        chunk_bytes: `chunk_bytes_of` x's device.
    Raises:
        ValueError: where x cannot be computed as wished.
    """
    shape = count, channels, pixels, num_groups, itemsize, backward, dropout
    return _plan_for(_wishes, chunk_bytes, *shape)


class _Shape(NamedTuple):
    """What `plan_of` is asked about."""

    samples: int
    channels: int
    pixels: int
    num_groups: int
    itemsize: int
    backward: bool
    dropout: bool

    @property
    def share(self) -> int:
        """A thread has one in so many of the elements that it has elsewhere."""
        return 4 if self.dropout and self.channels % 8 != 0 else 1


@lru_cache(4096)
def _plan_for(wishes: _Wishes, chunk_bytes: int, *given: int) -> Plan:
    """`plan_of`: resident where a tile fits, else split.

    A resident tile bundles groups until a row of it fills at least two of memory's 32-byte sectors, and up to
    128 bytes as long as several tiles fit on a processor. Forward at 32 x 32, that is a tile that registers
    hold in 16 bits alone, 128 elements for each of 256 threads: 1.19 and 1.21 times as fast on an H200 as
    rows of one sector in fp32. Backward, where none of two sectors fits (32 x 32), rows of one whole sector
    do; but the registers hold one such tile on a processor, whose program waits most of the time. There split
    was 1.24 to 1.28 times as fast, but 0.83 times with dropout, whose mask it draws twice.

    With dropout, smaller tiles in 16 bits were 1.04 to 1.13 times as fast forward at 16 x 16; at 8 x 8, and
    without dropout, 0.92 to 1.03 times.

    Where the chosen rows end within a sector (576, 960 and 1152 channels at 16 x 16) split was 1.10 to 1.55
    times as fast forward, backward 1.24 and 1.30, with dropout 0.94, so not there; at 8 x 8 0.65. Forward a
    tile of whole sectors is chosen before; backward those of 80 channels spill. Tiles of all channels have no
    ends of rows. (results/norm-plans-NVIDIA-H200-20261128.json)

    A split tile has 64 elements per thread; forward in 16 bits and without dropout 128, which was 1.04 to
    1.14 times as fast there, and once 0.99.

    Where 8 does not divide the channels each element has a dropout draw of its own, and a thread a quarter of
    the elements: with as many as elsewhere kernels spilled, up to 3,144 bytes (compiled ahead of time).
    """
    shape = _Shape._make(given)
    tile = _resident_tile(wishes, shape)
    if tile is not None and wishes.resident is None:
        ragged = tile.row_bytes % _SECTOR_BYTES != 0 and tile.groups < shape.num_groups
        split_is_faster = (shape.pixels >= 256 and ragged and not (shape.backward and shape.dropout)) or (
            shape.pixels >= 1024 and shape.backward and not shape.dropout
        )
        tile = None if split_is_faster else tile
    if tile is not None and wishes.resident is not False:
        return _resident_plan(wishes, tile, shape)
    return _split_plan(wishes, shape, chunk_bytes)


@dataclass(frozen=True)
class _Tile:
    """Of a resident program: whole groups, the parts that their channels are held in, all elements that the
    parts have place for, and bytes of a row of channels."""

    groups: int
    widths: tuple[int, int]
    elements: int
    row_bytes: int


def _resident_tile(wishes: _Wishes, shape: _Shape) -> _Tile | None:
    """The best tile that registers hold; None if there is none.

    Raises:
        ValueError: if there is none, and one is wished for.
    """
    _, channels, pixels, num_groups, itemsize, backward, dropout = shape
    most_elements = 8192 if shape.share > 1 else 20480 if backward else 32768
    candidates = []
    for groups in range(1, num_groups + 1):
        width = groups * (channels // num_groups)
        if num_groups % groups or (
            channels % 8 == 0 and width % 8 != 0 and (dropout or groups != wishes.groups)
        ):
            continue
        widths = parts(width)
        tile = _Tile(groups, widths, power_of_2(pixels) * sum(widths), width * itemsize)
        whole = tile.row_bytes % _SECTOR_BYTES == 0 or width == channels
        fits = tile.elements * itemsize <= _TILE_BYTES and tile.elements <= most_elements
        chosen = fits and (whole or tile.row_bytes >= 2 * _SECTOR_BYTES)
        if wishes.groups is not None:
            chosen = groups == wishes.groups
        if chosen:
            candidates.append((whole, tile))
    if not candidates:
        if wishes.resident:
            raise ValueError(
                f"no resident tile of {wishes.groups or 'any'} groups for {channels} channels in {num_groups}"
                f" groups and {pixels} pixels"
            )
        return None
    if pixels >= 256 and not backward and any(whole for whole, _ in candidates):
        candidates = [each for each in candidates if each[0]]
    tiles = [tile for _, tile in candidates]
    # several programs to a processor: 8,192 elements, or where that is too narrow 16,384, and forward, where
    # 16 bits are held as they are, twice as many
    most_wide = 16384 if backward else 32768
    wide = [tile for tile in tiles if tile.elements <= most_wide and tile.row_bytes >= 2 * _SECTOR_BYTES]
    roomy = [tile for tile in wide if tile.elements <= 8192 and tile.row_bytes <= 128]
    return roomy[-1] if roomy else wide[0] if wide else tiles[0]


def _resident_plan(wishes: _Wishes, tile: _Tile, shape: _Shape) -> Plan:
    samples, _, pixels, _, itemsize, backward, dropout = shape
    rows = power_of_2(pixels)
    # About 64 elements per thread, forward up to 96 and, of tiles in 16 bits, 128: half as many take more
    # instructions for each. 128 with dropout and rows beyond the image spilled.
    large = tile.elements > 16384 and itemsize == 2 and not (dropout and rows > pixels)
    per_warp = (2304 if backward else 4096 if large else 3072) // shape.share
    num_warps = wishes.num_warps or min(_MOST_WARPS, power_of_2(-(-tile.elements // per_warp)))
    per_thread = tile.elements // (32 * num_warps)
    in_16_bits = not backward and itemsize == 2 and (per_thread > 96 or (dropout and pixels >= 256))
    at_once = 256 * num_warps  # elements: 8 for each thread
    slices = [min(rows, max(1, rows * width // at_once)) if in_16_bits else 1 for width in tile.widths]
    maxnreg = wishes.maxnreg or (128 if in_16_bits and per_thread > 96 else None)
    return Plan(True, rows, tile.widths, tile.groups, num_warps, maxnreg, samples, (slices[0], slices[1]))


def _split_plan(wishes: _Wishes, shape: _Shape, chunk_bytes: int) -> Plan:
    samples, channels, pixels, _, itemsize, backward, dropout = shape
    width = min(64, power_of_2(channels))
    sample_bytes = channels * pixels * itemsize * (2 if backward else 1)
    if sample_bytes > chunk_bytes:  # L2 does not hold one: chunks would be launches and nothing else
        chunk_bytes = _UNCHUNKED
    chunk = min(samples, _GRID_Y, max(1, (wishes.chunk_bytes or chunk_bytes) // sample_bytes))
    elements = 8192 if backward or dropout or itemsize > 2 else 16384
    rows = min(power_of_2(pixels), wishes.rows or elements // shape.share // width)
    return Plan(False, rows, (width, 0), 0, wishes.num_warps or 4, wishes.maxnreg, chunk)


def parts(width: int) -> tuple[int, int]:
    """Two powers of two (or one and 0) that hold `width` channels."""
    first = power_of_2(width + 1) // 2
    second = power_of_2(width - first) if width > first else 0
    return (2 * first, 0) if second == first else (first, second)


def power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
