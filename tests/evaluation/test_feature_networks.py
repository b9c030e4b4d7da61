"""Features of a TorchScript file, and of the digits classifier, as an evaluation asks for them."""

import pickle

import numpy as np
import pytest
import torch

from ict_fast.data.prepare import load_digits
from ict_fast.errors import InputError
from ict_fast.evaluation.feature_networks import DigitsNetwork, TorchScriptNetwork
from ict_fast.evaluation.features import digits_features
from ict_fast.evaluation.torchscript import open_torchscript

CPU = torch.device("cpu")


def pictures(count, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)


def test_features_and_probabilities_are_those_of_the_file(inception):
    network = TorchScriptNetwork(inception)
    images = pictures(150)  # more than two batches
    features, classes = network(images, CPU, probabilities=True)
    assert features.shape == (150, network.num_features) == (150, 16)
    module, _ = open_torchscript(inception)
    whole = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert features == pytest.approx(module(whole, return_features=True).numpy(), rel=1e-5, abs=1e-5)
    # The Inception score is defined without the last layer's bias.
    assert classes == pytest.approx(module(whole, no_output_bias=True).numpy(), rel=1e-4, abs=1e-6)
    assert np.abs(classes - module(whole).numpy()).max() > 0.1
    assert network(images, CPU, probabilities=False)[1] is None


def test_grey_images_are_repeated_to_three_channels(inception):
    network, grey = TorchScriptNetwork(inception), pictures(5, channels=1)
    expected = network(grey.repeat(3, axis=3), CPU, probabilities=False)[0]
    assert np.array_equal(network(grey, CPU, probabilities=False)[0], expected)


def test_a_file_without_options_gives_features_alone(scripted):
    network = TorchScriptNetwork(scripted("FeaturesAlone"))
    features, classes = network(pictures(4), CPU, probabilities=True)
    assert features == pytest.approx(pictures(4).mean((1, 2)), rel=1e-6)
    assert classes is None
    assert not network.has_probabilities


def test_a_network_can_be_sent_to_another_process(inception):
    network = TorchScriptNetwork(inception)
    sent = pickle.loads(pickle.dumps(network))
    for ours, theirs in zip(*(n(pictures(3), CPU, probabilities=True) for n in (network, sent)), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_file_that_has_changed_since_is_refused_where_it_is_sent(inception, scripted, tmp_path):
    path = tmp_path / "network.pt"
    path.write_bytes(inception.read_bytes())
    sent = pickle.dumps(TorchScriptNetwork(path))
    path.write_bytes(scripted("FeaturesAlone").read_bytes())
    with pytest.raises(InputError, match="its SHA-256 is"):
        pickle.loads(sent)(pictures(1), CPU, probabilities=False)


def test_nan_features_are_refused_with_their_number(scripted):
    network = TorchScriptNetwork(scripted("NaNOfBright"))
    images = pictures(100)
    images[[3, 80]] = 255
    with pytest.raises(InputError, match=r"NaNOfBright.pt: its features of 2 of 100 images are NaN"):
        network(images, CPU, probabilities=False)


def test_a_file_that_gives_no_features_is_refused_with_what_it_gives(scripted):
    with pytest.raises(InputError, match=r"gives float32 of shape \(\) for 2 images; .* shape \(2, D\)"):
        TorchScriptNetwork(scripted("Flat"))


def test_the_digits_classifier_gives_its_features_and_classes():
    network, images = DigitsNetwork(), load_digits()[0][:700]
    features, classes = network(images, CPU, probabilities=True)
    whole = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert features == pytest.approx(digits_features()(whole).numpy(), rel=1e-12)
    assert (classes.argmax(1) == load_digits()[1][:700]).mean() > 0.95
    assert classes.sum(1) == pytest.approx(np.ones(700))
