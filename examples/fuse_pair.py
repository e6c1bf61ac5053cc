"""Fuse two image files over HTTP: python examples/fuse_pair.py street.jpg street_thermal.png fused.png"""

from __future__ import annotations

import argparse
from pathlib import Path

from recofuse_client import Client


def main() -> None:
    """Ask for all three pictures as PNG files, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vis", type=Path, help="the visible image")
    parser.add_argument("ir", type=Path, help="the infrared image of the same view")
    parser.add_argument("output", type=Path, help="the fused picture; the restored ones are written beside it")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()

    with Client(arguments.url) as client:
        fusion = client.fuse(arguments.vis, arguments.ir, output="all", format="png")

    for part, picture in fusion.pictures.items():
        name = arguments.output if part == "fused" else arguments.output.with_stem(f"{arguments.output.stem}_{part}")
        name.write_bytes(picture.encoded)
        print(f"wrote {name}")
    print(f"{fusion.model_name} {fusion.model_version} took {fusion.timings.model_s:.3f} s")


if __name__ == "__main__":
    main()
