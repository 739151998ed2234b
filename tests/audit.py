"""``python -m tests.audit [...]``: known weaknesses of what is installed, by pip-audit and its
options.

pip-audit succeeds even where it could not look up a single package. Here that is a failure, and
what was not looked up is named (but for what is installed as editable).
"""

from __future__ import annotations

import json
import subprocess
import sys

COMMAND = (sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner", "off")
EDITABLE = "marked as editable"


def main() -> int:
    """Prints what was found; 0 if packages were looked up and none has a known weakness."""
    command = [*COMMAND, "--format", "json", *sys.argv[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        return done.returncode or 1
    packages = json.loads(done.stdout)["dependencies"]
    known = [p for p in packages if "vulns" in p]
    unknown = [p["name"] for p in packages if not p.get("skip_reason", EDITABLE).endswith(EDITABLE)]
    for p in known:
        for weakness in p["vulns"]:
            fixed = ", ".join(weakness["fix_versions"]) or "no version"
            print(f"{p['name']} {p['version']}: {weakness['id']}, mended in {fixed}")
    if unknown:
        print("not looked up:", *unknown)
    print(f"{len(known)} packages were looked up")
    return done.returncode or int(not known)


if __name__ == "__main__":
    sys.exit(main())
