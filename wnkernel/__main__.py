"""``python -m wnkernel`` runs the command line. Without arguments it prints :func:`wnkernel.info`
as JSON, which needs none of the packages of the command line."""

import json
import os
import sys

from . import info
from .cli import main
from .cli.errors import NOBODY_READS

if len(sys.argv) > 1:
    main()
else:
    try:
        print(json.dumps(info(), indent=2), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        sys.exit(NOBODY_READS)
