"""The command line: ``python -m helpers check | ask | chat | serve | gateway``.

Each command imports its modules when it runs, so a service starts before this process imports the client.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .catalog import BUNDLED
from .errors import HelpersError, InvalidRequest, to_wire
from .gateway.options import GatewayArgs
from .memory import PRECISIONS, check_precision
from .options import GRACE, HOST, PORT, EngineArgs, SamplingParams, check_port
from .prompts import QUESTION, SYSTEM_PROMPT
from .terminal import check_argument, drop_unwritten, has_piped_input, is_notebook, open_streams, read_input, write

if TYPE_CHECKING:
    from .gateway.process import GatewayProcess

_EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 1 after a failure, which is explained on stderr.

    Raise `SystemExit` (status 2) for a wrong option.
    """
    open_streams()
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        status: int = options.command(options)
        return status
    except HelpersError as error:
        write(to_wire(error), sys.stderr)
        return 1
    except KeyboardInterrupt:
        write("", sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # `ask ... | head`
        return 1
    finally:
        drop_unwritten()


def check(options: argparse.Namespace) -> int:
    """Print which model can run here, and why. The exit status is 1 if none can."""
    from . import checks

    results = checks.check()
    write(checks.format_table(results), sys.stdout)
    return 0 if results[-1].ok else 1


def ask(options: argparse.Namespace) -> int:
    """Stream the answer to one question: the argument, else the piped text, else the article's question."""
    question = _question(options.question)
    with _service(options) as port:
        from .chat import show
        from .client import stream

        answer = stream(
            question,
            system=options.system,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            port=port,
        )
        show(answer)
    return 0


def chat(options: argparse.Namespace) -> int:
    """Chat until Ctrl-D or /exit. /help lists the commands.

    If stdin is not a terminal, each line is a question or a command, and the exit status is 1 if any of them failed.
    """
    with _service(options) as port:
        from .chat import converse
        from .conversation import Conversation

        return converse(
            Conversation(options.system, max_tokens=options.max_tokens, temperature=options.temperature, port=port)
        )


def serve(options: argparse.Namespace) -> int:
    """Run a service in the foreground until Ctrl-C. With ``--replicas``, run several behind one gateway."""
    check_precision(options.precision)
    if options.replicas != 1:
        return _serve_replicas(options)
    with _gateway_beside(options) as beside:
        from .server import run

        run(
            options.model,
            options.precision,
            host=options.host,
            port=options.port,
            engine_args=options.engine_args,
            grace=options.grace,
            parent=options.parent,
            log=options.log,
            companion=beside,
        )
    return 0


def gateway(options: argparse.Namespace) -> int:
    """Run OpenAI's HTTP API in front of a service, until Ctrl-C."""
    from .addresses import clean_host
    from .gateway import Keys, create_app
    from .gateway.hosts import hosts_to_allow
    from .gateway.server import run

    args = GatewayArgs.from_namespace(options)
    keys = Keys.load(args.keys)
    hosts = hosts_to_allow(clean_host(options.host), keys, args.allowed_host)
    services = options.service or [f"{HOST}:{PORT}"]
    app = create_app(
        services, service_model=options.service_model, keys=keys, cors=args.cors or (), allowed_hosts=hosts
    )
    run(app, args, host=options.host, port=options.port, parent=options.parent)
    return 0


def _serve_replicas(options: argparse.Namespace) -> int:
    if options.replicas < 1:
        raise InvalidRequest(f"replicas is {options.replicas}. Start at least 1 service.")
    if options.http is None:
        raise InvalidRequest("--replicas needs a gateway, which shares out the requests. Add --http 8000.")
    if (options.host, options.port) != (HOST, PORT):
        raise InvalidRequest(
            "With --replicas, the services listen on free ports of 127.0.0.1. Leave --host and --port out."
        )
    from . import replicas

    ports = replicas.free_ports(options.replicas)
    arguments = ["--model", options.model, "--precision", options.precision, *options.engine_args.to_arguments()]
    with _gateway_beside(options, ports) as beside:
        replicas.run(ports, arguments, grace=options.grace, companion=beside)
    return 0


def _gateway_beside(
    options: argparse.Namespace, ports: Sequence[int] = ()
) -> contextlib.AbstractContextManager[GatewayProcess | None]:
    """Return a context in which a gateway runs beside the service, if ``--http`` asks for one.

    With `ports`, the gateway stands in front of several services of this machine.
    Raise before anything is started if the gateway could not start. Set a free port for ``--port 0``.
    """
    args = GatewayArgs.from_namespace(options)
    if options.http is None:
        if given := ", ".join(args.given()):
            raise InvalidRequest(f"Without --http no gateway runs that {given} could be for. Add --http 8000.")
        return contextlib.nullcontext()
    from .addresses import clean_host, host_to_ask, join, split
    from .gateway.keys import Keys
    from .gateway.process import beside
    from .processes import port_to_listen_on
    from .service import program_of

    if not ports:
        options.port = port_to_listen_on(clean_host(options.host), options.port)
    host, port = split(options.http if ":" in options.http else f"{HOST}:{options.http}")
    Keys.load(args.keys)
    services = [join(host_to_ask(options.host), service) for service in ports or [options.port]]
    return beside(services, args, host=host, port=port_to_listen_on(host, port), program=program_of("__main__"))


def _question(argument: str | None) -> str:
    """Return the question to ask. Raise `InvalidRequest` if it is empty or not text."""
    if argument is None and not has_piped_input():
        write(f"The article's question: {QUESTION}", sys.stderr)
        return QUESTION
    if argument is None:
        write("Reading the question from stdin.", sys.stderr)
    question = read_input() if argument in (None, "-") else argument
    check_argument(question, "The question")
    if not question.strip():
        raise InvalidRequest("The question is empty. Write it after ask, or pipe it into ask.")
    return question


def _service(options: argparse.Namespace) -> contextlib.AbstractContextManager[int]:
    """Return a context with the port of the running service, or of a service that is started for this command."""
    if options.port is None:
        return _new_service(options)
    if (options.model, options.precision) != ("auto", "auto"):
        raise InvalidRequest(
            f"The service on port {options.port} runs its own model. Leave --model and --precision out, "
            "or leave --port out to start another service."
        )
    return contextlib.nullcontext(options.port)


@contextlib.contextmanager
def _new_service(options: argparse.Namespace) -> Iterator[int]:
    from .service import serve

    with serve(options.model, options.precision, port=0) as service:
        yield service.port


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options. Raise `SystemExit` for a wrong option and after ``--help``."""
    try:
        options, others = _parser().parse_known_args(arguments)
        if others:
            fix = "Put the question in quotes. " if options.command is ask else ""
            options.error(f"unrecognized arguments: {' '.join(others)}. {fix}--help lists the options.")
        if options.command is serve:
            try:
                options.engine_args = EngineArgs.from_namespace(options)
            except InvalidRequest as error:
                options.error(str(error))
    except SystemExit as ended:
        write("", sys.stdout, end="")  # raises if --help cannot be written
        if ended.code and any(word.startswith("-") and not _OPTION.fullmatch(word) for word in arguments):
            write("If a text begins with a dash, write it after --, or as --option=text.", sys.stderr)
        raise
    return options


_OPTION = re.compile(r"-h?|--[a-z-]*(=\S*)?")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m helpers", description="Run a chat model on this machine: check, ask, chat, serve, gateway."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", default="auto", help=f"a Hub id, a folder or {BUNDLED} (default: the best that fits)")
    model.add_argument("--precision", default="auto", help=f"one of auto (the best that fits), {', '.join(PRECISIONS)}")

    request = argparse.ArgumentParser(add_help=False, parents=[model])
    request.add_argument(
        "--system",
        type=_checked(str, lambda value: check_argument(value, "The system prompt")),
        default=SYSTEM_PROMPT,
        help='the system prompt; "" sends none (default: the article\'s)',
    )
    request.add_argument(
        "--max-tokens",
        type=_checked(int, lambda value: SamplingParams(max_tokens=value)),
        default=SamplingParams.max_tokens,
        help="the maximum number of tokens in an answer (default: %(default)s)",
    )
    request.add_argument(
        "--temperature",
        type=_checked(float, lambda value: SamplingParams(temperature=value)),
        default=SamplingParams.temperature,
        help="from 0 (always the most likely token) to 2 (default: %(default)s)",
    )
    request.add_argument("--port", type=_checked(int, check_port), help="of a running service (default: start one)")

    def add(command: Any, *, parents: list[argparse.ArgumentParser], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(command.__name__, parents=parents, help=help, description=command.__doc__)
        added.set_defaults(command=command, error=added.error)
        return added

    add(check, parents=[], help="print which model can run here, and why")
    one = add(ask, parents=[request], help="stream the answer to one question")
    one.add_argument(
        "question", nargs="?", help="- reads it from stdin (default: the piped text, or the article's question)"
    )
    add(chat, parents=[request], help="chat in the terminal")

    public = argparse.ArgumentParser(add_help=False)
    GatewayArgs.add_to(public)

    service = add(serve, parents=[model, public], help="run a service")
    service.add_argument("--host", default=HOST, help="the address to listen on; 0.0.0.0 is every network")
    service.add_argument("--port", type=int, default=PORT, help="0 takes any free port (default: %(default)s)")
    service.add_argument(
        "--grace",
        type=float,
        default=GRACE,
        metavar="SECONDS",
        help="how long running answers may take when the service stops (default: %(default)s)",
    )
    EngineArgs.add_to(service)
    service.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="run N services behind one gateway (default: %(default)s)"
    )
    service.add_argument("--http", metavar="[HOST:]PORT", help="run a gateway too, with OpenAI's HTTP API")
    service.add_argument("--log", type=Path, help=argparse.SUPPRESS)

    http = add(gateway, parents=[public], help="run OpenAI's HTTP API in front of a service")
    http.add_argument(
        "--service",
        action="append",
        metavar="HOST:PORT|URL",
        help="a service, or a server with OpenAI's API, such as http://127.0.0.1:8001/v1; may be given several times, "
        f"or name several services at once (default: {HOST}:{PORT})",
    )
    http.add_argument(
        "--service-model", metavar="ID", help="the model to use, if a server with OpenAI's API lists several"
    )
    http.add_argument("--host", default=HOST, help="the address to listen on; 0.0.0.0 is every network")
    http.add_argument("--port", type=int, default=8000, help="0 takes any free port (default: %(default)s)")
    for one in (service, http):
        one.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    return parser


def _checked(convert: Callable[[str], Any], check: Callable[[Any], object]) -> Callable[[str], Any]:
    """Return an argparse type that converts an option's text, and reports what `check` raises as the option's error."""

    def parse(text: str) -> Any:
        value = convert(text)
        try:
            check(value)
        except InvalidRequest as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    parse.__name__ = convert.__name__  # argparse says "invalid int value"
    return parse


if __name__ == "__main__":
    if is_notebook():  # `%run -m helpers`: a kernel shows SystemExit as a traceback
        with contextlib.suppress(SystemExit):
            main()
    else:
        sys.exit(main())
