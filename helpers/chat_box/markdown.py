"""The Markdown of an answer as HTML. Formulas stay as the model wrote them, and each block has a direction of its own.

The text of a model is untrusted: HTML, links and images in it stay text, and no pattern here takes more than linear
time.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

_LANGUAGES = {"bash", "c", "cpp", "css", "go", "html", "java", "javascript", "js", "json", "python", "py", "rust", "sh"}
_LANGUAGES |= {"shell", "sql", "toml", "typescript", "yaml"}

# A formula that begins with a backslash may lack its end, because the answer is still coming or was cut off. Single
# dollars could be prices: "$5 and $6" has a space before the second one, and "$5 or **6**$" begins with a number and a
# word.
_FORMULA = re.compile(
    r"""\\\( (?: \\[^()] | [^\\] )* (?: \\\) | \Z )
      | \\\[ (?: \\[^][] | [^\\] )* (?: \\\] | \Z )
      | \\begin\{(\w+\*?)\} .{0,5000}? (?: \\end\{\1\} | \Z )
      | \$\$ (?: \\. | [^\\$] )+ \$\$
      | (?<! \w ) \$ (?! \s | \d[\w.,]* \s [^\W\d]{2} ) (?: \\[^\n] | [^\\$`\n] )+ (?<! \s ) \$ (?! \d )
      | \\[][()]
    """,
    re.VERBOSE | re.DOTALL,
)
_DISPLAYED = re.compile(r"\\\[ | \$\$ | \\begin\{(\w+\*?)\}", re.VERBOSE)


def render_markdown(text: str) -> str:
    """Return `text` as HTML. A line break stays one, and formulas, HTML, links and images stay text."""
    return _MARKDOWN.render(text)


class _Renderer(RendererHTML):
    """Write the HTML. `RendererHTML` finds its methods by the type of a token."""

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return super().fence(tokens, idx, options, env).replace("<pre>", '<pre dir="ltr">', 1)

    def formula(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        lines = html.escape(tokens[idx].content).replace("\n", "<br />\n")
        return f'<span dir="ltr">{lines}</span>'


def _markdown() -> MarkdownIt:
    # lheading: a line of dashes would turn the line above it into a heading while the answer is being streamed
    disabled = ["html_block", "html_inline", "link", "image", "autolink", "reference", "lheading"]
    options = {"html": False, "breaks": True, "maxNesting": 100, "highlight": _highlight}
    markdown = MarkdownIt("commonmark", options, renderer_cls=_Renderer)
    markdown.enable(["table", "strikethrough"]).disable(disabled)
    markdown.block.ruler.before("table", "formula", _formula_lines, {"alt": ["paragraph"]})
    markdown.inline.ruler.before("escape", "formula", _formula)
    markdown.core.ruler.push("directions", _set_directions)
    return markdown


def _formula(state: StateInline, silent: bool) -> bool:
    """Parse a formula, or a lone sign that begins or ends one."""
    found = _FORMULA.match(state.src, state.pos, state.posMax)
    if not found:
        return False
    if not silent:
        state.push("formula", "", 0).content = found[0]
    state.pos = found.end()
    return True


def _formula_lines(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Parse the lines of a displayed formula as one paragraph. Otherwise, a line such as "- 1" would become a list."""
    begin = state.bMarks[start] + state.tShift[start]
    opening = _DISPLAYED.match(state.src, begin, state.eMarks[start])
    if not opening or state.is_code_block(start):
        return False
    closing = {r"\[": r"\]", "$$": "$$"}.get(opening[0], f"\\end{{{opening[1]}}}")
    stop = start
    while closing not in state.src[begin if stop > start else opening.end() : state.eMarks[stop]]:
        stop += 1
        if stop == end:  # the answer is still coming
            break
        begin = state.bMarks[stop] + state.tShift[stop]
        if state.isEmpty(stop) or (opening[0] != closing and state.src.startswith(opening[0], begin)):
            return False
    stop = min(stop + 1, end)
    if not silent:
        state.push("formula_open", "p", 1).map = [start, stop]
        inline = state.push("inline", "", 0)
        inline.content = state.getLines(start, stop, state.blkIndent, False).strip()
        inline.map, inline.children = [start, stop], []
        state.push("formula_close", "p", -1)
        state.line = stop
    return True


def _set_directions(state: StateCore) -> None:
    """Let the first letter of a block decide its direction and that of the blocks in it. Code runs left to right."""
    for token in state.tokens:
        if token.type == "code_block":
            token.attrSet("dir", "ltr")
        elif token.level == 0 and token.nesting == 1:
            token.attrSet("dir", "auto")
        for child in token.children or ():
            if child.type == "code_inline":
                child.attrSet("dir", "ltr")


def _highlight(code: str, language: str, _: str) -> str:
    """Return `code` as HTML in colours, or "" to show it as it is.

    Some lexers of Pygments take minutes for a malicious text, which would block the kernel.
    """
    if language not in _LANGUAGES or len(code) > 2_000:
        return ""
    return highlight(code, get_lexer_by_name(language, stripnl=False), HtmlFormatter(nowrap=True))


_MARKDOWN = _markdown()
