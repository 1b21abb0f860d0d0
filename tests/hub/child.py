"""A process whose Hub is a server of the test: runs commands and Python, a JSON object a line, an answer each."""

import contextlib
import io
import json
import os
import sys

from sae_dist.cli.main import main
from sae_dist.config import UserError

for request in map(json.loads, sys.stdin):
    os.environ.update(request.get("environment", {}))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(request["command"]) if "command" in request else exec(request["code"], {}) or 0
        except UserError as error:
            code = f"UserError: {error}"
    print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}), flush=True)
