"""One folder of images per class, as torchvision reads it, without what is hidden."""

import mimetypes
import os
import sys
from collections import Counter

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file


class ClassFolders(ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """Files and folders whose names begin with a dot are left out. Images of types that are not read
    are counted, and a warning names them.

    Raises:
        FileNotFoundError: there is no folder, or one without an image.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.not_read: Counter[str] = Counter()
        super().__init__(root, is_valid_file=self._is_read)
        if self.not_read and os.environ.get("RANK", "0") == "0":
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.not_read.items()))
            print(
                f"warning: {root}: images of types that are not read are left out: {kinds}",
                file=sys.stderr,
            )

    def find_classes(self, directory: str | os.PathLike[str]) -> tuple[list[str], dict[str, int]]:
        """The folders by name, and the number of each."""
        classes = [name for name in super().find_classes(directory)[0] if name[0] != "."]
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return classes, {name: number for number, name in enumerate(classes)}

    def _is_read(self, path: str) -> bool:
        if os.sep + "." in path[len(str(self.root)) :]:
            return False
        if is_image_file(path):
            return True
        kind, _ = mimetypes.guess_type(path, strict=False)
        if kind is not None and kind.startswith("image/"):
            self.not_read[os.path.splitext(path)[1].lower()] += 1
        return False
