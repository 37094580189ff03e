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
        checkpoint: last.pt or best.pt of runs of pretrain.py, or their folders (their last.pt); of
            several runs a table is written, too.
        baseline: A run whose errors under corruptions mCE is relative to; it is evaluated, too.
        transfer: Another data set to measure the embedding on, as --dataset of pretrain.py.
        transfer_val_fraction: imagefolder without val/, webdataset: the share of every class of it to
            test on.
        data_root: Where the data sets are looked for. Default: where each run found its own;
            --transfer: data.
        corruptions: Test on the 15 corruptions of ImageNet-C at 5 severities, which takes as long as
            75 tests and longer. What was tested before is not tested again.
        corruption_images: Corrupt so many test images, evenly drawn; 0: all.
        corruption_side: Side in pixels that smaller images are enlarged to, corrupted at, and reduced
            from. The corruptions are made for 224; at 32 most images cannot be recognised.
        output: Folder for the table of several runs. Default: the one that holds the first run.
        workers: Processes that load and corrupt images, for each process of torchrun.
        device: auto takes cuda, then mps, then cpu. Of several processes each takes a GPU to itself.
        timeout_minutes: How long one of several processes waits for another.
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
    return [
        sentence.replace("--dataset", "--transfer").replace(
            "--val_fraction", "--transfer_val_fraction"
        )
        for sentence in data.mistakes()
    ]
