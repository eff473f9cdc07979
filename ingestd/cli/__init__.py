"""The commands; the only place that prints. Results go to stdout, everything else to stderr.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration. A mistake of the user's never shows a traceback.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from ingestd import __version__
from ingestd.cli.checking import check_command
from ingestd.cli.console import complain, err
from ingestd.cli.control import reload_command
from ingestd.cli.db import db_group
from ingestd.cli.demo import demo_command
from ingestd.cli.importing import import_command
from ingestd.cli.journal import journal_group
from ingestd.cli.passwords import hash_password_command
from ingestd.cli.running import run_command
from ingestd.cli.service import service_group
from ingestd.cli.sessions import sessions_group
from ingestd.cli.tail import tail_command
from ingestd.errors import IngestdError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="ingestd")
def commands() -> None:
    """Telemetry from CAN buses and captures into PostgreSQL, with nothing lost on the way."""


for command in (
    run_command, reload_command, tail_command, import_command, check_command, sessions_group, journal_group, db_group,
    service_group, hash_password_command, demo_command,
):  # fmt: skip
    commands.add_command(command)


def main() -> NoReturn:
    """The console script."""
    try:
        sys.exit(commands(standalone_mode=False))  # The code of a command that raises Exit is what click returns.
    except click.exceptions.Abort as end:
        if isinstance(end.__cause__, KeyboardInterrupt):
            err.print("\nstopped; what is stored stays, and the same command goes on from there")
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except IngestdError as error:
        complain(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        sys.exit(1)
    except OSError as error:
        complain(IngestdError(f"the system refused: {error}"))  # a full disk under the output, a folder not ours …
        sys.exit(1)
