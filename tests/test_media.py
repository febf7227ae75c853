"""The animation of the README, and how its frames follow the recording."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

import media
from declared import ROOT

RECORDING = media.Recording(
    question="What is a token?",
    model="a model at fp32",
    machine="a CPU",
    waited=(0.93, "A piece of text."),
    pieces=[(0.2, "A"), (0.4, " piece"), (0.61, " of"), (0.84, " text.")],
)


def test_a_frame_shows_what_had_arrived_at_its_time() -> None:
    assert RECORDING.at(0.1) == ("", "")
    assert RECORDING.at(0.2) == ("", "A")
    assert RECORDING.at(0.83) == ("", "A piece of")
    assert RECORDING.at(0.92) == ("", "A piece of text.")
    assert RECORDING.at(0.93) == ("A piece of text.", "A piece of text.")


def test_the_frames_are_a_tick_apart_and_end_with_both_answers() -> None:
    times = media.frame_times(RECORDING)
    assert times == [tick / 10 for tick in range(11)]
    assert RECORDING.at(times[-1]) == ("A piece of text.", "A piece of text.")


def test_a_recording_keeps_its_times_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recording.json"
    file.write_text(json.dumps(asdict(RECORDING)))
    assert media.load_recording(file) == RECORDING


def test_wrapping_moves_no_character() -> None:
    text = "A lighthouse stands on a rock in the sea, and its lamp is lit at dusk.\nThe end"
    wrapped = media.wrap(text)
    assert len(wrapped) == len(text) and re.split(r"\s", wrapped) == re.split(r"\s", text)
    assert max(map(len, wrapped.splitlines())) <= media.COLUMNS


def test_the_animation_is_in_real_time(tmp_path: Path) -> None:
    file = tmp_path / "animation.webp"
    media.animate(RECORDING, file)
    assert durations(file)[:-1] == [media.TICK] * 10


def test_an_animation_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"animation\.webp has [\d,]+ bytes\. Lower MAX_TOKENS\."):
        media.animate(RECORDING, tmp_path / "animation.webp")


def test_the_stored_animation_is_that_of_the_stored_recording() -> None:
    recording = media.load_recording()
    waited, streamed = recording.at(recording.seconds)
    assert waited == streamed
    assert sum(durations(media.ANIMATION)[:-1]) == 1000 * media.frame_times(recording)[-1]
    assert media.ANIMATION.stat().st_size < media.MAX_BYTES
    assert media.ANIMATION.relative_to(ROOT).as_posix() in (ROOT / "README.md").read_text()


def durations(file: Path) -> list[int]:
    """Return the milliseconds for which each frame is shown."""
    with Image.open(file) as animation:
        times = []
        for frame in range(getattr(animation, "n_frames", 1)):
            animation.seek(frame)
            animation.load()
            times.append(animation.info["duration"])
    return times


@pytest.mark.parametrize("parts", ["diagram", "streaming everything"])
def test_an_unknown_part_is_refused_before_anything_is_made(parts: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        media.main(parts.split())
    assert "Choose from: diagrams, streaming, chat_box, chat_page, embed" in capsys.readouterr().err
