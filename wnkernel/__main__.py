"""``python -m wnkernel`` runs the command line. Without arguments it prints :func:`wnkernel.info`
as JSON, which needs none of the packages of the command line."""

import json
import sys

from . import info
from .cli import main

if len(sys.argv) > 1:
    main()
else:
    print(json.dumps(info(), indent=2))
