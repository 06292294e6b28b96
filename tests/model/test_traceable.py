"""What an export is simplified to gives the same features."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from visiontuner.model.onnx import easily_traced


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.other_norm = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.activation = nn.ReLU6()

    def forward(self, x):
        x = self.activation(self.norm(self.first(x)))
        return self.activation(self.other_norm(self.second(x))).mean((2, 3))


class TakesConvolutionToo(Net):
    def forward(self, x):
        before = self.first(x)
        return (self.norm(before) + before).mean((2, 3))


class RunsConvolutionTwice(Net):
    def forward(self, x):
        x = self.norm(self.second(self.first(x)))
        return self.other_norm(self.second(x)).mean((2, 3))


def norms_of(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def simplified(network, *, size=32):
    torch.manual_seed(1)
    network = network.eval()
    for norm in norms_of(network):  # statistics as after a training
        if norm.running_mean is not None:
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1)
        nn.init.normal_(norm.bias, std=0.1)
    images, had = torch.randn(3, 3, size, size), len(norms_of(network))
    before = network(images).detach()
    easy = easily_traced(network, torch.randn(1, 3, size, size))
    assert len(norms_of(network)) == had, "the network itself was changed"
    same = float(1e-4 * before.abs().max())
    torch.testing.assert_close(easy(images).detach(), before, rtol=0, atol=same)
    return easy


def test_norms_go_into_their_convolutions():
    easy = simplified(Net())
    assert norms_of(easy) == []
    assert not any(isinstance(module, nn.Hardtanh) for module in easy.modules())


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenetv2_050"])
def test_networks_of_timm_give_the_same_features(name):
    assert norms_of(simplified(timm.create_model(name, num_classes=0), size=64)) == []


@pytest.mark.parametrize("kind", [TakesConvolutionToo, RunsConvolutionTwice])
def test_norms_stay_where_the_convolution_is_needed_as_it_is(kind):
    assert len(norms_of(simplified(kind()))) == 2


def test_norms_stay_without_statistics_and_where_weights_are_computed():
    network = Net()
    network.norm = nn.BatchNorm2d(8, track_running_stats=False)
    network.second = weight_norm(network.second)
    assert len(norms_of(simplified(network))) == 2


def test_one_norm_that_does_not_fit_does_not_hold_up_the_others():
    network = Net()
    network.norm = nn.BatchNorm2d(8, track_running_stats=False)
    assert len(norms_of(simplified(network))) == 1


def test_a_network_that_gives_nan_stays_as_it_is():
    network = Net().eval()
    nn.init.constant_(network.first.weight, float("nan"))
    easy = easily_traced(network, torch.randn(1, 3, 32, 32))
    assert len(norms_of(easy)) == 2
    assert easy(torch.randn(1, 3, 32, 32)).isnan().all()


def test_a_network_without_norms_is_not_run():
    class Fails(nn.Module):
        def forward(self, x):
            raise AssertionError

    easily_traced(Fails(), torch.zeros(1, 3, 8, 8))
