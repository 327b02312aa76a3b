"""Episodes as videos: what the policy saw, what it was told, what it did, whether it succeeded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..action_spec import action_names
from ..folders import whole_file
from ..observation import Observation


WIDTH, LINE, FPS = 448, 22, 20
CAPTION, GIF_FRAMES, COLORS = 27, 60, 64  # of a GIF: height of two lines of text, how many frames, how many colours
OUTCOME = 2000  # milliseconds that a GIF stays on its last picture
GREEN, RED, GRAY = (60, 170, 80), (200, 60, 50), (150, 150, 150)
Outcome = tuple[tuple[int, int, int], str]  # colour and word
OUTCOMES: dict[bool | None, Outcome] = {True: (GREEN, "success"), False: (RED, "failure"), None: (GRAY, "broke")}


@dataclass(frozen=True)
class Film:
    """An episode for `save_tiles`."""

    pictures: Sequence[Image.Image]
    instruction: str
    success: bool


COMMENT = "filmed by openvla"  # in every video: it may be replaced by another


class EpisodeVideo:
    """An mp4 of an episode: the first camera, the instruction above, bars of the action below, the outcome at the end.

    Frames are kept small until `save` writes them; nothing stands at `path` before.

    Args:
        names: Of the A numbers of an action; where they are of other length, the usual ones.
        hz: Actions in a second, which the video has as well; None: unknown.
    """

    def __init__(self, path: Path, first: Observation, names: Sequence[str] = (), hz: float | None = None):
        self.path, self.instruction, self.names = path, first.instruction, names
        self.rate = Fraction(FPS if hz is None else hz).limit_denominator(1000)
        self.frames: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []

    def add(self, observation: Observation, action: np.ndarray) -> None:
        """What was seen, and the action (A,) that was executed then."""
        self.frames.append(next(iter(observation.images.values())))
        self.actions.append(np.asarray(action, dtype=np.float64))

    def save(self, success: bool | None, last: Observation | None = None) -> None:
        """Write the video, with a second of the outcome at its end.

        Args:
            success: None: it broke, which is neither success nor failure.
            last: What was seen after the last action, where that is known: the outcome is shown on it.
        """
        if not self.frames:
            return
        import av

        limits = np.maximum(np.abs(np.stack(self.actions)).max(axis=0), 1e-6)
        names = self.names if len(self.names) == len(limits) else action_names(len(limits))
        bars = [list(zip(names, action / limits, strict=True)) for action in self.actions]
        pictures = [draw(frame, self.instruction, bar) for frame, bar in zip(self.frames, bars)]
        seen = self.frames[-1] if last is None else next(iter(last.images.values()))
        pictures += [draw(seen, self.instruction, bars[-1], OUTCOMES[success])] * _in_a_second(self.rate)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part.mp4")
        with av.open(str(part), "w") as container:
            container.metadata["comment"] = COMMENT
            stream = container.add_stream("libx264", rate=self.rate, options={"crf": "28", "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = pictures[0].width, pictures[0].height, "yuv420p"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())
        part.replace(self.path)


def check_replaceable(file: Path) -> None:
    """Raise a `FileExistsError` if a video is there that was not made here."""
    if file.exists() and not (file.is_file() and COMMENT.encode() in file.read_bytes()):
        raise FileExistsError(
            f"'{file}' was not made here and would be replaced: move it away, or give another folder."
        )


def read_film(path: Path) -> list[Image.Image]:
    """What the camera saw in a video of `EpisodeVideo`, WIDTH pixels wide, without the outcome at its end."""
    import av

    with av.open(str(path)) as container:
        outcome = _in_a_second(container.streams.video[0].average_rate or Fraction(FPS))
        pictures = [frame.to_image() for frame in container.decode(video=0)][:-outcome]
    return [picture.crop((0, LINE, WIDTH, picture.height - 3 * LINE)) for picture in pictures]


def _in_a_second(rate: Fraction) -> int:
    return max(1, round(rate))


def save_tiles(films: Sequence[Film], path: Path, *, columns: int = 5, size: int = 112) -> None:
    """A GIF that shows episodes side by side, each with its instruction, and its outcome once it has ended.

    Args:
        columns: At most; further ones are below.
        size: Width of a picture in pixels.
    """
    stride = -(-max(len(film.pictures) for film in films) // GIF_FRAMES)  # of the frames only so many are shown
    small = [
        [picture.resize((size, size), Image.Resampling.BOX) for picture in film.pictures[::stride]] for film in films
    ]
    columns = min(columns, len(films))
    rows, height = -(-len(films) // columns), size + CAPTION
    steps = range(max(map(len, small)) + 1)
    sheets = []
    for step in steps:
        sheet = Image.new("RGB", (columns * (size + 2), rows * (height + 2)), "white")
        for index, (film, pictures) in enumerate(zip(films, small)):
            done = film.success if step >= len(pictures) else None
            tile = draw_tile(pictures[min(step, len(pictures) - 1)], film.instruction, done)
            sheet.paste(tile, (index % columns * (size + 2) + 1, index // columns * (height + 2) + 1))
        sheets.append(sheet)
    # One palette, no dithering: pixels that stay the same cost nothing.
    palette = palette_of([sheets[0], sheets[len(sheets) // 2], sheets[-1]])
    indexed = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in sheets]
    durations = [1000 * stride // FPS] * (len(indexed) - 1) + [OUTCOME]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        indexed[0].save(
            part,
            format="GIF",
            save_all=True,
            append_images=indexed[1:],
            duration=durations,
            loop=0,
            optimize=False,
            comment=COMMENT,
        )


def palette_of(pictures: Sequence[Image.Image]) -> Image.Image:
    """One palette of `COLORS` for several pictures of a size, with the colours of outcomes as they are."""
    joined = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures) + 40))
    top = 0
    for picture in pictures:
        joined.paste(picture, (0, top))
        top += picture.height
    for offset, color in ((0, GREEN), (20, RED)):
        joined.paste(color, (0, top + offset, joined.width, top + offset + 20))
    return joined.quantize(COLORS, method=Image.Quantize.MEDIANCUT)


def draw_tile(picture: Image.Image, instruction: str, success: bool | None) -> Image.Image:
    """A small square picture above its caption; a border and a word once the outcome is known."""
    size = picture.width
    tile = Image.new("RGB", (size, size + CAPTION), "white")
    tile.paste(picture)
    pen, font = ImageDraw.Draw(tile), ImageFont.load_default(10)
    for index, line in enumerate(wrap(instruction, lambda text: pen.textlength(text, font=font) <= size - 4)[:2]):
        pen.text((2, size + 1 + 12 * index), line, fill="black", font=font)
    if success is not None:
        color, text = OUTCOMES[success]
        pen.rectangle((0, 0, size - 1, size - 1), outline=color, width=3)
        width = pen.textlength(text, font=font)
        pen.rectangle((size - width - 8, 0, size - 1, 15), fill=color)
        pen.text((size - width - 4, 2), text, fill="white", font=font)
    return tile


def wrap(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Lines that break between words."""
    lines: list[str] = []
    for word in text.split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def draw(
    frame: np.ndarray, instruction: str, action: Sequence[tuple[str, float]], outcome: Outcome | None = None
) -> Image.Image:
    """One picture of the video.

    Args:
        frame: (H, W, 3) uint8.
        action: Name and value of each number, in [-1, 1] of what the episode saw.
        outcome: None until it ends.
    """
    height = max(1, WIDTH * frame.shape[0] // frame.shape[1])
    picture = Image.new("RGB", (WIDTH, (LINE + height + 3 * LINE + 1) // 2 * 2), "white")
    picture.paste(Image.fromarray(frame).resize((WIDTH, height)), (0, LINE))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    pen.text((6, 3), instruction, fill="black", font=font)
    if outcome is not None:
        color, text = outcome
        pen.rectangle((0, LINE, WIDTH - 1, LINE + height - 1), outline=color, width=6)
        pen.text((WIDTH - 70, 3), text, fill=color, font=font)
    width = WIDTH / len(action)
    gap = min(4, width / 8)  # between bars; a humanoid has forty of them
    for index, (name, value) in enumerate(action):
        left, base = index * width, LINE + height + LINE
        pen.text((left + gap, base + LINE + 2), name, fill="black", font=font)
        top, bottom = sorted((base, base - float(np.clip(value, -1, 1)) * (LINE - 3)))
        pen.rectangle((left + 1.5 * gap, top, left + width - 2 * gap, bottom), fill=GREEN if value >= 0 else RED)
        pen.line((left + gap, base, left + width - 1.5 * gap, base), fill=GRAY)
    return picture
