"""Launches what its argument, BlenderLauncher's arguments as JSON, says, until its standard input ends.

Usage: launch.py INFO ARGUMENTS. Writes the launch information to the file INFO, then says so.
"""

import json
import sys

from torch_side import BlenderLauncher, LaunchInfo

with BlenderLauncher(**json.loads(sys.argv[2])) as launcher:
    LaunchInfo.save_json(sys.argv[1], launcher.launch_info)
    print(json.dumps("launched"), flush=True)
    sys.stdin.read()
