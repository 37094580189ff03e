"""The options of evaluate.py."""

from dataclasses import dataclass, replace

from data.corrupted import SMALLEST_SIDE
from data.sources import DataOptions
from run.device import Device
from run.rules import LARGEST, broken, out_of_range

# Data sets that are not looked for in a folder of data.
ROOTLESS = ("digits", "imagefolder")


@dataclass
class EvaluateOptions:
    """Evaluating runs.

    Args:
        checkpoint: Runs of pretrain.py: last.pt, best.pt or the folder (its last.pt). For several
            runs a table is written, too.
        baseline: The run whose errors under corruptions are the denominator of mCE. It is evaluated,
            too.
        transfer: Another data set to measure the embedding on, as --dataset of pretrain.py.
        transfer_val_fraction: For --transfer with imagefolder without val/, or webdataset: the share
            of every class to test on.
        data_root: Folder of the data sets. Default: that of each run; for --transfer: data.
        corruptions: Test on the 15 corruptions of ImageNet-C at 5 severities. This takes longer than
            75 tests. Results that are already there are kept.
        corruption_images: Number of test images to corrupt, evenly drawn; 0: all.
        corruption_side: Smaller images are enlarged to this side in pixels, corrupted, and reduced
            again. The corruptions are made for 224. At 32 most images cannot be recognised.
        output: Folder for the table of several runs. Default: the parent folder of the first run.
        workers: Processes that load and corrupt images, for each process of torchrun.
        device: auto: cuda, then mps, then cpu. With several processes each has its own GPU.
        timeout_minutes: How long a process waits for the others.
    """

    checkpoint: list[str]
    baseline: str | None = None
    transfer: str | None = None
    transfer_val_fraction: float | None = None
    data_root: str | None = None
    corruptions: bool = True
    corruption_images: int = 0
    corruption_side: int = 64
    output: str | None = None
    workers: int = 0
    device: Device = "auto"
    timeout_minutes: float = 30.0

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        rules = [
            (
                self.corruptions or self.baseline is None,
                "--baseline contradicts --no_corruptions: errors under corruptions are compared",
            ),
            (
                self.transfer is not None or self.transfer_val_fraction is None,
                "--transfer_val_fraction needs --transfer",
            ),
        ]
        transfer = self.transferred()
        return (
            broken(rules)
            + (transfer_mistakes(transfer) if transfer else [])
            + out_of_range(
                self,
                at_least={
                    "corruption_images": 0,
                    "corruption_side": SMALLEST_SIDE,
                    "workers": 0,
                },
                at_most={"corruption_side": 1024, "workers": 1000, "timeout_minutes": LARGEST},
                greater_than_0=("timeout_minutes",),
            )
        )

    def transferred(self) -> DataOptions | None:
        """The data set of --transfer."""
        if self.transfer is None:
            return None
        data = DataOptions(dataset=self.transfer, val_fraction=self.transfer_val_fraction)
        return self.at_root(data)

    def at_root(self, data: DataOptions) -> DataOptions:
        """A data set where --data_root says, if it does and such a data set lies in a folder."""
        if self.data_root is None or data.dataset.partition(":")[0] in ROOTLESS:
            return data
        return replace(data, data_root=self.data_root)


def transfer_mistakes(data: DataOptions) -> list[str]:
    """Those of the data set of --transfer, by the names of its options here."""
    return [by_names_here(sentence) for sentence in data.mistakes()]


def by_names_here(sentence: str) -> str:
    """A sentence on the options of a data set, by the names that those of --transfer have."""
    renamed = sentence.replace("--dataset", "--transfer")
    return renamed.replace("--val_fraction", "--transfer_val_fraction")
