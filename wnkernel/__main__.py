"""``python -m wnkernel`` prints :func:`wnkernel.info` as JSON."""

import json

from . import info

print(json.dumps(info(), indent=2))
