"""NFNets and NF-ResNets in plain PyTorch functions, written from the papers' formulas, for the parity test: NCHW, a loop over blocks, padding by hand."""
import torch
from torch.nn import functional as F

ACTIVATIONS = {"relu": (F.relu, 1.7139588594436646), "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), 1.7015043497085571),
               "silu": (F.silu, 1.7881293296813965)}


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def padding(size, window, stride):
    """Zeros before and after an axis so that it gives ceil(size / stride) outputs; the odd one comes after."""
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def pad(x, window, stride, value=0.0):
    return F.pad(x, (*padding(x.shape[3], window, stride), *padding(x.shape[2], window, stride)), value=value)


def conv(x, p, stride=1, groups=1):
    weight = tensor(p["kernel"]).permute(3, 2, 0, 1)
    mean, variance = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), unbiased=False, keepdim=True)
    inputs = weight[0].numel()
    weight = tensor(p["gain"])[:, None, None, None] * (weight - mean) / torch.sqrt(torch.clamp(inputs * variance, min=1e-4))
    return F.conv2d(pad(x, weight.shape[2], stride), weight, tensor(p["bias"]) if "bias" in p else None, stride=stride, groups=groups)


def block(x, p, act, s, alpha, stride, groups, transition):
    h = act(x) / s
    shortcut = x
    if transition == "pool" and stride > 1:
        ones = pad(torch.ones_like(h[:1, :1]), 2, 2)
        shortcut = conv(F.avg_pool2d(pad(h, 2, 2), 2) / F.avg_pool2d(ones, 2), p["shortcut"])
    elif transition is not None:
        shortcut = conv(h, p["shortcut"], stride)
    middle = sum(name.startswith("conv_") for name in p) - 2
    h = conv(h, p["conv_0"])
    for i in range(1, middle + 1):
        h = conv(act(h), p[f"conv_{i}"], stride if i == 1 else 1, groups)
    h = conv(act(h), p[f"conv_{middle + 1}"])
    if "squeeze_excite" in p:
        down, up = ({name: tensor(leaf) for name, leaf in p["squeeze_excite"][which].items()} for which in ("down", "up"))
        hidden = F.relu(h.mean((2, 3)) @ down["kernel"] + down["bias"])
        h = h * 2 * torch.sigmoid(hidden @ up["kernel"] + up["bias"])[:, :, None, None]
    return shortcut + alpha * float(p["skip_gain"]) * h


def tower(params, image, *, depths, strides, activation, alpha, groups, transition):
    """The grid of the last stage [B, H * W, C] of pictures [B, H, W, 3]."""
    function, gamma = ACTIVATIONS[activation]

    def act(x):
        return gamma * function(x)
    x = tensor(image).permute(0, 3, 1, 2)
    if "stem" in params:
        x = F.max_pool2d(pad(conv(x, params["stem"], 2), 3, 2, float("-inf")), 3, 2)
    else:
        for i, stride in enumerate((2, 1, 1, 2)):
            x = conv(x if i == 0 else act(x), params[f"stem_{i}"], stride)
    s = 1.0
    for stage, depth in enumerate(depths):
        p = params[f"stages_{stage}"]
        for i in range(depth):
            of_block = p["first"] if i == 0 else index(p["blocks"], i - 1)
            x = block(x, of_block, act, s, alpha, strides[stage] if i == 0 else 1, groups[stage], transition if i == 0 else None)
            s = ((1.0 if i == 0 else s ** 2) + alpha ** 2) ** 0.5
    if "final" in params:
        x = conv(x, params["final"])
    return act(x).flatten(2).transpose(1, 2)


def index(tree, i):
    return {name: index(value, i) for name, value in tree.items()} if isinstance(tree, dict) else tree[i]
