"""``GET /``: a chat with the model in a browser. The page's files are those listed here, and load nothing else."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException, Response

router = APIRouter(include_in_schema=False)
"""The routes of the page. They need no key: they tell nothing about the model or its users."""

FILES = {
    "chat.js": "text/javascript",
    "clipboard.js": "text/javascript",
    "conversation.js": "text/javascript",
    "gateway.js": "text/javascript",
    "icon.svg": "image/svg+xml",
    "inline.js": "text/javascript",
    "markdown.js": "text/javascript",
    "page.css": "text/css",
    "settings.js": "text/javascript",
    "storage.js": "text/javascript",
    "stream.js": "text/javascript",
    "turns.js": "text/javascript",
}
"""The files that the page loads, and their types. A browser runs a script only if its type is right."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # so that no old file meets a new one after an update
}
"""The headers of the page and its files. Trusted types: the browser refuses to turn any text into HTML."""

_FOLDER = Path(__file__).parent / "page"


@router.get("/")
def page() -> Response:
    """Return the page."""
    return _file("index.html", "text/html")


@router.get("/page/{name}")
def page_file(name: str) -> Response:
    """Return a file of the page. Raise `HTTPException` of status 404 if the page has no such file."""
    if name not in FILES:
        raise HTTPException(404)
    return _file(name, FILES[name])


def _file(name: str, media_type: str) -> Response:
    return Response((_FOLDER / name).read_bytes(), headers=HEADERS, media_type=media_type)
