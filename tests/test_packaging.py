"""The wheel, the sdist, the editable install and the checkout's root give the same names.

Nothing here uses the network or installs anything: the build backend is called directly, and its
wheels are unpacked into folders that stand first on sys.path.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SOURCES = {"fpsc": "fpsc", "passes": "fpsc/passes", "kernels": "fpsc/kernels"}  # folder -> package
DATA = (
    *("fpsc/py.typed", "fpsc/policy/presets/*.yaml", "fpsc/policy/*.json"),
    *("fpsc/demo/weights/*", "fpsc/demo/tuned/*", "fpsc/evaluate/weights/*"),
    *("fpsc/pages/*.html", "fpsc/pages/*.css"),
    *("fpsc/train/recipes/*.yaml", "fpsc/train/*.json"),
)
BUILD_FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def python(code: str, *arguments: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Run code in a fresh interpreter; `path` goes first on sys.path. Returns what it printed."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def build(kind: str, source: Path, to: Path) -> Path:
    """Call the build backend: kind is `wheel`, `sdist` or `editable`. Returns the file it made."""
    to.mkdir(parents=True, exist_ok=True)
    name = python(
        f"import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))",
        to,
        cwd=source,
    ).splitlines()[-1]
    return to / name


def unpack(archive: Path, to: Path) -> Path:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(to)
        return to
    with tarfile.open(archive) as sdist:
        # Python 3.11 has the filter from 3.11.4 on.
        sdist.extractall(to, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return to / archive.name.removesuffix(".tar.gz")


def wheel_files(wheel: Path) -> list[str]:
    """Files of a wheel without its metadata; one that it holds twice is there twice."""
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


@pytest.fixture(scope="module")
def source(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that no build leaves anything in it or finds an older one."""
    copy = tmp_path_factory.mktemp("source")
    for name in BUILD_FILES:
        shutil.copy(checkout / name, copy / name)
    for folder in SOURCES:
        shutil.copytree(
            checkout / folder,
            copy / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def expected(source: Path) -> list[str]:
    """Every file that an installation must have, by its path there."""
    files = {str(path.relative_to(source)) for pattern in DATA for path in source.glob(pattern)}
    for folder, package in SOURCES.items():
        for path in (source / folder).rglob("*.py"):
            inside = path.relative_to(source / folder)
            if inside.parts[0] not in ("passes", "kernels") or folder != "fpsc":
                files.add(f"{package}/{inside}")
    assert len(files) > 20
    return sorted(files)


@pytest.fixture(scope="module")
def modules(expected: list[str]) -> list[str]:
    """The dotted names of all modules."""
    names = [file.removesuffix(".py").replace("/", ".") for file in expected if file[-3:] == ".py"]
    return [name.removesuffix(".__init__") for name in names]


def test_wheel_has_every_file_once(wheel: Path, expected: list[str]) -> None:
    """A folder that is missing here must be added to [tool.setuptools] packages."""
    assert wheel_files(wheel) == expected


def test_sdist_builds_the_same_wheel(source: Path, expected: list[str], tmp_path: Path) -> None:
    unpacked = unpack(build("sdist", source, tmp_path / "sdist"), tmp_path / "unpacked")
    assert not (unpacked / "fpsc" / "passes").exists()  # symlinks are not followed
    assert wheel_files(build("wheel", unpacked, tmp_path / "wheel")) == expected


def test_symlinks_are_relative(checkout: Path) -> None:
    for name in ("passes", "kernels"):
        assert os.readlink(checkout / "fpsc" / name) == f"../{name}"
        assert not (checkout / name / "__init__.py").exists()


def test_every_import_is_a_declared_dependency(source: Path) -> None:
    distributions = {"ruamel": "ruamel.yaml", "PIL": "pillow", "huggingface_hub": "huggingface-hub"}
    imported = set()
    for folder in SOURCES:
        for path in (source / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    imported.add(node.module.split(".")[0])
    imported -= {"fpsc", *sys.stdlib_module_names}
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    declared = {Requirement(text).name for text in project["dependencies"]}
    extras = project["optional-dependencies"]
    extra = {Requirement(text).name for x in extras if x != "test" for text in extras[x]}
    needed = {distributions.get(name, name) for name in imported}
    assert needed <= declared | extra
    assert extra <= needed
    # Inductor compiles with the first; diffusers reads weights with the other two.
    assert declared - needed <= {"triton"}


# Where each module comes from, without running it (its parents run).
ORIGINS = """
import importlib.util, json, sys
print(json.dumps({n: importlib.util.find_spec(n).origin for n in json.loads(sys.argv[1])}))
"""
# What pip's editable install does. An fpsc that is installed here must not win over it: forget the
# finder of another editable install, and put this one before the finder for sys.path.
EDITABLE = """
import site, sys
for name in [name for name in sys.modules if name.startswith('__editable___fpsc')]:
    del sys.modules[name]
site.addsitedir(sys.argv[2])
sys.meta_path.insert(0, sys.meta_path.pop())
"""


def origins(code: str, names: list[str], *rest: Path, cwd: Path, path: Path | None) -> set[Path]:
    """The files that the modules come from; fails when one is not found."""
    found = json.loads(python(code, json.dumps(names), *rest, cwd=cwd, path=path))
    return {Path(file).resolve() for file in found.values()}


def test_names_of_the_wheel(wheel: Path, modules: list[str], tmp_path: Path) -> None:
    site = unpack(wheel, tmp_path / "site")
    found = origins(ORIGINS, modules, cwd=tmp_path, path=site)
    assert found == {path.resolve() for path in site.rglob("*.py")}


def test_names_of_the_editable_install(
    source: Path, modules: list[str], expected: list[str], tmp_path: Path
) -> None:
    site = unpack(build("editable", source, tmp_path / "wheel"), tmp_path / "site")
    found = origins(EDITABLE + ORIGINS, modules, site, cwd=tmp_path, path=site)
    assert found == {(source / file).resolve() for file in expected if file.endswith(".py")}


def test_names_from_the_root(source: Path, modules: list[str], expected: list[str]) -> None:
    found = origins(ORIGINS, modules, cwd=source, path=None)
    assert found == {(source / file).resolve() for file in expected if file.endswith(".py")}


@pytest.fixture
def other_kernels(tmp_path: Path) -> Path:
    """A folder with an installed package `kernels`, as Hugging Face's is."""
    package = tmp_path / "other" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def get_kernel(): return 'theirs'\n")
    return package.parent


def test_installed_kernels_wins_at_the_root(source: Path, other_kernels: Path) -> None:
    printed = python(
        "import sys; sys.path.append(sys.argv[1]); import kernels, fpsc.kernels.reference; "
        "print(sys.path[0] == '', kernels.get_kernel(), fpsc.kernels.reference.__file__)",
        other_kernels,
        cwd=source,
    )
    assert printed.split() == ["True", "theirs", str(source / "fpsc/kernels/reference.py")]


def test_folder_is_not_mistaken_for_hugging_face_kernels(source: Path) -> None:
    """diffusers looks for an installed `kernels`; the folder at the root is none."""
    printed = python(
        "from importlib import metadata\n"
        "from diffusers.utils import is_kernels_available\n"
        "here = any(d.name == 'kernels' for d in metadata.distributions())\n"
        "print(is_kernels_available() == here)",
        cwd=source,
    )
    assert printed.strip() == "True"


def test_backend_resolves_by_name_alone(wheel: Path, tmp_path: Path) -> None:
    """torch finds `fpsattn` by its entry point and loads it from there, with no import of fpsc."""
    site = unpack(wheel, tmp_path / "site")
    printed = python(
        "import sys, torch._dynamo as dynamo\n"
        "print('fpsattn' in dynamo.list_backends(exclude_tags=()), 'fpsc' in sys.modules)\n"
        "backend = dynamo.lookup_backend('fpsattn')\n"
        "print(callable(backend), sys.modules['fpsc'].__file__)",
        cwd=tmp_path,
        path=site,
    )
    assert printed.split() == ["True", "False", "True", str(site / "fpsc" / "__init__.py")]


def test_command_is_an_entry_point(wheel: Path, tmp_path: Path) -> None:
    site = unpack(wheel, tmp_path / "site")
    printed = python(
        "import importlib.metadata as m, sys\n"
        "found, = m.distributions(name='fpsc', path=[sys.argv[1]])\n"
        "scripts = found.entry_points.select(group='console_scripts', name='fpsc')\n"
        "print(*(s.load()(['--version'], standalone_mode=False) for s in scripts))",
        site,
        cwd=tmp_path,
        path=site,
    )
    assert printed.split()[:2] == ["fpsc", "0.1.0"]
