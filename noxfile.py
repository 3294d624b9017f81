"""Everything that is run on this project: ``python -m nox`` for all of it, ``python -m nox -l`` for the list.

The large environments are built once each, by a session of their own, and shared by the sessions that
require them: ``env-torch`` (torch, ray, nixl; no engine), ``env-megatron`` (the same with Megatron-core),
``env-vllm`` and ``env-sglang`` (the same with an engine for the CPU and the demo's model). A stamp in the
environment holds a hash of what it was built from, and only a change of that builds it again.
docs/development.md says more.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox

# nox does not look for modules beside this file by itself.
sys.path.insert(0, str(Path(__file__).parent))

from nox_environments import (
    CONSTRAINTS,
    MEGATRON,
    MEGATRON_LATEST,
    PACKAGES,
    QUIET,
    RAY_DASHBOARD,
    ROOT,
    SGLANG,
    TORCH,
    TORCH_PYTHON,
    TORCH_PYTHON_VERSION,
    VLLM,
    Environment,
    beside,
    build_environment,
    install_ours,
    list_distributions,
    run_in,
)

nox.needs_version = ">=2025.10.16"
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"
nox.options.envdir = ".nox"

TOOLS = CONSTRAINTS / "tools.txt"
SCRIPT_FOLDERS = ("examples/demo", "examples/quick_start", "examples/rl", "benchmarks")
UNIT_PYTHONS = ["3.11", "3.12", "3.13"]

# What rdt-core brings when it is installed into an empty environment, and nothing else.
PLAIN_DEPENDENCIES = {
    "msgpack", "httpx", "httpcore", "h11", "anyio", "idna", "certifi", "sniffio", "typing-extensions",
}  # fmt: skip

# Two test files at a time: what is tested here starts processes and waits for them more than it computes.
# A file is never split, so that its tests share their servers and clusters.
TWO_FILES = ("-n", "2", "--dist", "loadfile")


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
