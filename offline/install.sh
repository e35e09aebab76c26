#!/usr/bin/env bash
# Install deca_ds from the wheels beside this script, without a network, beside the torch that this host has.
#
#     bash install.sh FOLDER               makes the virtual environment FOLDER over that of python3
#     PYTHON=/opt/python/bin/python3 bash install.sh FOLDER
#
# The environment sees the packages of $PYTHON, and its own before them. Nothing of $PYTHON's is changed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
folder=${1:-}
fail() { printf 'ERROR: %s\n' "$1" >&2; exit 2; }

[ -n "$folder" ] || fail "name the folder to install into: bash install.sh FOLDER"
[ ! -e "$folder" ] || fail "$folder exists; remove it or name another folder"
wanted=$(cat "$here/python.txt")
actual=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "cannot run $python"
[ "$actual" = "$wanted" ] || fail "this bundle is for Python $wanted, and $python is $actual; set PYTHON, or make a bundle with PYTHON_VERSION=$actual"

"$python" - "$here/host.txt" <<'PY' || exit 2
import sys
from importlib import metadata

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
for line in open(sys.argv[1]):
    requirement = Requirement(line.strip())
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        version = None
    if version is None or not requirement.specifier.contains(version, prereleases=True):
        has = "is not there" if version is None else f"is {version}"
        sys.exit(
            f"ERROR: {sys.executable}: {requirement.name} {has}, and {requirement} is needed\n"
            f"  fix:   install it, or make the bundle with WITH={requirement.name}"
        )
PY

trap 'rm -rf "$folder"' ERR
"$python" -m venv --without-pip "$folder"
"$python" - "$folder" <<'PY'
import sys
import sysconfig
from pathlib import Path

own = Path(sys.argv[1], "lib", "python%d.%d" % sys.version_info[:2], "site-packages")
parents = [path for path in dict.fromkeys(sys.path) if path.endswith(("site-packages", "dist-packages"))]
(own / "beside.pth").write_text("".join(f"{path}\n" for path in parents))
PY
"$python" -m pip --python "$folder/bin/python" install --quiet --no-index --no-deps --ignore-installed \
    --disable-pip-version-check "$here"/wheels/*.whl
"$folder/bin/deca" --version
"$folder/bin/python" -c 'import torch, deca_ds.tools.train; print("torch", torch.__version__, "from", torch.__file__)'
echo "installed; to use it: source $folder/bin/activate"
