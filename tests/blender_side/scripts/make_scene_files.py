"""Saves scenes that refer to what is not there, and says who saved them."""

import json
import sys
from pathlib import Path

import bpy

import blendtorch.btb as btb
from blender_side import scene_file

folder = Path(btb.parse_blendtorch_args()[1][0])


def library(name: str, *objects: str) -> str:
    """A file with objects of these names."""
    path = str(folder / name)
    blocks = {bpy.data.objects.new(each, None) for each in objects}
    bpy.data.libraries.write(path, blocks)
    for block in blocks:
        bpy.data.objects.remove(block)
    return path


def link(path: str) -> None:
    with bpy.data.libraries.load(path, link=True) as (there, wanted):
        wanted.objects = list(there.objects)
    for block in wanted.objects:
        bpy.context.scene.collection.objects.link(block)


def image(name: str, path: str, source: str = "FILE") -> None:
    made = bpy.data.images.new(name, 4, 4)
    made.source, made.filepath, made.use_fake_user = source, path, True


link(library("gone.blend", "Oak", "Elm"))
link(library("changed.blend", "Fir", "Ash"))
image("wood", "//textures/wood.png")
image("made", "")
image("tiles", "//tiles.<UDIM>.png", "TILED")
image("frames", "//frame_0007.png", "SEQUENCE")
packed = bpy.data.images.new("packed", 4, 4)
packed.pack()
packed.use_fake_user = True
(folder / "tiles.1001.png").touch()
(folder / "frame_0001.png").touch()

bpy.ops.wm.save_as_mainfile(filepath=str(folder / "plain.blend"), compress=False, relative_remap=False)
bpy.ops.wm.save_as_mainfile(filepath=str(folder / "compressed.blend"), compress=True, relative_remap=False)
(folder / "gone.blend").unlink()
bpy.ops.wm.read_homefile(use_factory_startup=True, use_empty=True)
library("changed.blend", "Fir")
(folder / "text.blend").write_text("no scene")
said = {name: scene_file.saved_by(str(folder / f"{name}.blend")) for name in ("plain", "compressed", "text", "none")}
said |= {
    "here": bpy.app.version[:2],
    "knows what is missing": "is_missing" in bpy.types.ID.bl_rna.properties,
}
(folder / "said.json").write_text(json.dumps(said))
sys.stdout.flush()
