"""Everything that is run on this project: ``python -m nox`` for all of it, ``python -m nox -l`` for the list.

The large environments are built once each, by a session of their own, and shared by the sessions that
require them: ``env-torch`` (torch, ray, nixl; no engine), ``env-megatron`` (the same with Megatron-core),
``env-vllm`` and ``env-sglang`` (the same with an engine for the CPU and the demo's model). A stamp in the
environment holds a hash of what it was built from, and only a change of that builds it again.
docs/development.md says more.
"""

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

import nox
from nox.command import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

nox.needs_version = ">=2025.10.16"
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"
nox.options.envdir = ".nox"

BESIDE_TIMEOUT_S = 600.0

ROOT = Path(__file__).parent
PACKAGES = ("rdt-core", "rdt-megatron", "rdt-vllm", "rdt-sglang")
ENVIRONMENTS = ROOT / ".nox"
CONSTRAINTS = ROOT / "tests" / "constraints"
TOOLS = CONSTRAINTS / "tools.txt"
SCRIPT_FOLDERS = ("examples/demo", "examples/quick_start", "examples/rl", "benchmarks")
UNIT_PYTHONS = ["3.11", "3.12", "3.13"]

# The only index that carries CPU builds of torch under the `+cpu` version we pin.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# What rdt-core brings when it is installed into an empty environment, and nothing else.
PLAIN_DEPENDENCIES = {
    "msgpack", "httpx", "httpcore", "h11", "anyio", "idna", "certifi", "sniffio", "typing-extensions",
}  # fmt: skip

# Nothing that a session runs asks the network for a model or reports its use; a hung test is ended.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTEST_TIMEOUT": "300",
}


def has_python(version: str) -> bool:
    """Whether the interpreter of this version runs."""
    if not shutil.which(f"python{version}"):
        return False
    # A version manager may put one on PATH that only says it is not installed.
    probe = subprocess.run([f"python{version}", "-c", ""], capture_output=True, check=False, timeout=30)
    return probe.returncode == 0


# Two test files at a time: what is tested here starts processes and waits for them more than it computes.
# A file is never split, so that its tests share their servers and clusters.
TWO_FILES = ("-n", "2", "--dist", "loadfile")


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


def add_environment_session(environment: Environment, purpose: str) -> None:
    """The session that builds a shared environment."""

    def build(session: nox.Session) -> None:
        build_environment(session, environment)

    build.__doc__ = f"Build the environment with {purpose}."
    is_usual = environment.python == TORCH_PYTHON_VERSION
    make_session = nox.session(
        name=environment.session,
        python=TORCH_PYTHON if is_usual else environment.python,
        default=False,
        reuse_venv=environment.is_built(),
    )
    make_session(build)


add_environment_session(TORCH, "torch, ray and nixl that several sessions share")
add_environment_session(MEGATRON, "Megatron-core beside them")
add_environment_session(MEGATRON_LATEST, "the newest Megatron-core, which needs Python 3.12")
add_environment_session(RAY_DASHBOARD, "Ray's dashboard agent")
add_environment_session(VLLM, "vLLM's CPU build")
add_environment_session(SGLANG, "SGLang in plain torch")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    session.install("-c", str(TOOLS), "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="none", requires=["env-torch"])
def typecheck(session: nox.Session) -> None:
    """Check types with mypy, strictly, against the real torch."""
    run_in(session, TORCH, "-m", "mypy", *session.posargs)
    for folder in SCRIPT_FOLDERS:
        run_in(session, TORCH, "-m", "mypy", folder, env={"MYPYPATH": folder})


@nox.session(python=UNIT_PYTHONS)
def unit(session: nox.Session) -> None:
    """Run the unit tests. They need neither torch nor ray; a Python that is not installed is skipped."""
    session.install("-r", str(TOOLS))
    install_ours(session)
    strict = ("-W", "error::ResourceWarning")
    session.run("python", "-m", "pytest", "tests/unit", *TWO_FILES, *strict, *session.posargs, env=QUIET)


@nox.session(venv_backend="none", requires=["env-torch"])
def contract(session: nox.Session) -> None:
    """Run the tests that every transport, exporter and engine must pass alike."""
    chosen = ("-m", "not cuda and not yr")
    # A second process, because NIXL and openYuanrong crash in one. It mostly waits, so it does so beside.
    apart = ("-m", "pytest", "tests/contract", "-m", "yr", *session.posargs)
    with beside(session, TORCH, *apart):
        run_in(session, TORCH, "-m", "pytest", "tests/contract", *TWO_FILES, *chosen, *session.posargs)


@nox.session(venv_backend="none", requires=["env-torch"])
def integration(session: nox.Session) -> None:
    """Run several real processes of ours against each other over Ray and NIXL, on CPU memory."""
    chosen = ("-m", "not cuda")
    run_in(session, TORCH, "-m", "pytest", "tests/integration", *TWO_FILES, *chosen, *session.posargs)


@nox.session(name="integration-megatron", venv_backend="none", requires=["env-megatron"])
def integration_megatron(session: nox.Session) -> None:
    """Export real Megatron-core ranks' live parameters and compare with transformers; CPU, gloo."""
    run_in(session, MEGATRON, "-m", "pytest", "tests/megatron", "-m", "not cuda", *session.posargs)


@nox.session(
    name="integration-megatron-latest",
    venv_backend="none",
    requires=["env-megatron-latest"],
    default=False,
)
def integration_megatron_latest(session: nox.Session) -> None:
    """The same tests with the newest Megatron-core."""
    run_in(session, MEGATRON_LATEST, "-m", "pytest", "tests/megatron", "-m", "not cuda", *session.posargs)


@nox.session(venv_backend="none", requires=["env-torch"])
def faults(session: nox.Session) -> None:
    """Kill, stop and break every party of a sync; docs/reliability.md has the table of it.

    ``-- --all`` runs the whole matrix, half an hour; ``-- --all --record`` writes what it measures.
    """
    apart = ("--ignore", "tests/faults/engines")
    run_in(session, TORCH, "-m", "pytest", "tests/faults", *apart, *session.posargs, patience_s=30)


@nox.session(name="faults-engines", venv_backend="none", requires=["env-vllm", "env-sglang"], default=False)
def faults_engines(session: nox.Session) -> None:
    """The rows of the fault matrix that real vLLM and SGLang servers of two ranks play; an hour."""
    patience = {"OMP_NUM_THREADS": "1", "PYTEST_TIMEOUT": "900", "TORCHDYNAMO_DISABLE": "1"}
    for environment in (VLLM, SGLANG):
        arguments = ("-m", "pytest", "tests/faults/engines", "--all", *session.posargs)
        run_in(session, environment, *arguments, patience_s=30, env=patience)


@nox.session(venv_backend="none", requires=["env-vllm"])
def chaos(session: nox.Session) -> None:
    """Let faults come at random while engines serve and sync every second. Arguments after -- go to it.

    With ``--engines`` that name sglang, its environment is built first.
    """
    arguments = list(session.posargs)
    if any("sglang" in argument for argument in arguments):
        session.run(sys.executable, "-m", "nox", "-s", SGLANG.session, external=True)
        arguments += ["--sglang-python", str(SGLANG.python_path)]
    run_in(session, VLLM, "-m", "tests.chaos", *arguments, patience_s=60)


@nox.session(name="e2e-vllm", venv_backend="none", requires=["env-vllm", "env-megatron"])
def e2e_vllm(session: nox.Session) -> None:
    """Sync weights into real vLLM servers on the CPU, and compare every byte."""
    tests = ("tests/e2e/vllm", "tests/e2e/vllm_families")
    run_in(
        session,
        VLLM,
        *("-m", "pytest", *tests, *TWO_FILES, "-m", "not cuda", *session.posargs),
        patience_s=30,
        env={"RDT_MEGATRON_PYTHON": str(MEGATRON.python_path)},
    )


@nox.session(name="e2e-sglang", venv_backend="none", requires=["env-sglang", "env-megatron"])
def e2e_sglang(session: nox.Session) -> None:
    """Sync weights into real SGLang servers on the CPU, and compare every byte.

    ``-- -m wide`` runs the servers of four schedulers, which take minutes to start on two cores.
    """
    tests = ("tests/e2e/sglang", "tests/e2e/sglang_families")
    # Tests of one server share a process even over files: see the scheduler in tests/e2e/sglang/conftest.py.
    # SGLang compiles nothing on a CPU, and a server takes its time to start on a small machine.
    env = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTEST_TIMEOUT": "600"}
    env["RDT_MEGATRON_PYTHON"] = str(MEGATRON.python_path)
    arguments = (*tests, *TWO_FILES, "-m", "not cuda and not wide", *session.posargs)
    run_in(session, SGLANG, "-m", "pytest", *arguments, patience_s=30, env=env)


@nox.session(venv_backend="none", requires=["env-vllm"])
def demo(session: nox.Session) -> None:
    """Run examples/demo/run.py: a trainer and a vLLM server side by side. Arguments after -- go to it.

    With ``--engine sglang`` or ``--engine vllm,sglang`` among them, SGLang's environment is built first.
    """
    arguments = list(session.posargs)
    if any("sglang" in argument for argument in arguments):
        session.run(sys.executable, "-m", "nox", "-s", SGLANG.session, external=True)
        arguments += ["--sglang-python", str(SGLANG.folder / "bin" / "python")]
    run_in(session, VLLM, "examples/demo/run.py", *arguments, patience_s=30)


@nox.session(venv_backend="none", requires=["env-vllm"])
def examples(session: nox.Session) -> None:
    """Run examples/rl/run.py: an RL loop under torchrun, and AReaL's way through a gateway, on one vLLM."""
    run_in(session, VLLM, "examples/rl/run.py", *session.posargs, patience_s=30)


@nox.session(venv_backend="none", requires=["env-torch"], default=False)
def bench(session: nox.Session) -> None:
    """Run benchmarks/sync.py. Arguments after -- go to it."""
    run_in(session, TORCH, "benchmarks/sync.py", *session.posargs, patience_s=30)


@nox.session(name="ray-metrics", venv_backend="none", requires=["env-ray-dashboard"], default=False)
def ray_metrics(session: nox.Session) -> None:
    """Sync under a Ray with a dashboard, and read the metrics that its agent exports."""
    run_in(session, RAY_DASHBOARD, "-m", "pytest", "tests/ray_dashboard", *session.posargs)


@nox.session(requires=["env-torch"], python=TORCH_PYTHON, default=False)
def fuzz(session: nox.Session) -> None:
    """Feed 100,000 malformed manifests, plans and control messages, and half as many led by coverage.

    Arguments after -- go to the first part: ``--inputs``, ``--seed``.
    """
    run_in(session, TORCH, "-m", "tests.fuzz.run", *session.posargs)
    session.install("--no-deps", "-r", str(CONSTRAINTS / "fuzz.txt"))
    paths = os.pathsep.join((str(ROOT), str(ROOT / "packages" / "rdt-core" / "src")))
    session.run("python", "-m", "tests.fuzz.guided", "--inputs", "50000", env={"PYTHONPATH": paths})


@nox.session(venv_backend="none", requires=["env-torch"], default=False)
def soak(session: nox.Session) -> None:
    """Bring an engine through 1,000 versions and see that no process of the group grows.

    Arguments after -- go to tests/soak/run.py: ``--versions``, ``--out``.
    """
    run_in(session, TORCH, "-m", "tests.soak.run", *session.posargs, patience_s=30)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheels and sdists, and install each package into an empty environment."""
    session.install("-c", str(TOOLS), "build", "hatchling", "virtualenv")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for name in PACKAGES:
        session.run(
            "python", "-m", "build", "--no-isolation", "--outdir", str(dist), f"packages/{name}", silent=True
        )
    for name in PACKAGES:
        check_wheel(session, dist, name)


def check_wheel(session: nox.Session, dist: Path, name: str) -> None:
    """Import a package from its wheel alone, then with its dependencies; refuse any that is not expected."""
    module = name.replace("-", "_")
    wheels = {package: find_wheel(dist, package) for package in ("rdt-core", name)}
    clean = Path(session.create_tmp()) / name
    session.run("python", "-m", "virtualenv", "--quiet", "--clear", str(clean))
    python = str(clean / "bin" / "python")

    def run(*arguments: str) -> None:
        session.run(python, *arguments, external=True)

    before = list_distributions(session, python)
    run("-m", "pip", "install", "--quiet", "--no-deps", str(wheels[name]))
    if name != "rdt-core":
        run("-c", f"import {module}; print({module}.__file__)")
    run("-m", "pip", "install", "--quiet", "-c", str(TOOLS), *map(str, wheels.values()))
    run("-m", "pip", "check")
    run("-c", f"import {module}; print({module}.__version__)")
    run("-c", LOAD_ENTRY_POINTS, name)
    unexpected = list_distributions(session, python) - before - PLAIN_DEPENDENCIES - {"rdt-core", name}
    if unexpected:
        session.error(f"{name} brings {sorted(unexpected)} into an empty environment; expected none of these")


def find_wheel(dist: Path, name: str) -> Path:
    """The one wheel of this package that was just built."""
    (wheel,) = dist.glob(f"{name.replace('-', '_')}-*.whl")
    return wheel


LOAD_ENTRY_POINTS = """
import importlib.metadata, sys
for point in importlib.metadata.distribution(sys.argv[1]).entry_points:
    print(point.group, point.name, point.load())
"""


if __name__ == "__main__":
    nox.main()
