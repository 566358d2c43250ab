"""How the command line speaks: results on standard output, all else on standard error behind its name.

mdadm prints every message as `mdadm: ...` on standard error and only pages such as -D on standard output; so
does this. With --json there is one JSON object on standard output, also for a refusal.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from clustermd.errors import Refused

PROGRAM = "clustermd"
SCHEMA = 1


def say(message: str) -> None:
    """One message for a person."""
    print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A part of the result, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show_json(**content: Any) -> None:
    """The result for programs: one object with the schema's number."""
    show(json.dumps({"schema": SCHEMA, **content}, indent=2, default=str) + "\n")


def show_refusal(refusal: Refused, as_json: bool) -> None:
    say(refusal.message)
    if as_json:
        show_json(error={"code": refusal.code, "message": refusal.message, "data": refusal.data})
