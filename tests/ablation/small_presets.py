"""`python small_presets.py WORDS...`: ict-fast, but with digits whose network trains in seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

from ict_fast import cli, presets
from ict_fast.config import Config


def small(get: Callable[[str], Config]) -> Callable[[str], Config]:
    """`ict_fast.presets.get`, with fewer channels and images for the digits."""

    def get_small(name: str) -> Config:
        config = get(name)
        if name != "digits":
            return config
        network, training = replace(config.network, channels=8), replace(config.training, batch_size=32)
        return replace(config, network=network, training=training)

    return get_small


if __name__ == "__main__":
    presets.get = small(presets.get)
    sys.exit(cli.main())
