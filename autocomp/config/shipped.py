"""Where the data files that ship with autocomp lie, in a wheel and in a source tree alike."""

from __future__ import annotations

from pathlib import Path


def data_folder(name: str) -> Path:
    """Return the folder of shipped files called ``name`` (``hardware_profiles``, ``recipes``, ``search_spaces``).

    A wheel carries it inside the package; in a source tree (editable install) it stands beside the package.
    FileNotFoundError if neither is there, which means that the installation is broken.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no folder {name!r} in {package} or beside it: install autocomp again")


def shipped_files(name: str) -> dict[str, Path]:
    """Return the shipped YAML files of a folder by name (the file's stem), sorted."""
    return {path.stem: path for path in sorted(data_folder(name).glob("*.yaml"))}
