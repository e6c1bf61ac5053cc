"""Have a pair fused in the background: python examples/background_job.py street.jpg street_thermal.png fused.png"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from recofuse_client import AsyncClient, JobError, TimedOutError


async def fuse_later(url: str, vis: Path, ir: Path) -> bytes:
    """Submit, do something else, look how the job stands, and fetch its picture, a PNG file."""
    async with AsyncClient(url) as client:
        job = await client.submit(vis, ir, format="png", priority="low", job_timeout_s=600)
        print(f"job {job.id} is {job.status}")
        # The id is all that has to be kept: another process may ask for the job, also after a restart.
        print(f"job {job.id} is {(await client.job(job.id)).status}")
        try:
            fusion = await client.wait(job.id, timeout_s=120)
        except TimedOutError:
            await client.cancel(job.id)
            raise
        except JobError as error:
            raise SystemExit(f"the job came to nothing: {error}") from error
    return fusion["fused"].encoded


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vis", type=Path)
    parser.add_argument("ir", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="http://, https://, grpc:// or grpcs://")
    arguments = parser.parse_args()
    arguments.output.write_bytes(asyncio.run(fuse_later(arguments.url, arguments.vis, arguments.ir)))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
