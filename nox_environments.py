"""The virtual environments that nox builds and shares, and how a command runs in one; see noxfile.py."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nox.command import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    import nox

ROOT = Path(__file__).parent
PACKAGES = ("rdt-core", "rdt-megatron", "rdt-vllm", "rdt-sglang")
ENVIRONMENTS = ROOT / ".nox"
CONSTRAINTS = ROOT / "tests" / "constraints"

# The only index that carries CPU builds of torch under the `+cpu` version we pin.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Nothing that a session runs asks the network for a model or reports its use; a hung test is ended.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTEST_TIMEOUT": "300",
}

BESIDE_TIMEOUT_S = 600.0


def has_python(version: str) -> bool:
    """Whether the interpreter of this version runs."""
    if not shutil.which(f"python{version}"):
        return False
    # A version manager may put one on PATH that only says it is not installed.
    probe = subprocess.run([f"python{version}", "-c", ""], capture_output=True, check=False, timeout=30)
    return probe.returncode == 0


def choose_torch_python() -> str | None:
    """The interpreter for the torch environments: 3.11, as pinned, or None for the running one."""
    return "3.11" if sys.version_info[:2] != (3, 11) and has_python("3.11") else None


TORCH_PYTHON = choose_torch_python()
TORCH_PYTHON_VERSION = TORCH_PYTHON or f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Environment:
    """A shared virtual environment: its session, the lists that together name all it holds, local extras."""

    session: str
    requirements: tuple[Path, ...]
    local: tuple[Path, ...] = ()
    python: str = TORCH_PYTHON_VERSION

    @property
    def folder(self) -> Path:
        """The virtual environment."""
        return ENVIRONMENTS / self.session

    @property
    def python_path(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """Where the fingerprint lies once the environment is complete."""
        return self.folder / "rdt-fingerprint"

    @property
    def torch_pin(self) -> str:
        """The line of the requirements that names torch."""
        lines = [line for file in self.requirements for line in file.read_text().splitlines()]
        return next(line for line in lines if line.startswith("torch=="))

    def fingerprint(self) -> str:
        """A hash of all that decides what the built environment holds."""
        sources = [file for folder in self.local for file in list_sources(folder)]
        return hash_files(*self.requirements, *sources, seed=self.python)

    def is_built(self) -> bool:
        """Whether the environment on disk is complete and what the requirements ask for now."""
        return read_stamp(self.stamp) == self.fingerprint()


def list_sources(folder: Path) -> list[Path]:
    """What a local distribution is built from."""
    return [folder / "pyproject.toml", *sorted(folder.rglob("*.py"))]


def hash_files(*files: Path, seed: str = "") -> str:
    """A hash of the contents of the files."""
    digest = hashlib.sha256(seed.encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read_stamp(stamp: Path) -> str | None:
    """What the stamp holds; None where there is none."""
    return stamp.read_text() if stamp.is_file() else None


STAND_INS = ROOT / "tests" / "environments"
TORCH = Environment("env-torch", (CONSTRAINTS / "torch-cpu.txt",))
MEGATRON = Environment("env-megatron", (CONSTRAINTS / "torch-cpu.txt", CONSTRAINTS / "megatron-oldest.txt"))
# Its wheels begin at Python 3.12.
MEGATRON_LATEST = Environment(
    "env-megatron-latest",
    (CONSTRAINTS / "torch-cpu.txt", CONSTRAINTS / "megatron-latest.txt"),
    python="3.12",
)
RAY_DASHBOARD = Environment(
    "env-ray-dashboard", (CONSTRAINTS / "torch-cpu.txt", CONSTRAINTS / "ray-dashboard.txt")
)
VLLM = Environment("env-vllm", (CONSTRAINTS / "vllm-latest.txt",), (STAND_INS / "vllm-cpu-shim",))
SGLANG = Environment(
    "env-sglang",
    (CONSTRAINTS / "sglang-latest.txt",),
    (STAND_INS / "sglang-cpu-stubs", STAND_INS / "sglang-cpu-platform"),
)


def build_environment(session: nox.Session, environment: Environment) -> None:
    """Fill the session's virtual environment, unless its stamp says that it is; install our packages."""
    if Path(session.virtualenv.location) != environment.folder:
        session.error(f"the shared environments are in {ENVIRONMENTS}; run nox without --envdir")
    if environment.is_built():
        names = " and ".join(file.name for file in environment.requirements)
        session.log(f"{environment.session} is up to date with {names}")
    else:
        environment.stamp.unlink(missing_ok=True)
        install_torch(session, environment)
        lists = [argument for file in environment.requirements for argument in ("-r", str(file))]
        session.install("--no-deps", *lists)
        for folder in environment.local:
            session.install("--no-deps", "--no-build-isolation", str(folder))
        refuse_cuda_libraries(session)
        environment.stamp.write_text(environment.fingerprint())
    refresh_ours(session, environment)


def refresh_ours(session: nox.Session, environment: Environment) -> None:
    """Install our packages as editable, again only when their metadata changed: sources are read in place."""
    stamp = environment.folder / "rdt-packages"
    current = hash_files(*(ROOT / "packages" / name / "pyproject.toml" for name in PACKAGES))
    if read_stamp(stamp) != current:
        install_ours(session)
        stamp.write_text(current)


def install_torch(session: nox.Session, environment: Environment) -> None:
    """Install the CPU build of torch from where pip is configured to look, or else from PyTorch's index."""
    pin = environment.torch_pin
    try:
        session.install("--no-deps", pin)
    except CommandFailed:
        session.warn(f"pip's configured indexes have no {pin}; trying {TORCH_CPU_INDEX}")
    else:
        return
    try:
        session.install("--no-deps", "--index-url", TORCH_CPU_INDEX, pin)
    except CommandFailed:
        session.error(
            f"{pin} was found neither where pip is configured to look nor at {TORCH_CPU_INDEX}. Set "
            "PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to a place that has it for this Python "
            f"({environment.python}) and platform."
        )


def refuse_cuda_libraries(session: nox.Session) -> None:
    """End the session when a CUDA library was installed: gigabytes, and not what these sessions test."""
    found = sorted(name for name in list_distributions(session) if name.startswith("nvidia-"))
    if found:
        session.error(f"CUDA libraries were installed into a CPU environment: {', '.join(found)}")


def list_distributions(session: nox.Session, python: str = "python") -> set[str]:
    """Names of the distributions that are installed beside this interpreter."""
    listing = session.run(python, "-m", "pip", "list", "--format=json", silent=True, external=True)
    return {entry["name"].lower().replace("_", "-") for entry in json.loads(str(listing))}


def install_ours(session: nox.Session) -> None:
    """Install our packages as editable, with their entry points and without their dependencies."""
    folders = [argument for name in PACKAGES for argument in ("-e", f"packages/{name}")]
    session.install("--no-deps", "--no-build-isolation", *folders)


def run_in(
    session: nox.Session,
    environment: Environment,
    *arguments: str,
    patience_s: int = 15,
    env: dict[str, str] | None = None,
) -> None:
    """Run this environment's Python. After Ctrl-C the command has ``patience_s`` seconds to clean up."""
    session.run(
        str(environment.python_path),
        *arguments,
        external=True,
        interrupt_timeout=patience_s,
        terminate_timeout=patience_s,
        env={**env_of(environment), **(env or {})},
    )


def env_of(environment: Environment) -> dict[str, str]:
    """The variables of a process that runs in an environment."""
    folder = environment.folder
    path = os.pathsep.join((str(folder / "bin"), os.environ["PATH"]))
    return {**os.environ, **QUIET, "VIRTUAL_ENV": str(folder), "PATH": path}


@contextlib.contextmanager
def beside(session: nox.Session, environment: Environment, *arguments: str) -> Iterator[None]:
    """Run this environment's Python while the body runs; then print what it said, and fail if it failed."""
    command = [str(environment.python_path), *arguments]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=env_of(environment))
        try:
            yield
            process.wait(BESIDE_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
            said.seek(0)
            session.log(f"beside this ran {' '.join(command)}\n{said.read()}")
    if process.returncode != 0:
        session.error(f"{' '.join(command)} failed with exit code {process.returncode}")
