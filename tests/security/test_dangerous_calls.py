"""No code of ours unpickles, evaluates, or lets a model or a tenant bring code along: read from the syntax trees."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.security

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for top in ("server", "scheduler", "kernels", "clients", "benchmarks")
    for path in (ROOT / top).rglob("*.py")
    if ".venv" not in path.parts
)

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "zmq"}
BARE_CALLS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "os.system",
    "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "PeftConfig.from_pretrained", "numpy.fromfile",
    "ctypes.CDLL",
}  # fmt: skip
# Libraries that are part of the process already, at places that nobody outside can choose; once each.
ALLOWED = {
    ("server/engine/containment.py", "ctypes.CDLL"): "glibc's malloc_trim, after memory ran out",
    ("server/engine/cores.py", "ctypes.CDLL"): "the size of an OpenMP team, in the library that torch is linked with",
}
METHODS = {"recv_pyobj", "send_pyobj", "read_pickle", "to_pickle"}
KEYWORDS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def dotted(node):
    """`torch.load` for the expression torch.load; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def faults(source):
    """(line, what) of everything that must not be in our sources."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            if module.split(".")[0] in MODULES or names & CALLS:
                yield node.lineno, module
        elif isinstance(node, ast.Attribute) and (dotted(node) in CALLS or node.attr in METHODS):
            yield node.lineno, dotted(node) or node.attr
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BARE_CALLS:
                yield node.lineno, node.func.id
            for keyword in node.keywords:
                if keyword.arg in KEYWORDS and not safe(keyword):
                    yield keyword.value.lineno, f"{keyword.arg}="
        elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "allow_pickle"):
            yield node.lineno, f"the key {node.value!r}"


def safe(keyword):
    """Only the harmless constant is: a variable could be anything."""
    return isinstance(keyword.value, ast.Constant) and keyword.value.value is (not KEYWORDS[keyword.arg])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_file_is_free_of_them(path):
    name = str(path.relative_to(ROOT))
    found = [call for _, call in faults(path.read_text("utf-8"))]
    assert sorted(found) == sorted(call for file, call in ALLOWED if file == name)


def test_every_source_is_read():
    assert len(SOURCES) > 60 and ROOT / "server" / "app.py" in SOURCES


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import pickle as p", "from pickle import loads", "import torch\ntorch.load('x')",
        "from torch import load", "f = torch.load", "socket.recv_pyobj()", "eval('1')", "exec(code)",
        "__import__('os')",
        "run('ls', shell=True)", "run('ls', shell=flag)", "load(x, trust_remote_code=True)",
        "load(x, trust_remote_code=f)",
        "load(x, **{'trust_remote_code': True})", "np.load(f, allow_pickle=True)", "yaml.load(f)", "os.system('ls')",
        "x(weights_only=False)",
    ],
)  # fmt: skip
def test_the_lint_sees_what_it_should(source):
    assert list(faults(source))


@pytest.mark.parametrize(
    "source", ["model.eval()", "re.compile('x')", "load(x, trust_remote_code=False)", "run(['ls'], shell=False)"]
)
def test_the_lint_lets_the_rest_pass(source):
    assert not list(faults(source))


def test_no_check_stands_in_an_assert():
    """`python -O` removes asserts; what guards tenants must not go with them."""
    guarded = ("api", "gateway", "store", "tenancy", "data", "wire")
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        if path.is_relative_to(ROOT / "server") and path.relative_to(ROOT / "server").parts[0] in guarded
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert found == []
