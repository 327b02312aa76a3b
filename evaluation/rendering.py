"""Pictures of a MuJoCo scene without a screen: which OpenGL there is, and cameras on it."""

import atexit
import functools
import importlib
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..extras import require


OFFSCREEN = {"linux": ("egl", "osmesa"), "darwin": ("cgl",)}
PROBE = "from mujoco.{backend} import GLContext; GLContext(8, 8).make_current()"
REMEDY = (
    "Install one of them, for example apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri (EGL: uses a GPU where "
    "there is one, else the CPU) or apt-get install libosmesa6 (OSMesa: CPU). MUJOCO_GL=egl, osmesa or glfw chooses."
)


class NoOpenGL(FileNotFoundError):
    """There is nothing to render with; the message says what to install."""

    exit_code = 3  # of the command line, for scripts that can do without pictures


_open: "weakref.WeakSet[Renderer]" = weakref.WeakSet()


@functools.cache
def opengl_backend() -> str:
    """The OpenGL that works here: "egl", "osmesa" (Linux), "cgl" (macOS) or "glfw".

    The environment variable MUJOCO_GL decides where it is set, and is set to what was found, so that other processes
    and libraries need not look again. Each candidate is tried in a process of its own: PyOpenGL stays with the first
    library that it loads, and broken drivers do not raise, they crash.

    Raises:
        NoOpenGL: If none works; says what to install.
        ModuleNotFoundError: If there is no simulator to render.
    """
    require("mujoco", purpose="Rendering")
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    candidates = (chosen,) if chosen else OFFSCREEN.get(sys.platform, ("glfw",))
    trouble = []
    for backend in candidates:
        # GLFW without a display only warns
        command = [sys.executable, "-W", "error::UserWarning", "-c", PROBE.format(backend=backend)]
        probe = subprocess.run(command, env={**os.environ, "MUJOCO_GL": backend}, capture_output=True, text=True)
        if probe.returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return backend
        said = probe.stderr.partition("Exception ignored in")[0].strip()  # without what follows from it
        trouble.append(f"{backend}: {(said.splitlines() or ['it crashed'])[-1]}")
    only = f"MUJOCO_GL={chosen} lets nothing else be tried: unset it. " if chosen else ""
    raise NoOpenGL(f"No OpenGL to render with ({'; '.join(trouble)}). {only}{REMEDY}")


class Decoration(NamedTuple):
    """A shape that is in pictures only, never in the world. Lengths in metres."""

    shape: int  # mujoco.mjtGeom
    size: np.ndarray  # (3,): half of each edge, or radius, radius and half of the height
    position: np.ndarray  # (3,)
    rgba: np.ndarray  # (4,) from 0 to 1


LARGEST = 4096  # width of a picture; what drivers do with a larger one depends on them


class Renderer:
    """Square pictures of a model, `size` pixels wide. Hold one per model: making it uploads all meshes and textures.

    Shapes of `hidden_groups` are left out: some models keep those for collisions in one. Shadows, reflections and
    anti-aliasing are turned off in the model: on a CPU they take nine tenths of the time.
    """

    def __init__(self, model: Any, size: int, hidden_groups: Sequence[int] = ()):
        import mujoco

        if size > LARGEST:
            raise ValueError(f"size={size}: expected {LARGEST} pixels at most.")
        backend = opengl_backend()
        model.vis.quality.offsamples = 0
        model.light_castshadow[:] = 0
        model.mat_reflectance[:] = 0
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        self._model = model
        self._context = importlib.import_module(f"mujoco.{backend}").GLContext(size, size)
        self._context.make_current()
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        self._options, self._camera = mujoco.MjvOption(), mujoco.MjvCamera()
        for group in hidden_groups:
            self._options.geomgroup[group] = 0
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._target = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._target)
        self._view = mujoco.MjrRect(0, 0, size, size)
        self._pixels = np.empty((size, size, 3), dtype=np.uint8)
        if not _open:
            # After mujoco's own hook, so before it: a context must go before the display it belongs to.
            atexit.register(_close_all)
        _open.add(self)

    def render(
        self, data: Any, camera: str, *, upside_down: bool = False, decorations: Sequence[Decoration] = ()
    ) -> np.ndarray:
        """(size, size, 3) uint8 of what a camera of the model sees. `upside_down`: the camera hangs that way, turn the
        picture by 180 degrees. `decorations` are added to this picture."""
        import mujoco

        self._context.make_current()  # several models may be open
        self._camera.fixedcamid = self._model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, self._options, None, self._camera, everything, self._scene)
        for shape, size, position, rgba in decorations:
            added = self._scene.geoms[self._scene.ngeom]
            mujoco.mjv_initGeom(added, shape, size, position, np.eye(3).ravel(), rgba.astype(np.float32))
            self._scene.ngeom += 1
        mujoco.mjr_render(self._view, self._scene, self._target)
        mujoco.mjr_readPixels(self._pixels, None, self._view, self._target)
        # OpenGL's first row is the lowest
        return (self._pixels[:, ::-1] if upside_down else self._pixels[::-1]).copy()

    def close(self) -> None:
        _open.discard(self)
        if self._target is not None:
            self._context.make_current()
            self._target.free()
            self._context.free()
            self._target = self._context = None


def _close_all() -> None:
    for renderer in list(_open):
        renderer.close()
