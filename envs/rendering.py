"""Offscreen images of MuJoCo scenes, tuned for speed: no anti-aliasing, shadows or reflections.

One renderer serves every simulator of one model: the graphics context holds meshes and textures only, and positions
come with the simulator's own model and data at each call.
"""

from __future__ import annotations

import atexit
import ctypes
import ctypes.util
import functools
import importlib
import os
import weakref
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wamrl.naming import RunError

try:
    import mujoco as mujoco
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'MuJoCo is not installed; Meta-World and its renderer come with: pip install "wamrl[metaworld]"'
    ) from error

_HELP = (
    "images need EGL or OSMesa, and this machine offers neither ({reason}). On Debian or Ubuntu: "
    "apt-get install libegl1 libgl1 (or libosmesa6). Runs without images go on without them."
)


_EGL_PLATFORM_DEVICE_EXT = 0x313F


class RenderingUnavailable(RunError):
    """No way to draw images on this machine; the message says what to install."""


@dataclass(frozen=True)
class Camera:
    """A free camera. Angles in degrees, lengths in metres, sizes in pixels.

    By default it sees the hand, the task's object and the goal from start to end in all six tasks of the benchmark
    (looked at on dev starts). Where the object is a small puck, `CLOSE` shows it larger.
    """

    azimuth: float = 140.0
    elevation: float = -40.0
    distance: float = 1.0
    lookat: tuple[float, float, float] = (0.0, 0.72, 0.12)
    height: int = 64
    width: int = 64

    def __post_init__(self) -> None:
        """Check the ranges."""
        if len(self.lookat) != 3:
            raise ValueError(f"camera.lookat has {len(self.lookat)} numbers, but a point has 3")
        object.__setattr__(self, "lookat", tuple(float(x) for x in self.lookat))
        if self.distance <= 0:
            raise ValueError(f"camera.distance is {self.distance}, but must be above 0 metres")
        for name in ("height", "width"):
            if not 8 <= getattr(self, name) <= 2048:
                raise ValueError(f"camera.{name} is {getattr(self, name)}, but must be between 8 and 2048 pixels")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, fit for JSON."""
        return {**asdict(self), "lookat": list(self.lookat)}


def _egl_works() -> bool:
    """Whether EGL has a device to draw on. Asked before PyOpenGL is told to use EGL: it cannot change its mind."""
    library = ctypes.util.find_library("EGL")
    if not library:
        return False
    try:
        egl = ctypes.CDLL(library)
        egl.eglGetProcAddress.restype = ctypes.c_void_p
        address = {name: egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT")}
    except (OSError, AttributeError):
        return False
    if not all(address.values()):
        return False
    pointer = ctypes.c_void_p
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, pointer, pointer)(address[b"eglQueryDevicesEXT"])
    display_of = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)(address[b"eglGetPlatformDisplayEXT"])
    devices, count = (pointer * 16)(), ctypes.c_int(0)
    if not query(16, devices, ctypes.byref(count)):
        return False
    egl.eglInitialize.argtypes, egl.eglInitialize.restype = [pointer, pointer, pointer], ctypes.c_uint
    displays = [display_of(_EGL_PLATFORM_DEVICE_EXT, devices[i], None) for i in range(count.value)]
    return any(display and egl.eglInitialize(display, None, None) for display in displays)


@functools.cache
def _context_class() -> Any:
    """The class of MuJoCo's GL contexts: that of MUJOCO_GL if set, else EGL, else OSMesa."""
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if not chosen:
        platform = os.environ.get("PYOPENGL_PLATFORM", "").lower()
        if platform in ("", "egl") and _egl_works():
            chosen = "egl"
        elif platform in ("", "osmesa") and ctypes.util.find_library("OSMesa"):
            chosen = "osmesa"
        else:
            raise RenderingUnavailable(_HELP.format(reason="EGL finds no device, and OSMesa is not installed"))
    if chosen not in ("egl", "osmesa", "glfw"):
        raise RenderingUnavailable(_HELP.format(reason=f"MUJOCO_GL is set to '{chosen}'"))
    try:
        return importlib.import_module(f"mujoco.{chosen}").GLContext
    except Exception as error:  # PyOpenGL fails in several ways when the library is missing or a stub
        reason = f"{chosen}: {type(error).__name__}: {error}"
        raise RenderingUnavailable(_HELP.format(reason=reason)) from error


def back_end() -> str:
    """What MuJoCo draws with here: "egl", "osmesa" or "glfw".

    Raises:
        RenderingUnavailable: when the machine has none of them; it says how to get one.
    """
    return str(_context_class().__module__).rpartition(".")[2]


CLOSE = Camera(azimuth=150.0, elevation=-48.0, distance=0.72, lookat=(0.0, 0.74, 0.07))
"""For reach, push and pick-place: the puck is about 4 by 6 of 64 pixels."""


class SceneRenderer:
    """Draws scenes of one model, at any size.

    Raises:
        RenderingUnavailable: when no context can be made.
    """

    def __init__(self, model: mujoco.MjModel, height: int, width: int) -> None:
        make_context = _context_class()
        self._size = (height, width)
        quality, visual = model.vis.quality, model.vis.global_
        kept = (quality.offsamples, quality.shadowsize, visual.offwidth, visual.offheight)
        quality.offsamples, quality.shadowsize = 0, 0
        visual.offwidth, visual.offheight = width, height
        try:
            self._gl = make_context(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50.value)
        except Exception as error:  # each back end has errors of its own
            raise RenderingUnavailable(_HELP.format(reason=f"{type(error).__name__}: {error}")) from error
        finally:
            quality.offsamples, quality.shadowsize, visual.offwidth, visual.offheight = kept
        if not _open:
            # After the first context, so that it runs before the back end's own end, which pulls the rug.
            atexit.register(_close_all)
        _open.add(self)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._option, self._perturbation = mujoco.MjvOption(), mujoco.MjvPerturb()

    def render(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, height: int, width: int
    ) -> NDArray[np.uint8]:
        """[height, width, 3] upright image of what `data` holds, through `camera` (whose own size is not used)."""
        if self._context is None:
            raise RuntimeError("this renderer is closed")
        self._gl.make_current()
        if height > self._size[0] or width > self._size[1]:
            self._size = (max(height, self._size[0]), max(width, self._size[1]))
            mujoco.mjr_resizeOffscreen(self._size[1], self._size[0], self._context)
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FREE
        view.azimuth, view.elevation, view.distance = camera.azimuth, camera.elevation, camera.distance
        view.lookat[:] = camera.lookat
        mujoco.mjv_updateScene(
            model, data, self._option, self._perturbation, view, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
        )
        rectangle = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(rectangle, self._scene, self._context)
        image = np.empty((height, width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(image, None, rectangle, self._context)
        return image[::-1].copy()  # OpenGL's rows begin at the bottom

    def close(self) -> None:
        """Free the graphics memory; may be called twice."""
        if self._context is not None:
            self._gl.make_current()
            self._context.free()
            self._context = None
            self._gl.free()


_open: weakref.WeakSet[SceneRenderer] = weakref.WeakSet()


def _close_all() -> None:
    for renderer in list(_open):
        renderer.close()
