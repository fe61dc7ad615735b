"""Commands run in this process: any, one that must succeed, and one that must refuse."""

from click.testing import Result
from typer.testing import CliRunner

from raydml.cli import main


def run(*arguments) -> Result:
    """The result of a command; errors that are no exit are raised."""
    result = CliRunner().invoke(main.app, [str(argument) for argument in arguments], prog_name="launch.py")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*arguments) -> Result:
    """The result of a command that succeeds."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments) -> str:
    """What a command prints on stderr that refuses a mistake of the user."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr
