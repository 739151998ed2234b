"""``python -m wnkernel`` is the command line; without arguments it prints :func:`wnkernel.info` as
JSON, whatever is installed."""

import json
import sys

from . import info
from .cli import main

if len(sys.argv) > 1:
    main()
else:
    print(json.dumps(info(), indent=2))
