"""Nothing that we write or read can execute code; caches and runs are looked at where they are
made: tests/end_to_end/test_surroundings.py, tests/trainer/run/test_run.py."""

import ast
import pickle

import numpy as np

from tests.paths import ROOT
from tests.pickles import pickles_below

CAN_EXECUTE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch"}


def trees():
    paths = list((ROOT / "decant").glob("*.py"))
    for package in ("schemas", "models", "pipelines", "trainer"):
        paths += (ROOT / package).rglob("*.py")
    for path in paths:
        yield path, list(ast.walk(ast.parse(path.read_text("utf-8"))))


def test_nothing_is_imported_that_reads_pickles():
    for path, nodes in trees():
        names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
        names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        assert not {name.split(".")[0] for name in names} & CAN_EXECUTE, path


def test_numpy_never_loads_or_saves_a_pickle():
    found = 0
    for path, nodes in trees():
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            if ast.unparse(call.func) in ("np.load", "np.save", "numpy.load", "numpy.save"):
                found += 1
                given = {k.arg: ast.unparse(k.value) for k in call.keywords}
                assert given.get("allow_pickle") == "False", f"{path}:{call.lineno}"
    assert found >= 2


def test_a_pickle_would_be_found(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / f"{protocol}").write_bytes(pickle.dumps({"a": [1]}, protocol))
    np.savez(tmp_path / "archive.npz", a=np.zeros(1))
    assert len(pickles_below(tmp_path)) == pickle.HIGHEST_PROTOCOL + 2
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "text.json").write_text('{"a": 1}')
    np.save(tmp_path / "plain" / "numbers.npy", np.zeros(3))
    assert pickles_below(tmp_path / "plain") == []
