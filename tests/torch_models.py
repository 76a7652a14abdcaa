"""VGG and ResNet written anew from plain torch.nn: witnesses of the models here, with the names of torchvision's state dicts
(for the CIFAR ResNets, of the public checkpoints). Nothing is shared with the code under test."""
import torch
from torch import nn
from torch.nn import functional

VGG_CHANNELS = {11: "64 M 128 M 256 256 M 512 512 M 512 512 M", 13: "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
                16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
                19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M"}


class VGG(nn.Module):
    def __init__(self, depth, batch_norm, num_classes=1000, hidden=4096, pool=7, dropout=0.5):
        super().__init__()
        modules, channels = [], 3
        for word in VGG_CHANNELS[depth].split():
            if word == "M":
                modules.append(nn.MaxPool2d(2, 2))
                continue
            modules.append(nn.Conv2d(channels, int(word), 3, padding=1))
            modules += [nn.BatchNorm2d(int(word))] if batch_norm else []
            modules.append(nn.ReLU())
            channels = int(word)
        self.features = nn.Sequential(*modules)
        self.avgpool = nn.AdaptiveAvgPool2d(pool)
        self.classifier = nn.Sequential(nn.Linear(512 * pool * pool, hidden), nn.ReLU(), nn.Dropout(dropout),
                                        nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, num_classes))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Basic(nn.Module):
    """conv 3x3, conv 3x3; the shortcut is a module, registered under `shortcut_name`."""

    def __init__(self, c_in, c_out, stride, shortcut, shortcut_name):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.add_module(shortcut_name, shortcut)
        self.shortcut_name = shortcut_name

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + getattr(self, self.shortcut_name)(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride (v1.5), 1x1 to four times the width."""

    def __init__(self, c_in, c_out, stride, shortcut, shortcut_name):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out // 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out // 4)
        self.conv2 = nn.Conv2d(c_out // 4, c_out // 4, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out // 4)
        self.conv3 = nn.Conv2d(c_out // 4, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.add_module(shortcut_name, shortcut)
        self.shortcut_name = shortcut_name

    def forward(self, x):
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return torch.relu(self.bn3(self.conv3(y)) + getattr(self, self.shortcut_name)(x))


class ZeroChannels(nn.Module):
    """Option A: every second pixel, and as many zero channels in front as behind."""

    def forward(self, x):
        side = x.shape[1] // 2
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))


def project(c_in, c_out, stride):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


def stage(block, c_in, c_out, depth, stride, shortcut, name):
    blocks = [block(c_in, c_out, stride, shortcut, name)]
    return nn.Sequential(*blocks, *(block(c_out, c_out, 1, nn.Sequential(), name) for _ in range(depth - 1)))


class ResNet(nn.Module):
    """For ImageNet. depths: blocks of the four stages; expansion: 1 for basic blocks, 4 for bottlenecks."""

    def __init__(self, block, depths, expansion, num_classes=1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        c_in = 64
        for i, depth in enumerate(depths):
            c_out, stride = 64 * 2 ** i * expansion, 1 if i == 0 else 2
            shortcut = nn.Sequential() if c_in == c_out else project(c_in, c_out, stride)
            setattr(self, f"layer{i + 1}", stage(block, c_in, c_out, depth, stride, shortcut, "downsample"))
            c_in = c_out
        self.fc = nn.Linear(c_in, num_classes)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class CifarResNet(nn.Module):
    """depth = 6 n + 2, with shortcuts of option "A" or "B"."""

    def __init__(self, depth, num_classes=10, shortcut="A", channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        n = (depth - 2) // 6
        self.layer1 = stage(Basic, 16, 16, n, 1, nn.Sequential(), "shortcut")
        self.layer2 = stage(Basic, 16, 32, n, 2, ZeroChannels() if shortcut == "A" else project(16, 32, 2), "shortcut")
        self.layer3 = stage(Basic, 32, 64, n, 2, ZeroChannels() if shortcut == "A" else project(32, 64, 2), "shortcut")
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def take_over(net, model):
    """Give a torch net the state of a model of minicnn, by its names, in its floating type; every name must fit."""
    state = {name: torch.from_numpy(array) for name, array in model.state_dict().items()}
    net.to(torch.float64 if model.dtype == "float64" else torch.float32).load_state_dict(state, strict=True)
    return net
