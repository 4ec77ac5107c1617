"""Several groups at once, awaited, with a time limit for each.

python tests/examples/many_groups.py HOST:PORT PANORAMA PANORAMA
"""

import asyncio
import sys

from panotriton import AsyncClient, ServerBusy


async def main(url, one, two):
    """Three seeds of one pair of panoramas."""
    async with AsyncClient(url) as client:

        async def group(seed):
            try:
                work = client.process(one, two, seed=seed, crop_size=64, interpolations=1)
                return await asyncio.wait_for(work, 600)  # cancels the request at the server, too
            except ServerBusy as error:
                print(f"seed {seed}: {error}")
                return None

        for made in await asyncio.gather(*(group(seed) for seed in range(3))):
            if made is not None:
                print(f"{len(made.kept)} intervals kept, {made.image_count} images")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
