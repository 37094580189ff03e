"""The options of the scripts: typed dataclasses, which say what contradicts itself."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml

DATASETS = ("digits", "fashion_mnist", "cifar10", "cifar100", "stl10")
WARMUP_EPOCHS = 4


@dataclass
class PretrainConfig:
    """The options of pretrain.py.

    Args:
        dataset: digits | fashion_mnist | cifar10 | cifar100 | stl10 | imagefolder:PATH |
            webdataset:URL. stl10: its labelled images. PATH holds train/ and val/ with a folder per
            class, or the class folders alone (see val_fraction). URL names tar shards, as in
            DATA/train-{000..127}.tar, by a path or anything that webdataset opens (https:, gs:,
            pipe:COMMAND); of each sample a jpg, jpeg, png or webp is the image and an integer as
            text in cls the label.
        data_root: Where fashion_mnist, cifar and stl10 are looked for, and downloaded to if not
            there; shards that are no local files are copied to it, once. Default: data.
        image_size: Side of the images that the encoder sees, in pixels. Default: the data set's
            own (digits: 16); imagefolder, webdataset: 64.
        val_fraction: imagefolder without val/, webdataset without val_shards: the share of every
            class to hold out.
        val_shards: webdataset: URL of the shards to evaluate on.
        validation_fraction: The share of every class to hold out of the training images, as the seed
            draws it. k-NN during the run is then measured on these, and chooses best.pt; the test
            images are looked at once, at the end. Of a class with one image none is held out.
            Default: none; k-NN is measured on the test images, and nothing is chosen by it.
        in_chans: Channels that the network sees: 1 makes colour images grey, 3 repeats grey ones.
            Default: the data set's own; imagefolder, webdataset: 3.
        mean: Of each channel, subtracted from pixels in [0, 1], such as [0.5]. Default: the
            training images' own; imagefolder, webdataset: ImageNet's.
        std: Of each channel, to divide by. Default: as for mean.
        augment: The random views. auto: digits for the data set digits, otherwise simclr. digits:
            slant, turn, shift and scale. All others crop and flip. crop_flip: no more; simclr: and
            change colours; simclr_blur: and blur; autoaugment, randaugment: and draw from that
            policy, for each image alone; stacked_randaugment: from it, and change colours at twice
            the strength and blur.
        min_crop_area: The least share of an image that a random crop keeps, up to all of it, such as
            0.08 of the SupCon authors' ImageNet runs. Default: 0.2, as SupContrast. Of images in files
            crops are cut from the whole image, as of stl10 at an image_size below its 96.
        num_views: Random views of each image in a batch.
        method: supcon: images of one class attract each other; simclr: only the views of one
            image do (labels are not used in training).
        temperature: Of the loss.
        base_temperature: Multiply the loss by temperature / base_temperature, so that the size of a step
            does not follow the temperature. 1: as the SupCon authors' code; 0.07: as SupContrast's.
            Default: do not.
        queue_size: Contrast the first view of each image with a queue of so many keys, such as 8192:
            the other views of this step's and of earlier images, embedded without gradient by an
            average of the weights (MoCo). Default: the views of a step with each other.
        queue_momentum: The share of that average which a step keeps.
        model: With the small stem resnet10, 18, 34, 50, 101, 152 or 200; with the standard stem
            any model of timm by name that can embed images of image_size.
        stem: small: 3x3 at stride 1, for images up to about 64 pixels; standard: the model's own.
        zero_init_residual: Begin the last batch norm of every residual block at zero, so that the block
            begins as the identity (models of timm that take zero_init_last); false: at one, as
            SupContrast.
        width: Channels of the first stage, doubled at each of the next three (small stem only).
        head: Between encoder and loss. mlp: two layers; linear: one, as the paper's ImageNet recipe.
        normalize_embedding: The head sees embeddings of length 1, as in that recipe.
        pretrained: Start from timm's weights for the model, downloaded (standard stem only).
        init_from: Start from the encoder of another run of the same model: PATH of its checkpoint,
            its encoder.safetensors, or its folder (its last.pt); or from what convert.py wrote.
        batch_size: Images per step, of all processes together, each in num_views views.
        classes_per_batch: Have every batch hold so many classes, with equally many images of each.
            Default: batches are drawn from all images alike.
        epochs: Passes over the training images. In a resumed run with another number the schedule is
            from the next step on that of a run of the new length.
        max_steps: Stop after so many steps; the learning rate then ends its decay there.
        learning_rate: At its peak; not scaled by the batch size.
        weight_decay: Applied to all parameters, as the SupCon authors do; but see the next one.
        decay_norm_and_bias: Whether biases and norm layers decay, too, and with lars are adapted.
            bias: biases alone, as the SupCon authors. Default: true; with lars false.
        optimizer: momentum: SGD with momentum 0.9; nesterov: the same with Nesterov's; lars: with
            momentum 0.9 and trust coefficient 0.001; rmsprop: TensorFlow's, with momentum 0.9 and
            eps 1; adamw.
        clip_grad: Scale the gradient of all parameters together down to this norm. Default: never.
        ema_decay: Evaluate and export an average of the weights, of which each step keeps this share,
            such as 0.999, and less early on: at step k at most 1 - k^(-2/3). Default: no average.
        warmup_epochs: Epochs of linear warm-up before the schedule. Default: 4, but one less than epochs
            where these are fewer; of a resumed run its own.
        schedule: cosine: half a cosine to final_learning_rate; step: times decay_rate at each of decay_epochs;
            exponential: a little lower every step, times decay_rate per decay_epochs.
        final_learning_rate: Where the cosine ends; with SupContrast at a thousandth of the peak.
        decay_rate: A factor of the learning rate (step and exponential only).
        decay_epochs: step: the epochs, from the start of the run, after which the rate falls, such
            as [700,800,900]; exponential: [how many epochs it takes to fall once].
        precision: Of the network in training: fp32, or by autocast bf16 or fp16, whose gradients are
            scaled, and a step whose gradient overflows skipped. The loss is always in float32.
        compile: Compile the network for training (torch.compile); checkpoints are the same.
        grad_cache_chunk: For batches that do not fit in memory: embed so many rows (an image in one view is
            one) at a time, without a graph, and once more with it for the gradient, which is that
            of the whole batch; but batch norm takes the statistics of each chunk by itself. Of
            several processes each goes by its own rows. Default: all rows at once.
        sync_batchnorm: Have batch norm take the statistics of all processes' rows (CUDA only); else
            they are each process's own, and the first one's are evaluated and saved.
        channels_last: Keep images and filters with the channels innermost, which convolutions are
            mostly faster with.
        workers: Processes that load (and for imagefolder and webdataset decode) images, for each
            training process (of torchrun: 8 GPUs with 4 workers each are 32); 0: the training
            process itself. The results do not depend on it.
        device: auto takes cuda, then mps, then cpu. Of several processes each takes a GPU to itself.
        timeout_minutes: How long one of several processes waits for another before it ends with an
            error; the first of each host may be downloading the data set meanwhile.
        seed: Of weights, order and augmentation.
        probe: Train a linear classifier on the embeddings, too, without gradient to the encoder, and
            evaluate it with k-NN.
        knn_every: Epochs between k-NN evaluations; 0: only before the first and after the last.
        knn_k: Neighbours that vote.
        knn_temperature: Each votes with the weight exp(cosine similarity / this).
        knn_bank: Use only so many training images as neighbours; 0: all.
        save_every: Steps between checkpoints within an epoch; 0: only at each epoch's end.
        keep: Checkpoints that stay; with 2 or more a damaged one has another before it. last.pt is
            the newest. best.pt, of the best k-NN accuracy on the images of validation_fraction,
            stays besides; without these there is none.
        output_dir: The run is written to output_dir/name.
        name: Default: made of dataset, method and seed, numbered when that name is taken.
        resume: none: start a new run. auto: go on from the newest checkpoint of the run of this
            name that is not damaged (without --name: the latest of the default name), or start it
            if there is none. PATH: go on from this checkpoint, or in this run folder. Options that
            would change the past are refused; epochs, max_steps, knn_every and save_every may change,
            and data_root or the path in dataset, where the same images have moved.
    """

    dataset: str = "digits"
    data_root: str | None = None
    image_size: int | None = None
    val_fraction: float | None = None
    val_shards: str | None = None
    validation_fraction: float | None = None
    in_chans: Literal[1, 3] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    augment: Literal[
        "auto", "digits", "crop_flip", "simclr", "simclr_blur",
        "autoaugment", "randaugment", "stacked_randaugment",
    ] = "auto"  # fmt: skip
    min_crop_area: float = 0.2
    num_views: int = 2
    method: Literal["supcon", "simclr"] = "supcon"
    temperature: float = 0.1
    base_temperature: float | None = None
    queue_size: int | None = None
    queue_momentum: float = 0.999
    model: str = "resnet18"
    stem: Literal["small", "standard"] = "small"
    zero_init_residual: bool = True
    width: int = 16
    head: Literal["mlp", "linear"] = "mlp"
    normalize_embedding: bool = False
    pretrained: bool = False
    init_from: str | None = None
    batch_size: int = 128
    classes_per_batch: int | None = None
    epochs: int = 60
    max_steps: int | None = None
    learning_rate: float = 0.2
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool | Literal["bias"] | None = None
    optimizer: Literal["momentum", "nesterov", "lars", "rmsprop", "adamw"] = "momentum"
    clip_grad: float | None = None
    ema_decay: float | None = None
    warmup_epochs: int | None = None
    schedule: Literal["cosine", "step", "exponential"] = "cosine"
    final_learning_rate: float = 0.0
    decay_rate: float = 0.1
    decay_epochs: list[float] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    grad_cache_chunk: int | None = None
    sync_batchnorm: bool = False
    channels_last: bool = True
    workers: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    timeout_minutes: float = 10.0
    seed: int = 0
    probe: bool = False
    knn_every: int = 10
    knn_k: int = 20
    knn_temperature: float = 0.07
    knn_bank: int = 0
    save_every: int = 0
    keep: int = 2
    output_dir: str = "runs"
    name: str | None = None
    resume: str = "none"

    def __post_init__(self) -> None:
        if self.warmup_epochs is None:
            self.warmup_epochs = self.default_warmup_epochs

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        assert self.warmup_epochs is not None
        kind, _, path = self.dataset.partition(":")
        in_files = kind in ("imagefolder", "webdataset") and path != ""
        rules = [
            (
                self.dataset in DATASETS or in_files,
                f"--dataset {self.dataset}: accepted are {', '.join(DATASETS)}, imagefolder:PATH, "
                "webdataset:URL",
            ),
            (
                self.data_root is None or kind not in ("digits", "imagefolder"),
                f"--data_root contradicts --dataset {self.dataset}, which is not looked for there",
            ),
            (
                self.val_fraction is None or in_files,
                f"--val_fraction contradicts --dataset {self.dataset}, which has a test split",
            ),
            (
                self.val_fraction is None or 0 < self.val_fraction < 1,
                f"--val_fraction {self.val_fraction}: must lie between 0 and 1",
            ),
            (
                self.validation_fraction is None or 0 < self.validation_fraction < 1,
                f"--validation_fraction {self.validation_fraction}: must lie between 0 and 1",
            ),
            (
                self.val_shards is None or kind == "webdataset",
                f"--val_shards contradicts --dataset {self.dataset}, which has none",
            ),
            (
                kind != "webdataset" or (self.val_fraction is None) != (self.val_shards is None),
                f"--dataset {self.dataset} needs --val_shards URL, or --val_fraction to hold images "
                "out, and not both",
            ),
            (
                self.stem == "small" or self.width == PretrainConfig.width,
                "--width contradicts --stem standard: the model's own channels are used",
            ),
            (
                self.stem == "standard" or not self.pretrained,
                "--pretrained contradicts --stem small, which timm has no weights for: "
                "use --stem standard",
            ),
            (
                self.init_from is None or not self.pretrained,
                "--pretrained contradicts --init_from: the weights come from one of them",
            ),
            (
                self.ema_decay is None or 0 < self.ema_decay < 1,
                f"--ema_decay {self.ema_decay}: must lie between 0 and 1",
            ),
            (
                self.std is None or min(self.std, default=0) > 0,
                f"--std {self.std}: must be greater than 0",
            ),
            (
                self.classes_per_batch is None or self.method != "simclr",
                "--classes_per_batch contradicts --method simclr, which trains without labels",
            ),
            (
                self.classes_per_batch is None or self.classes_per_batch > 1,
                f"--classes_per_batch {self.classes_per_batch}: must be at least 2, one class alone "
                "has nothing to tell apart",
            ),
            (
                not self.classes_per_batch or self.batch_size % self.classes_per_batch == 0,
                f"--batch_size {self.batch_size} is no multiple of "
                f"--classes_per_batch {self.classes_per_batch}",
            ),
            (
                self.warmup_epochs < max(self.epochs, 1),
                f"--warmup_epochs {self.warmup_epochs} contradicts --epochs {self.epochs}: "
                "it must be smaller",
            ),
            (
                0 < self.min_crop_area <= 1,
                f"--min_crop_area {self.min_crop_area}: must be greater than 0 and at most 1",
            ),
            (
                self.crops or self.min_crop_area == PretrainConfig.min_crop_area,
                "--min_crop_area contradicts --augment digits, which does not crop",
            ),
            *self._queue_rules(),
            *self._schedule_rules(),
            (
                self.name is None
                or (self.name == Path(self.name).name and self.name not in ("", "..")),
                f"--name {self.name}: a folder name without slashes is needed",
            ),
            (
                self.name is None or self.resume in ("none", "auto") or self._resumes_itself(),
                f"--name {self.name} contradicts --resume {self.resume}: a run stays in its folder",
            ),
            (self.seed < 2**63, f"--seed {self.seed}: must be less than 2**63"),
        ]
        return [sentence for holds, sentence in rules if not holds] + self._out_of_range()

    def _queue_rules(self) -> list[tuple[bool, str]]:
        num_keys = self.batch_size * (self.num_views - 1)
        return [
            (
                self.queue_size is None or self.queue_size >= num_keys,
                f"--queue_size {self.queue_size}: must hold at least the {num_keys} keys of a step, "
                "which are all views but the first of --batch_size images",
            ),
            (
                self.queue_size is not None or self.queue_momentum == PretrainConfig.queue_momentum,
                "--queue_momentum contradicts the absence of a queue: give --queue_size",
            ),
            (
                0 <= self.queue_momentum < 1,
                f"--queue_momentum {self.queue_momentum}: must be at least 0 and less than 1",
            ),
        ]

    def _schedule_rules(self) -> list[tuple[bool, str]]:
        assert self.warmup_epochs is not None
        at = self.decay_epochs
        cosine = self.schedule == "cosine"
        return [
            (
                cosine or bool(at),
                f"--schedule {self.schedule} needs --decay_epochs",
            ),
            (
                not cosine or (at is None and self.decay_rate == PretrainConfig.decay_rate),
                "--decay_epochs and --decay_rate contradict --schedule cosine",
            ),
            (
                cosine or self.final_learning_rate == 0,
                f"--final_learning_rate contradicts --schedule {self.schedule}: a cosine ends there",
            ),
            (
                0 <= self.final_learning_rate <= self.learning_rate,
                f"--final_learning_rate {self.final_learning_rate}: must be at least 0 and at most "
                f"--learning_rate {self.learning_rate}",
            ),
            (
                self.schedule != "exponential" or not at or (len(at) == 1 and at[0] > 0),
                f"--decay_epochs {at}: --schedule exponential takes one number greater than 0",
            ),
            (
                self.schedule != "step"
                or not at
                or (at == sorted(at) and self.warmup_epochs <= at[0]),
                f"--decay_epochs {at}: must rise, from --warmup_epochs {self.warmup_epochs} on",
            ),
            (
                0 < self.decay_rate <= 1,
                f"--decay_rate {self.decay_rate}: must be greater than 0 and at most 1",
            ),
        ]

    @property
    def crops(self) -> bool:
        """Whether views begin with a random crop."""
        return self.augment != "digits" and (self.augment, self.dataset) != ("auto", "digits")

    @property
    def loss_scale(self) -> float:
        """What the contrastive loss is multiplied by."""
        return self.temperature / (self.base_temperature or self.temperature)

    @property
    def default_warmup_epochs(self) -> int:
        """The warm-up of a new run that is told of none."""
        return max(min(WARMUP_EPOCHS, self.epochs - 1), 0)

    @property
    def memory_format(self) -> torch.memory_format:
        """How images and filters lie in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def _resumes_itself(self) -> bool:
        path = Path(self.resume).resolve()
        return self.name == (path if path.is_dir() else path.parent).name

    def _out_of_range(self) -> list[str]:
        least: dict[str, int] = {
            "image_size": 8, "num_views": 2, "width": 4, "batch_size": 2, "epochs": 1, "max_steps": 1,
            "weight_decay": 0, "warmup_epochs": 0, "workers": 0, "seed": 0,
            "knn_every": 0, "knn_k": 1, "knn_bank": 0, "save_every": 0, "keep": 1, "grad_cache_chunk": 1,
        }  # fmt: skip
        # Beyond these no step fits in memory, or no list of processes on a machine.
        most = {"num_views": 1000, "workers": 1000} | dict.fromkeys(
            ("image_size", "width", "batch_size", "queue_size", "epochs", "max_steps"), 2**31 - 1
        )
        values = asdict(self)
        found = [
            f"--{option} {values[option]}: must be at most {bound}"
            for option, bound in most.items()
            if values[option] is not None and values[option] > bound
        ]
        found += [
            f"--{option} {values[option]}: must be at least {bound}"
            for option, bound in least.items()
            if values[option] is not None and values[option] < bound
        ]
        return found + [
            f"--{option} {values[option]}: must be greater than 0"
            for option in (
                "temperature", "base_temperature", "learning_rate", "clip_grad", "timeout_minutes",
                "knn_temperature",
            )
            if values[option] is not None and not values[option] > 0
        ]  # fmt: skip


@dataclass
class LinearConfig:
    """The options of linear.py.

    Args:
        checkpoint: last.pt or best.pt of a run of pretrain.py, or the run's folder (its last.pt).
        dataset: Fit on and measure by this data set, which has the run's classes; as of pretrain.py.
            Default: that of the run, of which nothing is fetched.
        data_root: Default: the one that the run was trained with; with --dataset as of pretrain.py.
        val_fraction: With --dataset, as of pretrain.py.
        val_shards: With --dataset, as of pretrain.py.
        weight_decay: L2 penalty of the linear layer.
        max_iterations: Most L-BFGS iterations.
        workers: Processes that load images.
        device: auto takes cuda, then mps, then cpu.
    """

    checkpoint: str
    dataset: str | None = None
    data_root: str | None = None
    val_fraction: float | None = None
    val_shards: str | None = None
    weight_decay: float = 1e-4
    max_iterations: int = 200
    workers: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        named = self.dataset is not None
        rules = [
            (named or self.val_fraction is None, "--val_fraction needs --dataset"),
            (named or self.val_shards is None, "--val_shards needs --dataset"),
            (self.weight_decay >= 0, f"--weight_decay {self.weight_decay}: must be at least 0"),
            (self.max_iterations >= 1, f"--max_iterations {self.max_iterations}: must be >= 1"),
            (self.workers >= 0, f"--workers {self.workers}: must be at least 0"),
        ]
        return [sentence for holds, sentence in rules if not holds]


@dataclass
class EmbedConfig:
    """The options of embed.py.

    Args:
        checkpoint: last.pt or best.pt of a run of pretrain.py, or the run's folder (its last.pt).
        images: A folder of images, or of a folder per class.
        output: The .npz file to write.
        workers: Processes that decode images.
        device: auto takes cuda, then mps, then cpu.
    """

    checkpoint: str
    images: str
    output: str
    workers: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        output = Path(self.output)
        rules = [
            (output.suffix == ".npz", f"--output {output}: the name of a .npz file is needed"),
            (output.parent.is_dir(), f"--output {output}: there is no folder {output.parent}"),
            (self.workers >= 0, f"--workers {self.workers}: must be at least 0"),
        ]
        return [sentence for holds, sentence in rules if not holds]


def to_yaml(config: PretrainConfig) -> str:
    """Write a config such that --config reads it back."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
