"""Names of cameras: what a model sees by the names that data sets, simulators and robots give their views.

`config.camera_names` says what a model sees: "primary" (the scene), "secondary", "wrist", "left_wrist", "right_wrist",
or the very name of a camera. The standard library alone.
"""

import re
from collections.abc import Collection, Sequence


# The one table of words by which images are told to be something else than colours (docs/data.md lists them). Those in
# WITHIN count as parts of others as well ("frontdepthcam"), the rest only by themselves.
NOT_COLOUR = {
    "a depth map": ("depth", "depths", "disparity", "pointcloud", "xyz"),
    "a mask": (
        "mask",
        "masks",
        "segmentation",
        "segment",
        "segmented",
        "seg",
        "semantic",
        "instance",
        "label",
        "labels",
    ),
    "an infrared image": ("infrared", "infra", "ir", "nir", "thermal", "lwir"),
    "no picture": ("normals", "flow", "heatmap"),
}
WITHIN = ("depth", "disparity", "pointcloud", "mask", "segment", "infrared", "heatmap")


def words_of(name: str) -> list[str]:
    """The words of a name, in small letters: "video.isDepth_map" has video, is, depth, map."""
    return re.findall(r"[a-z]+\d*|\d+", re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", name).lower())


def not_colour(name: str) -> str | None:
    """What a name says that pixels are, where that is something else than colours: "a depth map", "a mask", ..."""
    words = words_of(name)
    within = [part for part in WITHIN if part in name.lower()]
    found = {*words, *(word.rstrip("0123456789") for word in words), *within}
    return next((kind for kind, known in NOT_COLOUR.items() if found & {*known}), None)


def order_cameras(cameras: Sequence[str]) -> list[str]:
    """Cameras that look at the scene first, those on the arm after them; by name within both."""
    return sorted(cameras, key=lambda name: (is_on_arm(name), name))


def is_on_arm(name: str) -> bool:
    """Whether a camera is one on the arm, by its name."""
    return any(word in name.lower() for word in ("wrist", "hand", "gripper"))


# Views of a model -----------------------------------------------------------------------------------------------------


VIEWS = ("primary", "secondary", "wrist", "left_wrist", "right_wrist")
OF_OFT = {  # what models of OpenVLA-OFT call them
    "full_image": "primary",
    "wrist_image": "wrist",
    "left_wrist_image": "left_wrist",
    "right_wrist_image": "right_wrist",
}


def view_of(name: str) -> str:
    """The view that a model means by a name of its cameras: one of `VIEWS`, or the name itself."""
    return OF_OFT.get(name, name)


def find_cameras(names: Collection[str], views: Sequence[str], *, ordered: bool = True) -> list[str]:
    """Which of the cameras `names` each of `views` is, in the order of `views`.

    A name that is there is itself. Otherwise "primary" is the first camera in colour that is not on an arm (the first
    of all where there is no other), "secondary" the second, "wrist" the first on an arm, "left_wrist" and "right_wrist"
    the first on an arm that says so. Names of OpenVLA-OFT ("full_image") are such views as well. A camera that has the
    name of another view is not taken, alone or not: a model that sees the wrong camera still gives an action.

    Args:
        ordered: Whether the order of `names` means something, as that of a data set or a simulator. In images that are
            given for one prediction it does not: a view that may be either of two cameras is refused.

    Raises:
        ValueError: If there is no such camera, or two views are one camera; lists what there is.
    """
    colours = [name for name in names if not not_colour(name)]
    on_arm = [name for name in colours if is_on_arm(name)]
    around = [name for name in colours if name not in on_arm]
    found: list[str] = []
    for view in views:
        meant = view_of(view)
        side = meant.partition("_")[0]
        candidates = {
            "primary": around or colours,
            "secondary": around[1:],
            "wrist": on_arm,
            "left_wrist": [name for name in on_arm if side in words_of(name)],
            "right_wrist": [name for name in on_arm if side in words_of(name)],
        }.get(meant, [])
        candidates = [name for name in candidates if view_of(name) not in VIEWS or view_of(name) == meant]
        camera = view if view in names else next(iter(candidates), None)
        if camera != view and not ordered and len(candidates) > 1:
            raise ValueError(
                f"The view '{view}' of the model may be {' or '.join(candidates)}: give its image as '{view}', or "
                "leave out what the model does not see."
            )
        if camera is None or camera in found:
            problem = f"no camera for the view '{view}'" if camera is None else f"'{camera}' alone for two views"
            raise ValueError(
                f"The model sees {', '.join(views)}, and there is {problem}: there are {', '.join(names) or 'none'}. "
                f"Views: {', '.join(VIEWS)}, or the name of a camera."
            )
        found.append(camera)
    return found


__all__ = ["VIEWS", "find_cameras", "is_on_arm", "not_colour", "order_cameras", "view_of", "words_of"]
