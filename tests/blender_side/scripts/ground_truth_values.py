"""Publishes ground truth that was drawn into the slot, and what it was."""

import bpy
import numpy as np

import blendtorch.btb as btb

RASTERS = ("depth", "distance", "normals", "instance", "category", "flow_backward", "flow_forward")
btargs, _ = btb.parse_blendtorch_args()
publisher = btb.DataPublisher(btargs.btsockets["DATA"], btargs.btid)
cube = bpy.data.objects["Cube"]
cube["category"] = "cube"
truth = btb.GroundTruth(btb.Camera(shape=(60, 80)), (*RASTERS, "boxes_2d", "camera"))
for _ in range(4):
    cube.rotation_euler.z += 0.1
    made = truth.render()
    lent = [made[name].base is not None for name in RASTERS]
    sums = {name: float(np.nan_to_num(made[name], posinf=0).sum(dtype=np.float64)) for name in RASTERS}
    publisher.publish(**made, lent=lent, sums=sums)
publisher.close()
