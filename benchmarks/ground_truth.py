"""Inside Blender: times a SOLID draw and each pass of ground truth in turn, and publishes the samples in milliseconds."""

import time

import bpy
import numpy as np

import blendtorch.btb as btb

PASSES = {
    **{
        name: (name,)
        for name in (
            "depth",
            "distance",
            "normals",
            "instance",
            "category",
            "flow_backward",
            "flow_forward",
            "boxes_2d",
            "boxes_2d_full",
            "boxes_3d",
            "keypoints",
            "camera",
        )
    },
    "depth, normals, instance": ("depth", "normals", "instance"),
    "all rasters": ("depth", "distance", "normals", "instance", "category", "flow_backward", "flow_forward"),
}

btargs, (rounds,) = btb.parse_blendtorch_args()
bpy.context.scene.render.engine = "BLENDER_WORKBENCH"
cubes = [obj for obj in bpy.data.objects if obj.name.startswith("Cube")]
camera = btb.Camera(shape=(480, 640))
renderer = btb.OffScreenRenderer(camera, mode="rgb")
renderer.set_render_style(shading="SOLID", overlays=False)
points = {f"{cube.name} {i}": (cube, i) for cube in cubes for i in range(8)}
truths = {
    label: btb.GroundTruth(camera, passes, keypoints=points if "keypoints" in passes else None)
    for label, passes in PASSES.items()
}
makers = {"SOLID draw": renderer.render} | {label: truth.render for label, truth in truths.items()}
samples: dict[str, list[float]] = {label: [] for label in makers}
for i in range(int(rounds) + 3):
    for label, make in makers.items():
        for cube in cubes:  # an unchanged scene is drawn from a cache
            cube.rotation_euler.z += 0.01
        bpy.context.evaluated_depsgraph_get()
        start = time.perf_counter()
        make()
        if i >= 3:
            samples[label].append((time.perf_counter() - start) * 1e3)

with btb.DataPublisher(btargs.btsockets["DATA"], btargs.btid) as publisher:
    publisher.publish(version=bpy.app.version_string, samples={k: np.array(v) for k, v in samples.items()})
