"""Episodes as films: what the policy saw, what it was told, what it did, whether it succeeded."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..action_text import action_names
from .environment import Observation


WIDTH, LINE, FPS = 448, 22, 20
GREEN, RED, GRAY = (60, 170, 80), (200, 60, 50), (150, 150, 150)


class EpisodeVideo:
    """An mp4 of an episode: the first camera, the instruction above, bars of the action below, the outcome at the end.

    Frames are kept small until `save` writes them; nothing stands at `path` before.
    """

    def __init__(self, path: Path, first: Observation):
        self.path, self.instruction = path, first.instruction
        self.frames: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []

    def add(self, observation: Observation, action: np.ndarray) -> None:
        """What was seen, and the action (A,) that was executed then."""
        self.frames.append(next(iter(observation.images.values())))
        self.actions.append(np.asarray(action, dtype=np.float64))

    def save(self, success: bool) -> None:
        """Write the film, with a second of the outcome at its end."""
        if not self.frames:
            return
        import av

        limits = np.maximum(np.abs(np.stack(self.actions)).max(axis=0), 1e-6)
        pictures = [
            draw(frame, self.instruction, action / limits, None) for frame, action in zip(self.frames, self.actions)
        ]
        pictures += [draw(self.frames[-1], self.instruction, self.actions[-1] / limits, success)] * FPS
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part.mp4")
        with av.open(str(part), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "28", "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = pictures[0].width, pictures[0].height, "yuv420p"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())
        part.replace(self.path)


def draw(frame: np.ndarray, instruction: str, action: np.ndarray, success: bool | None) -> Image.Image:
    """One picture of the film.

    Args:
        frame: (H, W, 3) uint8.
        action: (A,) in [-1, 1] of what the episode saw.
        success: None while it goes on.
    """
    height = WIDTH * frame.shape[0] // frame.shape[1]
    names = action_names(len(action))
    picture = Image.new("RGB", (WIDTH, (LINE + height + 3 * LINE + 1) // 2 * 2), "white")
    picture.paste(Image.fromarray(frame).resize((WIDTH, height)), (0, LINE))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    pen.text((6, 3), instruction, fill="black", font=font)
    if success is not None:
        color, text = (GREEN, "success") if success else (RED, "failure")
        pen.rectangle((0, LINE, WIDTH - 1, LINE + height - 1), outline=color, width=6)
        pen.text((WIDTH - 70, 3), text, fill=color, font=font)
    width = WIDTH / len(action)
    for index, (name, value) in enumerate(zip(names, action)):
        left, base = index * width, LINE + height + LINE
        pen.text((left + 4, base + LINE + 2), name, fill="black", font=font)
        top, bottom = sorted((base, base - float(np.clip(value, -1, 1)) * (LINE - 3)))
        pen.rectangle((left + 6, top, left + width - 8, bottom), fill=GREEN if value >= 0 else RED)
        pen.line((left + 4, base, left + width - 6, base), fill=GRAY)
    return picture
