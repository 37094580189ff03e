"""Where compilers keep what they have compiled: on a disk of this host.

Triton's default is the home, which a cluster's hosts often share: processes then wait for the network,
and for each other's files.
"""

import getpass
import os
import tempfile
from pathlib import Path

MOUNTS = Path("/proc/mounts")
SHARED = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.juicefs", "fuse.sshfs",
    "gpfs", "lustre", "nfs", "nfs4", "panfs", "smb3", "wekafs",
}  # fmt: skip
VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def keep_caches_local() -> None:
    """Move the caches of torch.compile and Triton off a shared home, and say so.

    What the user has set stays.
    """
    home, temporary = Path.home(), Path(tempfile.gettempdir())
    missing = [variable for variable in VARIABLES if variable not in os.environ]
    kind = file_system_of(home)
    if not missing or kind not in SHARED or file_system_of(temporary) in SHARED:
        return
    folder = temporary / f"compiled-{getpass.getuser()}"
    for variable in missing:
        os.environ[variable] = str(folder / VARIABLES[variable])
    print(f"{home} is shared ({kind}): compiled kernels go to {folder} ({', '.join(missing)})")


def file_system_of(path: Path) -> str | None:
    """The kind of file system that a path lies on; None where the system does not say."""
    if not MOUNTS.is_file():
        return None
    path, found = path.resolve(), (-1, "")
    for line in MOUNTS.read_text().splitlines():
        _, place, kind, *_ = line.split(" ")
        mount = Path(place.replace("\\040", " "))
        if path.is_relative_to(mount):
            # Of two in one place the later hides the earlier.
            found = max(found, (len(mount.parts), kind), key=lambda mounted: mounted[0])
    return found[1] or None
