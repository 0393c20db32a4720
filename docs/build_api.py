"""Writes the API reference, a page for every module, from docstrings: make docs, or python docs/build_api.py FOLDER"""

import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed

import pdoc  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# Of launch, whose modules are commands with flags of the same names, only what others call.
CHOSEN = ("eupe_jax/**/*.py", "configs/**/*.py", "convert/**/*.py", "launch/load_any.py")
# A package brings the modules in it, but not where it has an __all__: so all are named, and some come twice. A name
# in an annotation of optax is not defined where pdoc looks for it.
HARMLESS = ("has already been added", "Import of ArrayTree failed")


def modules() -> list[str]:
    """Import paths of everything that gets a page."""
    files = [file for pattern in CHOSEN for file in ROOT.glob(pattern)]
    return sorted(".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files)


def main(folder: str) -> int:
    """Writes the pages; 1 if anything did not resolve, which is printed. Raises what a module raises on import."""
    import eupe_jax

    for name in eupe_jax.__all__:  # pdoc does not ask for names that a module gives only when asked
        setattr(eupe_jax, name, getattr(eupe_jax, name))
    pdoc.render.configure(docformat="google", show_source=False, footer_text="names that stay: docs/api.md")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc(*modules(), output_directory=Path(folder))
    said = dict.fromkeys(str(w.message) for w in caught if "pdoc" in Path(w.filename).parts)
    wrong = [words for words in said if not any(known in words for known in HARMLESS)]
    print("\n".join([*wrong, f"open {Path(folder) / 'index.html'}"]))
    return bool(wrong)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "docs" / "_build")))
