"""The sources that `ict-fast prepare` knows by name, and the options that each takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ict_fast.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from ict_fast.data.sources.source import Source

OPTIONS: dict[str, tuple[str, ...]] = {
    "digits": (),
    "cifar10": ("path", "processes", "download", "restart"),
    "imagenet": ("path", "resolution", "crop", "processes", "max_rejected", "restart"),
    "imagenet-npz": ("path", "processes", "restart"),
    "edm-zip": ("path", "processes", "max_rejected", "restart"),
    "folder": ("path", "resolution", "crop", "channels", "processes", "max_rejected", "restart"),
    "parquet": (
        "path",
        "resolution",
        "crop",
        "channels",
        "image_column",
        "label_column",
        "processes",
        "max_rejected",
        "restart",
    ),
}
"""What each source takes beside --out."""


def check_options(source: str, given: Mapping[str, Any]) -> None:
    """Refuses options that the source does not take, asks for those that it lacks, and checks their values.

    Args:
        source: a key of `OPTIONS`.
        given: every option of any source, and its value; None or False where it was not given.
    Raises:
        InputError: naming the option and what would be right.
    """
    taken = OPTIONS[source]
    for name, value in given.items():
        if value is not None and value is not False and name not in taken:
            what = f'PATH, which is "{value}"' if name == "path" else _spelled(name)
            takes = ", ".join(_spelled(each) for each in (*taken, "out"))
            raise InputError(f"prepare {source} does not take {what}; it takes {takes}")
    if "path" in taken and given["path"] is None and not given["download"]:
        instead = ", or --download" if "download" in taken else ""
        raise InputError(f"prepare {source} needs PATH, the archive or folder with the images{instead}")
    if source in ("folder", "parquet") and given["resolution"] is None:
        raise InputError(f"prepare {source} needs --resolution N, height and width of the images to make")
    for name in ("resolution", "processes"):
        if given[name] is not None and given[name] < 1:
            raise InputError(f"--{name} is {given[name]}; it must be at least 1")
    if given["channels"] not in (None, 1, 3):
        raise InputError(f"--channels is {given['channels']}; it must be 1 (grey) or 3 (RGB)")
    if given["max_rejected"] is not None and not 0 <= given["max_rejected"] <= 1:
        raise InputError(f"--max-rejected is {given['max_rejected']}; it must be a share, from 0 to 1")
    if given["crop"] is not None:
        from ict_fast.data.sources.crops import CROPS

        if given["crop"] not in CROPS:
            raise InputError(f'--crop "{given["crop"]}"{did_you_mean(given["crop"], CROPS)}')


def check_place(source: str, path: Path | None, out: Path) -> None:
    """Raises InputError if the store would lie in the folder of its own images."""
    if source == "folder" and path is not None and out.resolve().is_relative_to(path.resolve()):
        raise InputError(f"--out is {out}, inside the folder of the images; choose another place")


def open_source(source: str, given: Mapping[str, Any]) -> Source:
    """The source, with its list of images; none of them is read yet.

    Args:
        source: a key of `OPTIONS` other than digits.
        given: as `check_options` has let pass.
    Raises:
        InputError: as the sources themselves; a download that fails.
    """
    from ict_fast.data.sources.archives import archive_source
    from ict_fast.data.sources.array_sources import Cifar10Source, ImagenetNpzSource
    from ict_fast.data.sources.download import download_cifar10
    from ict_fast.data.sources.edm_zip import edm_zip_source
    from ict_fast.data.sources.folder_files import folder_source, ilsvrc_folder_source
    from ict_fast.data.sources.ilsvrc_zip import ilsvrc_zip_source
    from ict_fast.data.sources.parquet_files import parquet_in, parquet_source
    from ict_fast.data.sources.tar_files import ilsvrc_tar_source
    from ict_fast.data.sources.zip_files import is_zip

    path = given["path"] or Path("data")
    crop, resolution = given["crop"] or "center-crop-dhariwal", given["resolution"] or 64
    if source == "cifar10":
        return Cifar10Source(download_cifar10(path) if given["download"] else path)
    if source == "imagenet-npz":
        return ImagenetNpzSource(path)
    if source == "edm-zip":
        return edm_zip_source(path)
    channels = int(given["channels"] or 3)
    if source == "parquet":
        return parquet_source(
            path,
            crop=crop,
            resolution=resolution,
            image_channels=channels,
            image_column=given["image_column"],
            label_column=given["label_column"],
        )
    try:
        if source == "imagenet":
            if not path.is_file():
                return ilsvrc_folder_source(path, crop=crop, resolution=resolution)
            open_archive = ilsvrc_zip_source if is_zip(path) else ilsvrc_tar_source
            return open_archive(path, crop=crop, resolution=resolution)
        open_images = archive_source if path.is_file() else folder_source
        return open_images(path, crop=crop, resolution=resolution, image_channels=channels)
    except InputError as error:
        if found := parquet_in(path):
            raise InputError(f"{error}; {found} is for `ict-fast prepare parquet`") from error
        raise


def _spelled(option: str) -> str:
    return "PATH" if option == "path" else f"--{option.replace('_', '-')}"
