"""`ict-fast prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ict_fast import errors, results
from ict_fast.interruption import interruptible


@dataclass(frozen=True)
class PrepareOptions:
    """Turn a source of images into the store that training reads."""

    source: Positional[
        Literal["digits", "cifar10", "imagenet", "imagenet-npz", "edm-zip", "folder", "parquet"]
    ]
    """digits: scikit-learn's handwritten digits, 8x8; nothing is downloaded. cifar10: the python archive.
    imagenet: ILSVRC 2012's training set, its tar, Kaggle's ZIP or the folders of its synsets.
    imagenet-npz: Chrabaszcz's batches. edm-zip: a data set of EDM or EDM2. folder: any images, in a folder,
    a tar or a ZIP; a class per subfolder, if there are. parquet: a data set of the Hugging Face Hub, a file
    or a folder of them."""
    path: Positional[Annotated[Path | None, arg(metavar="[PATH]", help_behavior_hint="")]] = None
    """The archive or folder that holds the images. Archives are read in place, except compressed tars, which
    must be decompressed, and Chrabaszcz's ZIPs, which must be unpacked."""
    out: Annotated[
        Path | None,
        arg(metavar="DIR", help_behavior_hint="(default: data/<source>, for imagenet data/imagenet64)"),
    ] = None
    """Folder to write. The same command continues what was stopped, and verifies what is finished."""
    resolution: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(imagenet: default 64; folder, parquet: required)")
    ] = None
    """Height and width in pixels."""
    crop: Annotated[
        str | None,
        arg(
            metavar="{center-crop-dhariwal,center-crop,none}",
            help_behavior_hint="(imagenet, folder, parquet: default center-crop-dhariwal)",
        ),
    ] = None
    """How an image of any size becomes a square: as ADM (halvings by BOX, then BICUBIC), as EDM (the central
    square by LANCZOS), or not at all: others are rejected."""
    channels: Annotated[
        int | None, arg(metavar="{1,3}", help_behavior_hint="(folder, parquet: default 3)")
    ] = None
    """1: grey, 3: RGB."""
    image_column: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(parquet: default image or img)")
    ] = None
    """The column of the encoded images."""
    label_column: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(parquet: default label, labels or fine_label)")
    ] = None
    """The column of the classes' numbers."""
    processes: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: one per core)")] = None
    """Processes that read and decode."""
    max_rejected: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="(default: 0.01)")] = None
    """Largest share of unusable images. They are left out, and listed in rejected.txt."""
    restart: bool = False
    """Delete what an earlier command has left unfinished, and begin anew."""
    download: bool = False
    """cifar10: get the archive from its authors first, into PATH (default: data); its MD5 is checked."""


@interruptible("the same command continues")
def run(options: PrepareOptions) -> int:
    """Runs the command; returns its exit code."""
    from ict_fast.data.sources import catalogue

    given = {name: value for name, value in vars(options).items() if name not in ("source", "out")}
    catalogue.check_options(options.source, given)
    folder = f"imagenet{options.resolution or 64}" if options.source == "imagenet" else options.source
    out = options.out if options.out is not None else Path("data") / folder
    results.require_place(out, "--out")
    catalogue.check_place(options.source, options.path, out)

    if options.source == "digits":
        from ict_fast.data.prepare import prepare_digits

        prepare_digits(out)
    else:
        from ict_fast.data.prepare import prepare_store

        source = catalogue.open_source(options.source, given)
        max_rejected = 0.01 if options.max_rejected is None else options.max_rejected
        prepare_store(
            source,
            out,
            processes=options.processes,
            max_rejected=max_rejected,
            restart=options.restart,
        )
    print(f"{options.source}: {out}, {_contents(out)}")
    return errors.EXIT_DONE


def _contents(folder: Path) -> str:
    """What a prepared store holds, so that a person sees what is missing from it."""
    from ict_fast.data.sources.class_folders import first_few
    from ict_fast.data.store import open_store
    from ict_fast.screen import counted

    store = open_store(folder)
    size, colour = store.resolution, "grey" if store.image_channels == 1 else "RGB"
    text = f"{counted(store.num_images, 'image')} of {size}x{size} {colour}"
    classes = store.meta["classes"]
    text += (
        f" in {counted(len(classes), 'class', 'classes')}: {first_few(classes)}"
        if classes
        else " without classes"
    )
    rejected = store.meta.get("rejected", 0)
    text += f"; {rejected:,} could not be used, see {folder / 'rejected.txt'}" if rejected else ""
    return text + "".join(f"; {count:,} {remark}" for remark, count in store.meta.get("remarks", {}).items())
