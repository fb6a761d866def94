"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

KeyFile = Annotated[
    str | None,
    typer.Option(
        "--signing-key-file",
        metavar="FILE",
        envvar="SPOT_SIGNING_KEY_FILE",
        help="Keys, one a line, one of which must have signed the manifests. Or SPOT_SIGNING_KEY.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines: units in the names, keys stay.")]
