"""Offscreen images of MuJoCo scenes, tuned for speed: no anti-aliasing, shadows or reflections.

One renderer serves every simulator of one model: the graphics context holds meshes and textures only, and positions
come with the simulator's own model and data at each call.
"""

from __future__ import annotations

import ctypes.util
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

_HELP = (
    "images need EGL or OSMesa, and this machine offers neither ({reason}). On Debian or Ubuntu: "
    "apt-get install libegl1 libgl1 (or libosmesa6). Runs without images go on without them."
)


class RenderingUnavailable(RuntimeError):
    """No way to draw images on this machine; the message says what to install."""


@dataclass(frozen=True)
class Camera:
    """A free camera. Angles in degrees, lengths in metres, sizes in pixels."""

    azimuth: float = 150.0
    elevation: float = -48.0
    distance: float = 0.72
    lookat: tuple[float, float, float] = (0.0, 0.74, 0.07)
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


def _choose_backend() -> None:
    """Set MUJOCO_GL before mujoco makes its first context, unless someone has chosen already."""
    if os.environ.get("MUJOCO_GL"):
        return
    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = backend
            if backend == "egl":
                os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
            return
    raise RenderingUnavailable(_HELP.format(reason="neither library was found"))


class SceneRenderer:
    """Draws scenes of one model at one size.

    Raises:
        RenderingUnavailable: when no context can be made.
    """

    def __init__(self, model: mujoco.MjModel, height: int, width: int) -> None:
        _choose_backend()
        self.height, self.width = height, width
        quality, visual = model.vis.quality, model.vis.global_
        kept = (quality.offsamples, quality.shadowsize, visual.offwidth, visual.offheight)
        quality.offsamples, quality.shadowsize = 0, 0
        visual.offwidth, visual.offheight = width, height
        try:
            from mujoco.gl_context import GLContext

            self._gl = GLContext(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        except Exception as error:  # each back end has errors of its own
            raise RenderingUnavailable(_HELP.format(reason=f"{type(error).__name__}: {error}")) from error
        finally:
            quality.offsamples, quality.shadowsize, visual.offwidth, visual.offheight = kept
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._option, self._perturbation = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._view = mujoco.MjrRect(0, 0, width, height)

    def render(self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera) -> NDArray[np.uint8]:
        """[H, W, 3] upright image."""
        self._gl.make_current()
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FREE
        view.azimuth, view.elevation, view.distance = camera.azimuth, camera.elevation, camera.distance
        lookat: Sequence[float] = camera.lookat
        view.lookat[:] = lookat
        mujoco.mjv_updateScene(
            model, data, self._option, self._perturbation, view, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
        )
        mujoco.mjr_render(self._view, self._scene, self._context)
        image = np.empty((self.height, self.width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(image, None, self._view, self._context)
        return image[::-1].copy()  # OpenGL's rows begin at the bottom

    def close(self) -> None:
        """Free the graphics memory."""
        self._gl.make_current()
        self._context.free()
        self._gl.free()
