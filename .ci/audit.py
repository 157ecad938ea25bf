"""Known vulnerabilities of what is installed in a folder: fails if there is one.

pip-audit calls packages that it could not look up clean. Here they are counted, and without a
single answer, as on a machine without a network, the check says that it was skipped.
"""

import json
import subprocess
import sys
from importlib.util import find_spec

OF_PYTHON = ("pip", "setuptools")  # they come with a new environment; nothing here needs them


def main(folder: str) -> int:
    if find_spec("pip_audit") is None:
        print("pip-audit: skipped, because it could not be installed")
        return 0
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--timeout", "10"]
    options = ["--format", "json", "--path", folder]
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError):
        packages = []
    packages = [package for package in packages if package["name"] not in OF_PYTHON]
    known = [package for package in packages if "skip_reason" not in package]
    if not known:
        print("pip-audit: skipped, because its database cannot be reached from here")
        return 0
    found = [(package, fault) for package in known for fault in package["vulns"]]
    for package, fault in found:
        fixed = ", ".join(fault["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {fault['id']}, fixed in {fixed}")
    print(f"pip-audit: {len(known)} of {len(packages)} packages looked up, {len(found)} faults")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
