"""The capstone's checker: what it finds in the article's service, in a repaired one, and in one that does not start."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers import capstone

REPAIRED = Path(__file__).with_name("repaired_article_service.py").read_text("utf-8")
LESSON = Path(__file__).parents[1] / "notebooks" / "03_streaming.ipynb"

STEP = "await asyncio.to_thread(self.step, ids, past)"
CACHED = "ids = torch.tensor([[token_id]], device=self.model.device)"
PIECE = 'piece = "" if text.endswith("�") else text[len(sent) :]'
YIELD = "yield ModelOutputDocument(token_id=token_id, generated_text=piece)"
ENDPOINT = (
    '    @requests(on="/stream")\n    async def task(self, doc: PromptDocument, **kwargs) -> ModelOutputDocument:\n'
)
UNSTOPPED = """
        documents = asyncio.Queue()

        async def produce():
            async for document in self.answer(doc):
                documents.put_nowait(document)
            documents.put_nowait(None)

        task = asyncio.create_task(produce())
        while (document := await documents.get()) is not None:
            yield document

    async def answer(self, doc):
"""
# What is back again in the repaired service: the faults that must be found, a text of the service, what replaces it.
BACK_AGAIN = {
    "the model reads all tokens again": (
        "cost",
        CACHED,
        "ids, past = torch.cat([ids, torch.tensor([[token_id]])], 1), None",
    ),
    "each token is decoded alone": (
        "text",
        PIECE,
        "piece = self.tokenizer.decode([token_id]); sent = text[: -len(piece)]",
    ),
    "clients share their state": ("clients", "made", "self.made"),
    "the gateway repeats what failed": ("error", "except Exception as failure", "except ArithmeticError as failure"),
    "the tokenizer always adds BOS": ("BOS", "not has_bos", "True"),
    "nothing stops the task of a client that left": ("leaving", ENDPOINT, ENDPOINT + UNSTOPPED),
    "the model sees only the newest token": ("cost", CACHED, f"{CACHED}; past = None"),
    "all text comes at the end": ("clients", PIECE, 'piece = ""'),
    "the event loop waits for a thread": (
        "clients, leaving",
        STEP,
        '__import__("concurrent.futures").futures.ThreadPoolExecutor().submit(self.step, ids, past).result()',
    ),
    "the last document does not say how it ended": ("error", "finish_reason=reason, ", ""),
    "the tokenizer never adds BOS": ("BOS", "not has_bos", "False"),
}
# The other faults are those of the article's service.
DOES_NOT_START = {
    "has a syntax error": ("def step(", "def step((", "It does not start. Line 43: SyntaxError: "),
    "raises when its Executor starts": (
        "from_pretrained(model_name)",
        "from_pretrained(1 / 0)",
        "It does not start. Line ",
    ),
    "does not wait": ("dep.block()", "pass", "It ended by itself. End the script with dep.block(), which waits."),
    "raises in its endpoint": (
        "self.encode(",
        "self.encod(",
        "It starts, but a request to /stream gets no answer. Line ",
    ),
}


@pytest.fixture
def findings(
    llama2_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], list[str]]:
    """Return a function that checks a service, and returns the printed lines. Nothing may be left of the service."""
    monkeypatch.setattr(capstone, "llama_tokenizer", lambda: llama2_tokenizer)  # reading it takes seconds
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def lines(service: str) -> list[str]:
        script = tmp_path / "article_service.py"
        script.write_text(service, "utf-8")
        processes = psutil.Process().children(recursive=True)
        capstone.check(script)
        assert psutil.Process().children(recursive=True) == processes
        assert not [*(tmp_path / "temporary").glob("capstone-*"), *(tmp_path / "temporary").glob("helpers-*")]
        output = capsys.readouterr()
        assert not output.err
        return output.out.replace(f"{tmp_path}/", "").splitlines()

    return lines


def articles_service() -> str:
    """Return the article's service as the lesson types it in: the first version of each part."""
    parts: dict[str, str] = {}
    for cell in json.loads(LESSON.read_text("utf-8"))["cells"]:
        magic, _, code = "".join(cell["source"]).partition("\n")
        if magic.startswith("%%writefile parts/"):
            parts.setdefault(magic, f"{code}\n")
            if "deploy" in magic:
                break
    text = "".join(parts[magic] for magic in sorted(parts) if "measured" not in magic)
    return text.replace("uses=Measured", "uses=TokenStreamingExecutor")


def changed(old: str, new: str) -> str:
    """Return the repaired service with `new` in place of `old`."""
    assert old in REPAIRED
    return REPAIRED.replace(old, new)


@pytest.mark.main
def test_the_articles_service_has_all_faults(findings: Callable[[str], list[str]]) -> None:
    *lines, last = findings(articles_service())
    names = [*capstone.FAULTS]
    assert [line.split(". ")[0] for line in lines] == [f"{n} {name}: found" for n, name in enumerate(names, 1)]
    assert all(" Hint: " in line for line in lines)
    assert last == f"Still to repair: {', '.join(names)}."


@pytest.mark.long  # the solution of lesson 3 shows it too
def test_a_repaired_service_has_none(findings: Callable[[str], list[str]]) -> None:
    *lines, last = findings(REPAIRED)
    names = [*capstone.FAULTS]
    assert [line.split(". ")[0] for line in lines] == [f"{n} {name}: repaired" for n, name in enumerate(names, 1)]
    assert last == "Nothing is left to repair."


@pytest.mark.long
@pytest.mark.parametrize("what", BACK_AGAIN)
def test_a_fault_is_found_alone_if(what: str, findings: Callable[[str], list[str]]) -> None:
    names, old, new = BACK_AGAIN[what]
    *lines, last = findings(changed(old, new))
    assert last == f"Still to repair: {names}."
    assert all((" Hint: " in line) == (": found. " in line) for line in lines)


@pytest.mark.long
def test_an_exception_at_the_client_is_not_a_fault_without_jinas_gateway(findings: Callable[[str], list[str]]) -> None:
    service = changed('reason, error = "error", str(failure)', "raise")
    assert (
        findings(service.replace('protocol="grpc"', 'protocol="grpc", include_gateway=False'))[-1]
        == "Nothing is left to repair."
    )


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=pytest.mark.main if what == "raises in its endpoint" else pytest.mark.long)
        for what in DOES_NOT_START
    ],
)
def test_one_sentence_says_why_a_service_cannot_be_checked_that(
    what: str, findings: Callable[[str], list[str]]
) -> None:
    old, new, sentence = DOES_NOT_START[what]
    (line,) = findings(changed(old, new))
    assert line.startswith(f"article_service.py cannot be checked. {sentence}")


@pytest.mark.parametrize(
    "hangs",
    [
        pytest.param("import sys", marks=pytest.mark.main),
        pytest.param("                made.append(token_id)", marks=pytest.mark.long),
    ],
)
def test_a_service_that_hangs_is_ended(
    hangs: str, findings: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capstone, "LIMIT", 30.0 if "made" in hangs else 3.0)
    indent = " " * (len(hangs) - len(hangs.lstrip()))
    (line,) = findings(changed(f"{hangs}\n", f"{hangs}\n{indent}import time\n{indent}time.sleep(1000)\n"))
    assert "did not" in line


def test_a_file_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    capstone.check("no_such_service.py")
    assert capsys.readouterr().out.startswith("no_such_service.py cannot be checked. There is no such file.")
