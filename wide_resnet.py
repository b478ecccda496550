"""Wide ResNets of the semi-supervised literature, registered with timm.

Importing this file is enough for `timm.create_model('wide_resnet28_2', num_classes=10)`; timm itself only has the
ImageNet-sized `wide_resnet50_2` and `wide_resnet101_2`, which are bottleneck ResNets.

Pre-activation networks (Zagoruyko & Komodakis 2016, arXiv 1605.07146) with the details of the semi-supervised
literature: leaky ReLU with slope 0.1, a 3x3 stem with 16 channels and a bias, batch-norm momentum 0.001 (the new batch
counts 0.001; train_ssl.py raises it in shorter runs), Kaiming-normal (fan-out) convolutions and a Xavier-normal
classifier.

One detail differs between its codes. In the first block of stages 2 and later the first convolution sees the activated
input, here and in Google's FixMatch. In the networks of USB, TorchSSL and kekmodel's FixMatch-pytorch, and so in USB's
published table, it sees the raw one. Their weights fit in here one to one, and predict something else.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model

__all__ = ['WideResNet']

NEGATIVE_SLOPE = 0.1
BN_MOMENTUM = 0.001


class Block(nn.Module):
    """Two pre-activated 3x3 convolutions and a shortcut.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
        shared_act: The shortcut starts from the activated input (the network's first block) and not from the raw one.
        drop_path: Probability of dropping the residual branch of a sample.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, shared_act: bool = False, drop_path: float = 0.):
        super().__init__()
        self.shared_act = shared_act
        self.bn1 = nn.BatchNorm2d(in_chs, momentum=BN_MOMENTUM)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs, momentum=BN_MOMENTUM)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        if in_chs != out_chs or stride != 1:
            self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False)
        else:
            self.shortcut = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = F.leaky_relu(self.bn1(x), NEGATIVE_SLOPE)
        shortcut = self.shortcut(activated if self.shared_act else x)
        x = F.leaky_relu(self.bn2(self.conv1(activated)), NEGATIVE_SLOPE)
        return self.drop_path(self.conv2(x)) + shortcut


class WideResNet(nn.Module):
    """Wide ResNet for small images.

    Args:
        depths: Blocks in each stage.
        channels: Output channels of each stage.
        strides: Stride of each stage's first block.
        num_classes: Classes of the classifier; 0 leaves the pooled features.
        in_chans: Channels of the image.
        global_pool: timm's pooling type.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; earlier blocks have proportionally less.
    """

    def __init__(
            self,
            depths: tuple[int, ...] = (4, 4, 4),
            channels: tuple[int, ...] = (32, 64, 128),
            strides: tuple[int, ...] = (1, 2, 2),
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=True)

        self.feature_info = []
        self.stages = []
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        in_chs, reduction = 16, 1
        for i, (depth, out_chs, stride) in enumerate(zip(depths, channels, strides)):
            blocks = [
                Block(
                    in_chs if b == 0 else out_chs,
                    out_chs,
                    stride=stride if b == 0 else 1,
                    shared_act=i == 0 and b == 0,
                    drop_path=drop_paths[i][b],
                )
                for b in range(depth)
            ]
            in_chs, reduction, name = out_chs, reduction * stride, f'layer{i + 1}'
            self.add_module(name, nn.Sequential(*blocks))
            self.stages.append(name)
            self.feature_info.append(dict(num_chs=out_chs, reduction=reduction, module=name))

        self.num_features = self.head_hidden_size = in_chs
        self.norm = nn.BatchNorm2d(in_chs, eps=0.001, momentum=BN_MOMENTUM)
        self.act = nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False):
        return dict(stem=r'^conv1', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True):
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None):
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        if num_classes > 0:
            nn.init.xavier_normal_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, H, W]` to the last stage's normalised and activated map `[B, num_features, h, w]`."""
        x = self.conv1(x)
        for name in self.stages:
            stage = getattr(self, name)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
        return self.act(self.norm(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature map to logits `[B, num_classes]`, or with `pre_logits` to the features that the classifier sees."""
        x = self.global_pool(x)
        x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(size: int, mean: tuple[float, ...], std: tuple[float, ...], pool: int) -> dict:
    return dict(
        url='',
        num_classes=10,
        input_size=(3, size, size),
        pool_size=(pool, pool),
        crop_pct=1.0,
        interpolation='bicubic',
        mean=mean,
        std=std,
        first_conv='conv1',
        classifier='fc',
        license='apache-2.0',
    )


# Mean and standard deviation over the pixels of the CIFAR-10 and STL-10 training images.
_CIFAR = _cfg(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 8)
_STL = _cfg(96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), 6)

default_cfgs = generate_default_cfgs({
    'wide_resnet10_1.untrained': _CIFAR,
    'wide_resnet16_2.untrained': _CIFAR,
    'wide_resnet28_2.untrained': _CIFAR,
    'wide_resnet28_8.untrained': _CIFAR,
    'wide_resnet37_2.untrained': _STL,
})


def _create_wide_resnet(variant: str, pretrained: bool = False, **kwargs) -> WideResNet:
    feature_cfg = dict(out_indices=tuple(range(len(kwargs['depths']))))
    return build_model_with_cfg(WideResNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def wide_resnet10_1(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-10-1, 32 px: for trials on a CPU."""
    args = dict(depths=(1, 1, 1), channels=(16, 32, 64))
    return _create_wide_resnet('wide_resnet10_1', pretrained, **dict(args, **kwargs))


@register_model
def wide_resnet16_2(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-16-2, 32 px: for trials on a CPU."""
    args = dict(depths=(2, 2, 2), channels=(32, 64, 128))
    return _create_wide_resnet('wide_resnet16_2', pretrained, **dict(args, **kwargs))


@register_model
def wide_resnet28_2(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-28-2, 32 px: CIFAR-10 and SVHN."""
    args = dict(depths=(4, 4, 4), channels=(32, 64, 128))
    return _create_wide_resnet('wide_resnet28_2', pretrained, **dict(args, **kwargs))


@register_model
def wide_resnet28_8(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-28-8, 32 px: CIFAR-100."""
    args = dict(depths=(4, 4, 4), channels=(128, 256, 512))
    return _create_wide_resnet('wide_resnet28_8', pretrained, **dict(args, **kwargs))


@register_model
def wide_resnet37_2(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-37-2, 96 px: STL-10. Four stages that each halve the image."""
    args = dict(depths=(4, 4, 4, 4), channels=(32, 64, 128, 256), strides=(2, 2, 2, 2))
    return _create_wide_resnet('wide_resnet37_2', pretrained, **dict(args, **kwargs))
