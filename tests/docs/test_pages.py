"""What the pages show is so: commands are read by the real scripts, Python runs, files exist, links lead somewhere."""

import glob
import json
import os
import re
import subprocess
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest

from configs import common
from tests.docs import shell
from tests.docs.pages import ROOT, anchors, blocks, links, pages, prose

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
BLOCKS = [block for page in PAGES.values() for block in blocks(page)]
# Pages that say above such blocks, in words, that nobody ran them.
SAID = {"docs/pods.md": "have not been run by this project", "docs/mobile.md": "are measured on a server's CPU"}
# Checked by a test of their own (C++: tests/convert/test_mobile_page.py; diffs: test_examples.py), or said not to be.
ELSEWHERE = {"cpp": "", "diff": "", "kotlin": "Not compiled here", "swift": "Not compiled here"}
TEXT = ("experts (PEcore-G", "# NAME (from `model`")  # a diagram and a template; others begin with ```text
# Importing these takes seconds (torch, ExecuTorch): here only their flags' names are looked up.
HEAVY = re.compile(r"convert/to_|benchmarks/")
FOLDERS = "eupe_jax|launch|configs|convert|benchmarks|tests|docs"
# Files that docs/extending.md tells the reader to make.
PLACES = {"eupe_jax/models/convmixer.py", "eupe_jax/data/sources/zip_files.py", "eupe_jax/evals/effective_rank.py"}


def is_config(block) -> bool:
    """Lines that belong into a config or onto a command line."""
    return bool(re.match(r"(--)?config\.", block.text))


def commands():
    """(where, [script, argument, ...]) of every script of ours that a page starts, in blocks and in lines of prose."""
    found, wrong = [], []

    def add(where, text, marked, variables):
        try:
            for words in shell.lines(text, variables):
                found.extend((where, command) for command in shell.scripts(words, marked))
        except ValueError as error:
            wrong.append(f"{where}: {error}")

    for name, page in PAGES.items():
        variables: dict[str, str] = {}
        for block in blocks(page):
            if not block.language and shell.is_shell(block.text):
                marked = block.text.startswith(shell.NOT_RUN) or SAID.get(name, "\0") in page.read_text()
                add(block.where, block.text, marked, variables)
            elif not block.language and is_config(block):
                for line in block.text.splitlines():
                    if line.startswith("--config."):
                        add(block.where, f"python launch/train.py --config={shell.RECIPE} {line}", False, {})
        for text in re.findall(r"`((?:python|make|pip) [^`]{1,300})`", re.sub(r"\n(?!\n)", " ", prose(page))):
            add(name, text, False, {})
    return found, wrong


def test_commands_are_what_they_seem():
    found, wrong = commands()
    assert not wrong, "\n".join(wrong)
    assert len(found) > 50, "hardly any command was found: does this test still read the pages?"
    for where, (script, *arguments) in found:
        if HEAVY.match(script):
            source = (ROOT / script).read_text() + (ROOT / "convert" / "cli.py").read_text()
            for flag in re.findall(r"--\w+", " ".join(arguments)):
                assert f'"{flag}"' in source, f"{where}: {script} has no flag {flag}"


def parsed(chosen):
    """Lets the scripts read their command lines; returns what went wrong."""
    chosen = list({json.dumps(command): (where, command) for where, command in chosen}.values())
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.parse_commands"],
        input=json.dumps([command for _, command in chosen]),
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    return [f"{w}: {' '.join(c)}\n  {s}" for (w, c), s in zip(chosen, said, strict=True) if s is not None]


def test_scripts_take_their_command_lines():
    train = ["launch/train.py", f"--config={shell.RECIPE}"]
    bad = [("a", [*train, "--workdr=x"]), ("b", [*train, "--config.sed=1"]), ("c", [*train, "word"])]
    light = [(where, command) for where, command in commands()[0] if not HEAVY.match(command[0])]
    *wrong, first, second, third = parsed([*light, *bad])
    assert not wrong, "\n".join(wrong)
    assert "workdr" in first and "sed" in second and "word" in third, "wrong command lines are not noticed"


@pytest.mark.slow
def test_heavy_scripts_take_their_command_lines():
    wrong = parsed([(where, command) for where, command in commands()[0] if HEAVY.match(command[0])])
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_every_block_is_of_a_known_kind(block):
    if block.language in ELSEWHERE:
        assert ELSEWHERE[block.language] in block.before[-900:], f"{block.where}: say that it is not compiled"
    elif not block.language:
        known = shell.is_shell(block.text) or is_config(block) or block.text.startswith(TEXT)
        assert known, f"{block.where}: neither commands nor fields of a config: begin it with ```text, if it is prose"
    else:
        assert block.language in ("python", "text"), f"{block.where}: nobody checks {block.language!r}"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A folder with a small encoder as the checkpoint of a run, in place of gs://BUCKET."""
    import jax
    from safetensors.numpy import save_file

    from convert import teachers_to_orbax
    from eupe_jax.models import interchange, zoo

    folder = tmp_path_factory.mktemp("bucket")
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 1}
    module, image = zoo.build("eupe_vitb16", **shape), np.zeros((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)
    variables = jax.tree.map(lambda x: np.full(x.shape, 0.01, x.dtype), shapes)
    save_file(interchange.to_state_dict("eupe_vitb16", variables, **shape), folder / "vitb.safetensors")
    teachers_to_orbax.convert("eupe_vitb16", folder / "vitb.safetensors", folder / "stage3_vitb", overrides=shape)
    return folder


def python_blocks():
    for block in BLOCKS:
        if block.language == "python":
            yield block.where, block.text
        elif not block.language and is_config(block):
            lines = [line for line in block.text.splitlines() if line.startswith("config.")]
            if lines:
                yield block.where, "\n".join(lines)


@pytest.mark.parametrize(("where", "text"), list(python_blocks()), ids=lambda value: value if ".md:" in value else "")
def test_python_runs(where, text, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    names = {"config": common.base(), "common": common, "images": np.zeros((2, 32, 32, 3), np.uint8)}
    if "load_encoder" in text:
        text = text.replace("gs://BUCKET", str(request.getfixturevalue("bucket")))
    before = str(names["config"])
    exec(compile(text, where, "exec"), names)
    if "tokens" in names:
        assert {"cls", "storage", "patches"} <= set(names["tokens"])
    else:
        assert str(names["config"]) != before, f"{where}: it changes nothing in the config"


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name):
    missing = []
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./{{}},*-]+)`", prose(PAGES[name])):
        options = re.search(r"{([^{}]*)}", path)
        for choice in options[1].split(",") if options else [""]:
            chosen = path.replace(options[0], choice) if options else path
            if not glob.glob(str(ROOT / chosen)) and chosen not in PLACES:
                missing.append(chosen)
    assert not missing, f"{name} names files that are not there: {missing}"


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    page, wrong = PAGES[name], []
    for line, target in links(page):
        found = urlsplit(target)
        if found.scheme:
            if found.scheme not in ("https", "http") or "." not in found.netloc or found.netloc.endswith("."):
                wrong.append(f"{name}:{line}: {target} is no address")
            continue
        file = (page.parent / found.path).resolve() if found.path else page
        if not file.exists():
            wrong.append(f"{name}:{line}: {target} leads nowhere")
        elif ROOT not in (file, *file.parents):
            wrong.append(f"{name}:{line}: {target} leads out of the repository")
        elif found.fragment and (file.suffix != ".md" or found.fragment not in anchors(file)):
            wrong.append(f"{name}:{line}: {target}: {file.name} has no heading of that name")
    assert not wrong, "\n".join(wrong)


def test_headings_become_anchors(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# int8\n\n## What `it` is, and not\n\n## int8\n\n```\n# no heading\n```\n## A [link](x.md)\n")
    assert anchors(page) == {"int8", "what-it-is-and-not", "int8-1", "a-link"}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python launch/trian.py --config=x", "no such file: launch/trian.py"),
        ("make tset", "no target"),
        ("pip install -e '.[tpus]'", "no extra"),
        ("pip install -r requirement.txt", "no such file"),
        ("gcloud storage ls", "not run by any test"),
        ("pyhton launch/train.py", "unknown command"),
        ("python -m tests.data.fuzz_image", "no module"),
    ],
)
def test_wrong_commands_are_noticed(command, words):
    with pytest.raises(shell.Wrong, match=words):
        [list(shell.scripts(line, False)) for line in shell.lines(command, {})]
