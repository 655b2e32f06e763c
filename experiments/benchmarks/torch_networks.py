"""The reference networks in PyTorch, with the same layers, channels last, and a training step."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from gc_nc.models.layers import scaled_width
from gc_nc.models.resnet import RESNET_STAGES
from gc_nc.models.vgg import VGG_STAGES


class VGG(nn.Module):
    """`gc_nc.models.VGG` without BatchNorm."""

    def __init__(self, depth: int, num_classes: int, width: float = 1.0):
        """The VGG of this depth."""
        super().__init__()
        layers, channels = [], 3
        for stage in VGG_STAGES[depth]:
            for full_width in stage:
                features = scaled_width(full_width, width)
                layers += [nn.Conv2d(channels, features, 3, padding=1), nn.ReLU()]
                channels = features
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x):
        """Returns (logits, embedding)."""
        embedding = self.features(x).mean((2, 3))
        return self.head(embedding), embedding


class _Block(nn.Module):
    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """`gc_nc.models.ResNet` of 18 layers at full width."""

    def __init__(self, num_classes: int):
        """With the default initialisation."""
        super().__init__()
        layers = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        channels = 64
        for i, num_blocks in enumerate(RESNET_STAGES[18][0]):
            for j in range(num_blocks):
                width = 64 * 2**i
                layers.append(_Block(channels, width, 2 if i > 0 and j == 0 else 1))
                channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x):
        """Returns (logits, embedding)."""
        embedding = self.features(x).mean((2, 3))
        return self.head(embedding), embedding


def training_step(
    network: nn.Module, batch_size: int, *, penalty_weight: float = 0.0
) -> Callable[[], None]:
    """A step of plain SGD on a fixed batch of CIFAR-10's shape.

    With a weight, the loss also has weight times the batch's GC, estimated by one random projection
    with the graph kept, as in jacobian_regularizer.
    """
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    x = torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.arange(batch_size) % 10
    x.requires_grad_(penalty_weight > 0)

    def step():
        optimizer.zero_grad(set_to_none=True)
        logits, embedding = network(x)
        loss = functional.cross_entropy(logits, labels)
        if penalty_weight:
            signs = torch.randint(0, 2, embedding.shape).float() * 2 - 1
            (product,) = torch.autograd.grad(embedding, x, signs, create_graph=True)
            loss = loss + penalty_weight * product.square().sum() / batch_size
        # Not the images, which need a gradient only for the penalty.
        loss.backward(inputs=list(network.parameters()))
        optimizer.step()

    return step
