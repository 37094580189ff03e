"""The optimiser, from timm: which parameters it moves, how, and whether they decay."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from run.rules import broken, out_of_range

OptimizerName = Literal["momentum", "nesterov", "lars", "rmsprop", "adamw"]
# Of each --optimizer: its name in timm, whose "sgd" would be Nesterov's, and the options that
# are not timm's defaults.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("momentum", {}),
    "nesterov": ("nesterov", {}),
    "lars": ("lars", {"trust_coeff": 0.001}),
    "rmsprop": ("rmsproptf", {}),
    "adamw": ("adamw", {}),
}


@dataclass
class OptimizerOptions:
    """The optimiser.

    Args:
        optimizer: momentum: SGD with momentum 0.9; nesterov: the same with Nesterov's; lars: with
            momentum 0.9 and trust coefficient 0.001; rmsprop: TensorFlow's, with momentum 0.9;
            adamw.
        learning_rate: The peak; not scaled by the batch size.
        weight_decay: Weight decay of all parameters; see decay_norm_and_bias.
        decay_norm_and_bias: Apply weight decay to biases and norm layers, and with lars adapt them.
            bias: only biases, as the SupCon authors do. Default: true; with lars false.
        rmsprop_eps: rmsprop only: added to the mean square under the root. The SupCon authors use 1
            to pretrain and 0.001 for the linear stage.
    """

    optimizer: OptimizerName = "momentum"
    learning_rate: float = 0.2
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool | Literal["bias"] | None = None
    rmsprop_eps: float = 1.0

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        rules = [
            (
                self.optimizer == "rmsprop" or self.rmsprop_eps == OptimizerOptions.rmsprop_eps,
                f"--rmsprop_eps contradicts --optimizer {self.optimizer}",
            )
        ]
        return broken(rules) + out_of_range(
            self,
            at_least={"weight_decay": 0},
            greater_than_0=("learning_rate", "rmsprop_eps"),
        )


def build_optimizer(options: OptimizerOptions, *modules: nn.Module) -> Optimizer:
    """The optimiser that the options ask for, over all parameters of some modules that are trained.

    They are one group, or two where norm layers, or they and biases, do not decay.
    """
    decays = options.decay_norm_and_bias
    if decays is None:
        decays = options.optimizer != "lars"
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    biases = {b for module in modules for b in _biases(module)} if decays == "bias" else set()
    decaying = [p for p in parameters if decays is True or p.ndim > 1 or p in biases]
    others = [p for p in parameters if not (decays is True or p.ndim > 1 or p in biases)]
    groups: list[dict[str, Any]] = [{"params": decaying, "weight_decay": options.weight_decay}]
    if options.optimizer == "lars":
        # Left to itself, timm's adapts nothing where nothing decays.
        groups[0]["always_adapt"] = True
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    name, rest = OPTIMIZERS[options.optimizer]
    if options.optimizer == "rmsprop":
        rest = {"eps": options.rmsprop_eps}
    return create_optimizer_v2(groups, opt=name, lr=options.learning_rate, momentum=0.9, **rest)


def _biases(model: nn.Module) -> set[nn.Parameter]:
    """Those beside a weight of several dimensions: not the ones of norm layers."""
    found = set()
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor) and weight.ndim > 1 and isinstance(bias, nn.Parameter):
            found.add(bias)
    return found


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer the state that another's `state_dict` returned.

    Raises:
        ValueError: it is that of other weights, which torch itself finds out in the next step.
    """
    optimizer.load_state_dict(saved)
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape != weight.shape:
                raise ValueError(
                    f"the optimizer's {name} is {tuple(value.shape)} for a weight of "
                    f"{tuple(weight.shape)}"
                )


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """The norm of all gradients together, a scalar on their device."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norms = torch._foreach_norm([weight.grad for weight in weights if weight.grad is not None])
    total: Tensor = torch.stack(norms).norm()
    return total
