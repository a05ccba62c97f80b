"""Whole models on images and signals, each as small as its architecture allows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomise(model: nn.Module) -> nn.Module:
    """Running statistics and affine parameters of norms away from zero and one, so that none of them drops out of a formula."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            if (
                isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d))
                and module.weight is not None
            ):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
    return model


def lenet() -> nn.Module:
    """LeNet-5 with ReLU and max pooling, on 16 x 16 images."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def lenet_tanh() -> nn.Module:
    """LeNet-5 as of 1998: tanh and average pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 12, 3, padding="same"), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 4),
    )  # fmt: skip


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm; the shortcut subsamples and pads channels (He et al. 2015, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.extra = (channels - in_channels) // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(h + x)


class ResNet20(nn.Module):
    """Three stages of three blocks; ``width`` 16 in the paper."""

    def __init__(self, width: int = 8, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        blocks, channels = [], width
        for stage in range(3):
            for block in range(3):
                blocks.append(ResidualBlock(channels, width << stage, 2 if stage and not block else 1))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, layer norm on the last axis, two linear layers, layer scale."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.linspace(0.3, 1.2, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.gamma * self.project(F.gelu(self.expand(h)))
        return x + h.permute(0, 3, 1, 2)


class ChannelsFirstNorm(nn.Module):
    """Layer norm over the channels of ``[N, C, H, W]``, written out."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, channels))
        self.bias = nn.Parameter(torch.linspace(-0.2, 0.2, channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((x - mean) / torch.sqrt(variance + 1e-6)) + self.bias[:, None, None]


class ConvNeXt(nn.Module):
    """Two stages of one block each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), ChannelsFirstNorm(8))
        self.stage1 = ConvNeXtBlock(8)
        self.down = nn.Sequential(ChannelsFirstNorm(8), nn.Conv2d(8, 12, 2, stride=2))
        self.stage2 = ConvNeXtBlock(12)
        self.norm = nn.LayerNorm(12, eps=1e-6)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(h.mean([-2, -1])))


def double_conv(in_channels: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())


class UNet(nn.Module):
    """Two levels: one goes up by a transposed convolution, the other by bilinear interpolation; skips are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = double_conv(1, 4), double_conv(4, 6), double_conv(6, 8)
        self.up2 = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.merge2 = double_conv(12, 6)
        self.merge1 = double_conv(10, 4)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        h = self.merge2(torch.cat([b, self.up2(self.middle(F.max_pool2d(b, 2)))], dim=1))
        h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.merge1(torch.cat([a, h], dim=1)))


class SqueezeExcite(nn.Module):
    """Channel gates from a global mean."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, 4, 1)
        self.expand = nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Not F.hardsigmoid: torch multiplies its derivative by a sixth in float32, also in float64.
        gate = F.relu6(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))) + 3) / 6
        return x * gate


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze and excite, project (MobileNet v3)."""

    def __init__(self, channels: int, hidden: int, out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            SqueezeExcite(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        InvertedResidual(8, 16, 8, 1),
        InvertedResidual(8, 16, 12, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(12, 6),
    )


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self, growth: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        channels = 6
        self.layers = nn.ModuleList()
        for _ in range(3):
            self.layers.append(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, growth, 3, padding=1, bias=False)))
            channels += growth
        self.transition = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 8, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(self.transition(torch.cat(features, 1)).amax((2, 3)))


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, pre-norm blocks with fused attention."""

    def __init__(self, width: int = 16, heads: int = 2, depth: int = 2):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(VisionBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), h], dim=1) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)[:, 0])


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP; one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.norm2(x))


class Mixer(nn.Module):
    """MLPs over positions and over channels in turn."""

    def __init__(self, positions: int = 4, width: int = 12):
        super().__init__()
        self.patches = nn.Linear(12, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_positions = nn.Sequential(nn.Linear(positions, 8), nn.GELU(), nn.Linear(8, positions))
        self.over_channels = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(F.unfold(x, 2, stride=2).transpose(1, 2))
        h = h + self.over_positions(self.norm1(h).transpose(1, 2)).transpose(1, 2)
        h = h + self.over_channels(self.norm2(h))
        return self.head(h.mean(dim=1))


class WindowAttention(nn.Module):
    """Swin: the windows are folded into the batch; a table gives the bias of every relative position; ``shift`` > 0 rolls and masks."""

    def __init__(self, width: int, heads: int, size: int, window: int, shift: int):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = grid[:, :, None] - grid[:, None, :] + window - 1
        self.register_buffer("index", relative[0] * (2 * window - 1) + relative[1])
        region = torch.zeros(size, size)
        bands = (slice(0, -window), slice(-window, -shift), slice(-shift, None)) if shift else (slice(None),)
        for i, rows in enumerate(bands):
            for j, columns in enumerate(bands):
                region[rows, columns] = len(bands) * i + j
        regions = self.split(region[None, :, :, None]).squeeze(-1)
        self.register_buffer("mask", torch.where(regions[:, None] == regions[:, :, None], 0.0, -100.0))

    def split(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        w = self.window
        return x.view(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, C)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        w = self.window
        h = self.norm(x)
        if self.shift:
            h = torch.roll(h, (-self.shift, -self.shift), (1, 2))
        h = self.split(h)
        T = h.shape[1]
        q, k, v = self.qkv(h).reshape(-1, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q * (C // self.heads) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.table[self.index.view(-1)].view(T, T, -1).permute(2, 0, 1)
        if self.shift:
            windows = self.mask.shape[0]
            scores = (scores.view(-1, windows, self.heads, T, T) + self.mask[None, :, None]).view(-1, self.heads, T, T)
        h = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, T, C))
        h = h.view(B, H // w, W // w, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        if self.shift:
            h = torch.roll(h, (self.shift, self.shift), (1, 2))
        return x + h


class Swin(nn.Module):
    """A plain and a shifted window block, and patch merging between them."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 2, stride=2)
        self.plain = WindowAttention(width, 2, 4, 2, 0)
        self.shifted = WindowAttention(width, 2, 4, 2, 1)
        self.merge = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.shifted(self.plain(self.embed(x).permute(0, 2, 3, 1)))
        h = torch.cat([h[:, 0::2, 0::2], h[:, 1::2, 0::2], h[:, 0::2, 1::2], h[:, 1::2, 1::2]], -1)
        return self.head(self.merge(h).flatten(1, 2).mean(1))


class Decoder(nn.Module):
    """Codes to images by transposed convolutions, as in a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 8 * 2 * 2)
        self.up1 = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.up2 = nn.ConvTranspose2d(6, 2, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm(self.up1(self.fc(x).view(-1, 8, 2, 2))), 0.2)
        return torch.sigmoid(self.up2(h))


def norms() -> nn.Module:
    """Group norm, instance norm with and without parameters, local response norm."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.SiLU(), nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.InstanceNorm2d(6, affine=True), nn.PReLU(6), nn.Conv2d(6, 4, 3, stride=2), nn.InstanceNorm2d(4), nn.Mish(),
        nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


class WaveNet(nn.Module):
    """Causal dilated convolutions with gated activations, residual and skip paths."""

    def __init__(self, channels: int = 6):
        super().__init__()
        self.stem = nn.Conv1d(1, channels, 1)
        self.filters = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 2, dilation=1 << i) for i in range(3))
        self.mixes = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 1) for _ in range(3))
        self.head = nn.Conv1d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, skip = self.stem(x), 0.0
        for dilated, mix in zip(self.filters, self.mixes, strict=True):
            signal, gate = dilated(F.pad(h, (dilated.dilation[0], 0))).chunk(2, dim=1)
            residual, out = mix(torch.tanh(signal) * torch.sigmoid(gate)).chunk(2, dim=1)
            h, skip = h + residual, skip + out
        return self.head(F.relu(skip))


def volumes() -> nn.Module:
    """Three-dimensional convolution and pooling."""
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ELU(), nn.AvgPool3d(2), nn.Conv3d(4, 6, 2), nn.Softplus(), nn.Flatten(),
        nn.Linear(6, 3),
    )  # fmt: skip


class SpatialTransformer(nn.Module):
    """An affine grid predicted from the image, and bilinear sampling by it."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Linear(36, 6)
        self.conv = nn.Conv2d(1, 3, 3)
        self.head = nn.Linear(3, 3)
        self.register_buffer("identity", torch.tensor([1.0, 0, 0, 0, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        theta = (0.3 * self.where(x.flatten(1)) + self.identity).view(-1, 2, 3)
        h = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        return self.head(torch.tanh(self.conv(h)).mean((2, 3)))
