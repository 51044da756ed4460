"""The house: a module imports only from lower floors, and heavy libraries only where they serve."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    "errors ahead tasks origin checksum whole_batch machine yaml_text forking layout muon upsampling",
    "team addresses weights classes geometry files progress contours polygons density staining bootstrap sampling squares",
    "settings memory loss cells database jpeg_tiles outlines label_image stencil shards truth stains objects boundaries",
    "open_regions dask_cluster components halving scan ome_channels mlflow_names config grid cohort ngff store snapshot",
    "slide config_file",
    "cluster processes tissue canvas label_truth augment network dense graph histology folds combinations",
    "architectures tracing fusion normalised annotations pyramid specs calibration froc",
    "openvino_graph footprint fields patches checkpoint metrics phantom",
    "engine openvino_engine training registry assessment tally comparison ensemble scoreboard lineage",
    "runtime prediction regions measurement ome_tiff pictures tracking remembered versions inputs sources assessment_file",
    "blending epoch_log geojson approval folder tile_table contest",
    "stitching",
    "validation exactness probe",
    "precision tiling",
    "trial",
    "finishing slide_job",
    "slide_tasks",
    "segmentation",
    "workspace preloaded",
    "fitting",
]
MODULES = {path.stem for path in (ROOT / "pipeline").glob("[a-z]*.py")}
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
OWNERS = {"openslide": {"scan"}, "lightning_fabric": {"team"}, "mlflow": {"tracking", "served", "store", "registry"}}
OWNERS |= {"openvino": {"openvino_engine", "openvino_graph", "upsampling"}, "nncf": {"openvino_graph"}}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_module_imports_only_from_lower_floors(path: Path) -> None:
    for name in imports(path):
        package, _, rest = name.partition(".")
        assert package != "workflows"
        if package == "pipeline" and (other := rest.partition(".")[0]) in MODULES and path.stem != "served":
            assert FLOOR[other] < FLOOR[path.stem], f"{path.stem} imports {other}"


def test_every_module_stands_on_a_floor_but_what_mlflow_runs() -> None:
    assert set(FLOOR) | {"served"} == MODULES


def test_the_house_names_every_module() -> None:
    house = (ROOT / "CONTRIBUTING.md").read_text().partition("## The house")[2].split("```")[1]
    rows = house.partition("workflows/")[0].splitlines()
    names = [re.split(" {2,}", row.removeprefix("pipeline/").strip())[0] for row in rows]  # then what they are about
    assert {name for row in names for name in row.split()} == MODULES


def lines_of(function: ast.FunctionDef) -> int:
    """How many lines a function has beside its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    docstring = ast.get_docstring(function, clean=False)
    return lines - (0 if docstring is None else len(docstring.split("\n")))


def test_files_and_functions_are_short() -> None:
    """Up to 300 lines, and up to 40 beside the docstring."""
    long = set[str]()
    for path in (path for folder in ("pipeline", "workflows", "benchmarks") for path in (ROOT / folder).glob("*.py")):
        text = path.read_text()
        if len(text.splitlines()) > 300:
            long.add(path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and lines_of(node) > 40:
                long.add(f"{path.name}: {node.name}")
    assert not long


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_workflow_imports_no_other_but_where_it_is_made_of_them(path: Path) -> None:
    others = {name for name in imports(path) if name.startswith("workflows")}
    assert not others or path.stem in ("run", "demo", "crossval", "sweep", "promote", "study_commands")


@pytest.mark.parametrize(("library", "owners"), OWNERS.items())
def test_a_library_has_one_owner(library: str, owners: set[str]) -> None:
    files = [*(ROOT / "pipeline").glob("*.py"), *(ROOT / "workflows").glob("*.py")]
    users = {path.stem for path in files if any(name.split(".")[0] == library for name in imports(path))}
    assert users <= owners


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("workflows.__main__", ["torch", "monai", "mlflow", "distributed", "openslide", "numpy"]),
        ("workflows.segment", ["torch", "monai", "mlflow"]),
        ("workflows.train", ["torch", "monai", "mlflow"]),
        ("workflows.plan", ["torch", "monai", "mlflow"]),
    ],
)
def test_a_command_loads_no_library_that_it_may_not_need(module: str, heavy: list[str]) -> None:
    code = f"import sys, {module}; found = set({heavy}) & set(sys.modules); assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
