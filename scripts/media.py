"""Make the pictures that show the real thing: `make media`, or `make media MEDIA="streaming chat_box"`.

- ``diagrams``: the SVG files of ``notebooks/images``, each rendered as a PNG file.
- ``streaming``: one question, waited for and streamed, recorded from a service as ``docs/images/streaming.json`` and
  drawn from that as ``docs/images/streaming.webp``. Its frames follow the recorded times.
- ``chat_box``: the chat box in JupyterLab while an answer arrives, as ``notebooks/images/chat_box.png``.
- ``chat_page``: the gateway's page while an answer arrives, as ``notebooks/images/chat_page.png``.
- ``embed``: copy the PNG files into the lessons, see `dev.embed_pictures`.

It needs Chromium, the bundled model, and an idle machine for the recording.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

import dev

ROOT = dev.ROOT
IMAGES = ROOT / "notebooks" / "images"
RECORDING = ROOT / "docs" / "images" / "streaming.json"
ANIMATION = ROOT / "docs" / "images" / "streaming.webp"

QUESTION = "Tell me a story about a lighthouse."
MAX_TOKENS = 110
MAX_BYTES = 2_000_000


def main(words: list[str] | None = None) -> None:
    """Make the pictures that the command line names, or all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", metavar="PART", nargs="*", help=", ".join(PARTS))
    parts = parser.parse_args(words).parts or list(PARTS)
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"there is no part {', '.join(unknown)}. Choose from: {', '.join(PARTS)}")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for part in PARTS:
        if part in parts:
            PARTS[part]()


def note(path: Path) -> None:
    print(f"{path.relative_to(ROOT).as_posix()}: {path.stat().st_size / 1000:,.0f} kB")


# --- Diagrams -------------------------------------------------------------------------------------


def render_diagrams() -> None:
    """Render each SVG file of the lessons as a PNG file with two pixels per dot. GitHub's notebooks show no SVG."""
    from playwright.sync_api import sync_playwright

    from jupyterlab_fixture import chromium_in

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=chromium_in(driver))
        page = chromium.new_page(device_scale_factor=2)
        for svg in sorted(IMAGES.glob("*.svg")):
            page.set_content(f"<style>body {{margin: 0}} svg {{display: block}}</style>{svg.read_text('utf-8')}")
            save_png(page.locator("svg").screenshot(omit_background=True), svg.with_suffix(".png"), source=svg)
        chromium.close()


def save_png(content: bytes, path: Path, *, source: Path | None = None) -> None:
    """Save a picture with at most 128 colours. Its text "Source" is the digest of the file that it was made from."""
    picture = Image.open(io.BytesIO(content)).convert("RGBA").quantize(128, Image.Quantize.FASTOCTREE)
    info = PngInfo()
    if source:
        info.add_text("Source", digest(source))
    picture.save(path, optimize=True, pnginfo=info)
    note(path)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- One question, waited for and streamed --------------------------------------------------------


@dataclass
class Recording:
    """Two answers to one question. `pieces` are (seconds since the question, text), and so is `waited`."""

    question: str
    model: str
    machine: str
    waited: tuple[float, str]
    pieces: list[tuple[float, str]]

    @property
    def seconds(self) -> float:
        return max(self.waited[0], self.pieces[-1][0])

    def at(self, seconds: float) -> tuple[str, str]:
        """Return what the client that waits and the client that streams have at a time."""
        waited = self.waited[1] if self.waited[0] <= seconds else ""
        return waited, "".join(text for moment, text in self.pieces if moment <= seconds)


def record() -> Recording:
    """Ask a real service twice. Both questions find the prompt in the prefix cache, so that the comparison is fair."""
    import helpers
    from helpers import hardware, model_choice

    choice = model_choice.choose()
    with helpers.serve(choice.model, choice.exact_precision, port=0) as service:  # as in the lessons
        service.ask(QUESTION, max_tokens=MAX_TOKENS)
        began = time.perf_counter()
        text = service.ask(QUESTION, max_tokens=MAX_TOKENS).text
        waited = round(time.perf_counter() - began, 3), text
        pieces = []
        began = time.perf_counter()
        for piece in service.stream(QUESTION, max_tokens=MAX_TOKENS):
            pieces.append((round(time.perf_counter() - began, 3), piece))
        model = service.info()
    gpu = hardware.this_machine().gpu
    machine = gpu.name if gpu else "a CPU"
    return Recording(QUESTION, f"{model.model.split('/')[-1]} at {model.precision}", machine, waited, pieces)


def load_recording(path: Path = RECORDING) -> Recording:
    fields = json.loads(path.read_text("utf-8"))
    fields["waited"] = tuple(fields["waited"])
    fields["pieces"] = [tuple(piece) for piece in fields["pieces"]]
    return Recording(**fields)


def record_streaming() -> None:
    """Record the two answers, and draw them."""
    ANIMATION.parent.mkdir(parents=True, exist_ok=True)
    RECORDING.write_text(json.dumps(asdict(record()), ensure_ascii=False, indent=1) + "\n", "utf-8")
    animate(load_recording(), ANIMATION)
    note(ANIMATION)


TICK, PAUSE = 100, 4000
"""Milliseconds that a frame is shown, and that the last one is."""


def frame_times(recording: Recording) -> list[float]:
    """Return the time in seconds that each frame shows: from the question to the end of both answers."""
    last = -(-round(1000 * recording.seconds) // TICK)
    return [tick * TICK / 1000 for tick in range(last + 1)]


def animate(recording: Recording, path: Path) -> None:
    """Draw the recording in real time. Raise `ValueError` if the file is too large for a README."""
    frames = [draw_frame(recording, seconds) for seconds in frame_times(recording)]
    durations = [TICK] * (len(frames) - 1) + [PAUSE]
    options: dict[str, Any] = {"lossless": True, "method": 6, "minimize_size": True}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes. Lower MAX_TOKENS.")


WIDTH, PANE, COLUMNS, ROW = 1660, 780, 42, 36
"""The picture's width, a terminal's width, its columns, and the height of a row. All but the columns are pixels."""
TOP, HEAD = 84, 120
"""Where the terminals begin, and the height of their heads, in pixels."""
BACKGROUND, TERMINAL, EDGE, WHITE, QUIET = "#0D1117", "#161B22", "#3D444D", "#F0F6FC", "#9DA7B3"
ORANGE, SKY_BLUE = "#E69F00", "#56B4E9"  # two of Okabe and Ito's colours, which suit a dark background


def font(size: int, style: str = "SansMono") -> ImageFont.FreeTypeFont:
    """Return a DejaVu font, which matplotlib brings along."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVu{style}.ttf")), size)


def wrap(text: str) -> str:
    """Return the text with a newline in place of some spaces, so that no line of words exceeds `COLUMNS`."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line, *words = paragraph.split(" ")
        for word in words:
            if len(line) + 1 + len(word) > COLUMNS:
                lines.append(line)
                line = word
            else:
                line += " " + word
        lines.append(line)
    return "\n".join(lines)


def draw_frame(recording: Recording, seconds: float) -> Image.Image:
    """Draw both terminals as they were at a time: the command, the clock, and the text that has arrived."""
    waited, streamed = recording.at(seconds)
    wrapped = wrap(recording.at(recording.seconds)[1])
    height = HEAD + ROW * len(wrapped.rstrip().splitlines()) + 36
    frame = Image.new("RGB", (WIDTH, TOP + height + 34), BACKGROUND)
    draw = ImageDraw.Draw(frame)
    draw.text((36, 26), f"question = {recording.question!r}", WHITE, font(28))
    end, (first, _) = recording.pieces[-1][0], recording.pieces[0]
    wait, loop = "print(ask(question))", 'for piece in stream(question):\n    print(piece, end="")'
    for left, colour, command, text, word, stop in (
        (36, ORANGE, wait, waited, recording.waited[0], recording.waited[0]),
        (WIDTH - PANE - 36, SKY_BLUE, loop, streamed, first, end),
    ):
        draw.rounded_rectangle((left, TOP, left + PANE, TOP + height), 14, TERMINAL, EDGE, 2)
        draw.line((left, TOP + 98, left + PANE, TOP + 98), EDGE, 2)
        draw.text((left + 26, TOP + 16), command, QUIET, font(25), spacing=9)
        right = left + PANE - 26
        draw.text((right, TOP + 12), f"{min(seconds, stop):.1f} s", colour, font(32, "SansMono-Bold"), anchor="ra")
        if word <= seconds:
            draw.text((right, TOP + 60), f"first word: {word:.2f} s", colour, font(22), anchor="ra")
        lines = wrapped[: len(text)].split("\n")
        for row, line in enumerate(lines):
            draw.text((left + 26, TOP + HEAD + ROW * row), line, WHITE, font(28))
        if seconds < stop:
            x, y = left + 28 + draw.textlength(lines[-1], font(28)), TOP + HEAD + ROW * (len(lines) - 1)
            draw.rectangle((x, y + 1, x + 14, y + 29), colour)
    return frame


# --- The chat box ---------------------------------------------------------------------------------

CHAT_CELLS = (
    "import helpers\nservice = helpers.serve(port=0)",
    "box = helpers.ChatBox(service.conversation(max_tokens=200))\nbox",
)


def take_chat_box() -> None:
    """Save a picture of the chat box in JupyterLab while its second answer arrives, and of its buttons after that."""
    from chat_page import ChatPage
    from jupyterlab_fixture import running_jupyterlab

    options = {"device_scale_factor": 2, "viewport": {"width": 900, "height": 1000}}
    with tempfile.TemporaryDirectory() as home, running_jupyterlab(Path(home), **options) as jupyterlab:
        notebook = jupyterlab.new_notebook("chat.ipynb")
        notebook.run(*CHAT_CELLS)
        chat = ChatPage(notebook)
        chat.ask("What is the capital of France?")
        chat.send("Tell me a story about a lighthouse.")
        chat.wait_for_words(turn=1, count=30)
        live = chat.root.screenshot()
        chat.stop_by_escape()
        chat.button("Regenerate").wait_for()
        row = chat.button("Regenerate").locator("xpath=..").screenshot()
        notebook.close()
    save_png(stack({"while an answer arrives": live, "after the answer": row}), IMAGES / "chat_box.png")


def take_chat_page() -> None:
    """Save a picture of the gateway's page while an answer arrives."""
    from playwright.sync_api import sync_playwright

    import helpers
    from browser_chat import BrowserChat
    from eventually import until
    from helpers.gateway.start import start_gateway
    from jupyterlab_fixture import chromium_in

    with (
        helpers.serve("smollm2", "fp32", port=0) as service,
        start_gateway(f"127.0.0.1:{service.port}") as gateway,
        sync_playwright() as driver,
    ):
        chromium = driver.chromium.launch(executable_path=chromium_in(driver))
        options = {"device_scale_factor": 2, "viewport": {"width": 720, "height": 440}}
        chat = BrowserChat(chromium, gateway.url, **options)
        chat.send(QUESTION)
        until(lambda: len(chat.turns()[-1][1].split()) > 25, "a part of the answer")
        save_png(chat.page.screenshot(), IMAGES / "chat_page.png")
        chat.close()
        chromium.close()


def stack(pictures: Mapping[str, bytes], rim: int = 32) -> bytes:
    """Return a picture of these, one below the other, each under its caption, on a white card."""
    loaded = {caption: Image.open(io.BytesIO(content)) for caption, content in pictures.items()}
    width = max(picture.width for picture in loaded.values()) + 2 * rim
    card = Image.new("RGB", (width, sum(picture.height + 84 for picture in loaded.values()) + rim), "white")
    draw, y = ImageDraw.Draw(card), rim
    draw.rectangle((0, 0, width - 1, card.height - 1), outline="#D0D7DE", width=2)
    for caption, picture in loaded.items():
        draw.text((rim, y), caption, "#4B535D", font(26, "Sans-Bold"))
        card.paste(picture, (rim, y + 44))
        y += picture.height + 84
    file = io.BytesIO()
    card.save(file, "PNG")
    return file.getvalue()


# --- Into the lessons -----------------------------------------------------------------------------


def embed() -> None:
    """Copy the PNG files into the lessons that show them."""
    for path in sorted(IMAGES.parent.glob("*.ipynb")):
        before = path.read_bytes()
        after = dev.notebook_bytes(dev.embed_pictures(json.loads(before), IMAGES))
        if after != before:
            path.write_bytes(after)
            note(path)


PARTS: dict[str, Callable[[], None]] = {
    "diagrams": render_diagrams,
    "streaming": record_streaming,
    "chat_box": take_chat_box,
    "chat_page": take_chat_page,
    "embed": embed,
}

if __name__ == "__main__":
    main()
