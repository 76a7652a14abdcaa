"""The models written anew from plain torch.nn: witnesses of those here, with the names of torchvision's state dicts (for the CIFAR
ResNets, of the public checkpoints; for Network in Network, of its Caffe model). Nothing is shared with the code under test."""
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


class NetworkInNetwork(nn.Module):
    def __init__(self, num_classes=10, channels=3):
        super().__init__()
        self.conv1, self.cccp1, self.cccp2 = nn.Conv2d(channels, 192, 5, padding=2), nn.Conv2d(192, 160, 1), nn.Conv2d(160, 96, 1)
        self.conv2, self.cccp3, self.cccp4 = nn.Conv2d(96, 192, 5, padding=2), nn.Conv2d(192, 192, 1), nn.Conv2d(192, 192, 1)
        self.conv3, self.cccp5 = nn.Conv2d(192, 192, 3, padding=1), nn.Conv2d(192, 192, 1)
        self.cccp6 = nn.Conv2d(192, num_classes, 1)

    def forward(self, x):
        for conv in (self.conv1, self.cccp1, self.cccp2):
            x = torch.relu(conv(x))
        x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        for conv in (self.conv2, self.cccp3, self.cccp4):
            x = torch.relu(conv(x))
        x = functional.avg_pool2d(x, 3, 2, ceil_mode=True)
        for conv in (self.conv3, self.cccp5, self.cccp6):
            x = torch.relu(conv(x))
        return x.mean((2, 3))


class BasicConv(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


class Inception(nn.Module):
    """large: the kernel of the third branch."""

    def __init__(self, c_in, one, to_three, three, to_five, five, pooled, large):
        super().__init__()
        self.branch1 = BasicConv(c_in, one, 1)
        self.branch2 = nn.Sequential(BasicConv(c_in, to_three, 1), BasicConv(to_three, three, 3, padding=1))
        self.branch3 = nn.Sequential(BasicConv(c_in, to_five, 1), BasicConv(to_five, five, large, padding=(large - 1) // 2))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), BasicConv(c_in, pooled, 1))

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """With batch norm and without the auxiliary heads. The numbers are table 1's of the paper, row by row."""

    def __init__(self, num_classes=1000, large=5, channels=3):
        super().__init__()
        self.conv1 = BasicConv(channels, 64, 7, 2, 3)
        self.conv2 = BasicConv(64, 64, 1)
        self.conv3 = BasicConv(64, 192, 3, 1, 1)
        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32, large)
        self.inception3b = Inception(256, 128, 128, 192, 32, 96, 64, large)
        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64, large)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64, large)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64, large)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64, large)
        self.inception4e = Inception(528, 256, 160, 320, 32, 128, 128, large)
        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128, large)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128, large)
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x):
        x = functional.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True)
        x = functional.max_pool2d(self.conv3(self.conv2(x)), 3, 2, ceil_mode=True)
        x = functional.max_pool2d(self.inception3b(self.inception3a(x)), 3, 2, ceil_mode=True)
        x = self.inception4e(self.inception4d(self.inception4c(self.inception4b(self.inception4a(x)))))
        x = functional.max_pool2d(x, 2, 2, ceil_mode=True)
        return self.fc(self.inception5b(self.inception5a(x)).mean((2, 3)))


def simam(x, e_lambda=1e-4):
    """In the words of the authors' module."""
    n = x.shape[2] * x.shape[3] - 1
    square = (x - x.mean((2, 3), keepdim=True)).pow(2)
    return x * torch.sigmoid(square / (4 * (square.sum((2, 3), keepdim=True) / n + e_lambda)) + 0.5)


def take_over(net, model):
    """Give a torch net the state of a model of minicnn, by its names, in its floating type; every name must fit."""
    state = {name: torch.from_numpy(array) for name, array in model.state_dict().items()}
    net.to(torch.float64 if model.dtype == "float64" else torch.float32).load_state_dict(state, strict=True)
    return net
