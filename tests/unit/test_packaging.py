"""What a user gets from the four wheels: metadata, entry points, type information, licences."""

from __future__ import annotations

import configparser
import email
import email.message
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="the wheels are built with hatchling, which is not installed here")

ROOT = Path(__file__).parents[2]
PACKAGES = ("rdt-core", "rdt-megatron", "rdt-vllm", "rdt-sglang")
ADAPTERS = PACKAGES[1:]
ENGINE_OWNED = ("torch", "ray", "nixl", "vllm", "sglang", "numpy", "transformers")


@dataclass(frozen=True)
class Wheel:
    metadata: email.message.Message
    entry_points: configparser.ConfigParser
    files: dict[str, bytes]

    @property
    def requirements(self) -> list[str]:
        return self.metadata.get_all("Requires-Dist", [])

    @property
    def plain_requirements(self) -> list[str]:
        """What is installed when the user names no extra."""
        return [line for line in self.requirements if "extra ==" not in line]

    def of_extra(self, name: str) -> list[str]:
        marker = f"; extra == '{name}'"
        return [line.removesuffix(marker) for line in self.requirements if line.endswith(marker)]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Wheel]:
    return {name: build_wheel(name, tmp_path_factory.mktemp(name)) for name in PACKAGES}


def build_wheel(name: str, folder: Path) -> Wheel:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT / "packages" / name, check=True, capture_output=True, timeout=60)
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as opened:
        files = {member: opened.read(member) for member in opened.namelist()}
    (metadata,) = [member for member in files if member.endswith(".dist-info/METADATA")]
    entry_points = configparser.ConfigParser()
    entry_points.read_string(files.get(metadata.replace("METADATA", "entry_points.txt"), b"").decode())
    return Wheel(email.message_from_bytes(files[metadata]), entry_points, files)


def read_version(name: str) -> str:
    """The ``__version__`` that the package's source gives."""
    module = name.replace("-", "_")
    source = (ROOT / "packages" / name / "src" / module / "__init__.py").read_text()
    (line,) = [line for line in source.splitlines() if line.startswith("__version__ = ")]
    return line.removeprefix("__version__ = ").strip('"')


def test_all_packages_have_one_version_and_say_it_at_run_time(wheels: dict[str, Wheel]) -> None:
    released = {name: wheel.metadata["Version"] for name, wheel in wheels.items()}
    assert len(set(released.values())) == 1, released
    assert {name: read_version(name) for name in PACKAGES} == released


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_pins_the_core_of_its_own_version(wheels: dict[str, Wheel], name: str) -> None:
    wheel = wheels[name]
    assert wheel.plain_requirements == [f"rdt-core=={wheel.metadata['Version']}"]


def test_the_core_needs_only_a_wire_format_and_an_http_client(wheels: dict[str, Wheel]) -> None:
    names = {line.split(">")[0].strip() for line in wheels["rdt-core"].plain_requirements}
    assert names == {"msgpack", "httpx"}


@pytest.mark.parametrize("name", PACKAGES)
def test_no_package_moves_what_an_engine_or_a_trainer_has_installed(
    wheels: dict[str, Wheel], name: str
) -> None:
    for requirement in wheels[name].plain_requirements:
        assert not requirement.startswith(ENGINE_OWNED)


@pytest.mark.parametrize("name", PACKAGES)
def test_ray_and_nixl_are_extras_of_every_package(wheels: dict[str, Wheel], name: str) -> None:
    core = wheels["rdt-core"]
    version = core.metadata["Version"]
    for extra in ("ray", "nixl"):
        expected = core.of_extra(extra) if name == "rdt-core" else [f"rdt-core[{extra}]=={version}"]
        assert wheels[name].of_extra(extra) == expected
        assert any(line.startswith(extra) for line in core.of_extra(extra))


@pytest.mark.parametrize(("name", "engine"), [("rdt-vllm", "vllm>=0.26"), ("rdt-sglang", "sglang>=0.5.17")])
def test_the_engine_is_an_extra_of_its_adapter(wheels: dict[str, Wheel], name: str, engine: str) -> None:
    assert wheels[name].of_extra("engine") == [engine]


@pytest.mark.parametrize("name", PACKAGES)
def test_no_extra_is_declared_and_left_empty(wheels: dict[str, Wheel], name: str) -> None:
    for extra in wheels[name].metadata.get_all("Provides-Extra", []):
        assert wheels[name].of_extra(extra), extra


@pytest.mark.parametrize(
    ("name", "group"), [("rdt-vllm", "vllm.general_plugins"), ("rdt-sglang", "sglang.srt.plugins")]
)
def test_an_engine_finds_its_adapter_by_an_entry_point(
    wheels: dict[str, Wheel], name: str, group: str
) -> None:
    module = name.replace("-", "_")
    assert dict(wheels[name].entry_points[group]) == {"rdt": f"{module}.plugin:register"}
    source = wheels[name].files[f"{module}/plugin.py"].decode()
    assert "\ndef register() -> None:" in source


@pytest.mark.parametrize("name", PACKAGES)
def test_type_information_is_shipped(wheels: dict[str, Wheel], name: str) -> None:
    assert f"{name.replace('-', '_')}/py.typed" in wheels[name].files
    assert "Typing :: Typed" in wheels[name].metadata.get_all("Classifier", [])


@pytest.mark.parametrize("name", PACKAGES)
def test_the_licence_is_named_and_shipped(wheels: dict[str, Wheel], name: str) -> None:
    wheel = wheels[name]
    assert wheel.metadata["License-Expression"] == "Apache-2.0"
    shipped = [content for member, content in wheel.files.items() if member.endswith("/licenses/LICENSE")]
    assert shipped == [(ROOT / "LICENSE").read_bytes()]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_module_of_the_source_is_in_the_wheel_and_nothing_else(
    wheels: dict[str, Wheel], name: str
) -> None:
    source = ROOT / "packages" / name / "src"
    modules = [file for file in source.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    expected = {str(path.relative_to(source)) for path in modules}
    shipped = {member for member in wheels[name].files if ".dist-info/" not in member}
    assert shipped == expected


@pytest.mark.parametrize("name", PACKAGES)
def test_the_floor_of_python_is_the_one_that_the_type_checker_assumes(
    wheels: dict[str, Wheel], name: str
) -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert wheels[name].metadata["Requires-Python"] == f">={tools['mypy']['python_version']}"
