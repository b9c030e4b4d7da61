"""What one image costs a network: multiplications, and the activations that wait for the backward pass.

Closed forms, layer by layer. The tests hold the FLOPs to the count of torch, and the bytes to what autograd
really keeps.

FLOPs are those of matrix products, convolutions and attention, two per multiply-add, of the network as it is
written (after nearest upsampling a GPU computes 4 of a convolution's 9 taps); the backward pass needs
twice those of the forward, but for layers whose input needs no gradient, or whose weights do not.

An activation is kept once, whoever needs it. By layer, in the order of ict_fast/networks:

    residual block   its input (norm), the norm's output (convolution), resampled too where it resamples, the
                     first convolution's output (norm), that norm's output (convolution)
    attention        its input (norm), the norm's output (convolution), query, key, value, the mixture
    output           its input and the norm's output, in fp32

The fused GroupNorm-SiLU-dropout keeps its input and two numbers per group, and no mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ict_fast.networks.layers import AverageDownsample, FirDownsample, FirUpsample, ResidualBlock
from ict_fast.networks.unet import DecoderLevel, EncoderLevel, UNet

_FP32 = 4  # bytes
_FIR_TAPS = 16


@dataclass
class NetworkCost:
    """Of one image; parameters of the network.

    Attributes:
        parameters: number of them.
        forward_flops, backward_flops: of one pass.
        trunk_values: activations kept for the backward pass in the trunk's dtype.
        end_bytes: bytes of those kept in fp32 whatever the trunk's dtype: ends, embedding, loss.
        widest_values: of the largest activation of the trunk.
    """

    parameters: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    trunk_values: int = 0
    end_bytes: int = 0
    widest_values: int = 0

    @property
    def step_flops(self) -> int:
        """Of one image in a training step: the student forward and backward, the teacher forward."""
        return 2 * self.forward_flops + self.backward_flops

    def activation_bytes(self, trunk_itemsize: int) -> int:
        """Kept for the backward pass of one image, with a trunk of 2 or 4 bytes a value."""
        return self.trunk_values * trunk_itemsize + self.end_bytes


def network_cost(network: UNet) -> NetworkCost:
    """The cost of a network's passes, from its layers' shapes: they need no memory (torch's meta device)."""
    cost = NetworkCost(parameters=sum(p.numel() for p in network.parameters()))
    _add_ends(cost, network)

    resolution = network.config.resolution
    for level in network.encoder:
        assert isinstance(level, EncoderLevel)
        if level.down is not None:
            _add_block(cost, level.down, resolution, resolution // 2)
            if level.pyramid is not None:
                convolution = level.pyramid.conv
                bordered = (resolution + 2) ** 2
                _multiply(cost, convolution, bordered, input_grad=not level.pyramid.reads_image)
                _filter(cost, convolution.out_channels, (resolution // 2) ** 2)
                # What it reads next is its sum with the activations, which the next block keeps anyway.
                if level.pyramid.reads_image:
                    cost.end_bytes += convolution.out_channels * bordered * _FP32
                else:
                    cost.trunk_values += convolution.out_channels * bordered
            resolution //= 2
        for block in level.blocks:
            assert isinstance(block, ResidualBlock)
            _add_block(cost, block, resolution, resolution)
    for block in network.middle:
        assert isinstance(block, ResidualBlock)
        _add_block(cost, block, resolution, resolution)
    for level in reversed(network.decoder):
        assert isinstance(level, DecoderLevel)
        if level.up is not None:
            _add_block(cost, level.up, resolution, 2 * resolution)
            resolution *= 2
        for block in level.blocks:
            assert isinstance(block, ResidualBlock)
            _add_block(cost, block, resolution, resolution)
    return cost


def _add_ends(cost: NetworkCost, network: UNet) -> None:
    config = network.config
    pixels = config.resolution**2
    _multiply(cost, network.input, pixels, input_grad=False)
    _multiply(cost, network.output.conv, pixels)
    # Input and raw output of student and teacher, for the input convolution and for the loss.
    cost.end_bytes += 4 * config.image_channels * pixels * _FP32
    cost.end_bytes += 2 * network.output.conv.in_channels * pixels * _FP32
    label = getattr(network.embedding, "label", None)
    for name, layer in network.embedding.named_modules():
        if isinstance(layer, nn.Linear):
            # Features and classes are data; with a layer for the classes, the sum of both is not.
            learned = name == "linear1" or (name == "linear0" and isinstance(label, nn.Linear))
            _multiply(cost, layer, 1, input_grad=learned)
            cost.end_bytes += (layer.in_features + layer.out_features) * _FP32


def _add_block(cost: NetworkCost, block: ResidualBlock, before: int, after: int) -> None:
    """A block whose input and output have `before` and `after` pixels on a side."""
    wide, narrow, width = block.in_channels * before**2, block.in_channels * after**2, block.out_channels
    pixels = after**2
    kept = wide + narrow + 2 * width * pixels
    if isinstance(block.resample, FirDownsample | FirUpsample):
        for _ in range(2):  # of both paths
            _filter(cost, block.in_channels, min(before, after) ** 2)
    if isinstance(block.resample, FirDownsample | FirUpsample | AverageDownsample):
        kept += wide  # their input, the norm's output before resampling
    if block.skip is not None:
        _multiply(cost, block.skip, pixels)
        if block.resample is not None:
            kept += narrow
    _multiply(cost, block.conv0, pixels)
    _multiply(cost, block.conv1, pixels)
    _multiply(cost, block.embedding, 1)
    if block.attention is not None:
        _multiply(cost, block.attention.qkv, pixels)
        _multiply(cost, block.attention.projection, pixels)
        products = 2 * 2 * pixels**2 * width
        cost.forward_flops += products
        cost.backward_flops += 2 * products
        kept += 6 * width * pixels
        cost.end_bytes += width // block.attention.head_channels * pixels * _FP32  # log-sum-exp of every row
        cost.end_bytes += 2 * block.attention.norm.num_groups * _FP32
    cost.end_bytes += 2 * (block.norm0.num_groups + block.norm1.num_groups) * _FP32
    cost.end_bytes += block.embedding.out_features * _FP32
    cost.trunk_values += kept
    cost.widest_values = max(cost.widest_values, wide, narrow, width * pixels)


def _multiply(
    cost: NetworkCost, layer: nn.Conv2d | nn.Linear, places: int, *, input_grad: bool = True
) -> None:
    """A layer whose weights are applied at so many places."""
    flops = 2 * layer.weight.numel() * places
    cost.forward_flops += flops
    cost.backward_flops += flops * (2 if input_grad else 1)


def _filter(cost: NetworkCost, channels: int, places: int) -> None:
    """A fixed filter of 4x4 taps in each channel: its backward pass is one for the input alone."""
    flops = 2 * _FIR_TAPS * channels * places
    cost.forward_flops += flops
    cost.backward_flops += flops
