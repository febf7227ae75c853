"""The command line: ``python -m helpers check | ask | chat | serve``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Iterator, Sequence

from . import access, prompts
from .errors import HelpersError, InvalidRequest, to_wire

_EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status, 1 after a failure that was told in a sentence on stderr."""
    options = _parser().parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # a model may say what the terminal's encoding has not
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
        from .chat import show
        from .client import stream

        answer = stream(
            options.question,
            system=options.system,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            port=port,
        )
        show(answer)
    return 0


def chat(options: argparse.Namespace) -> int:
    """Talk, turn by turn, until Ctrl-D or /exit; /help lists the commands.

    Without a terminal each line of the input is a question or a command, and the status is 1 if any of them failed.
    """
    with _service(options) as port:
        from .chat import converse
        from .client import Conversation

        return converse(
            Conversation(options.system, max_tokens=options.max_tokens, temperature=options.temperature, port=port)
        )


def serve(options: argparse.Namespace) -> int:
    """Be a service, in the foreground."""
    from .service import run

    names = ("context_length", "max_live", "max_waiting", "cache_memory")
    limits = {name: getattr(options, name) for name in names}
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


def max_tokens(text: str) -> int:
    """An option's value; the service would refuse a wrong one too, but takes its time to start."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"max_tokens is {number}; ask for at least 1 token.")
    return number


def temperature(text: str) -> float:
    """An option's value, as `max_tokens`."""
    if not 0 <= (number := float(text)) <= 2:
        raise argparse.ArgumentTypeError(f"temperature is {number}; it goes from 0 (always the likeliest token) to 2.")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", default="auto", help="a Hub id, a folder, or smollm2 (default: what fits)")
    model.add_argument("--precision", default="auto", help=" or ".join(["auto", *access.PRECISIONS]))

    asking = argparse.ArgumentParser(add_help=False, parents=[model])
    asking.add_argument("--max-tokens", type=max_tokens, default=256, help="at most so many tokens (default: 256)")
    asking.add_argument("--temperature", type=temperature, default=0.0, help="0 is always the likeliest token")
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
    service.add_argument("--context-length", type=int, help="less of the model's window, in tokens (default: all)")
    service.add_argument("--max-live", type=int, help="readers who are answered at once (default: 32)")
    service.add_argument("--max-waiting", type=int, help="readers who may stand in line for that (default: 64)")
    service.add_argument("--cache-memory", type=int, help="bytes for keys and values (default: by the free memory)")
    service.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    service.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
