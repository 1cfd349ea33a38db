"""The command line: ``glm52 COMMAND``. Importing it stays cheap; a command's
module is imported when that command is run."""

import argparse
import importlib
import logging
import os
import sys
from typing import NoReturn

from glm52 import __version__
from glm52.errors import GLMError, RequestError

_COMMANDS = {
    "chat": ("glm52.terminal", "talk to a model in the terminal"),
    "serve": ("glm52.server.command", "serve a model over HTTP, for clients of OpenAI, Anthropic and Z.ai"),
    "inspect": ("glm52.inspect", "what a configuration or checkpoint is, weighs and costs"),
    "train": ("glm52.train.command", "run a training recipe, or resume it"),
    "data": ("glm52.train.build", "build training data: tokenizer and token shards"),
    "launch": ("glm52.launch", "print or run the command that starts vLLM or SGLang for GLM-5.2"),
    "agent-check": ("glm52.clients.check", "run real clients against the server and print what works"),
    "eval": ("glm52.evaluate", "score a model on held-out tasks and text"),
}


class _Lines(logging.Formatter):
    """The log of requests is JSON and stands alone."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.name == "glm52.requests" else super().format(record)


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line, without the list of all options above it."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Run a command -> exit code: 0 done, 1 failed, 2 asked wrongly, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    named = next((a for a in argv if not a.startswith("-")), None)
    level = os.environ.get("GLM52_LOG", "warning").upper()
    try:
        return _run(argv, named, level)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (GLMError, OSError, MemoryError) as error:
        if level == "DEBUG":
            raise
        name = f"glm52 {named}" if named in _COMMANDS else "glm52"
        print(f"{name}: {'memory ran out' if isinstance(error, MemoryError) else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str], named: str | None, level: str) -> int:
    for at, argument in enumerate(argv):
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{' '.join(argv[max(at - 1, 0) : at + 1])!a}: expected text in UTF-8") from error
    parser = _Parser(prog="glm52", description="GLM-5.2: run, serve, explain and train it.")
    parser.add_argument("--version", action="version", version=f"glm52 {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == named:
            importlib.import_module(module).add_arguments(command)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        prog = " ".join(filter(None, ("glm52", args.command)))
        raise RequestError(f"unrecognized arguments: {' '.join(unknown)}; see {prog} --help")
    if args.command is None:
        parser.print_help()
        return 0
    if level not in logging.getLevelNamesMapping():
        raise RequestError(f"GLM52_LOG: expected debug, info, warning or error, found {level.lower()}")
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    return int(importlib.import_module(_COMMANDS[args.command][0]).run(args))


if __name__ == "__main__":
    sys.exit(main())
