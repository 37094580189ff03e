"""Packages of an extra of the installation, which one of the scripts needs."""

from importlib.util import find_spec

from run.errors import UserError


def require_extra(extra: str, *packages: str) -> None:
    """Refuse to go on without packages that are installed by `pip install -e ".[extra]"`."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(f'{", ".join(missing)} not installed: pip install -e ".[{extra}]"')
