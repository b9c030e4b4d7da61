"""`evaluate` from end to end, with stand-ins for models whose quality is known."""

import dataclasses
import importlib
import importlib.metadata
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from ict_fast.cli import main
from ict_fast.config import Config
from ict_fast.consistency import load_model, sample
from ict_fast.data.pictures import to_uint8
from ict_fast.data.prepare import load_digits, prepare_digits
from ict_fast.data.store import open_store, write_store
from ict_fast.errors import InputError, TrainingError
from ict_fast.evaluation import chunks, evaluate, table
from ict_fast.evaluation.feature_networks import TorchScriptNetwork

# The package's name for it is the function of the same name.
evaluate_module = importlib.import_module("ict_fast.evaluation.evaluate")


class RemembersDigits(nn.Module):
    """Turns pure noise into a digit, picked by the first pixel, and anything else into the nearest digit."""

    def __init__(self, num_classes=0):
        super().__init__()
        config = Config()
        self.data_fingerprint = None
        self.config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, path="not there"),  # data/digits is, after `make demo`
            network=dataclasses.replace(config.network, num_classes=num_classes),
        )
        images, labels = load_digits()
        order = np.argsort(labels, kind="stable")
        self.images = nn.Parameter(torch.from_numpy(images[order]).permute(0, 3, 1, 2).float() / 127.5 - 1)
        self.first = torch.from_numpy(np.searchsorted(labels[order], np.arange(11)))
        self.seen_labels = []

    def forward(self, x, sigma, labels=None):
        assert not self.training, "evaluated in training mode"
        if sigma < 10:
            return self.images[torch.cdist(x.flatten(1), self.images.flatten(1)).argmin(1)]
        uniform = torch.special.ndtr(x[:, 0, 0, 0] / sigma).clamp(0, 1 - 1e-6)
        if labels is None:
            return self.images[(uniform * len(self.images)).long()]
        self.seen_labels.append(labels)
        begin, end = self.first[labels], self.first[labels + 1]
        return self.images[begin + (uniform * (end - begin)).long()]


class Paints(nn.Module):
    """Returns whatever it is told to."""

    def __init__(self, painter):
        super().__init__()
        self.config, self.data_fingerprint = Config(), None
        self.unused = nn.Parameter(torch.zeros(1))
        self.painter = painter

    def forward(self, x, sigma, labels=None):
        return self.painter(x)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="module")
def good(store):
    return evaluate(RemembersDigits(), store, count=2000)


def test_a_model_that_returns_real_digits_is_as_near_as_real_halves(good):
    halves = good["reference"]["halves"]
    assert good["one_step"]["frechet_distance"] < halves
    assert good["two_step"]["frechet_distance"] < halves
    assert good["one_step"]["relative_to_noise"] < 0.01
    assert good["one_step"]["relative_to_gaussian"] < 0.1


def test_a_model_that_returns_noise_scores_as_noise(store):
    noise = Paints(lambda x: torch.erf(x / 80 / 2**0.5))
    result = evaluate(noise, str(store), steps=(1,), count=2000)
    assert result["one_step"]["relative_to_noise"] == pytest.approx(1, abs=0.05)


def test_a_model_that_returns_one_image_scores_far_worse_than_a_gaussian(store):
    image = torch.from_numpy(load_digits()[0][0]).permute(2, 0, 1) / 127.5 - 1
    result = evaluate(Paints(lambda x: image.expand_as(x)), store, steps=(1,), count=100)
    assert result["one_step"]["relative_to_gaussian"] > 3


def test_the_result_is_json_with_what_is_needed_to_repeat_it(good, store):
    assert json.loads(json.dumps(good)) == good
    assert good["count"] == 2000
    assert good["seed"] == 0
    assert good["one_step"]["sigmas"] == [80.0]
    assert len(good["two_step"]["sigmas"]) == 2
    assert good["features"]["accuracy"] >= 0.97
    assert good["reference_path"] == str(store)
    assert len(good["reference_fingerprint"]) == 64
    assert good["versions"]["torch"] == importlib.metadata.version("torch")


def test_the_same_seed_repeats_the_result_and_another_changes_the_samples_only(good, store):
    assert evaluate(RemembersDigits(), store, count=2000) == good
    other = evaluate(RemembersDigits(), store, count=2000, seed=1)
    assert other["reference"] == good["reference"]
    assert other["one_step"]["frechet_distance"] != good["one_step"]["frechet_distance"]


def test_any_number_of_steps_has_a_key(store):
    result = evaluate(RemembersDigits(), store, steps=(3, 12), count=50)
    assert result["steps"] == [3, 12]
    assert {"three_step", "12_step"} <= result.keys()


def test_sigmas_are_the_levels_that_are_sampled(store, trained, torchmetrics_distance):
    """The distance is torchmetrics', of the images that `sample` makes at these levels."""
    model = load_model(trained)
    for sigmas in ((5.0,), (5.0, 0.3)):
        steps = len(sigmas) + 1
        result = evaluate(model, store, steps=(steps,), sigmas=sigmas, count=64, seed=3)
        images = to_uint8(sample(model, 64, steps=steps, sigmas=sigmas, seed=3))
        expected = torchmetrics_distance(open_store(store).images, images)
        measured = result["two_step" if steps == 2 else "three_step"]
        assert measured["frechet_distance"] == pytest.approx(expected, rel=1e-3)
        assert measured["sigmas"] == [80.0, *sigmas]
        assert result["sigmas"] == list(sigmas)


@pytest.mark.parametrize(
    ("steps", "sigmas", "said"),
    [
        ((1, 2), (0.3,), "1 steps need 0 sigmas after sigma_max; 1 were given"),
        ((2,), (80.0,), "they must fall from below sigma_max = 80.0"),
        ((3,), (0.3, 0.001), "to above sigma_min = 0.002"),
    ],
)
def test_sigmas_that_the_model_cannot_be_sampled_at_are_refused_first(
    store, monkeypatch, steps, sigmas, said
):
    monkeypatch.setattr(evaluate_module, "choose_network", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match=said):
        evaluate(RemembersDigits(), store, steps=steps, sigmas=sigmas)


def test_what_is_replaced_is_said_of_a_poorer_measurement_and_not_of_a_refused_or_an_equal_one(
    trained, inception, tmp_path, capsys
):
    def measured(code, *words):
        words = ["--count", "16", "--features", str(inception), "--out", str(tmp_path / "o.json"), *words]
        assert main(["evaluate", str(trained), *words]) == code
        said = capsys.readouterr().err
        return [line for line in said.splitlines() if "replaced" in line]

    assert measured(0) == measured(0) == []
    before = (tmp_path / "o.json").read_text()
    assert measured(2, "--sigmas", "100") == []
    assert (tmp_path / "o.json").read_text() == before
    [line] = measured(0, "--steps", "1")
    assert "o.json was measured with --steps 2 too, and will be replaced; " in line


def test_by_default_10000_images_are_sampled(store, monkeypatch):
    assert evaluate_module.DEFAULT_DIGITS_COUNT == 10_000
    monkeypatch.setattr(evaluate_module, "DEFAULT_DIGITS_COUNT", 2000)
    assert evaluate(RemembersDigits(), store, steps=(1,))["count"] == 2000


def test_a_conditional_model_gets_labels_in_the_references_proportions(tmp_path):
    images, labels = load_digits()
    kept = labels < 2
    kept &= (labels == 0) | (np.arange(len(labels)) % 4 == 0)
    names = [str(number) for number in range(10)]
    path = write_store(
        tmp_path / "two", images[kept], labels[kept], source="test", recipe="test", classes=names
    )
    model = RemembersDigits(num_classes=10)
    result = evaluate(model, path, steps=(1,), count=2000)
    seen = torch.cat(model.seen_labels)
    assert seen.unique().tolist() == [0, 1]
    assert (seen == 0).double().mean().item() == pytest.approx((labels[kept] == 0).mean(), abs=0.03)
    assert result["one_step"]["relative_to_gaussian"] < 0.5


def test_the_model_is_left_in_the_mode_it_was_in(store):
    model = RemembersDigits().train()
    evaluate(model, store, steps=(1,), count=10)
    assert model.training


def test_progress_rises_to_one(store):
    seen = []
    evaluate(
        RemembersDigits(), store, count=600, progress=lambda fraction, text: seen.append((fraction, text))
    )
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert any("sampling 600 images in two steps" in text for _, text in seen)


def test_a_model_that_returns_real_digits_is_precise_and_recalls_them(good):
    for steps in ("one_step", "two_step"):
        measures = good[steps]
        assert measures["precision"] == 1
        assert measures["recall"] > 0.85  # 63 % of the digits are drawn at least once
        assert measures["precision_recall_count"] == 1797
        assert abs(measures["kernel_distance"]) < 3 * measures["kernel_distance_std"]
        assert 8.5 < measures["inception_score"] < 10


def test_precision_and_recall_are_of_equal_numbers(store, monkeypatch):
    """The balls of the larger set would be smaller."""
    seen = []

    def measured(real, generated, **_):
        seen.append((len(real), len(generated)))
        return 0.5, 0.5

    monkeypatch.setattr(evaluate_module, "precision_and_recall", measured)
    for other in ("kernel_distance", "inception_score"):  # which take seconds
        monkeypatch.setattr(evaluate_module, other, lambda *_: (0.0, 0.0))
    for count in (300, 1800):
        evaluate(RemembersDigits(), store, steps=(1,), count=count)
    assert seen == [(300, 300), (1797, 1797)]


def test_the_table_names_every_distance(good):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(json.loads(json.dumps(good))))
    text = console.export_text()
    assert "sigmas" not in text
    for words in (
        "real, 898 to 899 ",
        "one step",
        "two steps",
        "Gaussian of pixels",
        "KID",
        "precision",
        "uniform noise",
        "100.00%",
    ):
        assert words in text
    assert f"{good['one_step']['frechet_distance']:.3f}" in text


def test_an_older_result_without_the_halves_numbers_is_shown_all_the_same(good):
    older = {name: value for name, value in good["reference"].items() if name != "halves_counts"}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(good | {"reference": older}))
    assert "real, half to half" in console.export_text()


def test_the_table_says_at_which_sigmas_the_model_was_sampled(good):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(good | {"sigmas": [0.8]}))
    assert "2,000 samples, seed 0, sigmas 0.8;" in console.export_text()


def test_nan_in_the_samples_is_a_failure_of_training(store):
    def one_bad_image(x):
        images = torch.zeros_like(x)
        images[3, 0, 0, 0] = float("nan")
        return images

    with pytest.raises(TrainingError, match=r"1 of 10 images sampled in 1 step hold NaN .* diverged"):
        evaluate(Paints(one_bad_image), store, count=10)


def _write(path, images, classes=()):
    return write_store(
        path, images, np.zeros(len(images), np.int64), source="test", recipe="test", classes=classes
    )


def test_without_labels_a_store_is_a_reference_as_its_images_in_an_npz_are(tmp_path, inception):
    """Each class is sampled equally often for either."""
    images = load_digits()[0][:200]
    np.savez(tmp_path / "unlabelled.npz", images)
    results = []
    for reference in (_write(tmp_path / "unlabelled", images), tmp_path / "unlabelled.npz"):
        model = RemembersDigits(num_classes=10)
        results.append(evaluate(model, reference, steps=(1,), count=100, features=inception)["one_step"])
        assert torch.cat(model.seen_labels).bincount(minlength=10).tolist() == [10] * 10
    assert results[0] == results[1]


@pytest.mark.parametrize(("shape", "seen"), [((4, 16, 16, 1), "16x16"), ((4, 8, 8, 3), "3 channels")])
def test_a_reference_of_another_size_is_refused(tmp_path, shape, seen):
    path = _write(tmp_path / "other", np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match=f"{seen}.*the model makes 8x8 with 1 channel;"):
        evaluate(RemembersDigits(), path)


def test_images_other_than_the_digits_are_refused_with_what_to_do(tmp_path):
    path = _write(tmp_path / "other", 255 - load_digits()[0][:10])
    with pytest.raises(InputError, match=r"other images, and .*digits.*ict-fast prepare digits"):
        evaluate(RemembersDigits(), path)


@pytest.mark.parametrize("count", [2, 3])
def test_two_images_are_enough_for_all_but_precision_and_recall(store, count):
    result = evaluate(RemembersDigits(), store, steps=(1,), count=count)
    assert result["one_step"].keys() >= {"frechet_distance", "kernel_distance", "inception_score"}
    assert result["not_available"].keys() == {"precision", "recall"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_too_few_images_are_refused(store, tmp_path):
    with pytest.raises(InputError, match=r"--count is 1; .*at least 2"):
        evaluate(RemembersDigits(), store, count=1)
    with pytest.raises(InputError, match=r"holds 3 images; .*at least 4"):
        evaluate(RemembersDigits(), _write(tmp_path / "few", load_digits()[0][:3]))


# --- features of a file, references of other kinds ---------------------------------------------------------


def test_features_of_a_file_measure_a_store(store, inception):
    result = evaluate(RemembersDigits(), store, steps=(1,), count=2000, features=inception)
    assert result["features"]["name"] == "like-inception.pt"
    assert len(result["features"]["sha256"]) == 64
    assert result["one_step"]["frechet_distance"] < 2 * result["reference"]["halves"]
    assert result["one_step"]["precision"] == 1
    assert 1 < result["one_step"]["inception_score"] < 5
    assert "noise" not in result["reference"]
    assert result["reference"]["halves_counts"] == [898, 899]
    assert json.loads(json.dumps(result)) == result


def test_with_statistics_alone_the_result_says_what_is_not_available(store, inception, tmp_path):
    network = TorchScriptNetwork(inception)
    images = open_store(store).images
    features, _ = network(images, torch.device("cpu"), probabilities=False)
    exact = features.astype(np.float64)
    np.savez(tmp_path / "stats.npz", mu=exact.mean(0), sigma=np.cov(exact, rowvar=False))
    of_store = evaluate(RemembersDigits(), store, steps=(1,), count=2000, features=inception)
    result = evaluate(RemembersDigits(), tmp_path / "stats.npz", steps=(1,), count=2000, features=inception)
    assert result["one_step"]["frechet_distance"] == pytest.approx(
        of_store["one_step"]["frechet_distance"], rel=1e-9
    )
    assert result["not_available"].keys() == {"kernel_distance", "precision", "recall"}
    assert not result["not_available"].keys() & result["one_step"].keys()
    assert result["reference"]["count"] is None
    assert "inception_score" in result["one_step"]
    Console(file=open("/dev/null", "w")).print(table(result))  # noqa: SIM115


def test_samples_are_a_reference_like_any_other(store, inception, tmp_path):
    np.savez(tmp_path / "samples.npz", open_store(store).images, np.zeros(1797, np.int64))
    of_store, of_samples = (
        evaluate(RemembersDigits(), reference, steps=(1,), count=500, features=inception)
        for reference in (store, tmp_path / "samples.npz")
    )
    assert of_samples["one_step"] == of_store["one_step"]


def test_a_sha256_of_no_file_is_refused(store):
    with pytest.raises(InputError, match="features_sha256 is ab, and no file of features is given"):
        evaluate(RemembersDigits(), store, steps=(1,), count=10, features_sha256="ab")


def test_statistics_of_another_number_of_features_are_refused(inception, tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(InputError, match=r"statistics of 2,048 features, and like-inception.pt gives 16; "):
        evaluate(RemembersDigits(), tmp_path / "stats.npz", features=inception)


def test_fewer_images_than_features_are_warned_of(store, inception):
    result = evaluate(RemembersDigits(), store, steps=(1,), count=16, features=inception)
    assert [warning for warning in result["warnings"] if "16 generated images for 16 features" in warning]
    more = evaluate(RemembersDigits(), store, steps=(1,), count=17, features=inception)
    assert not [warning for warning in more["warnings"] if "singular" in warning]


def test_a_stores_statistics_are_computed_once_and_kept_beside_it(inception, tmp_path, monkeypatch):
    store = prepare_digits(tmp_path / "digits")
    first = evaluate(RemembersDigits(), store, steps=(1,), count=300, features=inception)
    [kept] = (store / "evaluation").iterdir()
    open_store(store, verify=True)

    monkeypatch.setattr(chunks.Work, "_reference", None)  # to measure the reference again would be an error
    again = evaluate(RemembersDigits(), store, steps=(1,), count=300, features=inception)
    assert again == first

    monkeypatch.undo()
    kept.write_bytes(kept.read_bytes()[:-100])
    assert evaluate(RemembersDigits(), store, steps=(1,), count=300, features=inception) == first
    evaluate(RemembersDigits(), store, steps=(1,), count=300)  # of the digits classifier nothing is kept
    assert len(list((store / "evaluation").iterdir())) == 1


def test_a_store_that_cannot_be_written_is_measured_all_the_same(inception, tmp_path):
    store = prepare_digits(tmp_path / "digits")
    (store / "evaluation").write_text("in the way")
    result = evaluate(RemembersDigits(), store, steps=(1,), count=300, features=inception)
    assert result["one_step"]["frechet_distance"] > 0


def test_nan_features_of_the_samples_are_the_files_fault(store, scripted):
    white = Paints(lambda x: torch.ones_like(x))
    with pytest.raises(InputError, match=r"its features of 300 of 300 images are NaN"):
        evaluate(white, store, count=300, features=scripted("NaNOfBright"))


@pytest.mark.parametrize("steps", [(), (0,), (1, -2)])
def test_senseless_steps_are_refused(store, steps):
    with pytest.raises(InputError, match=r"--steps is .*each at least 1"):
        evaluate(RemembersDigits(), store, steps=steps)


def test_a_model_of_other_classes_is_refused(tmp_path):
    path = _write(tmp_path / "other", load_digits()[0][:10], classes=("a", "b", "c"))
    with pytest.raises(InputError, match=r"has 3 classes, the model 10"):
        evaluate(RemembersDigits(num_classes=10), path)
