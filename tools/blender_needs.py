"""Finds what Blender needs of this system and installs what is missing, or says how to.

Usage: blender_needs.py [tests]. With ``tests`` also what only the tests need, where this user may install it.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

# What the bpy wheel expects of the system: (library, Debian package). EGL and Mesa's drivers are not linked but opened
# at run time, by gpu.init(); everything else is needed to import bpy at all.
LIBRARIES = [
    ("libX11.so.6", "libx11-6"),
    ("libXext.so.6", "libxext6"),
    ("libXfixes.so.3", "libxfixes3"),
    ("libXi.so.6", "libxi6"),
    ("libXrender.so.1", "libxrender1"),
    ("libxkbcommon.so.0", "libxkbcommon0"),
    ("libSM.so.6", "libsm6"),
    ("libICE.so.6", "libice6"),
    ("libGL.so.1", "libgl1"),
    ("libEGL.so.1", "libegl1"),
]
MESA = ["libegl-mesa0", "libgl1-mesa-dri"]

# What the tests use besides: a Blender executable, its display, hosts of their own in network namespaces, a C compiler for the
# model of the protocol.
PROGRAMS = [("blender", "blender"), ("Xvfb", "xvfb"), ("ip", "iproute2"), ("cc", "build-essential")]

PROBE = """
import bpy
version = bpy.app.version_string
try:
    import gpu
    gpu.init()
    print("bpy", version, "renders with", gpu.platform.renderer_get())
except AttributeError:
    print("bpy", version, "renders with its final renderer (bpy 5.1 and later also draw off-screen)")
"""


def say(text: str) -> None:
    print("==>", text, flush=True)


def missing_libraries() -> list[str]:
    packages = []
    for library, package in LIBRARIES:
        try:
            ctypes.CDLL(library)
        except OSError:
            packages.append(package)
    if "libegl1" in packages or not egl_works_without_display():
        packages += MESA
    return packages


def egl_works_without_display() -> bool:
    """Whether EGL has a driver for Mesa's surfaceless platform, the one that a bpy without a display uses."""
    program = (
        "import ctypes; egl = ctypes.CDLL('libEGL.so.1'); egl.eglGetPlatformDisplay.restype = ctypes.c_void_p;"
        "display = egl.eglGetPlatformDisplay(0x31DD, None, None);"  # EGL_PLATFORM_SURFACELESS_MESA
        "raise SystemExit(not (display and egl.eglInitialize(ctypes.c_void_p(display), None, None)))"
    )
    # In a child: a broken driver may well crash.
    try:
        return subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def missing_programs() -> list[str]:
    packages = [package for program, package in PROGRAMS if shutil.which(program) is None]
    # Debian's Blender uses Debian's Python, whose numpy is only recommended by the package.
    debian_numpy = Path("/usr/lib/python3/dist-packages/numpy")
    if Path("/usr/bin/dpkg").exists() and not debian_numpy.exists():
        packages.append("python3-numpy")
    return packages


def install(packages: list[str]) -> str | None:
    """Returns why it did not work, or None."""
    if shutil.which("apt-get") is None:
        return "this system has no apt-get; its own packages of the same libraries serve as well"
    if os.geteuid() != 0:
        return "that takes root"
    say(f"apt-get installs {' '.join(packages)}")
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in ([*apt, "update"], [*apt, "install", "--yes", "--no-install-recommends", *packages]):
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # A failed update (one of several sources out of reach, say) need not keep the installation from working.
        if done.returncode and "install" in command:
            return f"apt-get failed:\n{done.stdout[-2000:].strip()}"
    return None


def remedy(packages: list[str]) -> str:
    return f"sudo apt-get install --no-install-recommends {' '.join(packages)}"


def provide_libraries() -> None:
    if packages := missing_libraries():
        if reason := install(packages):
            sys.exit(f"Blender needs system libraries that are missing here, and {reason}.\n  {remedy(packages)}")
        if packages := missing_libraries():
            sys.exit(f"These packages are installed, yet their libraries cannot be loaded: {' '.join(packages)}")


def provide_programs() -> None:
    if (packages := missing_programs()) and (reason := install(packages)):
        say(f"Tests with a Blender executable, a second host or the model will be skipped ({reason}). To run them too:")
        say(f"  {remedy(packages)}")


def try_bpy() -> None:
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        say(
            "bpy did not finish a first look at the graphics driver within 120 s: see that OpenGL works on this machine."
        )
        return
    if done.returncode == 0:
        say(done.stdout.strip().splitlines()[-1])
    elif "No module named 'bpy'" in done.stderr:
        say(
            f"There is no bpy module for Python {sys.version_info.major}.{sys.version_info.minor} (5.2 needs 3.13, "
            "5.0 needs 3.11): only a Blender executable can render here."
        )
    else:
        sys.exit(
            f"bpy is installed but does not start (exit status {done.returncode}):\n{done.stdout[-2000:].strip()}\n"
            "With a library missing, that is the package to install; a crash in gpu.init() means that EGL has no "
            f"working driver: {remedy(MESA)}"
        )


if __name__ == "__main__":
    provide_libraries()
    if "tests" in sys.argv[1:]:
        provide_programs()
    try_bpy()
