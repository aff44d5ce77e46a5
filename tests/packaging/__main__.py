"""``make dist``: the wheel and the source distribution in dist/, and proof that they can be released.

Builds both twice and compares the bytes, checks the metadata as an index would, installs the wheel with
each extra into an environment of its own, and runs its commands there. Writes the list of what the wheel
installs (CycloneDX) beside the distributions.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from email.parser import BytesParser
from pathlib import Path
from typing import Final
from zipfile import ZipFile

from packaging.metadata import Metadata

from tests.packaging.distributions import NAME, PROJECT, ROOT, build

DIST: Final = ROOT / "dist"
_EXTRAS: Final = ("", "syncd", "kong-pdk", "postgres", "notify", "all")
_COMMANDS: Final = {
    "": (("openmeter-plugin", "--version"), ("openmeter-plugin", "info"), ("syncd", "sandbox", "--help")),
    "syncd": (("syncd", "--version"), ("syncd", "plan", "--help"), ("openmeter-plugin", "--help")),
    "kong-pdk": (("openmeter-plugin", "pdk-dir"), ("kong-python-pluginserver", "--help")),
    "postgres": (("syncd", "--version"),),
    "notify": (("syncd", "--version"),),
    "all": (("openmeter-plugin", "pdk-dir"), ("syncd", "--help")),
}
"""Commands that must end with 0, by extra."""


class UnfitError(Exception):
    """The distributions cannot be released; says why."""


def main() -> int:
    """Build and check; returns the exit status."""
    shutil.rmtree(DIST, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            _check(Path(scratch))
    except UnfitError as error:
        print(f"make dist: {error}", file=sys.stderr)
        return 1
    return 0


def _check(scratch: Path) -> None:
    built = build(ROOT, DIST, "wheel", "sdist")
    again = build(ROOT, scratch / "again", "wheel", "sdist")
    for kind, path in built.items():
        if not filecmp.cmp(path, again[kind], shallow=False):
            raise UnfitError(f"two builds of the {kind} differ")
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes, the same in two builds")
    metadata = checked_metadata(built["wheel"])
    print(f"metadata of {metadata.name} {metadata.version}: valid")
    for extra in _EXTRAS:
        folder = _installed(scratch / f"with-{extra or 'nothing'}", built["wheel"], extra)
        for command in _COMMANDS[extra]:
            _run([str(folder / "bin" / command[0]), *command[1:]])
        listed = json.loads(_run([str(folder / "bin" / "python"), "-m", "pip", "list", "--format=json"]))
        print(f"{_requirement(extra)}: {len(listed) - 3} packages, {len(_COMMANDS[extra])} commands ran")
    bill = DIST / f"{built['wheel'].name.removesuffix('.whl')}.cdx.json"
    _write_sbom(scratch / "with-all", bill)
    components = len(json.loads(bill.read_text())["components"])
    print(f"{bill.relative_to(ROOT)}: {components} components")


def checked_metadata(wheel: Path) -> Metadata:
    """Return the metadata of a wheel, as strictly read as an index does; raises UnfitError."""
    with ZipFile(wheel) as archive:
        (name,) = [path for path in archive.namelist() if path.endswith(".dist-info/METADATA")]
        text = archive.read(name)
    try:
        metadata = Metadata.from_email(text, validate=True)
    except ExceptionGroup as error:
        raise UnfitError("; ".join(str(problem) for problem in error.exceptions)) from None
    declared = set(PROJECT["project"]["optional-dependencies"])
    if (found := set(BytesParser().parsebytes(text).get_all("Provides-Extra") or ())) != declared:
        raise UnfitError(f"the wheel offers the extras {sorted(found)}, pyproject.toml {sorted(declared)}")
    return metadata


def _requirement(extra: str) -> str:
    return f"{NAME}[{extra}]" if extra else NAME


def _installed(folder: Path, wheel: Path, extra: str) -> Path:
    """Install the wheel from its file and the rest from the index, pinned as in CI."""
    venv.EnvBuilder(with_pip=True).create(folder)
    constraints = ROOT / ".ci" / "constraints.txt"
    asked = f"{wheel}[{extra}]" if extra else str(wheel)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _run([*pip, "install", "--constraint", str(constraints), asked])
    _run([*pip, "check"])
    return folder


def _write_sbom(environment: Path, target: Path) -> None:
    """List what an environment has, without serial number and time: the same packages give the same file."""
    tool = Path(sys.executable).parent / "cyclonedx-py"
    python = environment / "bin" / "python"
    bill = json.loads(_run([str(tool), "environment", "--output-reproducible", str(python)]))
    for component in bill["components"]:  # the wheel was installed from a file of this machine
        links = component.get("externalReferences", [])
        component["externalReferences"] = [one for one in links if not one["url"].startswith("file:")]
    target.write_text(json.dumps(bill, indent=2) + "\n")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise UnfitError(f"{' '.join(command)} ended with {done.returncode}: {said[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
