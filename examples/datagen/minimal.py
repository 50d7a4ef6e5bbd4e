"""Two Blender instances render, a DataLoader receives: 16 pictures of a turning cube, in batches of four.

Prints what arrives and saves it, with the projected corners of the cube drawn in, as tmp/contact_sheet.png.
"""

import os
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch.utils import data
from tqdm import tqdm

import blendtorch.btt as btt

HERE = Path(__file__).parent
NUM_ITEMS, BATCH_SIZE = 16, 4


def main() -> None:
    batches: list[dict[str, Any]] = []
    start = first = time.monotonic()
    with btt.BlenderLauncher(
        scene=HERE / "cube.blend", script=HERE / "cube.blend.py", num_instances=2, named_sockets=["DATA"]
    ) as launcher:
        dataset = btt.RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=NUM_ITEMS)
        loader = data.DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=min(4, len(os.sched_getaffinity(0))))
        with tqdm(total=NUM_ITEMS, unit="frame") as progress:
            for batch in loader:
                image, xy = batch["image"], batch["xy"]
                tqdm.write(f"Received {image.shape} {xy.shape} from instances {batch['btid'].tolist()}")
                first = first if batches else time.monotonic()
                batches.append(batch)
                progress.update(len(image))

    end = time.monotonic()
    rate = (NUM_ITEMS - BATCH_SIZE) / (end - first)
    print(f"{NUM_ITEMS} pictures in {end - start:.0f} s (the first after {first - start:.0f} s, then {rate:.0f}/s)")
    sheet = HERE / "tmp" / "contact_sheet.png"
    sheet.parent.mkdir(exist_ok=True)
    contact_sheet(batches).save(sheet)
    print(f"The pictures, with the projected corners of the cube: {os.path.relpath(sheet)}")


def contact_sheet(batches: list[dict[str, Any]], columns: int = 4) -> Image.Image:
    """All images side by side, each with its points (pixels, from the upper left) as small circles."""
    images = torch.cat([batch["image"] for batch in batches])
    points = torch.cat([batch["xy"] for batch in batches])
    _, height, width, _ = images.shape
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    draw = ImageDraw.Draw(sheet)
    for i, (image, xy) in enumerate(zip(images, points, strict=True)):
        left, top = i % columns * width, i // columns * height
        sheet.paste(Image.fromarray(image.numpy()), (left, top))
        for x, y in xy.tolist():
            box = (left + x - 7, top + y - 7, left + x + 7, top + y + 7)
            draw.ellipse(box, outline="black", width=5)
            draw.ellipse(box, outline="white", width=3)
    return sheet.reduce(2)


if __name__ == "__main__":
    main()
