"""Random numbers are a function of their address: seed, step, sample, element, purpose, layer."""

import math
from unittest.mock import Mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ict_kernels import philox
from ict_kernels.philox import dropout_keep_mask, flip_bits, normal, uniform_bits


def philox_in_python(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 on Python's unbounded integers, from the paper."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 % 2**32, (p0 >> 32) ^ c[3] ^ k1, p0 % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return tuple(c)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_published_known_answers_of_random123(counter, key, expected):
    words = philox.philox(*map(torch.tensor, (*counter, *key)))
    assert tuple(int(w) for w in words) == expected
    assert philox_in_python(counter, key) == expected


def test_compiled_chunked_and_plain_rounds_give_the_same_bits(monkeypatch):
    calls = 3 * philox._CHUNK + 17
    c0 = torch.arange(calls)
    c1 = (c0 * 2654435761) & 0xFFFFFFFF
    constants = torch.tensor([0xFFFFFFFF, 0x9ABCDEF0, 0x80000001, philox.DROPOUT << 16 | 65535])
    plain = philox._packed_words(c0, c1, constants)
    assert torch.equal(philox._rounds(c0, c1, constants), plain)
    assert philox.cpu_path() == "compiled" or philox.cpu_path().startswith("eager: ")
    monkeypatch.setattr(philox, "_compiled", None)
    monkeypatch.setattr(philox, "_no_compiler", "this test")
    assert philox.cpu_path() == "eager: this test"
    assert torch.equal(philox._rounds(c0, c1, constants), plain)
    monkeypatch.setattr(philox, "_has_numpy", False)
    assert torch.equal(philox._rounds(c0, c1, constants), plain)
    last = philox_in_python((calls - 1, int(c1[-1]), 0x80000001, 3 << 16 | 65535), (0xFFFFFFFF, 0x9ABCDEF0))
    assert [int(w) % 2**64 for w in plain[-1]] == [last[0] | last[1] << 32, last[2] | last[3] << 32]


@pytest.mark.parametrize("calls", [1, 7, 8191])
def test_few_rounds_have_the_same_bits_by_numpy_by_torch_and_when_they_are_watched(calls, monkeypatch):
    c0 = torch.arange(calls) + (2**32 - calls)
    c1 = (c0 * 2654435761) & 0xFFFFFFFF
    constants = torch.tensor([0xFFFFFFFF, 0x9ABCDEF0, 0x80000001, philox.DROPOUT << 16 | 65535])
    plain = philox._packed_words(c0, c1, constants)
    by_numpy = Mock(wraps=philox._packed_by_numpy)
    monkeypatch.setattr(philox, "_packed_by_numpy", by_numpy)
    assert torch.equal(philox._rounds(c0, c1, constants), plain)
    assert by_numpy.call_count == 1
    with FlopCounterMode(display=False):
        assert torch.equal(philox._rounds(c0, c1, constants), plain)
    seen = torch.func.vmap(lambda x: x + philox._rounds(c0, c1, constants)[0, 0])(torch.zeros(2).long())
    assert torch.equal(seen, plain[0, 0].expand(2))
    assert by_numpy.call_count == 1, "what is watched is torch's own operations"
    monkeypatch.setattr(philox, "_has_numpy", False)
    assert torch.equal(philox._rounds(c0, c1, constants), plain)


def test_without_a_compiler_the_draw_still_works_and_says_why(monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no g++ here\nand more")

    expected = dropout_keep_mask((64, 32, 8, 8), 0.5, seed=1)
    monkeypatch.setattr(philox, "_compiled", None)
    monkeypatch.setattr(philox, "_no_compiler", None)
    monkeypatch.setattr(torch, "compile", no_compiler)
    assert torch.equal(dropout_keep_mask((64, 32, 8, 8), 0.5, seed=1), expected)
    assert philox.cpu_path() == "eager: RuntimeError: no g++ here"


def test_one_compilation_serves_every_shape_mode_and_autocast():
    from torch._dynamo.utils import counters

    dropout_keep_mask((64, 32, 8, 8), 0.5, seed=1)
    before = counters["stats"]["unique_graphs"]
    for shape in ((65, 32, 8, 8), (1, 64, 32, 32), (4096, 8), (7, 6, 33, 35)):
        dropout_keep_mask(shape, 0.3, seed=torch.tensor([1, 2]))
        normal(shape, seed=3)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        dropout_keep_mask((64, 32, 8, 8), 0.5, seed=1)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize(
    "shape", [(3, 5), (2, 6, 7), (2, 5, 3, 7), (2, 3, 2, 3, 4), (1, 1, 1, 1), (0, 4, 2, 2)]
)
def test_a_lane_of_the_mask_is_the_16_bits_at_its_address(shape):
    seed, step, layer, offset, p = 0x123456789ABCDEF0, 77, 9, 1000, 0.3
    mask = dropout_keep_mask(shape, p, torch.tensor([seed, step]), offset, layer)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    elements = mask.movedim(1, -1).reshape(shape[0], math.prod(shape[1:]))  # channels-last order
    for sample, row in enumerate(elements.tolist()):
        for element, kept in enumerate(row):
            counter = (element // 8, offset + sample, step, philox.DROPOUT << 16 | layer)
            words = philox_in_python(counter, (seed % 2**32, seed >> 32))
            lane = words[element % 8 // 2] >> 16 * (element % 2) & 0xFFFF
            assert kept == (lane >= round(p * 65536))


def test_the_noise_is_box_muller_of_the_words_at_its_address():
    shape, seed, step, offset = (2, 3, 3, 5), -5, 6, 7
    noise = normal(shape, torch.tensor([seed, step]), offset, philox.INITIAL, layer=2)
    assert noise.dtype == torch.float32
    elements = noise.movedim(1, -1).reshape(2, -1)
    for sample in range(2):
        for element in range(45):
            counter = (element // 4, offset + sample, step, philox.INITIAL << 16 | 2)
            words = philox_in_python(counter, (seed % 2**32, (seed >> 32) % 2**32))
            first, second = words[:2] if element % 4 < 2 else words[2:]
            radius = math.sqrt(-2 * math.log(first * 2.0**-32 + 2.0**-33))
            turn = math.cos if element % 2 == 0 else math.sin
            exact = radius * turn(2 * math.pi * second * 2.0**-32)
            assert float(elements[sample, element]) == pytest.approx(exact, abs=2e-6)


def test_the_noise_is_standard_normal():
    scipy_stats = pytest.importorskip("scipy.stats")
    z = normal((64, 16, 32, 32), seed=11).flatten().double()
    count = z.numel()
    assert abs(float(z.mean())) < 4 / math.sqrt(count)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / count)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / count)
    assert scipy_stats.kstest(z[:200_000].numpy(), "norm").pvalue > 1e-3
    assert float(z.abs().max()) < 6.77


def test_extreme_words_give_finite_noise(monkeypatch):
    extreme = torch.tensor([0, 0, -1, -1, 2**31, -(2**31), 2**63 - 1, -(2**63)]).view(1, 4, 2)
    monkeypatch.setattr(philox, "_draw", lambda *args: extreme)
    assert torch.isfinite(normal((1, 16), seed=0)).all()


@pytest.mark.parametrize("p", [0.0, 1 / 65536, 0.1, 0.3, 0.5, 0.9, 0.9999])
def test_the_mask_keeps_the_right_share(p):
    mask = dropout_keep_mask((64, 16, 32, 32), p, seed=5)
    share = 1 - round(p * 65536) / 65536
    deviation = math.sqrt(share * (1 - share) / mask.numel())
    assert abs(float(mask.double().mean()) - share) <= 5 * deviation


def draws(seed, offset, count):
    return (
        uniform_bits(count, seed, offset),
        normal((count, 3, 5, 5), seed, offset),
        dropout_keep_mask((count, 3, 5, 5), 0.4, seed, offset, layer=3),
    )


@pytest.mark.parametrize("seed", [123, torch.tensor([123, 45])])
def test_a_batch_drawn_in_parts_equals_the_batch_drawn_whole(seed):
    whole = draws(seed, 0, 10)
    parts = [draws(seed, 0, 3), draws(seed, torch.tensor(3), 4), draws(seed, 7, 3)]
    for together, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(together, torch.cat(pieces))


def test_each_part_of_the_address_matters():
    base = normal((4, 4, 4, 4), torch.tensor([1, 2]), 0, philox.NOISE, layer=0)
    others = [
        normal((4, 4, 4, 4), torch.tensor([2, 2]), 0, philox.NOISE),
        normal((4, 4, 4, 4), torch.tensor([1 + 2**32, 2]), 0, philox.NOISE),
        normal((4, 4, 4, 4), torch.tensor([1, 3]), 0, philox.NOISE),
        normal((4, 4, 4, 4), torch.tensor([1, 2]), 4, philox.NOISE),
        normal((4, 4, 4, 4), torch.tensor([1, 2]), 0, philox.INITIAL),
        normal((4, 4, 4, 4), torch.tensor([1, 2]), 0, philox.NOISE, layer=1),
    ]
    for other in others:
        assert float((base * other).mean().abs()) < 0.35  # independent: standard deviation 1/16
        assert not torch.equal(base, other)


def test_the_seeds_of_layers_draw_what_the_layers_numbers_draw():
    seeds = philox.layer_seeds(torch.tensor([-7, 2**32 - 1]), 2**16)
    for layer in (0, 1, 9, 2**16 - 1):
        word, *_ = philox_in_python((0, 4, 2**32 - 1, philox.DROPOUT << 16 | layer), (2**32 - 7, 2**32 - 1))
        assert int(uniform_bits(1, seeds[layer], 4, philox.DROPOUT)) == word
        assert int(uniform_bits(1, torch.tensor([-7, 2**32 - 1]), 4, philox.DROPOUT, layer=layer)) == word
    with pytest.raises(ValueError, match="layer"):
        philox.layer_seeds(1, 2**16 + 1)


def test_a_seed_may_be_a_column_of_a_table_though_kernels_read_it_by_its_address():
    table = torch.tensor([[5, 6], [7, 8]])
    seed = philox.seed_tensor(table[:, 0])
    assert seed.tolist() == [5, 7]
    assert seed.stride() == (1,)
    assert torch.equal(uniform_bits(4, table[:, 0]), uniform_bits(4, torch.tensor([5, 7])))


def test_seeds_are_taken_modulo_2_64_and_an_int_means_step_0():
    for seed, same in ((-1, 2**64 - 1), (5, torch.tensor([5, 0])), (2**63, -(2**63))):
        assert torch.equal(uniform_bits(4, seed), uniform_bits(4, same))


def test_no_seed_follows_torch_manual_seed():
    torch.manual_seed(1)
    first, second = uniform_bits(8, None), uniform_bits(8, None)
    torch.manual_seed(1)
    assert torch.equal(first, uniform_bits(8, None))
    assert not torch.equal(first, second)


def test_flip_bits_are_fair_and_addressed_by_the_global_sample_number():
    numbers = torch.arange(2**32 - 50_000, 2**32 + 50_000)
    bits = flip_bits(3, numbers)
    assert bits.dtype == torch.uint8
    assert abs(float(bits.double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(100_000)
    shuffled = torch.randperm(100_000)
    assert torch.equal(flip_bits(3, numbers[shuffled].view(100, -1)).flatten(), bits[shuffled])
    for place in (0, 50_000, 99_999):
        number = int(numbers[place])
        words = philox_in_python((number % 2**32, number >> 32, 0, philox.FLIP << 16), (3, 0))
        assert int(bits[place]) == words[0] & 1


@pytest.mark.parametrize("p", [-0.1, 1.0, 0.999999, math.nan])
def test_a_dropout_that_keeps_nothing_is_refused(p):
    with pytest.raises(ValueError, match="dropout must be in"):
        dropout_keep_mask((1, 8), p, seed=1)


def test_a_seed_tensor_of_another_form_is_refused():
    for seed in (torch.tensor(3), torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match="int64 of shape"):
            uniform_bits(3, seed)
    with pytest.raises(ValueError, match="layer"):
        uniform_bits(3, 0, layer=65536)


def test_fake_tensors_take_the_eager_path_and_leave_the_other_alone():
    """What estimates memory without having it: compiled code read addresses that are none, and crashed."""
    with FakeTensorMode():
        keep = philox.dropout_keep_mask((64, 64, 16, 16), 0.5, 3)
    assert isinstance(keep, FakeTensor)
    assert keep.shape == (64, 64, 16, 16)
    assert type(philox.dropout_keep_mask((64, 64, 16, 16), 0.5, 3)) is torch.Tensor
