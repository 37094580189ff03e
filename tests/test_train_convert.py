"""convert.py on files as SupContrast's main_supcon.py writes them, of its networks/resnet_big.py."""

import os
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_fixtures  # noqa: F401  puts train/ on the path
from convert import main
from run.errors import UserError
from train_parts import build_model, load_first_weights, options_of


class TheirBlock(nn.Module):
    """BasicBlock, or with `bottleneck` Bottleneck, of networks/resnet_big.py."""

    def __init__(self, in_planes, planes, stride, bottleneck):
        super().__init__()
        self.bottleneck, out_planes = bottleneck, 4 * planes if bottleneck else planes
        if bottleneck:
            self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
            self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
            self.conv3 = nn.Conv2d(planes, out_planes, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out_planes)
        else:
            self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
            self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != out_planes:
            shortcut = nn.Conv2d(in_planes, out_planes, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(out_planes))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            out = self.bn3(self.conv3(F.relu(out)))
        return F.relu(out + self.shortcut(x))


class TheirResNet(nn.Module):
    """ResNet of networks/resnet_big.py, of fewer channels (there `width` is 64)."""

    def __init__(self, num_blocks, bottleneck, width):
        super().__init__()
        planes = 64
        self.conv1 = nn.Conv2d(3, planes, 3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        for layer, number in enumerate(num_blocks):
            blocks = []
            for block in range(number):
                stride = 2 if layer > 0 and block == 0 else 1
                blocks.append(TheirBlock(planes, width << layer, stride, bottleneck))
                planes = (4 if bottleneck else 1) * width << layer
            setattr(self, f"layer{layer + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            out = layer(out)
        return torch.flatten(self.avgpool(out), 1)


def write_theirs(path, *, bottleneck=False, prefix="encoder.", width=8, **more):
    """Write what save_model of util.py does; returns the encoder."""
    torch.manual_seed(0)
    encoder = TheirResNet((3, 4, 6, 3) if bottleneck else (2, 2, 2, 2), bottleneck, width)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                nn.init.uniform_(tensor, 0.5, 1.5)
    weights = {prefix + key: value for key, value in encoder.state_dict().items()}
    head = {"head.0.weight": torch.zeros(1, 1)}
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5, momentum=0.9).state_dict()
    opt = Namespace(model="resnet", dataset="cifar10", lr_decay_epochs=[700, 800], cosine=True)
    torch.save(
        {"opt": opt, "model": weights | head, "optimizer": optimizer, "epoch": 1, **more}, path
    )
    return encoder


@pytest.mark.parametrize(
    ("bottleneck", "prefix"),
    # As of one GPU; of several, around the encoder; and around the whole network.
    [(False, "encoder."), (True, "encoder.module."), (False, "module.encoder.")],
)
def test_converted_encoder_embeds_as_theirs(tmp_path, capsys, bottleneck, prefix):
    theirs = write_theirs(tmp_path / "ckpt.pth", bottleneck=bottleneck, prefix=prefix)
    output = tmp_path / "encoder.safetensors"
    assert main(["--supcontrast", str(tmp_path / "ckpt.pth"), "--output", str(output)]) == output
    model = "resnet50" if bottleneck else "resnet18"
    assert f"--model {model} --width 8 --in_chans 3" in capsys.readouterr().out
    config = options_of(model=model, width=8, init_from=str(output))
    ours = build_model(config, channels=3).encoder
    load_first_weights(ours, config, channels=3)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = (network.eval()(images) for network in (theirs, ours))
    torch.testing.assert_close(found, expected)
    assert expected.std() > 0.01
    other = config.changed(width=16)
    with pytest.raises(UserError, match="width is 8, here 16"):
        load_first_weights(ours, other, channels=3)


class Code:
    """What runs when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_only_with_trust_anything_else_is_unpickled(tmp_path):
    path, mark = tmp_path / "ckpt.pth", tmp_path / "mark"
    write_theirs(path, epoch=Code(str(mark)))
    argv = ["--supcontrast", str(path), "--output", str(tmp_path / "encoder.safetensors")]
    with pytest.raises(
        UserError, match=r"more than weights and options.*mkdir.*--trust it"
    ) as raised:
        main(argv)
    assert "\n" not in str(raised.value) and not mark.exists()
    main([*argv, "--trust", "true"])
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"fc.weight": torch.zeros(1)}}, r"has no weights encoder\.\*"),
        ([1], r"has no weights encoder\.\*"),
        ({"model": {"encoder.conv1.weight": torch.zeros(4, 3, 7, 7)}}, "holds no ResNet"),
        ({"model": {"encoder.conv1.weight": torch.full((1,), torch.nan)}}, "is not finite"),
        (b"text", "cannot be read|more than weights"),
    ],
)
def test_other_files_are_refused_in_a_line(tmp_path, content, message):
    path = tmp_path / "ckpt.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=f"--supcontrast {path}.*({message})") as raised:
        main(["--supcontrast", str(path), "--output", str(tmp_path / "encoder.safetensors")])
    assert "\n" not in str(raised.value)


def test_missing_file_exits_with_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--supcontrast", str(tmp_path / "no.pth"), "--output", str(tmp_path / "e.npz")])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "there is no such file; --output" in error and error.count("\n") == 1
