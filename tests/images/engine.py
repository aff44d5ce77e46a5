"""buildah and podman, set up to work as root inside a container: no bridge, no cgroups of their own.

Everything they keep is below .tools/containers. The base image is Debian's own Python, made by debootstrap:
no registry of images is needed. It is for tests only; the Dockerfiles name the public image.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from tests.deploy.files import ROOT

PROGRAMS: Final = ("buildah", "podman", "runc", "catatonit", "debootstrap")
NAMES: Final = ("plugin", "syncd")
BASE: Final = "localhost/kong-openmeter/base"
_PACKAGES: Final = ("ca-certificates", "python3", "python3-pip", "python3-venv")
_SUITE: Final = "bookworm"
_TAKEN_OVER: Final = ("etc/pip.conf", "etc/ssl/certs/ca-certificates.crt")
"""How this machine reaches its package index."""

_CONTAINERS: Final = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
log_driver = "k8s-file"
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
_STORAGE: Final = """
[storage]
driver = "vfs"
graphroot = "{0}/storage"
runroot = "{0}/run"
"""


class EngineError(RuntimeError):
    """A program is missing or failed; says which and why."""


def image(name: str) -> str:
    """Return the name of one of our two images."""
    return f"localhost/kong-openmeter/{name}"


def missing_programs() -> list[str]:
    """Return what has to be installed first."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@dataclass(frozen=True)
class Engine:
    """buildah and podman with a storage of their own."""

    folder: Path = ROOT / ".tools" / "containers"

    @cached_property
    def environment(self) -> dict[str, str]:
        """The variables under which the programs use that storage."""
        self.folder.mkdir(parents=True, exist_ok=True)
        containers, storage = self.folder / "containers.conf", self.folder / "storage.conf"
        containers.write_text(_CONTAINERS)
        storage.write_text(_STORAGE.format(self.folder))
        return os.environ | {"CONTAINERS_CONF": str(containers), "CONTAINERS_STORAGE_CONF": str(storage)}

    def has(self, name: str) -> bool:
        """Return whether an image is there."""
        command = ["podman", "image", "exists", name]
        return subprocess.run(command, env=self.environment, capture_output=True).returncode == 0

    def run(self, *command: str, seconds: float = 120) -> str:
        """Run a program and return what it printed; raises EngineError."""
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=seconds
        )
        if done.returncode:
            said = (done.stdout + done.stderr).strip()[-3000:]
            raise EngineError(f"{' '.join(command)} ended with {done.returncode}: {said}")
        return done.stdout

    def make_base(self) -> None:
        """Make the base image if it is not there."""
        if self.has(BASE):
            return
        with tempfile.TemporaryDirectory(dir=self.folder if self.environment else None) as folder:
            root = Path(folder) / "root"
            packages = f"--include={','.join(_PACKAGES)}"
            self.run("debootstrap", "--variant=minbase", packages, _SUITE, str(root), seconds=900)
            for path in _TAKEN_OVER:
                if (Path("/") / path).is_file():
                    shutil.copyfile(Path("/") / path, root / path)
            for pattern in ("var/cache/apt/archives/*.deb", "var/lib/apt/lists/*"):
                for path_ in root.glob(pattern):
                    shutil.rmtree(path_) if path_.is_dir() else path_.unlink()
            archive = Path(folder) / "root.tar"
            self.run("tar", "--create", "--file", str(archive), "--directory", str(root), ".", seconds=300)
            self.run("podman", "import", "--quiet", str(archive), BASE, seconds=300)

    def build(self, name: str) -> None:
        """Build an image from its Dockerfile, on our base in the place of the public one."""
        self.run(
            *("buildah", "bud", "--isolation", "chroot", "--format", "docker", "--network", "host"),
            *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"),
            *("--from", BASE, "--file", f"{name}/Dockerfile", "--tag", image(name), "."),
            seconds=900,
        )

    def size(self, name: str) -> int:
        """Return the bytes of an image."""
        return int(self.run("podman", "image", "inspect", "--format", "{{.Size}}", name))
