"""The command line: ``python -m helpers check | ask | chat | serve``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Iterable, Iterator, Sequence

from . import access, prompts
from .errors import HelpersError, InvalidRequest, to_wire

_EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status, 1 after a failure that was told in a sentence on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except HelpersError as error:
        print(to_wire(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # `ask ... | head`
        sys.stderr.close()
        return 1


def check(options: argparse.Namespace) -> int:
    """Which model can run here, and why; status 1 if none can."""
    lines = access.check()
    print(access.check_table(lines))
    return 0 if lines[-1].ok else 1


def ask(options: argparse.Namespace) -> int:
    """Stream the answer to one question."""
    if options.question == prompts.QUESTION:
        print(f"The article's question: {prompts.QUESTION}", file=sys.stderr)
    with _service(options) as port:
        from .client import stream

        answer = stream(
            options.question,
            system=options.system,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            port=port,
        )
        _show(answer)
        _note(answer)
    return 0


def chat(options: argparse.Namespace) -> int:
    """Talk, turn by turn, until an empty line or the end of the input. /undo forgets the last turn."""
    with contextlib.suppress(ImportError):  # not everywhere; where it is, `input` has line editing
        import readline  # noqa: F401

    with _service(options) as port:
        from .client import Conversation, info

        talk = Conversation(
            options.system,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            port=port,
        )
        print(
            f"This is {info(port=port).model}. An empty line ends the chat, Ctrl-C stops an answer, "
            "/undo forgets the last turn.",
            file=sys.stderr,
        )
        while question := _read_question():
            if question == "/undo":
                print("(forgotten)" if talk.undo() else "(there is nothing to forget)", file=sys.stderr)
                continue
            try:
                _show(talk.stream(question))
            except HelpersError as error:
                print(f"\n{to_wire(error)}", file=sys.stderr)
            except KeyboardInterrupt:
                print("\n(stopped: this question and its answer are forgotten)", file=sys.stderr)
            else:
                _note(talk.answer)
    return 0


def serve(options: argparse.Namespace) -> int:
    """Be a service, in the foreground."""
    from .service import run

    limits = {name: getattr(options, name) for name in ("max_live", "max_waiting", "cache_memory")}
    run(
        options.model,
        options.precision,
        host=options.host,
        port=options.port,
        parent=options.parent,
        log=options.log,
        **{name: limit for name, limit in limits.items() if limit is not None},
    )
    return 0


def _service(options: argparse.Namespace) -> contextlib.AbstractContextManager[int]:
    """The port of the service to ask: the one named, or of one that is started for this command."""
    if options.port is not None:
        if (options.model, options.precision) != ("auto", "auto"):
            raise InvalidRequest(
                f"The service on port {options.port} has its model already. Leave --model and --precision out, "
                "or leave --port out to start another service."
            )
        return contextlib.nullcontext(options.port)
    return _own_service(options)


@contextlib.contextmanager
def _own_service(options: argparse.Namespace) -> Iterator[int]:
    from .service import serve as start

    with start(options.model, options.precision, port=0) as service:
        yield service.port


def _read_question() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _show(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _note(answer) -> None:
    """What a reader wants to know about an answer, on stderr, so that a pipe gets the answer alone."""
    rate = f", {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
    cut = "; cut off at --max-tokens" if answer.finish_reason == "length" else ""
    first = f", first after {answer.time_to_first_token:.2f} s" if answer.completion_tokens else ""
    print(f"({answer.completion_tokens} tokens{first}{rate}{cut})", file=sys.stderr)
    if answer.dropped_turns:
        print(
            f"(the oldest {answer.dropped_turns} turns no longer fit the model's window and were left out)",
            file=sys.stderr,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", default="auto", help="a Hub id, a folder, or smollm2 (default: what fits)")
    model.add_argument("--precision", default="auto", help=" or ".join(["auto", *access.PRECISIONS]))

    asking = argparse.ArgumentParser(add_help=False, parents=[model])
    asking.add_argument("--max-tokens", type=int, default=256, help="at most so many tokens (default: 256)")
    asking.add_argument("--temperature", type=float, default=0.0, help="0 is always the likeliest token")
    asking.add_argument("--port", type=int, help="of a running service (default: start one)")

    def add(command, *, parents: list, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(command.__name__, parents=parents, help=help, description=command.__doc__)
        added.set_defaults(command=command)
        return added

    add(check, parents=[], help="which model can run here, and why")

    one = add(ask, parents=[asking], help="stream the answer to one question")
    one.add_argument("question", nargs="?", default=prompts.QUESTION, help="default: the article's question")
    one.add_argument("--system", default=prompts.SYSTEM_PROMPT, help="the system prompt (default: the article's)")

    many = add(chat, parents=[asking], help="talk, turn by turn")
    many.add_argument("--system", default=prompts.SYSTEM_PROMPT, help="the system prompt (default: the article's)")

    service = add(serve, parents=[model], help="start a service")
    service.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 is every network")
    service.add_argument("--port", type=int, default=12345, help="0 takes a free one (default: 12345)")
    service.add_argument("--max-live", type=int, help="readers who are answered at once (default: 32)")
    service.add_argument("--max-waiting", type=int, help="readers who may stand in line for that (default: 64)")
    service.add_argument("--cache-memory", type=int, help="bytes for keys and values (default: by the free memory)")
    service.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    service.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
