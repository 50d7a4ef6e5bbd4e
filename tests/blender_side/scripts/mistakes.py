"""Does what cannot work, and notes what it is told."""

import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from importlib import import_module, util
from importlib.machinery import ModuleSpec

import bpy
import gpu
import numpy as np

import blendtorch.btb as btb
from blender_side import compat

args, (out,) = btb.parse_blendtorch_args()
told: dict[str, str] = {}


def tell(what: str, call: Callable[[], object]) -> None:
    try:
        call()
        told[what] = "nothing"
    except Exception as error:
        told[what] = f"{type(error).__name__}: {error}"


def tell_in_a_thread(what: str, call: Callable[[], object]) -> None:
    thread = threading.Thread(target=tell, args=(what, call), name="the other one")
    thread.start()
    thread.join()


scene = bpy.context.scene
scene.render.engine = compat.WORKBENCH
cube = bpy.data.objects["Cube"]
camera = btb.Camera(shape=(48, 64))
renderer, final = btb.OffScreenRenderer(camera), btb.FinalRenderer(camera)
renderer.set_render_style("SOLID")
passes = ("instance", "boxes_2d") if compat.draws_off_screen() else ("boxes_2d_full",)
truth = btb.GroundTruth(camera, passes, renderer=renderer)
renderer.render()
truth.render()

for name, call in {
    "a renderer": lambda: btb.OffScreenRenderer(camera),
    "a picture": renderer.render,
    "a later picture": renderer.render_later,
    "a final renderer": lambda: btb.FinalRenderer(camera),
    "a final picture": final.render,
    "labels": truth.render,
    "ground truth": lambda: btb.GroundTruth(camera, passes),
}.items():
    tell_in_a_thread(f"thread: {name}", call)

if compat.draws_off_screen():
    limit = gpu.capabilities.max_texture_size_get()
    told["limit"] = str(limit)
    camera.shape = (4, limit + 1)
    tell("size: a picture", renderer.render)
    tell("size: labels", truth.render)
    tell("size: a final picture", final.render)
    camera.shape = (48, 64)
    tell("size: as before", renderer.render)
    tell("size: a final picture as before", final.render)

tell("objects: misspelt", lambda: btb.GroundTruth(camera, passes, objects=["Cuube"]))
tell("objects: a name", lambda: btb.GroundTruth(camera, passes, objects=["Cube"]))
tell("objects: under a name", lambda: btb.GroundTruth(camera, passes, objects={"car": "Cuube"}))
tell("objects: nothing like it", lambda: btb.GroundTruth(camera, passes, categories={"x": ["qqqqqq"]}))

# Something that is called triton, and crashes when it is imported now.


class Crashing:
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname == "triton" else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)


if compat.draws_off_screen() and compat.draws_in_software():
    sys.meta_path.insert(1, Crashing())  # type: ignore[arg-type]  # behind the one of ours
    for attempt in range(2):
        tell(f"triton: {attempt}", lambda: import_module("triton"))
    tell("triton: part of it", lambda: import_module("triton.language"))
    told["triton: is there"] = str(util.find_spec("triton") is not None)

bpy.ops.wm.open_mainfile(filepath=bpy.data.filepath)
tell("gone: pixels", lambda: camera.object_to_pixel(cube))
tell("gone: a box", lambda: camera.bbox_object_to_pixel(cube))
tell("gone: labels", lambda: btb.GroundTruth(camera, passes, objects=[cube]))
tell("gone: a camera", lambda: btb.Camera(cube))
tell("gone: keypoints", lambda: btb.GroundTruth(camera, ("keypoints",), keypoints={"a": cube}))
tell("gone: anew", lambda: camera.object_to_pixel(bpy.data.objects["Cube"]))
np.savez(out, **{name: np.array(text) for name, text in told.items()})
