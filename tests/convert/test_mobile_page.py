"""What docs/mobile.md shows is so: its C++ compiles against the runtime's headers, its tables name what there is."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "mobile.md").read_text()

# The Python package ships every header that the snippet needs but this one.
MODULE = """
#pragma once
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/result.h>
#include <string>
#include <vector>
namespace executorch::extension {
class Module {
 public:
  enum class LoadMode { File, Mmap, MmapUseMlock, MmapUseMlockIgnoreErrors };
  explicit Module(const std::string& file_path, LoadMode load_mode = LoadMode::File);
  using Values = std::vector<runtime::EValue>;
  [[nodiscard]] runtime::Result<Values> execute(const std::string& method, const Values& inputs);
  [[nodiscard]] runtime::Result<Values> execute(const std::string& method, const runtime::EValue& input);
  [[nodiscard]] runtime::Result<Values> execute(const std::string& method);
};
}
"""


def snippet(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_the_cpp_compiles(tmp_path):
    executorch = pytest.importorskip("executorch", reason="the phone export needs `pip install eupe_jax[export]`")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    include = Path(next(iter(executorch.__path__))) / "include"
    header = tmp_path / "executorch" / "extension" / "module" / "module.h"
    header.parent.mkdir(parents=True)
    header.write_text(MODULE)
    source = tmp_path / "encoder.cpp"
    source.write_text(snippet("cpp"))
    folders = [tmp_path, include, include / "executorch" / "runtime" / "core" / "portable_type" / "c10"]
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    done = subprocess.run(
        [*command, *(f"-I{folder}" for folder in folders), source], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "encoder.cpp" not in done.stderr, done.stderr


def test_every_constant_method_is_explained():
    pytest.importorskip("torch")
    from convert import contract

    section = PAGE.split("## Preprocessing contract")[1].split("\n## ")[0]
    for name in (*contract.INSIDE, "methods", "resolution"):
        assert f"`{name}`" in section, name


@pytest.mark.parametrize("language", ["kotlin", "swift", "cpp"])
def test_code_asks_only_for_constants_that_there_are(language):
    pytest.importorskip("torch")
    from convert import contract

    asked = set(re.findall(r'(?:module\.execute|constant|call)\("(\w+)"\)', snippet(language)))
    assert {"mean", "std", "methods", "resolution", "outputs", "input_dtype"} == asked
    assert asked <= {*contract.INSIDE, "methods", "resolution"}
