# mypy: disable-error-code="no-untyped-def"
"""Where every random number comes from: Philox4x32-10, addressed by position instead of by order of drawing.

Ten rounds turn a 128-bit counter and a 64-bit key into four 32-bit words (Salmon, Moraes, Dror & Shaw,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011). One round, with 32 x 32 -> 64 bit products and the
key bumped between rounds:

    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0))

    key     = run seed, (low, high) word
    counter = (call in the sample, number of the sample in the global batch, step, purpose << 16 | layer)

The layer can also be told by the seed, in the upper half of the step's 64 bits (`layer_seeds`): layers of one
shape are then one piece of compiled code.

A call is 4 words: 8 lanes of 16 bits (dropout) or 4 lanes of 32 bits (noise). Elements of a sample are
numbered channels-last, (h W + w) C + c, whatever their layout in memory: call = element // 8 and
lane = element % 8 (or // 4 and % 4). A number depends on (seed, step, sample, element, purpose, layer) and on
nothing else: not on the layout, the micro-batch, the rank, the backend or the order of the calls.

Words are int64 tensors holding 0 .. 2^32 - 1. Bytes: 16 read and 16 written per call.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._ops import add_op_namespace_prefix
from .triton_support import is_transformed, jit, tl

# Purposes: the high half of the counter's last word. Changing one changes every run; append only.
LEVELS = 1  # noise levels of a training batch, one word per sample
NOISE = 2  # Gaussian noise of a training batch
DROPOUT = 3  # dropout masks; the low half is the layer's number
FLIP = 4  # horizontal flips, one bit per sample of the whole run
INITIAL = 5  # Gaussian noise that sampling starts from (step = number of the sampling step)

_MASK32 = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
# 4,096 calls are 32 KiB per int64 tensor; the dozen that a round keeps alive stay in a 1 MiB L2.
_CHUNK = 4096
# Below this many calls the rounds (at most 1 ms) cost a run less than the compiler, which takes 20 s at
# first and 5 s in every later process: the noise of the digits preset stays below, dropout does not.
_COMPILE_FROM = 8192

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# MKL's vector functions, met for the first time by two threads at once, now and then give one of them values
# that are good to 1e-5 alone: in 5 of 40 processes, half of the first batch's noise. So one thread is first.
for _function in (torch.log, torch.cos, torch.sin, torch.exp):
    _function(torch.ones(8, dtype=torch.float32, device="cpu"))

try:
    torch.zeros((), device="cpu").numpy()
    _has_numpy = True
except RuntimeError:
    _has_numpy = False

Seed = int | Tensor | None
Words = tuple[Tensor, Tensor, Tensor, Tensor]


# --------------------------------------------------------------------------------------- the eager definition


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> Words:
    """Philox4x32-10 in int64 arithmetic: four output words from four counter words and two key words.

    Args:
        c0, c1, c2, c3, k0, k1: int64 tensors holding 0 .. 2^32 - 1; they broadcast together.
    Returns:
        Four int64 tensors holding 0 .. 2^32 - 1, of the broadcast shape.
    Source:
        Salmon et al., SC 2011; the constants are Random123's.
    """
    for _ in range(_ROUNDS):
        low0, high0 = _product(c0, _M0)
        low1, high1 = _product(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def _product(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """(low, high) words of a * multiplier, for a multiplier of at least 2^31.

    The product itself can pass 2^63, and signed overflow is undefined in the C++ that Inductor writes. With
    the multiplier taken as m - 2^32 it cannot, and the high word only lacks the 2^32 a that was left out.
    """
    product = a * (multiplier - 2**32)
    return product & _MASK32, (product >> 32) + a


def _packed_words(c0: Tensor, c1: Tensor, constants: Tensor) -> Tensor:
    """(calls, 2) int64, the four words of each call in memory order; constants = (k0, k1, c2, c3)."""
    k0, k1, c2, c3 = constants.unbind()
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    return torch.stack((w0 | (w1 << 32), w2 | (w3 << 32)), dim=-1)


# ------------------------------------------------------------------------------------ the CPU's quicker paths


def _packed_by_numpy(c0: Tensor, c1: Tensor, constants: Tensor) -> Tensor:
    """`_packed_words` in a third of the time: of few calls, most of torch's is that of its 160 operations.

    Raises:
        RuntimeError: by torch, if there is no numpy.
    """
    x0, x1, key0, key1, bumps = (
        words.view(torch.uint64).numpy()
        for words in (c0, c1, constants[:1], constants[1:2], torch.arange(_ROUNDS, device="cpu"))
    )
    x2, x3 = constants.view(torch.uint64)[2:, None].numpy()
    for k0, k1 in zip((key0 + bumps * _W0) & _MASK32, (key1 + bumps * _W1) & _MASK32, strict=True):
        first, second = x0 * _M0, x2 * _M1
        x0, x1, x2, x3 = (second >> 32) ^ x1 ^ k0, second & _MASK32, (first >> 32) ^ x3 ^ k1, first & _MASK32
    packed = c0.new_empty(c0.shape[0], 2)
    words = packed.view(torch.uint64).numpy()
    words[:, 0], words[:, 1] = x0 | (x1 << 32), x2 | (x3 << 32)
    return packed


def _eager_rounds() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The quicker form of `_packed_words` that there is here, if nobody watches torch's operations."""
    if _has_numpy and not is_transformed() and not is_in_torch_dispatch_mode():
        return _packed_by_numpy
    return _packed_words


_compiled: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
_no_compiler: str | None = None
_compile_lock = threading.Lock()


def cpu_path() -> str:
    """The path of large draws on a CPU: "compiled", "eager: <reason>", or "undecided" before the first."""
    if _compiled is not None:
        return "compiled"
    return "undecided" if _no_compiler is None else f"eager: {_no_compiler}"


def _compiled_rounds() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The rounds through torch.compile, made and checked on first use; None where there is no compiler."""
    global _compiled, _no_compiler
    with _compile_lock:
        if _compiled is None and _no_compiler is None:
            c0 = torch.arange(_COMPILE_FROM, device="cpu")
            constants = torch.tensor([_MASK32, 3 << 16, _MASK32, 0x80000000], device="cpu")
            probe = (c0, (c0 * 0x9E3779B9) & _MASK32, constants)
            try:
                # Not fullgraph: an error under a TorchDispatchMode (a FLOP counter), where eager runs.
                rounds = torch.compile(_packed_words, dynamic=True)
                if torch.equal(rounds(*probe), _packed_words(*probe)):
                    _compiled = rounds
                else:
                    _no_compiler = "the compiled rounds gave other bits"
            except Exception as error:  # any failure of a compiler is a reason to do without it
                _no_compiler = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return _compiled


def _rounds(c0: Tensor, c1: Tensor, constants: Tensor) -> Tensor:
    """_packed_words by the quickest path for this device; the bits are the same on all of them."""
    calls = c0.shape[0]
    fake = type(c0) is not Tensor  # of FakeTensorMode: compiled code would read memory that is not there
    if torch.compiler.is_compiling() or c0.device.type != "cpu" or fake:
        return _packed_words(c0, c1, constants)
    if calls < _COMPILE_FROM:
        return _eager_rounds()(c0, c1, constants)
    # Grad mode, inference mode and autocast are guards of the compiled function: here they never change.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        rounds = _compiled_rounds()
        if rounds is not None:
            return rounds(c0, c1, constants)
    eager = _eager_rounds()
    packed = torch.empty(calls, 2, dtype=torch.int64, device="cpu")
    for start in range(0, calls, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        packed[chunk] = eager(c0[chunk], c1[chunk], constants)
    return packed


# ------------------------------------------------------------------------------------------------- addressing


def seed_tensor(seed: Seed, device: torch.device | str | None = None) -> Tensor:
    """A seed in its one form, an int64 tensor (run seed, step) on `device`.

    Args:
        seed: an int (taken modulo 2^64; step 0), an int64 tensor of shape (2,), or None: drawn once from
            torch's default generator of the CPU, so that torch.manual_seed decides it. Inside torch.compile
            pass a tensor: every new int may be a new compilation.
        device: where the draw will happen.
    Raises:
        ValueError: if a tensor seed has another shape or dtype, or a number is no int.
    """
    if seed is None:
        drawn = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device="cpu")
        return torch.cat((drawn, torch.zeros_like(drawn))).to(device)
    if isinstance(seed, Tensor):
        if seed.shape != (2,) or seed.dtype != torch.int64:
            raise ValueError(
                "a seed tensor is int64 of shape (2,), (run seed, step); "
                f"got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        return seed.to(device).contiguous()  # kernels read it by its address
    if isinstance(seed, float | str | list | tuple):  # the first of which torch would cut off
        raise ValueError(f"a seed is an int, an int64 tensor (run seed, step) or None; got {seed!r}")
    if not -(2**63) <= seed < 2**63:  # only then: under torch.compile an int may be symbolic, of 64 bits
        seed = (seed + 2**63) % 2**64 - 2**63
    return torch.tensor([seed, 0], dtype=torch.int64, device=device)


def offset_arguments(offset: int | Tensor, device: torch.device | str) -> tuple[Tensor | None, int]:
    """An offset as the ops take it: an int64 tensor on `device`, or None; and an int, then 0.

    Raises:
        ValueError: if a tensor is not one integer, or a number is no int.
    """
    if isinstance(offset, Tensor):
        if offset.numel() != 1 or offset.dtype not in INTEGERS:
            raise ValueError(
                f"an offset is one integer, got a tensor of {offset.dtype} of shape {tuple(offset.shape)}"
            )
        return offset.to(device, torch.int64).reshape(()), 0
    if isinstance(offset, float):  # which torch would cut off
        raise ValueError(f"an offset is an int or a 0-dim int64 tensor, got {offset}")
    return None, offset


def layer_seeds(seed: Seed, layers: int, device: torch.device | str | None = None) -> Tensor:
    """The seeds of `layers` layers that draw as if each had been given its number: 0, 1, 2, ...

    `dropout_keep_mask(x, p, layer_seeds(seed, 9)[7])` is `dropout_keep_mask(x, p, seed, layer=7)`. But the
    number is data here, where an int is part of the compiled code: layers that are alike would be compiled
    one by one.

    Args:
        seed, device: as in `seed_tensor`.
        layers: at most 65,536.
    Returns:
        int64 (layers, 2): run seed, step + 2^32 layer.
    """
    _stream(0, layers - 1)
    seeds = seed_tensor(seed, device).repeat(layers, 1)
    seeds[:, 1] += torch.arange(0, layers << 32, 1 << 32, device=seeds.device)
    return seeds


def _draw(
    samples: int, calls: int, seed: Seed, offset: int | Tensor, device: torch.device, stream: int
) -> Tensor:
    """(samples, calls, 2) int64: packed words of every call of every sample, for c3 = stream."""
    if calls > 2**32:
        raise ValueError(
            f"a sample may spend 2^32 Philox calls, not {calls}: its elements would share numbers"
        )
    with torch.inference_mode(False), torch.no_grad():  # ordinary tensors, in whatever mode the caller is
        # (seed low, seed high, step low, step high) -> (k0, k1, c2, c3)
        constants = seed_tensor(seed, device).view(torch.int32).to(torch.int64) & _MASK32
        constants[3] = (constants[3] + stream) & _MASK32
        first, number = offset_arguments(offset, device)
        if first is None:
            first = torch.full((), number, dtype=torch.int64, device=device)
        if torch.compiler.is_compiling() and constants.device.type == "cpu":
            return _words_op(constants, first, samples, calls)
        return _words(constants, first, samples, calls)


def _words(constants: Tensor, offset: Tensor, samples: int, calls: int) -> Tensor:
    """(samples, calls, 2) int64 packed words; constants = (k0, k1, c2, c3)."""
    sample_n = (torch.arange(samples, device=offset.device) + offset) & _MASK32
    call = torch.arange(calls, device=offset.device)
    # contiguous, never a stride of 0, which would be one compilation more
    c0 = call.expand(samples, calls).contiguous().view(-1)
    c1 = sample_n[:, None].expand(samples, calls).contiguous().view(-1)
    return _rounds(c0, c1, constants).view(samples, calls, 2)


# For graphs on a CPU: torch 2.13's Inductor, which then sees counters that are made of indices, gives other
# bits from 16 samples of 64 calls on.
_words_op = torch.library.custom_op(add_op_namespace_prefix("philox_words"), _words, mutates_args=())


@_words_op.register_fake
def _(constants: Tensor, offset: Tensor, samples: int, calls: int) -> Tensor:
    return constants.new_empty((samples, calls, 2))


def _stream(purpose: int, layer: int) -> int:
    if not 0 <= layer < 2**16:
        raise ValueError(f"layer must be in 0 .. 65535, got {layer}")
    return purpose << 16 | layer


def _channels_last(lanes: Tensor, shape: Sequence[int]) -> Tensor:
    """(N, at least C*spatial) lanes in element order -> (N, C, *spatial), channels last in memory."""
    samples, elements = _sizes(shape)
    if len(shape) == 1:
        return lanes[:, 0]
    _, channels, *spatial = shape
    return lanes[:, :elements].reshape(samples, *spatial, channels).movedim(-1, 1)


def _sizes(shape: Sequence[int]) -> tuple[int, int]:
    """Samples, and elements of each: one in a shape (N,)."""
    if not shape:
        raise ValueError("numbers are drawn for a shape (N, ...), which a scalar does not have")
    return shape[0], _prod(shape[1:])


def _prod(numbers: Sequence[int]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total


# ------------------------------------------------------------------------------------------- public functions


def uniform_bits(
    count: int,
    seed: Seed,
    offset: int | Tensor = 0,
    purpose: int = LEVELS,
    *,
    layer: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """One 32-bit word per sample: word 0 of call 0.

    Args:
        count: number of samples.
        seed: int, int64 tensor (run seed, step) or None; see `seed_tensor`.
        offset: number of the first sample in the global batch, int or 0-dim int64 tensor.
        purpose, layer: the stream, one of this file's constants and a number below 2^16.
        device: where to draw; default: the seed tensor's device, else the CPU.
    Returns:
        (count,) int64, uniform on 0 .. 2^32 - 1.
    """
    packed = _draw(count, 1, seed, offset, _device(device, seed), _stream(purpose, layer))
    return packed[:, 0, 0] & _MASK32


def normal(
    shape: Sequence[int],
    seed: Seed,
    offset: int | Tensor = 0,
    purpose: int = NOISE,
    *,
    layer: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise by Box-Muller, 4 values per call.

    Words (w0, w1) give elements 4i and 4i + 1, words (w2, w3) give 4i + 2 and 4i + 3:
    r = sqrt(-2 ln u1) with u1 = w0 2^-32 + 2^-33, times cos and sin of 2 pi w1 2^-32, all in fp32. No value
    passes 6.77.

    Args:
        shape: (N, C, *spatial), or (N,).
        seed, offset, purpose, layer, device: as in `uniform_bits`.
    Returns:
        fp32 of the given shape, channels last in memory.
    """
    samples, elements = _sizes(shape)
    packed = _draw(samples, -(-elements // 4), seed, offset, _device(device, seed), _stream(purpose, layer))
    signed = packed.view(torch.int32).unflatten(-1, (2, 2)).to(torch.float32) * 2.0**-32
    # The words are read as signed. For the angle that is the same turn, measured from -pi and so rounded more
    # finely.
    fraction, turn = signed.unbind(-1)
    fraction = torch.where(fraction < 0, fraction + 1.0, fraction)
    radius = torch.sqrt(-2.0 * torch.log(fraction + 2.0**-33))
    angle = turn * (2.0 * torch.pi)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return _channels_last(pairs.flatten(1), shape)


def dropout_threshold(p: float) -> int:
    """Number of the 65,536 values of a 16-bit lane that are dropped, round(65536 p).

    Raises:
        ValueError: if p is outside [0, 1) or rounds to 1, where nothing would be kept.
    """
    threshold = round(p * 65536) if 0.0 <= p < 1.0 else -1
    if not 0 <= threshold < 65536:
        raise ValueError(f"dropout must be in [0, 1), at most 0.99999; got {p}")
    return threshold


def dropout_keep_mask(
    like: Tensor | Sequence[int],
    p: float,
    seed: Seed,
    offset: int | Tensor = 0,
    layer: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which elements dropout keeps: those whose 16-bit lane is at least round(65536 p).

    Args:
        like: a tensor (N, C, *spatial) or (N,), or such a shape.
        p: probability of dropping an element, applied as round(65536 p) / 65536.
        seed, offset: as in `uniform_bits`. Equal seeds give equal masks: so student and teacher share one.
        layer: number of the layer in the network, below 2^16; different layers have independent masks.
        device: where to draw; default: that of `like`, else of the seed.
    Returns:
        bool (N, C, *spatial), True where kept, channels last in memory.
    """
    if isinstance(like, Tensor):
        device = like.device if device is None else device
        like = like.shape
    threshold = dropout_threshold(p)
    samples, elements = _sizes(like)
    packed = _draw(samples, -(-elements // 8), seed, offset, _device(device, seed), _stream(DROPOUT, layer))
    # Flipping the top bit maps lanes 0 .. 65535 to -32768 .. 32767 in order. On a CPU two clamped int16
    # passes take half the time of `>=`, which int16 -> bool does one element at a time.
    lanes = packed.view(torch.int16).flatten(1) ^ -32768
    if threshold == 0:
        return _channels_last(torch.ones_like(lanes, dtype=torch.bool), like)
    border = threshold - 32768
    keep = (lanes.clamp_(border - 1, border) - (border - 1)).to(torch.bool)
    return _channels_last(keep, like)


def flip_bits(seed: int, sample_numbers: Tensor) -> Tensor:
    """One fair bit for each sample of a run: does its image appear mirrored this time?

    Args:
        seed: run seed, an int modulo 2^64.
        sample_numbers: int64 of any shape: n = step * global batch + place in it, counted over the whole run.
    Returns:
        uint8 of the same shape and device, 0 or 1: the low bit of word 0 for the counter (n low, n high, 0,
            FLIP << 16).
    """
    run_seed, _ = seed_tensor(seed, sample_numbers.device).unbind()
    zero = torch.zeros_like(run_seed)
    words = philox(
        sample_numbers & _MASK32,
        (sample_numbers >> 32) & _MASK32,
        zero,
        zero + (FLIP << 16),
        run_seed & _MASK32,
        (run_seed >> 32) & _MASK32,
    )
    return (words[0] & 1).to(torch.uint8)


def _device(device: torch.device | str | None, seed: Seed) -> torch.device:
    if device is not None:
        return torch.device(device)
    return seed.device if isinstance(seed, Tensor) else torch.device("cpu")


# ------------------------------------------------------------------------------------------- inside a kernel

_MUL0, _MUL1 = tl.constexpr(_M0), tl.constexpr(_M1)
_BUMP0, _BUMP1 = tl.constexpr(_W0), tl.constexpr(_W1)


@jit
def philox_words(c0, c1, c2, c3, k0, k1):
    """`philox` on uint32 values of any one shape (the keys may be scalars); returns four words."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, _MUL0), c0 * _MUL0
        high1, low1 = tl.umulhi(c2, _MUL1), c2 * _MUL1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += _BUMP0
        k1 += _BUMP1
    return c0, c1, c2, c3


@jit
def philox_call(seed_ptr, sample, call, stream):
    """The four words of one call: `seed_ptr` holds (run seed, step), stream = purpose << 16 | layer.

    The upper half of the step is added to the stream, as in `_draw`. `sample` (global, int64 or less) and
    `call` broadcast together; words are uint32 of that shape.
    """
    seed, step = tl.load(seed_ptr), tl.load(seed_ptr + 1)
    c0, c1 = tl.broadcast(call.to(tl.uint32), sample.to(tl.uint32))
    zero = c0 * 0
    return philox_words(
        c0,
        c1,
        zero + step.to(tl.uint32),
        zero + (tl.full((), stream, tl.uint32) + (step >> 32).to(tl.uint32)),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@jit
def interleave4(w0, w1, w2, w3):
    """[...] four times -> [..., 2, 2], which reshaped is their values in this order."""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@jit
def lanes16(w0, w1, w2, w3):
    """Four words of calls [...] -> [..., 2, 2, 2] lanes in 0 .. 65535 (int32), 8 in element order."""
    words = interleave4(w0, w1, w2, w3)
    return tl.join(words & 0xFFFF, words >> 16).to(tl.int32)


@jit
def normal4(w0, w1, w2, w3):
    """Four words of calls [...] -> [..., 2, 2] standard normal fp32, 4 in element order, as `normal`.

    Within 1e-6 of `normal` whatever the words are: 6.77, the largest radius, times errors of 6e-8 here and
    there in cos and sin, and the last bits of both logarithms.
    """
    r01, r23 = _radius(w0), _radius(w2)
    cos01, sin01 = _cos_sin(w1)
    cos23, sin23 = _cos_sin(w3)
    return interleave4(r01 * cos01, r01 * sin01, r23 * cos23, r23 * sin23)


@jit
def _radius(word):
    # As the eager definition: the word is read as signed, scaled, and 1 added where that is negative. tl.log
    # is libdevice's, good to the last bit near 1 too; tl.sqrt would be an approximation worth 8e-7 here.
    fraction = word.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    fraction = tl.where(fraction < 0, fraction + 1.0, fraction)
    return tl.sqrt_rn(-2.0 * tl.log(fraction + 1.1641532182693481e-10))


@jit
def _cos_sin(word):
    """cos and sin of 2 pi word 2^-32, without the branch, the fp64 and the stack of tl.cos and tl.sin.

    The word's top bits give the nearest multiple of pi/2, polynomials the rest (minimax on
    [-pi/4, pi/4]; their error is below 4e-9). The angle is rounded as the eager definition rounds it, up to
    2e-7 from the exact one: 1e-6 of the noise would not cover the difference. tl.fma with 0 is a product that
    no compiler may fuse into the subtraction, which would leave that rounding out.
    """
    signed = word.to(tl.int32, bitcast=True)
    angle = tl.fma(signed.to(tl.float32), tl.full(word.shape, 1.4629180943015876e-09, tl.float32), 0.0)
    quarter = ((signed >> 29) + 1) >> 1  # -2 .. 2
    turned = quarter.to(tl.float32)
    # pi/2 in two parts: the first product and difference are exact.
    x = (angle - turned * 1.57079637050628662109375) + turned * 4.37113882867379e-08
    y = x * x
    sine = x + x * y * (-0.16666654936689537 + y * (0.008332177686228012 - y * 0.0001951723466726311))
    cosine = 0.041666646854591316 + y * (-0.0013887366909519545 + y * 2.4438379427222838e-05)
    cosine = 1.0 + y * (-0.5 + y * cosine)
    odd = (quarter & 1) != 0
    cosine, sine = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    return cosine, tl.where((quarter & 2) != 0, -sine, sine)
