"""What is compared: methods as options of pretrain.py and linear.py that differ from the scale's.

They differ in their loss alone, or in the one option that their title names.
"""

from dataclasses import dataclass, field
from itertools import product
from typing import Any

# Baselines that learn nothing, by a linear classifier: they stand beside every table.
RAW_PIXELS, UNTRAINED = "raw_pixels", "untrained"
# The run that errors under corruptions are relative to.
REFERENCE = "cross_entropy"
SUPCON = "supcon"
OPTIMIZERS = {"momentum": "momentum", "lars": "LARS", "rmsprop": "RMSprop"}
# The learning rate of each optimiser where that of momentum is 1, before it is tuned.
PRETRAINING_RATES = {"momentum": 1.0, "lars": 20.0, "rmsprop": 1.0}
LINEAR_RATES = {"momentum": 1.0, "lars": 1.0, "rmsprop": 0.03}
# Of grey images, and the paper's, which are of colours.
AUGMENTS = (
    ("crop_flip", "simclr", "simclr_blur"),
    ("autoaugment", "randaugment", "simclr_blur", "stacked_randaugment"),
)


@dataclass(frozen=True)
class Compared:
    """A method as it is compared.

    Attributes:
        options: of pretrain.py.
        times: of some options, how many times as much as without.
        of: the method whose learning rate it has, if it is not tuned itself.
        encoder: the method whose encoder it has, if only its linear stage is its own.
        linear: options of linear.py --protocol paper; None: as the scale has it.
        augments: what a scale must be able to do.
    """

    title: str
    options: dict[str, Any] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    of: str | None = None
    encoder: str | None = None
    linear: dict[str, Any] | None = None
    augments: tuple[str, ...] = ()


# Another view is another pass through the network: with twice the epochs cross-entropy computes as much
# as a method of two views.
METHODS = {
    "supcon": Compared("SupCon", {"method": "supcon"}),
    "cross_entropy": Compared("Cross-entropy, equal epochs", {"method": "cross_entropy"}),
    "cross_entropy_2x": Compared(
        "Cross-entropy, equal compute", {"method": "cross_entropy"}, {"epochs": 2}
    ),
    "cross_entropy_two_stages": Compared("Cross-entropy, two stages", encoder="cross_entropy"),
    "simclr": Compared("SimCLR", {"method": "simclr"}),
    "max_margin": Compared("Max-margin", {"method": "max_margin"}),
    "n_pairs": Compared("N-pairs", {"method": "n_pairs"}),
    "triplet": Compared("Triplet", {"method": "triplet"}),
    "joint": Compared("Cross-entropy + SupCon", {"method": "joint"}),
    "supcon_in": Compared("SupCon, L_in", {"method": "supcon", "summation": "in"}),
    "sincere": Compared("SINCERE", {"method": "supcon", "denominator": "one_positive"}),
    "dcl": Compared("DCL", {"method": "supcon", "denominator": "only_negatives"}),
}
SUPERVISED = ("supcon", "cross_entropy", "cross_entropy_2x")


def _changed(name: str, title: str, **changes: Any) -> Compared:
    """A method with some options changed; other fields as in Compared."""
    method = METHODS[name]
    options = method.options | changes.pop("options", {})
    times = method.times | changes.pop("times", {})
    return Compared(f"{method.title}, {title}", options, times, **changes)


# Of Table 5. All of them is SupCon itself.
POSITIVES = {f"positives_{count}": count for count in (1, 3, 7)}
for _name, _count in POSITIVES.items():
    _title = f"{_count} positive" + "s" * (_count > 1)
    METHODS[_name] = _changed(SUPCON, _title, options={"max_positives": _count})

# Of the table of memory: a queue of 32 batches, as the paper's of 8,192 keys is at a batch of 256.
BATCHES = (32, 64, 128, 256)
for _size in BATCHES:
    _name, _of_batch = f"batch_{_size}", {"batch_size": _size}
    METHODS[_name] = _changed(SUPCON, f"batch {_size}", options=_of_batch)
    _keys = 32 * _size
    _queue = {"queue_size": _keys, "queue_momentum": 0.99}
    METHODS[f"{_name}_queue"] = _changed(_name, f"queue of {_keys:,} keys", options=_queue)

# Beyond the paper: of each condition its title and its options. Learning rates are those of without.
CONDITIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "noise": ("40% wrong labels", {"label_noise": 0.4}),
    "tail": ("long tail of 1:50", {"imbalance": 50}),
    "few": ("500 images", {"train_images": 500}),
}
for (_name, (_title, _options)), _of in product(CONDITIONS.items(), SUPERVISED):
    METHODS[f"{_of}_{_name}"] = _changed(_of, _title, options=_options, of=_of)

# The baselines of every condition have its images, and the network of SupCon.
BASELINES = {
    RAW_PIXELS: Compared("Raw pixels, linear classifier", METHODS[SUPCON].options),
    UNTRAINED: Compared("Untrained encoder", METHODS[SUPCON].options),
}
for (_of, _baseline), (_name, (_title, _options)) in product(
    list(BASELINES.items()), CONDITIONS.items()
):
    BASELINES[f"{_of}_{_name}"] = Compared(
        f"{_baseline.title}, {_title}", _baseline.options | _options
    )

# Of Figure 4: of each setting its title, what changes, and whether its learning rate is tuned anew. That
# without any change is there, too: it has one of the optimisers.
SETTINGS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "batch_quarter": ("1/4 of the batch", {"times": {"batch_size": 0.25}}, True),
    "batch_half": ("1/2 of the batch", {"times": {"batch_size": 0.5}}, True),
    "batch_double": ("2 times the batch", {"times": {"batch_size": 2}}, True),
    "epochs_half": ("1/2 of the epochs", {"times": {"epochs": 0.5}}, False),
    "epochs_double": ("2 times the epochs", {"times": {"epochs": 2}}, False),
    "rate_third": ("1/3 of the learning rate", {"times": {"learning_rate": 1 / 3}}, False),
    "rate_triple": ("3 times the learning rate", {"times": {"learning_rate": 3}}, False),
    **{name: (title, {"options": {"optimizer": name}}, True) for name, title in OPTIMIZERS.items()},
}
TEMPERATURES = {
    f"temperature_{tau}": (f"temperature {tau}", {"options": {"temperature": tau}}, True)
    for tau in (0.05, 0.2, 0.5)
}
for _of, _settings in ((SUPCON, SETTINGS | TEMPERATURES), (REFERENCE, SETTINGS)):
    for _name, (_title, _changes, _tuned) in _settings.items():
        METHODS[f"{_of}_{_name}"] = _changed(_of, _title, **_changes, of=None if _tuned else _of)


def baseline_of(name: str) -> str | None:
    """Which of the two a baseline is; None: it is a method."""
    if name not in BASELINES:
        return None
    return UNTRAINED if name.startswith(UNTRAINED) else RAW_PIXELS


def settings_of(name: str) -> list[str]:
    """The settings of SupCon or of cross-entropy that both losses have."""
    return [f"{name}_{setting}" for setting in SETTINGS]


# Of Tables 8 and 9: SupCon's encoder by one optimiser or augmentation, its linear stage by another.
for _name in OPTIMIZERS:
    for _other, _title in OPTIMIZERS.items():
        METHODS[f"{_name}_{_other}"] = Compared(
            f"{OPTIMIZERS[_name]}, then {_title}",
            encoder=f"{SUPCON}_{_name}",
            linear={"optimizer": _other},
        )
for _augments in AUGMENTS:
    for _name in _augments:
        METHODS[f"{SUPCON}_{_name}"] = _changed(
            SUPCON, _name, options={"augment": _name}, augments=(_name,)
        )
    for _name, _other in product(_augments, repeat=2):
        METHODS[f"{_name}_{_other}"] = Compared(
            f"{_name}, then {_other}",
            encoder=f"{SUPCON}_{_name}",
            linear={"augment": _other},
            augments=(_name, _other),
        )


def tuned_for(name: str) -> tuple[str, ...]:
    """The methods whose learning rates are chosen before a method can run."""
    method = METHODS[name]
    if method.of is not None:
        return tuned_for(method.of)
    if method.encoder is None:
        return (name,)
    own = () if method.linear is None else (name,)
    return (*tuned_for(method.encoder), *own)
