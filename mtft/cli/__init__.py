"""The commands of mtft: parse, call one room, print. Nothing heavy is imported before a command runs.

The rooms' results go to stdout, their progress to stderr, so that `mtft eval ... > scores.json` holds JSON only.
Errors become one block in mtft/__main__.py.
"""

from mtft.cli.fuse import fuse_app
from mtft.cli.main import app
from mtft.cli.merge import merge_command
from mtft.cli.mix import mix_app

app.command("merge")(merge_command)
app.add_typer(mix_app, name="mix")
app.add_typer(fuse_app, name="fuse")

__all__ = ["app"]
